"""The whole model through the kernels: the original's numbers, and compiled as one graph."""

import pytest
import test_golden
import torch
from helpers import small_clips, small_config
from torch.utils.flop_counter import FlopCounterMode

import mar_fast
from mar_fast import cost, kernels, masking
from mar_fast.kernels.jit.launch import LaunchConfig, forced

pytestmark = pytest.mark.interpreter

# The interpreter's time goes by the number of tiles. That tiles fit together is for the tests of each kernel to show.
LARGE_TILES = {
    **dict.fromkeys(("attention_forward", "attention_backward_query", "attention_backward_key_value"), (512, 512, 64)),
    **dict.fromkeys(("add_layer_norm_forward", "add_layer_norm_backward"), (256, 0, 0)),
    **dict.fromkeys(("bias_gelu_forward", "bias_gelu_backward"), (512, 512, 0)),
    **dict.fromkeys(("scatter_tokens_forward", "scatter_tokens_backward"), (512, 512, 0)),
    **dict.fromkeys(("masked_patch_loss_forward", "masked_patch_loss_backward"), (128, 0, 0)),
    "gather_patch_embed_forward": (512, 128, 512),
    "gather_tubelets": (512, 2048, 0),
}


@pytest.fixture(autouse=True)
def large_tiles():
    with forced({name: LaunchConfig(*blocks) for name, blocks in LARGE_TILES.items()}):
        yield


@pytest.mark.parametrize("percent", [50, 75])
def test_eval(percent):
    test_golden.run_eval.cache_clear()
    test_golden.test_eval("model", percent)


def test_train():
    """Values, target and the norm of every gradient."""
    test_golden.run_train.cache_clear()
    test_golden.test_train_values("model")
    test_golden.test_kernel_target()
    test_golden.test_gradient_norms("model")


def step(model, clip, mask):
    """Logits and gradients of one training step."""
    model.zero_grad()
    out = model(clip, mask, reconstruct=True)
    mar_fast.mar_loss(out, torch.tensor([3, 5]), reconstruction_weight=0.1).backward()
    return out.logits.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("training", [False, True])
def test_flop_counter_sees_the_kernels(training):
    """PyTorch's counter gives the same for the kernels as for the formulas; backward recomputes the scores besides."""
    config = small_config()
    model = mar_fast.MAR(config).train(training)
    clip = small_clips()
    mask = masking.random(2, config.grid, 0.5)
    with FlopCounterMode(display=False) as counter:
        if training:
            step(model, clip, mask)
        else:
            model(clip, mask)
    count = cost.count(config, batch=2, reconstruct=training, training=training)
    attention = sum(part.multiply_adds for part in count.parts if part.name.endswith(".attention"))
    # Backward is 2.5 times the forward pass, and not twice.
    expected = count.multiply_adds + (attention / 6 if training else 0)
    assert counter.get_total_flops() / 2 == pytest.approx(expected, rel=5e-3)


@pytest.mark.compiles
def test_compiled():
    """torch.compile finds no graph break, and eager and compiled agree, forward and backward."""
    config = small_config()
    model = mar_fast.MAR(config).eval()
    clip = small_clips()
    mask = masking.random(2, config.grid, 0.5)
    torch.compiler.reset()
    logits, gradients = step(model, clip, mask)
    compiled_logits, compiled_gradients = step(torch.compile(model, fullgraph=True), clip, mask)
    torch.testing.assert_close(compiled_logits, logits, rtol=1e-4, atol=1e-5)
    for name, gradient in compiled_gradients.items():
        name = name.removeprefix("_orig_mod.")
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-3, atol=1e-5)


def test_flop_counter_reads_ragged_lengths():
    qkv = torch.randn(20, 3, 2, 16, requires_grad=True)
    offsets = torch.tensor([0, 3, 3, 20])
    with FlopCounterMode(display=False) as counter:
        kernels.attention_varlen(qkv, offsets, 17).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * (3**2 + 17**2) * 2 * 16

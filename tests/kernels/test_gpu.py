"""On a GPU, at the sizes of real models: make gpu. The truth is plain PyTorch in float64, which test_ops.py proves."""

import functools
import gc

import oracle
import pytest
import torch
from helpers import relative, small_config
from op_cases import every_dtype

import mar_fast
from mar_fast import kernels, masking
from mar_fast.bench import op_cases as suite_cases
from mar_fast.config import IMAGENET_MEAN, IMAGENET_STD
from mar_fast.kernels import use_backend
from mar_fast.kernels.jit.launch import LaunchConfig, forced

pytestmark = pytest.mark.gpu

every_visible = pytest.mark.parametrize("visible", [392, 784, 1568])
WIDTHS = {"base": 768, "large": 1024}
NORMALISE = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD)
PATCH, CUDA = (2, 16, 16), torch.device("cuda")
# As in test_ops.py: what a softmax made anew from its log-sum-exp loses in float32; here 3 x TF32 comes on top.
FLOOR = {torch.float32: 32}


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, device="cuda").to(dtype)


def make_clip(batch, dtype, channels_last=False):
    shape = (batch, 16, 224, 224, 3) if channels_last else (batch, 3, 16, 224, 224)
    if dtype == torch.uint8:
        clip = torch.randint(256, shape, dtype=dtype, device="cuda")
    else:
        clip = random(*shape, dtype=dtype)
    return clip.permute(0, 4, 1, 2, 3) if channels_last else clip


# Operands of the suites' calls, with the clip or the bias of a test.


def gather_operands(dtype, visible, width=768, batch=4, video=None, channels_last=False):
    operands = suite_cases.gather_patch_embed(CUDA, dtype, batch, visible, width, torch.uint8).operands()
    return operands | dict(video=make_clip(batch, video or dtype, channels_last))


def attention_operands(dtype, visible, heads=12, size=64, batch=2):
    return suite_cases.attention(CUDA, dtype, batch, visible, heads, size).operands()


def kvpacked_operands(dtype, visible, heads=6, size=64, batch=2):
    operands = suite_cases.attention_kvpacked(CUDA, dtype, batch, visible, 1568, heads, size).operands()
    return operands | dict(bias=random(3, heads, size))


def varlen_operands(dtype, lengths=(784, 1, 0, 392, 1568, 130), heads=12, size=64):
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    qkv = random(sum(lengths), 3, heads, size, dtype=dtype)
    return dict(qkv=qkv, cu_seqlens=offsets, max_seqlen=max(lengths))


def norm_operands(dtype, visible, width=768, batch=4):
    x, residual = (random(batch, visible, width, dtype=dtype) + 1 for _ in range(2))
    weight, bias, layer_scale, x_bias = (random(width, dtype=dtype) + 1 for _ in range(4))
    # The gradient of row_scale, a sum over a clip, is beyond float16's range.
    scale_dtype = torch.float32 if dtype == torch.float16 else dtype
    row_scale = torch.tensor([1.25, 0.0, 2.5, 1.0], device="cuda")[:batch].to(scale_dtype)
    factors = dict(layer_scale=layer_scale, row_scale=row_scale, x_bias=x_bias)
    return dict(x=x, residual=residual, weight=weight, bias=bias, **factors)


def scatter_operands(dtype, visible, width=384, batch=4):
    return suite_cases.scatter_tokens(CUDA, dtype, batch, visible, width).operands()


def loss_operands(dtype, dropped, video=torch.uint8, channels_last=True, batch=4):
    operands = suite_cases.masked_patch_loss(CUDA, dtype, batch, dropped).operands()
    return operands | dict(video=make_clip(batch, video, channels_last))


def on(backend, name, **options):
    """The op on one backend, whatever the device."""

    def run(**operands):
        with use_backend(backend):
            return getattr(kernels, name)(**operands, **options)

    return run


def times(factor, function):
    """A multiple of what the function gives: its gradients are that much larger, as with a loss scaler."""
    return lambda **operands: function(**operands) * factor


def check(name, operands, *, floor=0.5, no_gradient=(), factor=None, **options):
    """Every output and gradient of the kernels against float64, bounded by PyTorch's own error on this GPU."""
    ours, eager = on("triton", name, **options), on("eager", name, **options)
    if factor is not None:
        ours, eager = times(factor, ours), times(factor, eager)
    return oracle.compare(ours, eager, eager, operands, no_gradient=no_gradient, floor=floor)


@every_dtype
@every_visible
@pytest.mark.parametrize("size", WIDTHS)
def test_gather_patch_embed(size, visible, dtype):
    check("gather_patch_embed", gather_operands(dtype, visible, WIDTHS[size]), floor=FLOOR.get(dtype, 0.5), **NORMALISE)


BY_TMA = dict(num_warps=8, num_stages=3, tma=True)
WAYS = {
    "as chosen": {},
    "fused, TMA": {"gather_patch_embed_forward": LaunchConfig(128, 128, 32, fused=True, **BY_TMA)},
    "gathered, TMA": {"gather_patch_embed_forward": LaunchConfig(128, 128, 32, **BY_TMA)},
}


@every_dtype
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_gather_patch_embed_of_uint8(channels_last, way, dtype):
    operands = gather_operands(dtype, 784, batch=6, video=torch.uint8, channels_last=channels_last)
    with forced(WAYS[way]):
        check("gather_patch_embed", operands, floor=FLOOR.get(dtype, 0.5), **NORMALISE)


@every_dtype
@every_visible
def test_attention(visible, dtype):
    check("attention", attention_operands(dtype, visible), floor=FLOOR.get(dtype, 0.5))


@every_dtype
@pytest.mark.parametrize("size", [32, 80, 88, 96, 128])
def test_attention_head_sizes(size, dtype):
    """With a bias; 1200 tokens take the tiles of long clips."""
    for visible in (392, 1200):
        operands = attention_operands(dtype, visible, heads=4, size=size) | dict(bias=random(3, 4, size))
        check("attention", operands, floor=FLOOR.get(dtype, 0.5))


@every_dtype
def test_attention_varlen(dtype):
    check("attention_varlen", varlen_operands(dtype), floor=FLOOR.get(dtype, 0.5))


@every_dtype
def test_attention_kvpacked(dtype):
    check("attention_kvpacked", kvpacked_operands(dtype, 784), floor=FLOOR.get(dtype, 0.5))


@pytest.mark.parametrize("name", ["attention", "attention_kvpacked"])
def test_forward_by_cudnn(name):
    """Its log-sum-exp is what our backward pass goes on from."""
    operands = (attention_operands if name == "attention" else kvpacked_operands)(torch.bfloat16, 392)
    with forced({"attention_forward": LaunchConfig(64, 64, 64, cudnn=True)}):
        check(name, operands)


@every_dtype
@every_visible
@pytest.mark.parametrize("size", WIDTHS)
def test_add_layer_norm(size, visible, dtype):
    check("add_layer_norm", norm_operands(dtype, visible, WIDTHS[size]), floor=2)


@every_dtype
@pytest.mark.parametrize("size", WIDTHS)
def test_bias_gelu(size, dtype):
    hidden = 4 * WIDTHS[size]
    check("bias_gelu", dict(x=random(4, 784, hidden, dtype=dtype), bias=random(hidden, dtype=dtype)), floor=2)


@every_dtype
@every_visible
def test_scatter_tokens(visible, dtype):
    check("scatter_tokens", scatter_operands(dtype, visible), floor=2)


@every_dtype
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("video", [torch.uint8, torch.bfloat16])
def test_masked_patch_loss(video, channels_last, dtype):
    """The gradient of one pixel among millions would be a few steps of float16's smallest number: it is scaled."""
    operands = loss_operands(dtype, 784, video, channels_last)
    options = dict(patch_size=PATCH, no_gradient=("video",), floor=2, factor=2.0**20, **NORMALISE)
    check("masked_patch_loss", operands, **options)


CALLS = {
    "gather_patch_embed": (gather_operands, NORMALISE),
    "attention": (attention_operands, {}),
    "attention_kvpacked": (kvpacked_operands, {}),
    "add_layer_norm": (norm_operands, {}),
    "scatter_tokens": (scatter_operands, {}),
    "masked_patch_loss": (loss_operands, dict(patch_size=PATCH, **NORMALISE)),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_hundred_times_the_same_bits(name):
    make, options = CALLS[name]
    operands, run = make(torch.bfloat16, 784), on("triton", name, **options)
    first, seeds, first_gradients = oracle.outcome(run, operands)
    for _ in range(99):
        again, _, gradients = oracle.outcome(run, operands, seeds)
        assert all(torch.equal(*pair) for pair in zip(again, first, strict=True))
        assert all(
            gradient is None or torch.equal(gradient, first_gradients[key]) for key, gradient in gradients.items()
        )


# Memory.


def peak(run):
    """Bytes that ``run`` takes beyond what is held before, its results included."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = run()
    torch.cuda.synchronize()
    del kept
    return torch.cuda.max_memory_allocated() - before


def bytes_of(tensor):
    return tensor.numel() * tensor.element_size()


def test_memory_of_attention():
    """Forward and backward: output, log-sum-exp, delta and the gradient of qkv; the scores alone would be 8 x qkv."""
    operands = attention_operands(torch.bfloat16, 1568, batch=8)
    run = functools.partial(oracle.outcome, on("triton", "attention"), operands, [random(8, 1568, 768).bfloat16()])
    assert peak(run) < 1.6 * bytes_of(operands["qkv"])


def test_memory_of_gather_patch_embed():
    """The result, and the gathered patches if those are made, twice as large: no float copy of the clip."""
    operands = gather_operands(torch.bfloat16, 784, batch=16, video=torch.uint8, channels_last=True)
    out, one = 16 * 784 * 768 * 2, LaunchConfig(64, 256, 64, num_stages=3)
    with torch.no_grad():
        for configs, times in (({}, 3.1), ({"gather_patch_embed_forward": one}, 1.1)):
            with forced(configs):
                run = on("triton", "gather_patch_embed", **NORMALISE)
                assert peak(lambda run=run: run(**operands)) < times * out + 3 * 2**22


def test_memory_of_masked_patch_loss():
    """The gradient of pixels, and a few numbers for each tubelet: no target."""
    operands = loss_operands(torch.bfloat16, 784, batch=16)
    run = functools.partial(oracle.outcome, on("triton", "masked_patch_loss", patch_size=PATCH, **NORMALISE), operands)
    assert peak(run) < 1.1 * bytes_of(operands["pixels"])


# Addresses beyond 2**31 elements.


def test_large_clips():
    batch = 2**31 // (3 * 16 * 224 * 224) + 3
    operands = gather_operands(torch.bfloat16, 4, batch=batch, video=torch.uint8, channels_last=True)
    assert operands["video"].numel() > 2**31
    gather = on("triton", "gather_patch_embed", **NORMALISE)
    last = {key: value[-2:] if key in ("video", "keep_idx") else value for key, value in operands.items()}
    # So few rows may run in other tiles.
    assert relative(gather(**operands)[-2:], gather(**last)) < 1e-3


def test_large_qkv():
    batch = 2**31 // (784 * 3 * 768) + 3
    qkv = torch.empty(batch, 784, 3, 12, 64, dtype=torch.bfloat16, device="cuda").normal_()
    assert qkv.numel() > 2**31
    attention = on("triton", "attention")
    (whole, _, gradients), (last, _, last_gradients) = (
        oracle.outcome(attention, dict(qkv=part), [torch.ones(len(part), 784, 768, device="cuda")])
        for part in (qkv, qkv[-2:])
    )
    assert torch.equal(whole[0][-2:], last[0])
    assert torch.equal(gradients["qkv"][-2:], last_gradients["qkv"])


# The model.


def outcome_of_model(model, clip, mask, dtype):
    """Logits, loss and gradients of one training step, on whatever backend is in force."""
    model = model.to(dtype)
    model.zero_grad()
    out = model(clip, mask, reconstruct=True)
    loss = mar_fast.mar_loss(out, torch.arange(len(clip), device="cuda"), reconstruction_weight=0.1)
    loss.backward()
    gradients = torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])
    return out.logits.detach(), gradients


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_model(dtype):
    torch.manual_seed(0)
    model = mar_fast.create_model("mar_vit_base", num_classes=174, mask_ratio=0.5, depth=4).cuda().eval()
    clip = make_clip(2, torch.uint8, channels_last=True)
    mask = masking.cell_running(2, model.config.grid, 0.5, device="cuda")
    state = {key: value.clone() for key, value in model.state_dict().items()}
    results = {}
    for name, backend, precision in (
        ("ours", "triton", dtype),
        ("plain", "eager", dtype),
        ("exact", "eager", torch.double),
    ):
        model.load_state_dict(state)
        with use_backend(backend):
            results[name] = outcome_of_model(
                model.double() if precision == torch.double else model, clip, mask, precision
            )
    for got, plain, exact in zip(results["ours"], results["plain"], results["exact"], strict=True):
        size = float(exact.double().norm())
        error, own = (float((value.double() - exact.double()).norm()) / size for value in (got, plain))
        assert error <= 2 * own + (1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.compiles
def test_compiled_model():
    """One graph, forward and backward, through the kernels; inductor may round differently around them."""
    model = mar_fast.create_model("mar_vit_base", num_classes=174, mask_ratio=0.5, depth=2).cuda().eval()
    clip = make_clip(2, torch.uint8, channels_last=True)
    mask = masking.cell_running(2, model.config.grid, 0.5, device="cuda")
    torch.compiler.reset()
    logits, gradients = outcome_of_model(model, clip, mask, torch.float32)
    compiled = torch.compile(model, fullgraph=True)
    model.zero_grad()
    out = compiled(clip, mask, reconstruct=True)
    mar_fast.mar_loss(out, torch.arange(2, device="cuda"), reconstruction_weight=0.1).backward()
    again = torch.cat([parameter.grad.flatten().double() for parameter in model.parameters()])
    assert (out.logits - logits).norm() < 1e-4 * logits.norm()
    assert (again - gradients).norm() < 1e-3 * gradients.norm()


def test_captured_in_a_cuda_graph():
    """Nothing waits for the device: the forward pass can be captured, and its replay gives the same bits."""
    model = mar_fast.create_model("mar_vit_base", num_classes=174, mask_ratio=0.5, depth=2).cuda().eval().bfloat16()
    clip = make_clip(2, torch.uint8, channels_last=True)
    mask = masking.cell_running(2, model.config.grid, 0.5, device="cuda")
    with torch.no_grad():
        want = model(clip, mask).logits
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = model(clip, mask).logits
        graph.replay()
    assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_to_a_cuda_graph(dtype):
    """The bits of eager calls, from another stream too, when model and example are gone and their memory is used."""
    model = mar_fast.MAR(small_config(decoder_depth=0)).cuda().eval().to(dtype)
    calls = [
        (
            torch.randint(256, (2, 3, 4, 64, 64), dtype=torch.uint8, device="cuda"),
            masking.random(2, model.config.grid, 0.75, device="cuda"),
        )
        for _ in range(3)
    ]
    with torch.no_grad():
        want = [model(*call).logits for call in calls]
    compiled = mar_fast.compile_for_inference(model, calls[0], backend="graph")
    del model, calls[0]
    gc.collect()
    used = [torch.full((size,), torch.nan, device="cuda") for size in (2**10, 2**14, 2**18) for _ in range(50)]
    first = compiled(*calls[0]).logits
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        second = compiled(*calls[1]).logits
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(first, want[1]) and torch.equal(second, want[2]) and len(used) == 150
    with pytest.raises(ValueError, match="arguments: got tuple"):
        compiled(calls[0][0].cpu(), calls[0][1])

"""quantize: fp8 models against the reference with quantised layers; what stays, what is stored, and what is refused."""

import copy
import math

import pytest
import torch
from helpers import relative, small_clips, small_config
from torch import nn

import mar_fast
from mar_fast import masking, quantize, reference
from mar_fast.layers import Stream
from mar_fast.scaled_linear import scaled_layers

SIZE = dict(embed_dim=96, depth=2, bridge_depth=1, decoder_depth=1)


def small_model(**overrides):
    """With random biases, so that none is lost unnoticed."""
    model = mar_fast.MAR(small_config(**{**SIZE, **overrides})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model


def fp8(x):
    """Rows to e4m3 and back in float64: 4 significant bits, at least 2 ** -9, of a row whose largest value is 448."""
    scale = x.double().abs().amax(-1, keepdim=True) / 448
    x = x.double() / scale
    exponent = torch.frexp(x).exponent.clamp(min=-5)  # of x = m * 2 ** exponent, 0.5 <= m < 1
    step = torch.ldexp(torch.ones_like(x), exponent - 4)
    return (x / step).round() * step * scale  # round() goes to even


class Quantised(nn.Module):
    """What a layer in fp8 computes, written out in float64."""

    def __init__(self, weight, before, after):
        super().__init__()
        self.weight, self.before, self.after = fp8(weight), before, after
        self.bias = torch.zeros(())

    def forward(self, x):
        y = fp8(x) @ self.weight.T + self.before.bfloat16()
        return (y.bfloat16() + self.after).to(x.dtype)


def quantised_reference(model):
    """The reference with such layers; fc1's bias is added after its product is rounded, as the kernel for GELU does."""
    plain = reference.MAR(model.config).eval()
    plain.load_state_dict(model.state_dict())
    plain.double()
    zero = torch.zeros(())
    for block in [module for module in plain.modules() if isinstance(module, reference.Block)]:
        attn, mlp = block.attn, block.mlp
        bias = attn.qkv.bias
        if bias is None:
            bias = torch.cat((attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias))
            attn.q_bias.zero_(), attn.v_bias.zero_()
        has_key_bias = attn.qkv.bias is not None
        attn.qkv = Quantised(attn.qkv.weight, bias, zero)
        attn.qkv.bias = torch.zeros(()) if has_key_bias else None
        mlp.fc1 = Quantised(mlp.fc1.weight, zero, mlp.fc1.bias)
        mlp.fc2 = Quantised(mlp.fc2.weight, mlp.fc2.bias, zero)
    return plain


@torch.no_grad()
def test_against_the_reference():
    """As near as float32 gets: where it rounds a value to the other side of a tie, that value is off by a step."""
    model = small_model()
    quantised, video = quantize(model, "fp8", emulate=True), small_clips()
    mask = masking.random(2, model.config.grid, 0.5)
    got, before = (run(video, mask, reconstruct=True) for run in (quantised, model))
    plain = quantised_reference(model)
    want = plain(video, mask, reconstruct=True)
    for name in ("features", "logits", "pixels"):
        error, cost = (relative(getattr(got, name), getattr(one, name)) for one in (want, before))
        assert error < 4e-3 < 1e-2 < cost < 8e-2, (name, error, cost)


@torch.no_grad()
def test_what_is_quantised():
    """Three products of each block; the model that is given stays as it is, and the copy has memory of its own."""
    model = small_model()
    state = copy.deepcopy(model.state_dict())
    quantised = quantize(model.train(), "fp8", keep=("encoder.blocks.1", "decoder"), emulate=True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items()) and model.training
    layers = ("attn.qkv", "mlp.fc1", "mlp.fc2")
    names = {f"{block}.{layer}" for block in ("encoder.blocks.0", "classifier.blocks.0") for layer in layers}
    assert {name for name, _ in scaled_layers(quantised)} == names
    for name, layer in scaled_layers(quantised):
        weight = model.get_submodule(name).weight
        torch.testing.assert_close(layer.weight.double() * layer.weight_scale, fp8(weight), rtol=1e-6, atol=0)
    assert not quantised.training and not any(p.requires_grad for p in quantised.parameters())
    pointers = {p.data_ptr() for p in model.parameters()}
    assert not pointers & {value.data_ptr() for value in quantised.state_dict().values()}


@torch.no_grad()
def test_dtypes():
    """The rest of the model may change its dtype; layers in fp8 keep their bits, and follow the activations' dtype."""
    quantised = quantize(small_model(), "fp8", emulate=True)
    video = small_clips()
    want, state = quantised(video).logits, quantised.state_dict()
    for dtype, bound in ((torch.bfloat16, 3e-2), (torch.float16, 2e-2)):
        low = copy.deepcopy(quantised).to(dtype).float().to(dtype)
        for name, _ in scaled_layers(low):
            for key in ("weight", "weight_scale"):
                before, after = (s[f"{name}.{key}"] for s in (state, low.state_dict()))
                assert before.dtype == after.dtype and torch.equal(before.float(), after.float())
        assert low(video).logits.dtype == dtype
        assert relative(low(video).logits, want) < bound
    with torch.autocast("cpu", torch.bfloat16):
        assert relative(quantised(video).logits, want) < 3e-2


@torch.no_grad()
def test_ragged():
    """Packed clips give what each gives alone: every token has a scale of its own."""
    quantised = quantize(small_model(decoder_depth=0), "fp8", emulate=True)
    video, masked = small_clips(), torch.zeros(2, math.prod(quantised.config.grid), dtype=torch.bool)
    masked[0, ::2], masked[1, ::3] = True, True
    together, *alone = (
        quantised(video[clips], mar_fast.TokenMask.ragged(masked[clips])).logits
        for clips in (slice(None), slice(0, 1), slice(1, 2))
    )
    assert relative(together, torch.cat(alone)) < 1e-2


@torch.no_grad()
def test_layers_with_hooks():
    """Hooks see tensors, and layers that have them still run."""
    quantised = quantize(small_model(decoder_depth=0), "fp8", emulate=True)
    video, seen = small_clips(), []
    want = quantised(video).logits
    block = quantised.encoder.blocks[0]
    for module in (block.attn, block.attn.qkv, block.mlp, block.mlp.fc1, block.mlp.fc2):
        module.register_forward_hook(lambda module, inputs, output: seen.append((*inputs[:1], output)))
    with pytest.warns(UserWarning, match="hooks"):
        assert relative(quantised(video).logits, want) < 2e-2
    assert len(seen) == 5 and all(torch.is_tensor(value) for pair in seen for value in pair)


@torch.no_grad()
def test_stored(tmp_path):
    """Our layout gives the same bits back; the others do not take them."""
    quantised = quantize(small_model(), "fp8", keep="encoder.blocks.1", emulate=True)
    quantised.save_pretrained(tmp_path / "folder")
    mar_fast.save_checkpoint(quantised, tmp_path / "file.safetensors")
    state, video = quantised.state_dict(), small_clips()
    for source in (tmp_path / "folder", tmp_path / "file.safetensors"):
        back = mar_fast.from_pretrained(source)
        assert "9 layers in fp8" in str(back.load_report)
        for name, value in back.state_dict().items():
            assert value.dtype == state[name].dtype
            assert torch.equal(value.view(torch.uint8), state[name].view(torch.uint8)), name
        with pytest.raises(ValueError, match=r"without fp8 products.*emulate=True"):
            back(video)
        assert torch.equal(quantize(back, "fp8", emulate=True)(video).logits, quantised(video).logits)
    encoder = mar_fast.from_pretrained(tmp_path / "folder", classifier=None, decoder_depth=0)
    assert len([*scaled_layers(encoder)]) == 3
    with pytest.raises(ValueError, match=r"model: got layers in fp8, .* MAR .*expected layout 'mar_fast'"):
        mar_fast.save_checkpoint(quantised, tmp_path / "other.safetensors", layout="mar")
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.parametrize(
    ("name", "change", "text"),
    [
        ("weight", lambda w: w[:, :-16].clone(), r"float8_e4m3fn of shape \(288, 80\), expected finite"),
        ("weight", lambda w: w.bfloat16(), "bfloat16"),
        ("weight", lambda w: torch.full_like(w, torch.nan), "finite"),
        ("weight_scale", lambda s: s[:, 0], r"shape \(288,\)"),
        ("weight_scale", lambda s: s.half(), "float16"),
        ("weight_scale", lambda s: s * torch.inf, "finite"),
    ],
)
def test_damaged(name, change, text):
    model = small_model(classifier=None, decoder_depth=0)
    state, key = quantize(model, "fp8", emulate=True).state_dict(), f"encoder.blocks.0.attn.qkv.{name}"
    state[key] = change(state[key])
    with pytest.raises(ValueError, match=rf"{key}: got .*{text}"):
        mar_fast.from_pretrained(state, position="formula", num_heads=3, num_frames=4, image_size=(64, 64))


def test_refused():
    model = small_model(decoder_depth=0)
    with pytest.raises(ValueError, match=r"model: got tensors on cpu, without fp8 products, .*emulate=True"):
        quantize(model, "fp8")
    with pytest.raises(TypeError, match=r"model: got Linear, expected a mar_fast\.MAR"):
        quantize(nn.Linear(16, 16), "fp8", emulate=True)
    with pytest.raises(ValueError, match="kind: got 'int4', expected 'fp8'"):
        quantize(model, "int4", emulate=True)
    known = r"encoder, encoder\.blocks\.0 to encoder\.blocks\.1; classifier, classifier\.blocks\.0"
    for keep in ("decoder", ("encoder", "encoder.blocks.2")):
        with pytest.raises(ValueError, match=rf"keep: got '(decoder|encoder\.blocks\.2)', expected .*{known}"):
            quantize(model, "fp8", keep=keep, emulate=True)
    quantised = quantize(model, "fp8", emulate=True)
    with pytest.raises(ValueError, match="keep: got 'encoder', expected none, for a model that is quantised already"):
        quantize(quantised, "fp8", keep="encoder", emulate=True)
    with pytest.raises(ValueError, match=r"encoder\.blocks\.0\.attn\.qkv: got 88 -> 264 features, expected multiples"):
        quantize(mar_fast.MAR(small_config(embed_dim=88, num_heads=2)), "fp8", emulate=True)
    model.encoder.blocks[0].mlp.fc2.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"encoder\.blocks\.0\.mlp\.fc2: got Linear, expected a plain nn\.Linear"):
        quantize(model, "fp8", emulate=True)


@pytest.mark.interpreter
@torch.no_grad()
def test_kernels():
    """A block by kernels: norms and GELU hand over rows in fp8. A value near a tie may be off by a step."""
    block = quantize(small_model(decoder_depth=0), "fp8", emulate=True).encoder.blocks[0]
    for stream in (Stream(torch.randn(2, 17, 96)), Stream(torch.randn(2, 17, 96), torch.randn(2, 17, 96))):
        got = block(stream)
        with mar_fast.kernels.use_backend("eager"):
            want = block(stream)
        assert relative(got.x, want.x) < 5e-3 and relative(got.residual, want.residual) < 1e-3


@pytest.mark.compiles
@torch.no_grad()
def test_one_graph():
    block = quantize(small_model(decoder_depth=0), "fp8", emulate=True).encoder.blocks[0]
    inputs = (Stream(torch.randn(2, 5, 96), torch.randn(2, 5, 96)),)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    exported = torch.export.export(block, inputs, strict=False).module()
    for run in (compiled, exported):
        for got, want in zip(run(*inputs)[:2], block(*inputs)[:2], strict=True):
            assert relative(got, want) < 1e-6

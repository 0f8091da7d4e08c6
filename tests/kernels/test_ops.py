"""Values and every gradient of both paths against oracle.py; their rules are in test_op_rules.py."""

import functools

import oracle
import pytest
import torch
from op_cases import (
    ELEMENTWISE,
    MEAN,
    ON_GPU,
    PATCH,
    STD,
    TOKENS,
    attention_operands,
    check,
    every_dtype,
    gather_operands,
    gelu_operands,
    kvpacked_operands,
    linear_operands,
    loss_operands,
    mlp_operands,
    norm_operands,
    plain_gather,
    plain_gelu,
    plain_linear_gelu,
    plain_loss,
    plain_mlp,
    plain_norm,
    plain_scatter,
    scatter_operands,
    varlen_operands,
)

from mar_fast import kernels

pytestmark = pytest.mark.triton_too


OF_CLIPS = [
    dict(count=17, layout="channels_last"),
    dict(count=98, layout="cropped", batch=1),
    dict(count=TOKENS),
    dict(count=1, video=torch.uint8, layout="cropped"),
    dict(count=17, video=torch.float32),  # a clip in another dtype than weights or pixels
    dict(count=0),
    dict(batch=0),
    dict(lengths=(5, 0, 12), layout="cropped"),
    dict(lengths=(98, TOKENS, 1), video=torch.uint8, layout="channels_last", index=torch.int64),
    dict(lengths=(0, 0)),
    dict(lengths=()),
]
GATHER = [
    dict(count=1),
    dict(count=130, layout="strided"),
    dict(count=98, video=torch.uint8, layout="channels_last", index=torch.int64),
    dict(count=7, patch=(2, 16, 16), grid=(2, 2, 3), width=96, video=torch.uint8),  # the real patch
    *OF_CLIPS,
]


@every_dtype
@pytest.mark.parametrize("case", GATHER, ids=str)
def test_gather_patch_embed(case, dtype):
    (out,) = check("gather_patch_embed", plain_gather, gather_operands(dtype, **case), mean=MEAN, std=STD)
    assert out.dtype == dtype


@pytest.mark.usefixtures("bfloat16_too")
def test_gather_patch_embed_of_plain_uint8():
    """Without mean and std uint8 is only divided by 255; positions may be of any dtype."""
    operands = gather_operands(torch.float32, video=torch.uint8)
    operands["pos_embed"] = operands["pos_embed"].bfloat16()
    check("gather_patch_embed", plain_gather, operands)


@every_dtype
@pytest.mark.parametrize("size", [32, 64, 80, 88, 96, 128])
def test_attention_head_sizes(size, dtype):
    """With a bias in float32, as a model under autocast has it."""
    (out,) = check("attention", None, attention_operands(dtype, size=size, bias=torch.float32))
    assert (out.shape, out.dtype) == ((2, 17, 2 * size), dtype)


@every_dtype
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("batch", "count", "heads"), [(2, 1, 3), (2, 98, 1), (1, 130, 2), (2, 0, 2), (0, 17, 2)])
def test_attention(batch, count, heads, scale, dtype):
    operands = attention_operands(dtype, batch, count, heads)
    (out,) = check("attention", None, operands, scale=scale)
    assert out.shape == (batch, count, heads * 32)
    beside_lse, _ = kernels.attention(**operands, scale=scale, return_lse=True)
    assert torch.equal(beside_lse, kernels.attention(**operands, scale=scale))


@every_dtype
@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("batch", "count"), [(2, 1), (2, 17), (1, 130), (2, 0), (0, 17)])
def test_log_sum_exp(batch, count, scale, dtype):
    """It is float32, so the plain computation is that of qkv in float32."""

    def lse(module, qkv, bias):
        return module.attention(qkv, bias, scale=scale, return_lse=True)[1]

    def plain(qkv, bias):
        return naive((qkv if bias is None else qkv + bias).float(), None)

    ours, naive = (functools.partial(lse, module) for module in (kernels, oracle))
    operands, floor = attention_operands(dtype, batch, count, bias=None if scale else dtype), 32 if ON_GPU else 0.5
    operands.setdefault("bias")
    (out,) = oracle.compare(ours, naive, plain, operands, floor=floor)
    assert (out.shape, out.dtype) == ((batch, 2, count), torch.float32)


def test_log_sum_exp_of_large_scores():
    """128 products of 25 * 25 are above float16's range, times the scale they are far below it."""
    _, lse = kernels.attention(torch.full((1, 1, 3, 1, 128), 25, dtype=torch.float16), return_lse=True)
    torch.testing.assert_close(lse, torch.full((1, 1, 1), 128**0.5 * 625))


@every_dtype
@pytest.mark.parametrize(("count", "keys", "size"), [(98, 3, 32), (17, 130, 88), (1, 17, 64), (0, 17, 32)])
def test_attention_kvpacked(count, keys, size, dtype):
    (out,) = check("attention_kvpacked", None, kvpacked_operands(dtype, 2, count, keys, size=size))
    assert (out.shape, out.dtype) == ((2, count, 2 * size), dtype)


LENGTHS = [(17,), (1, 1, 1), (0, 5, 0, 0, 17, 1, 0), (98, 130), (0, 0), ()]


@every_dtype
@pytest.mark.parametrize("spare", [0, 9])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_attention_varlen(lengths, spare, dtype):
    """The bias is not for tokens alone: ds is exactly 0 there in plain PyTorch; ours has the output's rounding."""
    if spare:
        bias = None if max(lengths, default=0) == 1 else dtype
        operands = varlen_operands(dtype, lengths, spare, index=torch.int64, bias=bias)
    else:
        operands = varlen_operands(dtype, lengths)
    (out,) = check("attention_varlen", None, operands, scale=0.3 if spare else None)
    assert (out.shape, out.dtype) == ((sum(lengths), 64), dtype)


def test_attention_varlen_is_attention_clip_by_clip():
    operands = varlen_operands(torch.float32, (98, 1, 0, 17), spare=3)
    together = kernels.attention_varlen(**operands)
    alone = [kernels.attention(part[None])[0] for part in operands["qkv"].split((98, 1, 0, 17))]
    # The order of sums may differ; on a GPU tiles and so what is lost by products of TF32 do too.
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5 if ON_GPU else 1e-6)


def test_attention_varlen_keeps_clips_apart():
    """A clip that has become NaN leaves its neighbours as they are, in backward too."""
    operands = varlen_operands(torch.float32, (5, 3, 0, 9))
    clean, seeds, clean_gradients = oracle.outcome(kernels.attention_varlen, operands)
    operands["qkv"][5:8] = torch.nan
    outputs, _, gradients = oracle.outcome(kernels.attention_varlen, operands, seeds)
    for part in (slice(0, 5), slice(8, 17)):
        assert torch.equal(outputs[0][part], clean[0][part])
        assert torch.equal(gradients["qkv"][part], clean_gradients["qkv"][part])


NORM = [
    dict(without=("residual", "layer_scale", "row_scale", "x_bias")),
    dict(without=("layer_scale", "row_scale")),
    dict(without=("layer_scale", "x_bias")),
    dict(without=("row_scale",)),
    dict(),
    dict(batch=2, count=1),
    dict(batch=2, count=130, width=257),
    dict(count=98, width=768),
    dict(count=0),
    dict(batch=0),
]


@every_dtype
@pytest.mark.parametrize("eps", [1e-6, 0.1])  # one as in the models, one that shows
@pytest.mark.parametrize("case", NORM, ids=str)
def test_add_layer_norm(case, eps, dtype):
    operands = norm_operands(dtype, **case)
    normed, residual = check("add_layer_norm", plain_norm, operands, eps=eps)
    assert (normed.dtype, residual.dtype) == (dtype, dtype)


@every_dtype
def test_add_layer_norm_of_packed_tokens(dtype):
    operands = norm_operands(dtype, count=1)
    check("add_layer_norm", plain_norm, operands | {name: operands[name][:, 0] for name in ("x", "residual")})


@pytest.mark.usefixtures("bfloat16_too")
def test_residual_keeps_float32():
    """An x in bfloat16, as autocast makes it, is added to a float32 residual without rounding it."""
    operands = norm_operands(torch.float32, without=("layer_scale", "row_scale"))  # which would be float32 themselves
    operands["x"] = operands["x"].bfloat16()
    _, residual = check("add_layer_norm", plain_norm, operands)
    assert residual.dtype == torch.float32


@every_dtype
@pytest.mark.parametrize(
    "shape",
    [(33,), (1, 1), (130, 1), (17, 96), (2, 3, 5, 33), (2, 130, 257), (2, 98, 3072), (0, 17, 33), (2, 0, 33), (17, 0)],
)
def test_bias_gelu(shape, dtype):
    (out,) = check("bias_gelu", plain_gelu, gelu_operands(dtype, shape))
    assert (out.shape, out.dtype) == (shape, dtype)


@pytest.mark.usefixtures("bfloat16_too")
def test_bias_gelu_keeps_xs_dtype():
    """Gradients: test_jit_bias_gelu.py."""
    x, bias = gelu_operands(torch.bfloat16).values()
    out = kernels.bias_gelu(x, bias.float())
    assert out.dtype == torch.bfloat16
    exact = oracle.bias_gelu(x.double(), bias.double())
    oracle.assert_as_good("output", out, plain_gelu(x, bias.float()), exact)


@every_dtype
@pytest.mark.parametrize("shape", [(24,), (2, 17, 33), (0, 24)])
def test_linear_gelu(shape, dtype):
    """33 columns are no whole number of 16-byte runs: by way of bias_gelu."""
    (out,) = check("linear_gelu", plain_linear_gelu, linear_operands(dtype, shape))
    assert out.dtype == dtype


@every_dtype
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, 17, 24), (0, 24)])
def test_mlp(bias, shape, dtype):
    operands = mlp_operands(dtype, shape)
    if not bias:
        del operands["fc2_bias"]
    (out,) = check("mlp", plain_mlp, operands)
    assert out.dtype == dtype


SCATTER = [
    *(dict(batch=batch, count=count) for batch, count in [(2, 1), (2, 17), (1, 98), (2, 130), (2, TOKENS)]),
    *(dict(count=0), dict(batch=0)),
    *(dict(lengths=lengths) for lengths in LENGTHS),
]


@every_dtype
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("case", SCATTER, ids=str)
def test_scatter_tokens(case, index, dtype):
    (out,) = check("scatter_tokens", plain_scatter, scatter_operands(dtype, **case, index=index))
    assert out.dtype == dtype


LOSS = [
    dict(count=1, layout="strided"),
    dict(count=130, index=torch.int64),
    dict(count=98, video=torch.uint8, layout="channels_last"),
    *OF_CLIPS,
]


@every_dtype
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("case", LOSS, ids=str)
def test_masked_patch_loss(case, normalize, dtype):
    operands = loss_operands(dtype, **case)
    (loss,) = check("masked_patch_loss", plain_loss, operands, patch_size=PATCH, normalize=normalize)
    assert loss.dtype == torch.float32


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("video", [torch.float32, torch.uint8])
def test_masked_patch_loss_undoes_the_normalisation(video, normalize):
    """Of a floating-point clip; uint8 is in [0, 1] after the division."""
    operands = loss_operands(torch.float32, video=video)
    options = dict(patch_size=PATCH, normalize=normalize)

    def plain(video, **rest):
        if video.dtype != torch.uint8:
            video = video * torch.tensor(STD).view(3, 1, 1, 1) + torch.tensor(MEAN).view(3, 1, 1, 1)
        return plain_loss(video=video, **rest, **options)

    ours = functools.partial(kernels.masked_patch_loss, mean=MEAN, std=STD, **options)
    naive = functools.partial(oracle.masked_patch_loss, mean=MEAN, std=STD, **options)
    oracle.compare(ours, naive, plain, operands, no_gradient=("video",), floor=ELEMENTWISE[torch.float32])


@pytest.mark.parametrize("contrast", [1e-4, 1e-6])
def test_masked_patch_loss_of_a_faint_patch(contrast):
    """Where the 1e-6 beside the standard deviation shows."""
    operands = loss_operands(torch.float32)
    operands["video"] *= contrast
    check("masked_patch_loss", plain_loss, operands, patch_size=PATCH)


def test_masked_patch_loss_of_a_flat_patch():
    """Without any variance the target is zero, not the quotient of two roundings."""
    operands = loss_operands(torch.float32)
    operands["video"] = torch.full_like(operands["video"], 0.5)
    loss = kernels.masked_patch_loss(**operands, patch_size=PATCH)
    torch.testing.assert_close(loss, operands["pixels"].square().mean())

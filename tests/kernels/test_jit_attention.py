"""The attention kernels beyond what test_ops.py asks of every path: tiles, strides, dtypes, the custom ops."""

import contextlib
import functools

import oracle
import pytest
import torch
from helpers import relative
from op_cases import (
    attention_operands,
    cropped,
    expanded,
    expanded_rows,
    kvpacked_operands,
    strided,
    tokens_first,
    varlen_operands,
)
from plan_cases import misaligned

from mar_fast import kernels
from mar_fast.kernels import device
from mar_fast.kernels.jit import attention_backward
from mar_fast.kernels.jit.launch import LaunchConfig, forced, recording

pytestmark = pytest.mark.interpreter

KERNELS = ("attention_forward", "attention_backward_query", "attention_backward_key_value")
# As in test_ops.py: what a recomputed softmax loses in float32.
FLOOR = 8


@contextlib.contextmanager
def tiles(block_m, block_n, block_k=64, resident=True, tma=False, fused=False):
    """All three kernels in tiles of these sizes; the fused one with memory for as few heads as it can do with."""
    config = LaunchConfig(block_m, block_n, block_k, 4, 1, resident, tma, fused)
    with pytest.MonkeyPatch.context() as patch, forced(dict.fromkeys(KERNELS, config)):
        patch.setattr(attention_backward, "PROGRAMS", 1)
        yield


def check(operands, op="attention"):
    return oracle.compare(getattr(kernels, op), *[getattr(oracle, op)] * 2, operands, floor=FLOOR)


def check_varlen(operands):
    return check(operands, "attention_varlen")


# Tiles. 64 tokens are whole tiles of every size, 63 and 65 are one off; the tail is 16, 32 or a whole tile wide.


@pytest.mark.parametrize(
    ("block_m", "block_n", "tma", "fused"),
    [(16, 32, False, True), (32, 16, True, True), (64, 64, True, False), (64, 16, False, False)],
)
@pytest.mark.parametrize("count", [1, 15, 63, 64, 65, 97])
def test_tiles(count, block_m, block_n, tma, fused):
    with tiles(block_m, block_n, tma=tma, fused=fused):
        check(attention_operands(torch.float32, batch=1, count=count))


@pytest.mark.parametrize(("count", "keys", "fused"), [(1, 64, True), (65, 33, False), (65, 33, True), (33, 97, True)])
def test_tiles_of_queries_apart(count, keys, fused):
    """With a bias, and as parts of a larger tensor."""
    operands = kvpacked_operands(torch.float32, 2, count, keys)
    operands |= dict(q=heads_of_more(operands["q"]), kv=heads_of_more(operands["kv"]))
    with tiles(32, 32, tma=True, fused=fused):
        check(operands, "attention_kvpacked")


@pytest.mark.parametrize("count", [33, 64, 65])
@pytest.mark.parametrize("size", [32, 88])
def test_tiles_loaded_anew(count, size):
    """No operand stays in registers, and column tiles are narrow: as float32 and older architectures run it."""
    with tiles(32, 32, block_k=32, resident=False):
        check(attention_operands(torch.float32, batch=1, count=count, size=size, bias=torch.float16))
        check_varlen(varlen_operands(torch.float32, (count, 5), size=size))


@pytest.mark.parametrize(
    ("lengths", "tma", "fused"), [((63, 0, 65), True, False), ((1, 64, 31, 33), False, True), ((63, 0, 65), True, True)]
)
def test_tiles_of_ragged_clips(lengths, tma, fused):
    """33 tokens are one more than half a tile of queries, which the last one may be."""
    with tiles(64, 32, tma=tma, fused=fused):
        check_varlen(varlen_operands(torch.float32, lengths, spare=70, bias=torch.float32))


@pytest.mark.parametrize("count", [128 + 64, 128 + 65, 129])
def test_last_queries_in_half_a_tile(count):
    """192 and 129 tokens leave at most half a tile of 128 queries, 193 more than that."""
    with tiles(128, 128):
        check(attention_operands(torch.float32, batch=1, count=count, heads=1))


@pytest.mark.parametrize("size", [1, 8, 16, 24, 40, 72, 88, 112])
def test_head_sizes_in_between(size):
    """By TMA: sizes that are multiples of 16 bytes and have at most two widths of column tiles."""
    with tiles(32, 32, tma=True):
        check(attention_operands(torch.float32, batch=1, count=33, size=size, bias=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("size", [64, 88])
def test_real_tail(size, dtype):
    """392 tokens are six tiles of 64 and 8 more."""
    check(attention_operands(dtype, batch=1, count=392, heads=1, size=size))


def test_whole_clip():
    """784 tokens are six tiles of 128 and 16 more; in the interpreter's own tiles they would take a minute."""
    with tiles(128, 128):
        check(attention_operands(torch.float32, batch=1, count=784, heads=1, size=64))


# Strides and addresses.


def heads_of_more(value):
    """The first two of three heads: rows are further apart than they are long; the third is NaN."""
    buffer = torch.full((*value.shape[:-2], 3, value.shape[-1]), torch.nan, dtype=value.dtype)
    return buffer[..., :2, :].copy_(value)


def parts_first(value):
    """(3, B, N, H, d) memory."""
    return value.permute(2, 0, 1, 3, 4).contiguous().permute(1, 2, 0, 3, 4)


def heads_first(value):
    """(B, H, N, 3, d) memory."""
    return value.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)


def one_head(value):
    """All heads in the memory of the first."""
    return value[..., :1, :].expand(value.shape)


def sizes_first(value):
    """No unit stride in the last dimension: this one is copied."""
    return value.permute(4, 0, 1, 2, 3).contiguous().permute(1, 2, 3, 4, 0)


@pytest.mark.parametrize(
    "layout", [heads_of_more, tokens_first, parts_first, heads_first, sizes_first, cropped, strided]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_any_strides_of_qkv(layout, dtype):
    """By TMA where they allow that: next to clips, and in float16 heads of 40 next to heads, that are NaN."""
    operands = attention_operands(dtype, batch=2, count=33, size=40 if dtype == torch.float16 else 32)
    qkv = layout(operands["qkv"])
    assert not qkv.is_contiguous()
    with tiles(32, 32, tma=True):
        clean, seeds, clean_gradients = oracle.outcome(kernels.attention, operands)
        outputs, _, gradients = oracle.outcome(kernels.attention, dict(qkv=qkv), seeds)
    assert torch.equal(outputs[0], clean[0])
    assert torch.equal(gradients["qkv"], clean_gradients["qkv"])


@pytest.mark.parametrize(
    ("layout", "possible"),
    [
        (torch.Tensor.contiguous, True), (heads_of_more, True), (parts_first, True), (heads_first, True),
        (sizes_first, False), (cropped, False), (strided, False), (one_head, False), (misaligned, False),
    ],
)  # fmt: skip
def test_what_tma_takes(layout, possible):
    """And that it is taken: all of the tensor, in blocks of rows of one head."""
    qkv = layout(attention_operands(torch.float16, count=33)["qkv"])
    with tiles(32, 16, tma=True), recording() as launches:
        kernels.attention(qkv)
    blocks = launches[0][0].blocks
    assert set(blocks) == ({2} if possible else set())
    if possible:
        (made,) = blocks.values()
        assert made == ((2, 3, 2, 33, 32), (*(qkv.stride(i) for i in (0, 2, 3, 1)), 1), (1, 1, 1, 16, 32))


@pytest.mark.parametrize("layout", [cropped, strided, tokens_first, expanded_rows, expanded])
def test_any_strides_of_the_gradient(layout):
    operands = attention_operands(torch.float32, batch=2, count=33)
    seed = layout(torch.randn(2, 33, 64))
    assert not seed.is_contiguous()
    with tiles(32, 32, tma=True):
        _, _, gradients = oracle.outcome(kernels.attention, operands, [seed])
        _, _, contiguous = oracle.outcome(kernels.attention, operands, [seed.contiguous()])
    assert torch.equal(gradients["qkv"], contiguous["qkv"])


def test_ragged_clips_in_a_larger_buffer():
    """NaN before, behind and between the rows."""
    operands = varlen_operands(torch.float32, (33, 0, 17))
    clean, seeds, clean_gradients = oracle.outcome(kernels.attention_varlen, operands)
    operands["qkv"] = cropped(operands["qkv"])
    outputs, _, gradients = oracle.outcome(kernels.attention_varlen, operands, seeds)
    assert torch.equal(outputs[0], clean[0])
    assert torch.equal(gradients["qkv"], clean_gradients["qkv"])


# Values.


@pytest.mark.parametrize("op", ["attention", "attention_kvpacked"])
def test_forward_by_cudnn(op, monkeypatch):
    """By a stand-in with the layouts of PyTorch's own shape function; what is not in 16 bits is left to the kernel."""
    shapes, cudnn = [], torch.ops.aten._scaled_dot_product_cudnn_attention

    def stand_in(query, key, value, attn_bias, compute_log_sumexp, scale):
        abstract = (part.to("meta").as_strided(part.shape, part.stride()) for part in (query, key, value))
        out, lse, *rest = cudnn(*abstract, attn_bias, compute_log_sumexp, scale=scale)
        scores = query.double() @ key.double().mT * scale
        out, lse = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in (out, lse))
        shapes.append(out.copy_(scores.softmax(-1) @ value.double()).shape)
        return out, lse.copy_(scores.logsumexp(-1, keepdim=True)) if compute_log_sumexp else lse[:0], *rest

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_cudnn_attention", stand_in)
    make = kvpacked_operands if op == "attention_kvpacked" else attention_operands
    with forced({"attention_forward": LaunchConfig(32, 32, 64, cudnn=True)}):
        for dtype in (torch.float16, torch.float32):
            (out,) = check(make(dtype, bias=dtype), op)
            assert out.is_contiguous()
    with torch.no_grad(), forced({"attention_forward": LaunchConfig(32, 32, 64, cudnn=True)}):
        getattr(kernels, op)(**make(torch.float16))
    assert len(shapes) == 2


def with_lse(module, **operands):
    return module.attention(**operands, scale=0.3, return_lse=True)


@pytest.mark.parametrize("count", [17, 65])
def test_gradient_of_output_and_log_sum_exp_together(count):
    ours, naive = (functools.partial(with_lse, module) for module in (kernels, oracle))
    operands = attention_operands(torch.float32, count=count, bias=torch.float32)
    with tiles(32, 32, fused=count == 65):
        oracle.compare(ours, naive, naive, operands, floor=FLOOR)


@pytest.mark.parametrize("sign", [1, -1])
def test_scores_far_from_zero(sign):
    """Scores of 1e3 overflow without the running maximum; one that starts at zero loses those of -1e3."""
    qkv = torch.randn(1, 65, 3, 1, 32)
    qkv[:, :, 0] = 10
    qkv[:, :, 1] = sign * (18 + torch.rand(1, 65, 1, 32))
    with tiles(32, 32):
        outputs, seeds, gradients = oracle.outcome(kernels.attention, dict(qkv=qkv))
    exact, _, exact_gradients = oracle.outcome(oracle.attention, dict(qkv=qkv.double()), [seeds[0].double()])
    # A score of 1e3 is rounded by up to 6e-5, and so is the weight that it becomes.
    assert relative(outputs[0], exact[0]) < 2e-4
    assert relative(gradients["qkv"], exact_gradients["qkv"]) < 2e-4


def test_a_key_that_takes_all_comes_last():
    """The running sum is scaled down by a later maximum."""
    qkv = torch.randn(1, 65, 3, 1, 32)
    qkv[:, 64, 1] = 30 * qkv[:, 0, 0]
    with tiles(32, 32):
        check(dict(qkv=qkv))


@pytest.mark.parametrize("fused", [False, True])
def test_a_clip_of_nan_stays_alone(fused):
    """Its neighbours have the same memory for ds, one after the other."""
    operands = attention_operands(torch.float32, batch=3, count=33, bias=torch.float32)
    with tiles(32, 32, tma=True, fused=fused):
        clean, seeds, clean_gradients = oracle.outcome(kernels.attention, operands)
        operands["qkv"][1] = torch.nan
        outputs, _, gradients = oracle.outcome(kernels.attention, operands, seeds)
    assert torch.equal(outputs[0][::2], clean[0][::2])
    assert torch.equal(gradients["qkv"][::2], clean_gradients["qkv"][::2])
    assert outputs[0][1].isnan().all() and gradients["qkv"][1].isnan().all()


@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, False), (torch.float16, True)])
def test_bitwise_repeatable(dtype, fused):
    operands = attention_operands(dtype, count=130, bias=dtype)
    with tiles(64, 32, fused=fused):
        first, seeds, first_gradients = oracle.outcome(kernels.attention, operands)
        second, _, second_gradients = oracle.outcome(kernels.attention, operands, seeds)
    torch.testing.assert_close((second, second_gradients), (first, first_gradients), rtol=0, atol=0)


# Which path.


@pytest.mark.parametrize("op", ["attention", "attention_varlen"])
def test_heads_too_large_for_the_kernels(op, poisoned):
    make = attention_operands if op == "attention" else varlen_operands
    operands = make(torch.float32, size=136)
    with pytest.raises(RuntimeError, match=r"runs attention\w* with head sizes up to 128, got 136"):
        getattr(kernels, op)(**operands)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(device, "_forced", None)
        oracle.compare(getattr(kernels, op), *[getattr(oracle, op)] * 2, operands, floor=FLOOR)
    assert not poisoned.allocated
    poisoned.allocated = None


@pytest.mark.parametrize("op", ["attention", "attention_varlen"])
def test_autocast_halves_the_products(op):
    """float32 qkv becomes float16 and its gradient float32 again."""
    operands = (attention_operands if op == "attention" else varlen_operands)(torch.float32)
    with torch.autocast("cpu", torch.float16):
        outputs, _, gradients = oracle.outcome(getattr(kernels, op), operands)
    assert outputs[0].dtype == torch.float16
    assert gradients["qkv"].dtype == torch.float32
    assert torch.equal(gradients["qkv"], gradients["qkv"].half().float())


# The custom ops, which torch.compile sees.


def test_all_of_the_log_sum_exp_is_written():
    """What pads its rows too, which the op cuts off: graphs are compared by all that they hold."""
    _, lse = torch.ops.mar_fast.attention(attention_operands(torch.float32)["qkv"], None, 0.3, True)
    assert lse.shape == (2, 2, 32) and not lse.isnan().any()


@pytest.mark.compiles
def test_compiled_log_sum_exp_alone():
    """The output goes unused, and its gradient is None."""

    def program(qkv):
        return kernels.attention(qkv, return_lse=True)[1].sin()

    torch.compiler.reset()
    operands = attention_operands(torch.float32)
    outputs, seeds, gradients = oracle.outcome(program, operands)
    compiled, _, compiled_gradients = oracle.outcome(torch.compile(program, fullgraph=True), operands, seeds)
    torch.testing.assert_close(compiled[0], outputs[0])
    torch.testing.assert_close(compiled_gradients["qkv"], gradients["qkv"])

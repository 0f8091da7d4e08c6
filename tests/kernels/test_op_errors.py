"""Bad calls of the ops: the error names the argument, what was got and what is accepted."""

import math
import re

import pytest
import torch
from op_cases import DEVICE, OPS, call

from mar_fast import kernels

# Operands of an ordinary call: video (2, 3, 4, 21, 55) in tubelets of (2, 3, 5), 154 of them, 17 visible or dropped;
# width 33; 2 heads of size 32; offsets 0, 5, 5, 17.
VALUE, TYPE = ValueError, TypeError
HALF = torch.float16


def zeros(*shape, dtype=torch.float32, device=None):
    return torch.zeros(*shape, dtype=dtype, device=device)


def index(*changes, rows=2, count=17, dtype=torch.int32):
    """0 .. count - 1 in each row, but for {position: value} in the last."""
    value = torch.arange(count, dtype=dtype).repeat(rows, 1)
    for position, entry in changes:
        value[-1, position] = entry
    return value


META = index().to("meta")
CLIP = (2, 3, 4, 21, 55)

# Arguments that replace or join the ordinary ones; what is raised; the argument and the got value in its message.
BAD = {
    "gather_patch_embed": [
        (dict(video=None), TYPE, "video", "NoneType"),
        (dict(video=zeros(3, 4, 21, 55)), VALUE, "video", "shape (3, 4, 21, 55)"),
        (dict(video=zeros(*CLIP, dtype=torch.int32)), TYPE, "video", "torch.int32"),
        (dict(video=zeros(2, 4, 4, 21, 55)), VALUE, "video", "4 channels"),
        (dict(video=zeros(2, 3, 3, 21, 55)), VALUE, "video", "frames 3"),
        (dict(video=zeros(2, 3, 4, 20, 55)), VALUE, "video", "height 20"),
        (dict(video=zeros(2, 3, 4, 21, 54)), VALUE, "video", "width 54"),
        (dict(video=zeros(2, 3, 4, 0, 55)), VALUE, "video", "height 0"),
        (dict(keep_idx=index().float()), TYPE, "keep_idx", "torch.float32"),
        (dict(keep_idx=index()[0]), VALUE, "keep_idx", "shape (17,)"),
        (dict(keep_idx=index(rows=3)), VALUE, "keep_idx", "3 rows"),
        (dict(keep_idx=index((16, 154))), VALUE, "keep_idx", "values from 0 to 154"),
        (dict(keep_idx=index((0, -1))), VALUE, "keep_idx", "values from -1 to 16"),
        (dict(keep_idx=index((16, 3))), VALUE, "keep_idx", "rows with repeated indices"),
        (dict(keep_idx=META), VALUE, "keep_idx", "a tensor on meta"),
        (dict(weight=zeros(33, 90)), VALUE, "weight", "shape (33, 90)"),
        (dict(weight=zeros(33, 3, 2, 3, 5, dtype=torch.int8)), TYPE, "weight", "torch.int8"),
        (dict(bias=zeros(32)), VALUE, "bias", "shape (32,)"),
        (dict(bias=zeros(33, dtype=HALF)), TYPE, "bias", "torch.float16"),
        (dict(pos_embed=zeros(153, 33)), VALUE, "pos_embed", "shape (153, 33)"),
        (dict(pos_embed=zeros(1, 154, 33)), VALUE, "pos_embed", "shape (1, 154, 33)"),
        (dict(mean=(0.5, 0.5, 0.5)), VALUE, "mean and std", "std=None"),
        (dict(mean=(0.5, 0.5), std=(1.0, 1.0, 1.0)), VALUE, "mean", "(0.5, 0.5)"),
        (dict(mean=(0.5, 0.5, 0.5), std=(1.0, 1.0)), VALUE, "std", "(1.0, 1.0)"),
        (dict(mean=(0.5, 0.5, 0.5), std=(1.0, 0.0, 1.0)), VALUE, "std", "(1.0, 0.0, 1.0)"),
        (dict(mean=0.5, std=1.0), VALUE, "mean", "0.5"),
    ],
    "attention": [
        (dict(qkv=[1.0]), TYPE, "qkv", "list"),
        (dict(qkv=zeros(17, 3, 2, 32)), VALUE, "qkv", "shape (17, 3, 2, 32)"),
        (dict(qkv=zeros(2, 17, 2, 2, 32)), VALUE, "qkv", "shape (2, 17, 2, 2, 32)"),
        (dict(qkv=zeros(2, 17, 3, 2, 32, dtype=torch.uint8)), TYPE, "qkv", "torch.uint8"),
        (dict(qkv=zeros(2, 17, 3, 2, 0)), VALUE, "qkv", "head size 0"),
        (dict(scale=0), VALUE, "scale", "0"),
        (dict(scale=-0.5), VALUE, "scale", "-0.5"),
        (dict(scale=math.nan), VALUE, "scale", "nan"),
        (dict(scale="auto"), VALUE, "scale", "'auto'"),
    ],
    "attention_varlen": [
        (dict(qkv=zeros(2, 17, 3, 2, 32)), VALUE, "qkv", "shape (2, 17, 3, 2, 32)"),
        (dict(qkv=zeros(17, 2, 3, 32)), VALUE, "qkv", "shape (17, 2, 3, 32)"),
        (dict(qkv=zeros(17, 3, 2, 32).long()), TYPE, "qkv", "torch.int64"),
        (dict(cu_seqlens=[0, 17]), TYPE, "cu_seqlens", "list"),
        (dict(cu_seqlens=torch.tensor([0.0, 17.0])), TYPE, "cu_seqlens", "torch.float32"),
        (dict(cu_seqlens=torch.tensor([[0, 17]])), VALUE, "cu_seqlens", "shape (1, 2)"),
        (dict(cu_seqlens=torch.tensor([], dtype=torch.int32)), VALUE, "cu_seqlens", "no values"),
        (dict(cu_seqlens=torch.tensor([1, 17])), VALUE, "cu_seqlens", "offsets from 1 to 17"),
        (dict(cu_seqlens=torch.tensor([0, 16])), VALUE, "cu_seqlens", "offsets from 0 to 16"),
        (dict(cu_seqlens=torch.tensor([0, 9, 8, 17])), VALUE, "cu_seqlens", "offsets from 0 to 17"),
        (dict(cu_seqlens=META[0]), VALUE, "cu_seqlens", "a tensor on meta"),
        (dict(max_seqlen=11), VALUE, "max_seqlen", "11"),
        (dict(max_seqlen=-1), VALUE, "max_seqlen", "-1"),
        (dict(max_seqlen=12.0), VALUE, "max_seqlen", "12.0"),
        (dict(scale=0.0), VALUE, "scale", "0.0"),
    ],
    "add_layer_norm": [
        (dict(x=zeros(33)), VALUE, "x", "shape (33,)"),
        (dict(x=zeros(3, 33)), VALUE, "residual", "shape (3, 17, 33)"),
        (dict(x=zeros(3, 17, 33).int()), TYPE, "x", "torch.int32"),
        (dict(x=None), TYPE, "x", "NoneType"),
        (dict(residual=zeros(3, 16, 33)), VALUE, "residual", "shape (3, 16, 33)"),
        (dict(residual=zeros(1, 17, 33)), VALUE, "residual", "shape (1, 17, 33)"),  # nothing is broadcast
        (dict(residual=zeros(3, 17, 33).bool()), TYPE, "residual", "torch.bool"),
        (dict(weight=zeros(32)), VALUE, "weight", "shape (32,)"),
        (dict(weight=None), TYPE, "weight", "NoneType"),
        (dict(bias=zeros(1, 33)), VALUE, "bias", "shape (1, 33)"),
        (dict(bias=zeros(33, device="meta")), VALUE, "bias", "a tensor on meta"),
        (dict(layer_scale=zeros(1)), VALUE, "layer_scale", "shape (1,)"),
        (dict(layer_scale=0.1), TYPE, "layer_scale", "float"),
        (dict(row_scale=zeros(2)), VALUE, "row_scale", "shape (2,)"),
        (dict(row_scale=zeros(3, 1, 1)), VALUE, "row_scale", "shape (3, 1, 1)"),
        (dict(x_bias=zeros(32)), VALUE, "x_bias", "shape (32,)"),
        (dict(x_bias=zeros(33).long()), TYPE, "x_bias", "torch.int64"),
        (dict(residual=None, row_scale=None, x_bias=None), VALUE, "layer_scale", "a tensor"),
        (dict(residual=None, layer_scale=None, x_bias=None), VALUE, "row_scale", "a tensor"),
        (dict(residual=None, layer_scale=None, row_scale=None), VALUE, "x_bias", "a tensor"),
        (dict(eps=0.0), VALUE, "eps", "0.0"),
        (dict(eps=None), VALUE, "eps", "None"),
    ],
    "bias_gelu": [
        (dict(x=1.0), TYPE, "x", "float"),
        (dict(x=zeros(17, 33).long()), TYPE, "x", "torch.int64"),
        (dict(x=zeros(())), VALUE, "x", "a scalar"),
        (dict(bias=zeros(17)), VALUE, "bias", "shape (17,)"),
        (dict(bias=zeros(1)), VALUE, "bias", "shape (1,)"),
        (dict(bias=zeros(1, 33)), VALUE, "bias", "shape (1, 33)"),
        (dict(bias=None), TYPE, "bias", "NoneType"),
        (dict(bias=zeros(33, device="meta")), VALUE, "bias", "a tensor on meta"),
    ],
    "linear_gelu": [
        (dict(x=None), TYPE, "x", "NoneType"),
        (dict(x=zeros(2, 17, 24).int()), TYPE, "x", "torch.int32"),
        (dict(x=zeros(())), VALUE, "x", "a scalar"),
        (dict(x=zeros(2, 17, 23)), VALUE, "weight", "shape (40, 24)"),
        (dict(weight=zeros(40)), VALUE, "weight", "shape (40,)"),
        (dict(weight=zeros(40, 24).half()), TYPE, "weight", "torch.float16"),
        (dict(weight=zeros(40, 24, device="meta")), VALUE, "weight", "a tensor on meta"),
        (dict(bias=None), TYPE, "bias", "NoneType"),
        (dict(bias=zeros(24)), VALUE, "bias", "shape (24,)"),
        (dict(bias=zeros(40).double()), TYPE, "bias", "torch.float64"),
        (dict(bias=zeros(40, device="meta")), VALUE, "bias", "a tensor on meta"),
    ],
    "scatter_tokens": [
        (dict(visible=zeros(17, 33)), VALUE, "visible", "shape (17, 33)"),
        (dict(visible=zeros(2, 17, 33).char()), TYPE, "visible", "torch.int8"),
        (dict(keep_idx=index(count=16)), VALUE, "keep_idx", "shape (2, 16)"),
        (dict(keep_idx=index().bool()), TYPE, "keep_idx", "torch.bool"),
        (dict(keep_idx=index((16, 154))), VALUE, "keep_idx", "values from 0 to 154"),
        (dict(keep_idx=index((16, 15))), VALUE, "keep_idx", "rows that are not strictly ascending"),  # repeated
        (dict(keep_idx=index().flip(1)), VALUE, "keep_idx", "rows that are not strictly ascending"),
        (dict(mask_token=zeros(1, 1, 33)), VALUE, "mask_token", "shape (1, 1, 33)"),
        (dict(mask_token=zeros(32)), VALUE, "mask_token", "shape (32,)"),
        (dict(pos_embed=zeros(154, 32)), VALUE, "pos_embed", "shape (154, 32)"),
        (dict(pos_embed=None), TYPE, "pos_embed", "NoneType"),
    ],
    "ragged gather_patch_embed": [
        (dict(keep_idx=index(count=17)), VALUE, "keep_idx", "shape (2, 17)"),
        (dict(clip_idx=index()[0][:16]), VALUE, "clip_idx", "shape (16,)"),
        (dict(clip_idx=index()[0].float()), TYPE, "clip_idx", "torch.float32"),
        (dict(clip_idx=index(rows=1)), VALUE, "clip_idx", "shape (1, 17)"),
        (dict(clip_idx=index()[0]), VALUE, "clip_idx", "values from 0 to 16"),
        (dict(clip_idx=META[0]), VALUE, "clip_idx", "a tensor on meta"),
        (dict(clip_idx=None), VALUE, "keep_idx", "shape (17,)"),
        (dict(keep_idx=index((16, 3))[1], clip_idx=index()[0] * 0), VALUE, "keep_idx", "rows with repeated indices"),
    ],
    "ragged scatter_tokens": [
        (dict(visible=zeros(2, 17, 33)), VALUE, "visible", "shape (2, 17, 33)"),
        (dict(keep_idx=index()[0][:16]), VALUE, "keep_idx", "shape (16,)"),
        (dict(keep_idx=index()[0].flip(0)), VALUE, "keep_idx", "rows that are not strictly ascending"),
        (dict(cu_seqlens=[0, 17]), TYPE, "cu_seqlens", "list"),
        (dict(cu_seqlens=torch.tensor([], dtype=torch.int32)), VALUE, "cu_seqlens", "no values"),
        (dict(cu_seqlens=torch.tensor([0, 9, 8, 17])), VALUE, "cu_seqlens", "offsets from 0 to 17"),
        (dict(cu_seqlens=torch.tensor([0, 16])), VALUE, "cu_seqlens", "offsets from 0 to 16"),
        (dict(cu_seqlens=META[0]), VALUE, "cu_seqlens", "a tensor on meta"),
        (dict(cu_seqlens=None), VALUE, "visible", "shape (17, 33)"),
    ],
    "ragged masked_patch_loss": [
        (dict(pixels=zeros(1, 17, 90)), VALUE, "pixels", "shape (1, 17, 90)"),
        (dict(drop_idx=index(rows=3)), VALUE, "drop_idx", "shape (3, 17)"),
        (dict(clip_idx=index()[0]), VALUE, "clip_idx", "values from 0 to 16"),
        (dict(clip_idx=None), VALUE, "drop_idx", "shape (17,)"),
    ],
    "masked_patch_loss": [
        (dict(patch_size=(3, 5)), VALUE, "patch_size", "(3, 5)"),
        (dict(patch_size=(2, 3, 0)), VALUE, "patch_size", "(2, 3, 0)"),
        (dict(patch_size=(2, 3.0, 5)), VALUE, "patch_size", "(2, 3.0, 5)"),
        (dict(patch_size=(1, 1, 1)), VALUE, "patch_size", "(1, 1, 1)"),  # no variance of one value
        (dict(patch_size=16), VALUE, "patch_size", "16"),
        (dict(pixels=zeros(2, 17, 30)), VALUE, "pixels", "shape (2, 17, 30)"),
        (dict(pixels=zeros(2, 16, 90)), VALUE, "pixels", "shape (2, 16, 90)"),
        (dict(pixels=zeros(2, 17, 90).int()), TYPE, "pixels", "torch.int32"),
        (dict(video=zeros(*CLIP[1:])), VALUE, "video", "shape (3, 4, 21, 55)"),
        (dict(video=zeros(2, 3, 4, 21, 56)), VALUE, "video", "width 56"),
        (dict(video=zeros(*CLIP, device="meta")), VALUE, "pixels", f"a tensor on {DEVICE}"),
        (dict(drop_idx=index(rows=1)), VALUE, "drop_idx", "1 rows"),
        (dict(drop_idx=index((16, 999))), VALUE, "drop_idx", "values from 0 to 999"),
        (dict(drop_idx=index().half()), TYPE, "drop_idx", "torch.float16"),
        (dict(std=(1.0, 1.0, 1.0)), VALUE, "mean and std", "mean=None"),
        (dict(mean=(0.0, 0.0, 0.0), std=(1.0, -1.0, 1.0)), VALUE, "std", "(1.0, -1.0, 1.0)"),
    ],
}

CASES = [
    pytest.param(name, *row, id=f"{name}-{number}") for name, rows in BAD.items() for number, row in enumerate(rows)
]


@pytest.mark.parametrize(("name", "changes", "error", "argument", "got"), CASES)
def test_bad_call(name, changes, error, argument, got):
    """Also values of indices, which are read on a GPU only on request."""
    op, operands = call(name)
    with (
        kernels.debug_checks(),
        pytest.raises(error, match=rf"^{argument}: got .*{re.escape(got)}.*, expected .+") as caught,
    ):
        op(**{**operands, **changes})
    assert caught.type is error


def test_unsorted_rows_are_no_error():
    op, operands = call("gather_patch_embed")
    op(**operands | dict(keep_idx=index().flip(1)))


@pytest.mark.parametrize("name", OPS)
def test_ordinary_call(name):
    """What the bad calls change one argument of is itself accepted."""
    op, operands = call(name)
    op(**operands)

"""attention, attention_varlen and attention_kvpacked in Triton: how the backward pass is launched.

Two kernels: one for the gradient of the queries, which also stores delta for the other, and one for those of keys and
values. Or, where the launch choice of the latter says ``fused``, one for delta and one for all gradients
(`attention_backward_fused`).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .attention_backward_fused import attention_backward_delta_kernel, attention_backward_fused_kernel
from .attention_backward_kernels import attention_backward_key_value_kernel, attention_backward_query_kernel
from .attention_tiles import (
    ANY,
    LOG2_E,
    Tables,
    addressable,
    addresses,
    by_shape,
    described,
    layout,
    lse_row,
    shape_constants,
    tail,
)
from .launch import DENSE, Block, Choice, Launch, LaunchConfig, choose, like, scattered
from .op import Run
from .sum_parts import sum_parts

# About as many programs of the fused kernel as a GPU runs at a time: 3 on each of an H200's 132 multiprocessors. That
# is the distance between the programs that store ds of a head and those that read it.
PROGRAMS = 396

# The backward pass in several ways, in microseconds on an H200 by arithmetic: 784 tokens, 384 heads of 64 or 256 of 128
# (1568 tokens: 4 times as much). Products at 365 TFLOP/s, which narrow tiles of 4 warps reach there; 5.5 TB/s from L2,
# 4.26 from memory. The ways differ in how dq, the gradient of the queries, is summed over tiles of keys:  d 64   d 128
#   two kernels, seven products: each computes ds, the gradient of the scores (measured at 64: 581)        579     773
#   fused, five products: ds is stored, 0.9 GB at 64, most of it in L2, and read for dq                    466     607
#   one kernel stores a dq for each 128 keys, a second one adds these up                                   550     733
#   one kernel adds the dq of each 128 keys to a sum in memory, in turn; without the waiting               414     552
#   one program a head adds up dq in memory: 2 waves of programs, not 1.45; 106 and 212 MB in use          569     569
# In turn, a program would wait in each step, of 6600 cycles, for another one and then for its own load of dq, 1500 or
# more. In the fused kernel it waits once. As no program that waits has run on a GPU yet, two kernels are the default.

# See `Tables`. BLOCK_M is queries, BLOCK_N keys; in QUERY queries are resident, in KEY_VALUE keys and values.
# Compiled clean by Triton 3.6 and 3.9, not measured, except sm_90, 64, 784 tokens: H200, Triton 3.6, bc236cf, both
# kernels 581 us, 674 with 128-row tiles of 8 warps (only that of queries: 658); values compared there at 663e046. More
# tokens are more of the same tiles, and larger heads have 2 programs of 4 warps on an SM, not 1 of 8.
QUERY: Tables = ({
    "sm_80": {(64, 64): (64, 64, 128, 4, 2), (64, ANY): (128, 64, 128, 8, 3), (128, ANY): (128, 32, 64, 8, 2)},
    "sm_90": {(64, 64): (64, 64, 128, 4, 2), (64, ANY): (64, 32, 64, 4, 3), (128, ANY): (64, 32, 128, 4, 3)},
    "sm_100": {(64, 64): (64, 64, 128, 4, 2), (64, ANY): (128, 64, 128, 8, 3),
               (95, ANY): (64, 64, 128, 4, 2), (96, ANY): (64, 32, 128, 4, 2), (128, ANY): (128, 64, 128, 8, 2)},
    "": {(128, ANY): (64, 32, 64, 4, 1)},
}, {
    "sm_80": {(32, ANY): (64, 32, 32, 4, 1), (64, ANY): (64, 16, 32, 8, 1, False),
              (95, ANY): (16, 32, 32, 4, 1, False), (128, ANY): (32, 16, 32, 8, 1, False)},
    "sm_90": {(32, ANY): (64, 32, 32, 4, 1), (64, ANY): (64, 32, 32, 4, 1, False),
              (128, ANY): (64, 16, 32, 4, 1, False)},
    "sm_100": {(32, ANY): (64, 32, 32, 4, 1), (64, ANY): (32, 16, 32, 8, 1, False),
               (128, ANY): (64, 16, 32, 8, 1, False)},
    "": {(128, ANY): (32, 32, 32, 4, 1, False)},
})  # fmt: skip
KEY_VALUE: Tables = ({
    "sm_80": {(64, 64): (32, 64, 64, 4, 2), (32, ANY): (64, 128, 128, 8, 3), (64, ANY): (32, 128, 64, 8, 3),
              (80, ANY): (16, 64, 64, 4, 2), (96, ANY): (16, 128, 128, 8, 2), (128, ANY): (16, 64, 32, 4, 2, False)},
    "sm_90": {(64, 64): (64, 64, 128, 4, 2), (64, ANY): (32, 64, 64, 4, 3), (128, ANY): (32, 64, 128, 4, 3)},
    "sm_100": {(64, 64): (32, 64, 64, 4, 2), (64, ANY): (64, 128, 128, 8, 3), (80, ANY): (64, 64, 128, 8, 2),
               (95, ANY): (32, 64, 128, 4, 2), (128, ANY): (64, 64, 128, 8, 2)},
    "": {(32, ANY): (32, 64, 32, 4, 1), (64, ANY): (32, 128, 64, 8, 1), (128, ANY): (16, 32, 32, 4, 1, False)},
}, {
    "sm_80": {(32, ANY): (32, 64, 32, 8, 1, False), (64, ANY): (16, 32, 32, 8, 1, False),
              (128, ANY): (32, 16, 32, 8, 1, False)},
    "sm_90": {(32, ANY): (32, 64, 32, 4, 1, False), (64, ANY): (32, 64, 32, 8, 1, False),
              (128, ANY): (32, 16, 32, 8, 1, False)},
    "sm_100": {(32, ANY): (32, 64, 32, 4, 1, False), (64, ANY): (32, 64, 32, 8, 1, False),
               (80, ANY): (32, 16, 32, 4, 1, False), (96, ANY): (16, 16, 32, 4, 1, False),
               (128, ANY): (16, 16, 64, 8, 1, False)},
    "": {(128, ANY): (32, 32, 32, 4, 1, False)},
})  # fmt: skip
config_query = partial(by_shape, QUERY)
config_key_value = partial(by_shape, KEY_VALUE)


def gradients(grad, grad_lse, qkv, bias, out, lse, *options: Any) -> tuple[Tensor | None, ...]:
    """Memory for the gradients of qkv and the bias."""
    return _memory(options[-1][-1], bias, qkv)


def backward(grad, grad_lse, qkv, bias, out, lse, scale, save, needs) -> Run:
    """The gradients of qkv and bias. Those of out and lse are None if that output was not used."""
    run = _run(grad, grad_lse, qkv, None, None, bias, out, lse, qkv.shape[1], qkv.shape[1], scale, needs[-1])
    return lambda grad, grad_lse, qkv, bias, out, lse: run(grad, grad_lse, qkv, None, None, bias, out, lse)


def gradients_varlen(grad, grad_lse, qkv, cu_seqlens, bias, out, lse, *options: Any) -> tuple[Tensor | None, ...]:
    """Memory for the gradients of qkv and the bias."""
    return _memory(options[-1][-1], bias, qkv)


def backward_varlen(grad, grad_lse, qkv, cu_seqlens, bias, out, lse, max_seqlen, scale, save, needs) -> Run:
    """`backward` for ragged clips."""
    run = _run(grad, grad_lse, qkv, None, cu_seqlens, bias, out, lse, max_seqlen, max_seqlen, scale, needs[-1])

    def call(grad, grad_lse, qkv, cu_seqlens, bias, out, lse) -> tuple[Tensor | None, ...]:
        return run(grad, grad_lse, qkv, None, cu_seqlens, bias, out, lse)

    return call


def gradients_kvpacked(grad, grad_lse, q, kv, bias, out, lse, *options: Any) -> tuple[Tensor | None, ...]:
    """Memory for the gradients of q, kv and the bias."""
    return _memory(options[-1][-1], bias, q, kv)


def backward_kvpacked(grad, grad_lse, q, kv, bias, out, lse, scale, save, needs) -> Run:
    """`backward` for queries apart from keys and values; both gradients are computed, wanted or not."""
    run = _run(grad, grad_lse, q, kv, None, bias, out, lse, q.shape[1], kv.shape[1], scale, needs[-1])
    return lambda grad, grad_lse, q, kv, bias, out, lse: run(grad, grad_lse, q, kv, None, bias, out, lse)


def _memory(wanted: bool, bias: Tensor | None, *operands: Tensor) -> tuple[Tensor | None, ...]:
    """Contiguous memory for the gradients of the operands, and for that of the bias if it is ``wanted``."""
    of_bias = torch.empty_like(bias, memory_format=DENSE) if wanted and bias is not None else None
    return *(torch.empty_like(x, memory_format=DENSE) for x in operands), of_bias


def _zero(out: Tensor) -> Tensor:
    """The gradient of an output that was not used."""
    return torch.zeros((), dtype=out.dtype, device=out.device).expand(out.shape)


class _Call(NamedTuple):
    """What the launches of a call share while it is planned.

    Attributes:
        every: The number of heads of all clips.
        copies: Whether cu_seqlens and the bias must be copied first.
    """

    query: Tensor
    key_value: Tensor
    grad: Tensor
    queries: int
    keys: int
    every: int
    ragged: bool
    copies: tuple[bool, bool]
    addressing: tuple[int, ...]
    constants: Mapping[str, Any]
    vector: int

    def with_bias(self, biased: Tensor) -> "_Call":
        """The same call with other queries (..., H, d), to which the bias was added."""
        *_, row, head = (step // self.vector for step in biased.stride()[:-1])
        strides = (0 if self.ragged else self.queries * row, row, head)
        return self._replace(query=biased, addressing=(self.addressing[0], *strides, *self.addressing[4:]))

    def choose(self, name: str, config: Callable[..., LaunchConfig]) -> Choice:
        size = self.query.shape[-1]
        return choose(
            f"attention_backward_{name}", config, self.query, head_dim=size, tokens=self.keys, ragged=self.ragged
        )

    def launch(
        self,
        kernel: Any,
        choice: Choice,
        programs: int,
        numbers: tuple[float, ...],
        copies: tuple[bool, ...],
        blocks: dict[int, Block],
        **constants: Any,
    ) -> Launch:
        constants |= {**self.constants, **shape_constants(self.query, choice.config, self.vector)}
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        return Launch(kernel, (programs,), numbers, choice, copies, blocks, **constants)

    def blocks(self, tile: LaunchConfig, rows: int, *tensors: Tensor) -> dict[int, Block]:
        """Descriptors of ``tensors``, wide and narrow (see `load_described`), from operand 2 on; {} if not possible."""
        widths = list(dict.fromkeys(shape_constants(self.query, tile, 1)["WIDTHS"]))
        if not (tile.tma and tile.resident) or len(widths) > 2:
            return {}
        size, found = self.query.shape[-1], dict[int, Block]()
        for at, x in zip(range(2, 6, 2), tensors, strict=False):
            x = x[None] if self.ragged else x
            x = x.unflatten(-1, (-1, size)) if x.ndim == 3 else x  # a gradient (B, N, H * d)
            block = described((x[:, :, None] if x.ndim == 4 else x).permute(0, 2, 3, 1, 4))
            if block is None:
                return {}
            found |= {at + i: block(rows, width) for i, width in enumerate(widths)}
        return found


def _described(blocks: dict[int, Block], *tensors: Tensor) -> tuple[Tensor | None, ...]:
    """The kernel's operands from 2 on: each of ``tensors`` twice, with None where there is no descriptor."""
    return tuple(tensors[i // 2] if i + 2 in blocks else None for i in range(2 * len(tensors)))


Passes = Callable[..., None]


def _two_kernels(
    call: _Call, then: _Call, choice: Choice, ends: tuple[float, ...], vectors: tuple[bool, ...]
) -> tuple[Passes, int]:
    """The launches, and how many tiles of queries a clip has. ``then``: the call with the last kernel's queries."""
    other = call.choose("query", config_query)
    tile = other.config
    tiles = triton.cdiv(call.queries, tile.block_m)
    blocks = call.blocks(tile, tile.block_n, call.key_value)
    query = call.launch(
        *(attention_backward_query_kernel, other, tiles * call.every),
        (call.queries, call.keys, tiles, *call.addressing, *ends),
        (False, False, False, False, *call.copies, vectors[0], False, *vectors[1:]),
        blocks,
        TAIL=tail(call.keys, tile.block_n, call.ragged, tile.resident),
    )
    tile = choice.config
    key_tiles = triton.cdiv(call.keys, tile.block_n)
    other_blocks = then.blocks(tile, tile.block_m, then.query, then.grad)
    key_value = then.launch(
        *(attention_backward_key_value_kernel, choice, key_tiles * call.every),
        (call.queries, call.keys, key_tiles, *then.addressing, *ends),
        (*(False,) * 6, call.copies[0], False, vectors[1]),
        other_blocks,
        TAIL=tail(call.queries, tile.block_m, call.ragged, tile.resident),
    )

    def passes(q, kv, cu_seqlens, bias, biased, out, grad, lse, grad_lse, dq, dkv, part) -> None:
        delta = torch.empty_like(lse)
        query(q, kv, *_described(blocks, kv), cu_seqlens, bias, out, grad, lse, grad_lse, delta, biased, dq, part)
        q = q if biased is None else biased
        key_value(q, kv, *_described(other_blocks, q, grad), cu_seqlens, grad, lse, delta, dkv)

    return passes, tiles


def _fused(
    call: _Call, then: _Call, choice: Choice, ends: tuple[float, ...], vectors: tuple[bool, ...]
) -> tuple[Passes, int]:
    """The launches, and how many tiles of queries a clip has. ``then``: the call with the last kernel's queries."""
    tile, every = choice.config, call.every
    tiles = triton.cdiv(max(call.queries, call.keys), tile.block_n)
    lag = min(every, triton.cdiv(PROGRAMS, tiles))
    ring = min(every, 2 * lag)
    heads, grad_clip, grad_row, lse_stride = call.addressing[0], *call.addressing[-3:]
    before = call.launch(
        *(attention_backward_delta_kernel, choice, tiles * every),
        (call.queries, tiles, heads, *call.addressing[1:4], grad_clip, grad_row, lse_stride, every),
        (vectors[0], False, *call.copies, False, vectors[2]),
        {},
    )
    scores_row = tiles * tile.block_n
    blocks = then.blocks(tile, tile.block_m, then.query, then.grad)
    main = then.launch(
        *(attention_backward_fused_kernel, choice, tiles * (every + lag)),
        (call.queries, call.keys, tiles, *then.addressing, scores_row, call.keys * scores_row, every, lag, ring, *ends),
        (*(False,) * 6, call.copies[0], False, vectors[1]),
        blocks,
        TAIL=tail(call.queries, tile.block_m, call.ragged, tile.resident),
        KEY_TAIL=tail(call.keys, tile.block_n, call.ragged, True),
    )
    device = call.query.device
    scores = like((ring, call.keys, scores_row), call.query.dtype, device)
    counters = like((1 + 2 * every,), torch.int32, device)

    def passes(q, kv, cu_seqlens, bias, biased, out, grad, lse, grad_lse, dq, dkv, part) -> None:
        delta, count = torch.empty_like(lse), torch.empty_like(counters, memory_format=DENSE)
        ds = torch.empty_like(scores, memory_format=DENSE)
        before(out, q, cu_seqlens, bias, grad, grad_lse, delta, count, biased, part)
        q = q if biased is None else biased
        main(q, kv, *_described(blocks, q, grad), cu_seqlens, grad, lse, delta, dq, dkv, ds, count, part)

    return passes, tiles


def _run(
    grad, grad_lse, query, key_value, cu_seqlens, bias, out, lse, queries: int, keys: int, scale: float, wanted: bool
) -> Run:
    """A function of these tensors that returns the gradients of query, key_value and, if it is ``wanted``, the bias.

    ``query`` is a qkv if ``key_value`` is None. ``queries`` and ``keys`` are the numbers of each clip, with
    ``cu_seqlens`` those of the longest. Hooks on saved tensors may have changed the strides of what was saved.
    """
    wanted = wanted and bias is not None
    ragged, packed = cu_seqlens is not None, key_value is None
    if query.numel() == 0:

        def nothing(grad, grad_lse, query, key_value, cu_seqlens, bias, *rest: Tensor) -> tuple[Tensor | None, ...]:
            memory = _memory(wanted, bias, query) if packed else _memory(wanted, bias, query, key_value)
            return tuple(None if value is None else value.zero_() for value in memory)

        return nothing
    heads, head_dim = query.shape[-2:]
    clips = len(cu_seqlens) - 1 if ragged else query.shape[0]
    copied, vector, strides = layout(query, key_value, ragged)
    grad = _zero(out) if grad is None else grad
    grad_copied, grad_vector, grad_strides = addresses(grad, head_dim, ragged)
    call = _Call(
        *(query, query if packed else key_value, grad, queries, keys, heads * clips, ragged),
        (scattered(cu_seqlens), scattered(bias)),
        (heads, *strides, *grad_strides, lse.shape[-1]),
        dict(KEY_PART=int(packed), VARLEN=ragged, GRAD_VEC=grad_vector, VEC=vector, ROW=lse_row(head_dim)),
        vector,
    )
    shape = (*query.shape[: 1 if ragged else 2], heads, lse_row(head_dim))
    then, biased = call, None
    if bias is not None:
        biased = like(shape, query.dtype, query.device)
        then = call.with_bias(torch.empty(shape, dtype=query.dtype, device=query.device)[..., :head_dim])
    choice = call.choose("key_value", config_key_value)
    vectors = (scattered(out), scattered(lse), scattered(grad_lse))
    make = _fused if choice.config.fused else _two_kernels
    passes, tiles = make(call, then, choice, (0, scale, scale * LOG2_E), vectors)
    del call, then
    part = like((clips * tiles, 3 * heads * head_dim), torch.float32, query.device) if wanted else None
    add_up = sum_parts(query, clips * tiles, 3 * heads * head_dim) if wanted else None

    def run(grad, grad_lse, query, key_value, cu_seqlens, bias, out, lse) -> tuple[Tensor | None, ...]:
        if grad is None:
            grad = _zero(out)
        if grad_copied:
            grad = grad.contiguous()
        dquery, dbias = torch.empty_like(query, memory_format=DENSE), None
        dkey_value = dquery if packed else torch.empty_like(key_value, memory_format=DENSE)
        query, key_value = addressable(query, key_value, copied)
        sums = None if part is None else torch.empty_like(part, memory_format=DENSE)
        with_bias = None if biased is None else torch.empty_like(biased, memory_format=DENSE)
        passes(query, key_value, cu_seqlens, bias, with_bias, out, grad, lse, grad_lse, dquery, dkey_value, sums)
        if add_up is not None:
            dbias = torch.empty_like(bias, memory_format=DENSE)
            add_up(sums, dbias)
        return (dquery, dbias) if packed else (dquery, dkey_value, dbias)

    return run

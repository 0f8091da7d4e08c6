"""attention in bfloat16 on a CPU, without gradients: blocks of scores that stay in the cache, products by oneDNN.

PyTorch's flash attention has its products done by MKL, which on CPUs with bfloat16 instructions but without matrix
tiles (AMX) runs them no faster than float32 ones; oneDNN uses these instructions. Here a block of scores is written
out, as the textbook has it, but never all of them. Scores are rounded to bfloat16, as they are where plain PyTorch
writes them out (the original under autocast); softmax and all sums are in float32.

With gradients PyTorch's is as fast: it keeps what would have to be computed again here.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import flops

# Scores of a block: 2 MB, so that they are still in the cache when the second product reads them.
BLOCK = 2**20
# CPUs where blocks are faster than PyTorch's own: 1.3 to 1.7 times, measured on a Zen 4.
PREFERRED = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def takes(qkv: Tensor, dtype: torch.dtype) -> bool:
    """Whether attention over ``qkv``, worked in ``dtype``, is done here."""
    on_cpu = PREFERRED and qkv.device.type == "cpu" and dtype == torch.bfloat16 and qkv.numel() > 0
    return on_cpu and not (torch.is_grad_enabled() and qkv.requires_grad)


def attention(qkv: Tensor, scale: float) -> Tensor:
    """(B, N, 3, H, d) bfloat16 -> (B, N, H * d)."""
    # Traced through, the blocks would be hundreds of nodes a layer.
    return _opaque(qkv, scale) if torch.compiler.is_compiling() else _in_blocks(qkv, scale)


def _in_blocks(qkv: Tensor, scale: float) -> Tensor:
    batch, tokens, _, heads, size = qkv.shape
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, d) each, views
    out = qkv.new_empty(batch, tokens, heads, size)
    # Whole heads, as many as fit in a block; or a part of the queries of one head.
    rows = min(tokens, max(BLOCK // max(tokens, 1), 1))
    together = max(BLOCK // max(rows * tokens, 1), 1)
    for clip in range(batch):
        for head in range(0, heads, together):
            part = slice(head, head + together)
            k, v = key[clip, part].mT, value[clip, part]
            for row in range(0, tokens, rows):
                queries = slice(row, row + rows)
                scores = (query[clip, part, queries] * scale) @ k
                out[clip, queries, part] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out.flatten(2)


@torch.library.custom_op("mar_fast::cpu_attention", mutates_args=())
def _opaque(qkv: Tensor, scale: float) -> Tensor:
    return _in_blocks(qkv, scale)


@_opaque.register_fake
def _shape(qkv: Tensor, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[3] * qkv.shape[4])


register_flop_formula(torch.ops.mar_fast.cpu_attention)(flops.attention)

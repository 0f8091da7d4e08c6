"""attention in bfloat16 on a CPU, without gradients: blocks of scores that stay in the cache, products by oneDNN.

PyTorch's flash attention computes its products with MKL, which on CPUs with bfloat16 instructions but without matrix
tiles (AMX) runs them no faster than float32 ones; oneDNN uses these instructions. Here scores are stored, but only a
block at a time. They are rounded to bfloat16, as in attention written out in PyTorch under autocast; softmax and all
sums are in float32. With gradients PyTorch's own attention is as fast: it saves what this would have to recompute.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import flops
from .library import NAMESPACE

# Scores in a block: 2 MB, still in the cache when the second product reads them.
BLOCK = 2**20
# CPUs where blocks are faster than PyTorch's own: 1.3 to 1.7 times, measured on a Zen 4.
PREFERRED = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()


def takes(qkv: Tensor, dtype: torch.dtype) -> bool:
    """Whether attention on ``qkv``, computed in ``dtype``, runs here; exported graphs have plain ops instead."""
    if torch.compiler.is_exporting():
        return False
    on_cpu = PREFERRED and qkv.device.type == "cpu" and dtype == torch.bfloat16 and qkv.numel() > 0
    return on_cpu and not (torch.is_grad_enabled() and qkv.requires_grad)


def attention(qkv: Tensor, scale: float) -> Tensor:
    """(B, N, 3, H, d) bfloat16 -> (B, N, H * d)."""
    # Traced, the blocks would become hundreds of nodes a layer.
    return _opaque(qkv, scale) if torch.compiler.is_compiling() else _in_blocks(qkv, scale)


def _in_blocks(qkv: Tensor, scale: float) -> Tensor:
    batch, tokens, _, heads, head_dim = qkv.shape
    query, key, value = qkv.permute(2, 0, 3, 1, 4)  # (B, H, N, d) each, views
    out = qkv.new_empty(batch, tokens, heads, head_dim)
    # As many whole heads as fit in a block, or some of the queries of one head.
    block_rows = min(tokens, max(BLOCK // max(tokens, 1), 1))
    block_heads = max(BLOCK // max(block_rows * tokens, 1), 1)
    for clip in range(batch):
        for head in range(0, heads, block_heads):
            part = slice(head, head + block_heads)
            k, v = key[clip, part].mT, value[clip, part]
            for row in range(0, tokens, block_rows):
                rows = slice(row, row + block_rows)
                scores = (query[clip, part, rows] * scale) @ k
                out[clip, rows, part] = (scores.softmax(-1) @ v).transpose(0, 1)
    return out.flatten(2)


@torch.library.custom_op(f"{NAMESPACE}::cpu_attention", mutates_args=())
def _opaque(qkv: Tensor, scale: float) -> Tensor:
    return _in_blocks(qkv, scale)


@_opaque.register_fake
def _shape(qkv: Tensor, scale: float) -> Tensor:
    return qkv.new_empty(qkv.shape[0], qkv.shape[1], qkv.shape[3] * qkv.shape[4])


register_flop_formula(getattr(torch.ops, NAMESPACE).cpu_attention, get_raw=True)(flops.attention)

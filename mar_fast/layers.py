"""What encoder, decoder and classifier are made of: constants, attention, MLP and the block, on the ops of kernels/.

In comments: B clips, L tokens in the grid, N visible, M dropped, D channels of a token. Where clips keep different
numbers of tokens these are packed, (total, D) and not (B, N, D), and `Segments` say where clips begin and end.
"""

import itertools
import math
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple, TypeGuard
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
import torch.nn.modules.module as hooks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from .kernels import (
    add_layer_norm,
    add_layer_norm_rows,
    attention,
    attention_kvpacked,
    attention_varlen,
    bias_gelu,
    bias_gelu_rows,
    linear_gelu,
    mlp,
)
from .kernels.attention import takes_bias
from .kernels.derived import Derived
from .kernels.device import takes_triton
from .scaled_linear import ScaledLinear
from .token_mask import Segments

# Other types of weight (quantised, sharded) only work inside their own module. torch.export traces with fake tensors.
_PLAIN_TENSORS = (nn.Parameter, Tensor, FakeTensor)
# Hooks of these only record which modules run, or hidden states that transformers was once asked for.
_RECORDERS = ("transformers.utils.output_capturing", "torch.utils.module_tracker")
CHANGED = "layers with hooks or changed parts"


class Fallbacks:
    """Warns once of each sort of layer that a fused op cannot stand for. A copy or a pickle has not warned yet."""

    runner: ClassVar[str] = "each module's own code"

    def __init__(self) -> None:
        self._warned: set[str] = set()
        self._name = str(next(_numbers))
        _fallbacks[self._name] = self

    def __reduce__(self) -> tuple[type["Fallbacks"], tuple[()]]:
        return type(self), ()

    def fuses(self, layer: nn.Module, kind: type[nn.Module], needs_bias: bool = True) -> bool:
        """Whether ``layer`` is `untouched`; if not, a warning says once that such layers run by their own code."""
        if untouched(layer, kind, needs_bias):
            return True
        self.warn_once(CHANGED)
        return False

    def warn_once(self, what: str) -> None:
        """Warn the first time that ``what`` runs by its own code."""
        _warn_once(self._name, what)


_numbers = itertools.count()
_fallbacks = WeakValueDictionary[str, Fallbacks]()


@torch.compiler.assume_constant_result
def _warn_once(name: str, what: str) -> bool:
    """Under torch.compile it runs while the graph is traced, and is no part of it; torch 2.11 takes constants alone."""
    fallbacks = _fallbacks[name]
    if what not in fallbacks._warned:
        fallbacks._warned.add(what)
        warnings.warn(f"mar_fast: {fallbacks.runner} runs {what}", stacklevel=4)
    return True


class Fused(nn.Module):
    """A module that hands weights of its layers to fused ops, where `untouched` allows that; `MAR` shares Fallbacks."""

    def __init__(self) -> None:
        super().__init__()
        self.fallbacks = Fallbacks()


def untouched(module: nn.Module, kind: type[nn.Module], needs_bias: bool = False) -> bool:
    """Whether calling ``module`` does what ``kind`` does with its weight and bias, which then can be used without it.

    It does not with hooks, adapters, parametrizations, another forward, or quantised or sharded weights. Every layer
    asks this in every call: attribute reads only.
    """
    if type(module) is not kind or not own_forward(module) or not unhooked(module):
        return False
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None and type(weight) not in _PLAIN_TENSORS:
        return False
    return not needs_bias if bias is None else type(bias) in _PLAIN_TENSORS


def own_forward(module: nn.Module) -> bool:
    """Whether ``module`` has the forward that its class was written with."""
    kind = type(module)
    forward = kind.forward
    home = getattr(forward, "__globals__", {}).get("__name__", "")  # functools.wraps changes __module__, not this
    if home != kind.__module__:
        # A decorator of the library's own is part of the class.
        library = kind.__module__.partition(".")[0]
        if getattr(forward, "__module__", None) != kind.__module__ or home.partition(".")[0] != library:
            return False
    return "forward" not in module.__dict__ or put_back(module, kind)


def put_back(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether the forward in the instance is that of one of ``kinds``, as ``model.forward = model.forward`` leaves it.

    Exporters and accelerate's ``unwrap_model`` do that after they replaced it for a while.
    """
    forward = module.__dict__.get("forward")
    own = any(getattr(forward, "__func__", None) is kind.forward for kind in kinds)
    return own and getattr(forward, "__self__", None) is module


def unhooked(module: nn.Module) -> bool:
    """Whether ``module`` has no hooks, of its own or of all modules, but those that only record."""
    own = module.__dict__
    found = (
        *(own["_forward_pre_hooks"], own["_forward_hooks"], own["_backward_pre_hooks"], own["_backward_hooks"]),
        *(hooks._global_forward_pre_hooks, hooks._global_forward_hooks),
        *(hooks._global_backward_pre_hooks, hooks._global_backward_hooks),
    )
    if not any(found):
        return True
    return all(getattr(hook, "__module__", None) in _RECORDERS for some in found for hook in some.values())


def in_fp8(layer: nn.Module, needs_bias: bool = False) -> TypeGuard[ScaledLinear]:
    """Whether ``layer`` is an `untouched` one of `mar_fast.quantize`, which takes QuantizedRows too."""
    return untouched(layer, ScaledLinear, needs_bias)


def plain_projection(module: nn.Module) -> bool:
    """Whether ``module`` is an `untouched` convolution over whole patches: what gather_patch_embed computes."""
    if not untouched(module, nn.Conv3d, True):
        return False
    sizes = module.stride, module.padding, module.dilation, module.groups
    return sizes == (module.kernel_size, (0, 0, 0), (1, 1, 1), 1)


def like_weight(x: Tensor, layer: nn.Module) -> Tensor:
    """x in the dtype of the layer's weight; as it is where that is quantised, or no tensor."""
    weight = getattr(layer, "weight", None)
    return x.to(weight.dtype) if isinstance(weight, Tensor) and weight.is_floating_point() else x


class Constant(nn.Module):
    """A tensor given by a formula: not in the state dict, not rounded by ``.bfloat16()``, right after ``to_empty``."""

    def __init__(self, formula: Callable[[], Tensor]) -> None:
        super().__init__()
        self.formula = formula
        self.value: Tensor
        self.register_buffer("value", formula(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Constant":
        super()._apply(fn, recurse)
        self.value = self.formula().to(self.value.device)
        return self


def sinusoid_table(tokens: int, dim: int) -> Tensor:
    """(L, D) float32: angle(p, i) = p / 10000 ** (2 * (i // 2) / D), even columns sin, odd cos; from float64."""
    position = torch.arange(tokens, dtype=torch.float64)[:, None]
    column = torch.arange(dim)
    angle = position / 10000.0 ** (2 * (column // 2).double() / dim)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).float()


def position_table(grid: tuple[int, int, int], made_for: tuple[int, int, int] | None, dim: int) -> Tensor:
    """(L, D) float32: the sinusoid table of ``grid``, or that of ``made_for`` interpolated trilinearly to ``grid``.

    As F.interpolate does it without align_corners: between the centres of tubelets, and beyond the outermost centres
    the table is constant. The interpolation is done in float64.
    """
    if made_for is None or made_for == grid:
        return sinusoid_table(math.prod(grid), dim)
    table = sinusoid_table(math.prod(made_for), dim).double()
    volume = table.T.reshape(1, dim, *made_for)
    resized = F.interpolate(volume, size=grid, mode="trilinear", align_corners=False)
    return resized.reshape(dim, -1).T.contiguous().float()


def take(tokens: Tensor, index: Tensor) -> Tensor:
    """(B, L, D), (B, M) -> (B, M, D)."""
    return tokens.gather(1, index.long()[..., None].expand(-1, -1, tokens.shape[-1]))


def attend(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    num_heads: int,
    scale: float | None = None,
    segments: Segments | None = None,
) -> Tensor:
    """Self-attention before its last projection: x (B, N, D), qkv weight (3 * D, D), bias (3 * D,) -> (B, N, D).

    Packed tokens (total, D) attend to those of their own clip.
    """
    if takes_bias(x, bias, num_heads):
        return attend_packed(F.linear(x, weight), num_heads, scale, segments, bias)
    return attend_packed(F.linear(x, weight, bias), num_heads, scale, segments)


def attend_packed(
    qkv: Tensor,
    num_heads: int,
    scale: float | None = None,
    segments: Segments | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The same from queries, keys and values side by side: (B, N, 3 * D) -> (B, N, D), or both packed.

    A bias (3 * D,) is still to be added to them.
    """
    qkv = qkv.unflatten(-1, (3, num_heads, -1))  # (B, N, 3, H, d) or (total, 3, H, d)
    bias = None if bias is None else bias.unflatten(0, (3, num_heads, -1))  # (3, H, d)
    if segments is None:
        return attention(qkv, bias, scale=scale)
    return attention_varlen(qkv, segments.cu_seqlens, segments.max_seqlen, bias, scale=scale)


def attend_rows(
    x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int, scale: float | None = None
) -> Tensor:
    """The same with keys and values from all tokens x (B, L, D), and queries only from ``rows`` (B, M, D)."""
    dim, late = weight.shape[0] // 3, takes_bias(x, bias, num_heads)
    query_bias, key_value_bias = (None, None) if bias is None or late else (bias[:dim], bias[dim:])
    q = F.linear(rows, weight[:dim], query_bias).unflatten(-1, (num_heads, -1))  # (B, M, H, d)
    kv = F.linear(x, weight[dim:], key_value_bias).unflatten(-1, (2, num_heads, -1))  # (B, L, 2, H, d)
    bias = bias.unflatten(0, (3, num_heads, -1)) if bias is not None and late else None  # (3, H, d)
    return attention_kvpacked(q, kv, bias, scale=scale)


class Attention(Fused):
    """Multi-head self-attention. The qkv bias is (q_bias, 0, v_bias), or a full one with ``key_bias``."""

    def __init__(self, dim: int, num_heads: int, key_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=key_bias)
        self.q_bias = None if key_bias else nn.Parameter(torch.zeros(dim))
        self.v_bias = None if key_bias else nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)
        # Zeros made in advance, so that the three biases are joined by one launch.
        self.k_bias = None if key_bias else Constant(partial(torch.zeros, dim))
        self._packed = Derived()

    def qkv_bias(self) -> Tensor:
        """(3 * D,), made once for calls without gradients."""
        if self.q_bias is None or self.v_bias is None or self.k_bias is None:
            return self.qkv.bias
        zeros = self.k_bias.value.to(self.q_bias.dtype)
        return self._packed.get(
            (self.q_bias, self.v_bias), None, lambda q_bias, v_bias: torch.cat((q_bias, zeros, v_bias))
        )

    def forward(
        self, x: Tensor, segments: Segments | None = None, rows: Tensor | None = None, add_bias: bool = True
    ) -> Tensor:
        """(B, N, D) -> (B, N, D), or packed (total, D) -> (total, D); ``add_bias`` False leaves out proj's bias.

        With ``rows`` (B, M) keys and values come from all tokens, and queries only from these: (B, N, D) -> (B, M, D).
        """
        qkv, heads = self.qkv, self.num_heads
        joined = None
        if in_fp8(qkv):
            joined = qkv.product(x, self.qkv_bias())
        elif not self.fallbacks.fuses(qkv, nn.Linear, False) or (self.q_bias is not None and qkv.bias is not None):
            joined = qkv(x)
            if self.q_bias is not None:
                joined = joined + self.qkv_bias().to(joined.dtype)
        if joined is not None:
            y = attend_packed(joined, heads, segments=segments)
            return product(self.proj, y if rows is None else take(y, rows), add_bias)
        if rows is None:
            y = attend(x, qkv.weight, self.qkv_bias(), heads, segments=segments)
            return product(self.proj, y, add_bias)
        return product(self.proj, attend_rows(x, take(x, rows), qkv.weight, self.qkv_bias(), heads), add_bias)


class Mlp(Fused):
    """Two linear layers with an exact GELU between."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = dropout

    def forward(self, x: Tensor, add_bias: bool = True) -> Tensor:
        """(..., D) -> (..., D); ``add_bias`` False leaves out fc2's bias."""
        fc1, fc2, dropout = self.fc1, self.fc2, self.training and self.dropout
        if in_fp8(fc1, needs_bias=True):
            gelu: Any = bias_gelu_rows if in_fp8(fc2) and not dropout else bias_gelu
            x = gelu(fc1.product(x), fc1.bias)
        elif not self.fallbacks.fuses(fc1, nn.Linear):
            x = F.gelu(fc1(x))
        elif dropout or not untouched(fc2, nn.Linear):
            x = linear_gelu(x, fc1.weight, fc1.bias)  # (..., hidden_dim)
        else:
            return mlp(x, fc1.weight, fc1.bias, fc2.weight, fc2.bias if add_bias else None)
        if not dropout:
            return product(fc2, x, add_bias)
        return F.dropout(self.fc2(F.dropout(x, self.dropout)), self.dropout)


class Stream(NamedTuple):
    """What goes from block to block. The next norm adds x to the residual and normalises, in one pass.

    Attributes:
        x: (B, N, D) or packed (total, D), the output of the last sub-layer.
        residual: Of x's shape; None before the first block.
        row_scale: Drop path's scale of x, (B,) or (total,).
        x_bias: (D,), the bias that is still to be added to x: see `deferred_bias`.
    """

    x: Tensor
    residual: Tensor | None = None
    row_scale: Tensor | None = None
    x_bias: Tensor | None = None


def deferred_bias(layer: nn.Linear, x: Tensor) -> Tensor | None:
    """The bias of ``layer`` if the norm that follows is to add it, None if ``layer`` adds it to its product with x.

    In training with kernels that norm's backward gives the gradient of the bias besides; the layer's own would read all
    of its output's gradient for it.
    """
    if not (torch.is_grad_enabled() and untouched(layer, nn.Linear, True) and layer.bias.requires_grad):
        return None
    return layer.bias if isinstance(x, Tensor) and takes_triton("add_layer_norm", x) else None


def product(layer: nn.Linear, x: Tensor, add_bias: bool) -> Tensor:
    """layer(x), or the same without its bias."""
    return layer(x) if add_bias else F.linear(x, layer.weight)


def sub_layer(
    part: nn.Module, kind: type[nn.Module], last: str, x: Tensor, defer: bool, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """part(x, **options), an Attention or an Mlp, and the `deferred_bias` of its last layer."""
    bias = deferred_bias(getattr(part, last), x) if defer and untouched(part, kind) else None
    return part(x, **options) if bias is None else part(x, **options, add_bias=False), bias


class Block(Fused):
    """Pre-norm transformer block: x += attention(norm1(x)), x += mlp(norm2(x))."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        eps: float,
        *,
        drop_path_rate: float = 0.0,
        dropout: float = 0.0,
        key_bias: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = Attention(dim, num_heads, key_bias)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, round(dim * mlp_ratio), dropout)
        self.drop_path_rate = drop_path_rate
        self.dropout = dropout

    def row_scale(self, x: Tensor, segments: Segments | None = None) -> Tensor | None:
        """(B,) 0 for clips whose x is dropped, 1 / keep probability for the others; (total,) if packed."""
        if not self.training or not self.drop_path_rate:
            return None
        keep, batch = 1 - self.drop_path_rate, x.shape[0] if segments is None else segments.cu_seqlens.shape[0] - 1
        scale = torch.empty(batch, dtype=torch.float32, device=x.device).bernoulli_(keep).div_(keep)
        return scale if segments is None else scale.index_select(0, segments.clip_idx)

    def forward(self, stream: Stream, rows: Tensor | None = None, segments: Segments | None = None) -> Stream:
        """One block; with ``rows`` (B, M) only these tokens come out of it."""
        dropout = self.dropout if self.training else 0.0
        y, residual = norm_for(self.attn, self.attn.qkv, self.fallbacks, self.norm1, stream)
        of_rows = dict(segments=segments) if rows is None else dict(rows=rows)
        x, bias = sub_layer(self.attn, Attention, "proj", y, not dropout, **of_rows)
        if rows is not None:
            residual = take(residual, rows)
        if dropout:
            x = F.dropout(x, dropout)
        stream = Stream(x, residual, self.row_scale(x, segments), bias)
        y, residual = norm_for(self.mlp, self.mlp.fc1, self.fallbacks, self.norm2, stream)
        # FSDP2's hooks free the weights of a block, and this bias would leave it.
        x, bias = sub_layer(self.mlp, Mlp, "fc2", y, not dropout and unhooked(self))
        return Stream(x, residual, self.row_scale(x, segments), bias)


def norm(fallbacks: Fallbacks, layer: nn.LayerNorm, stream: Stream) -> tuple[Tensor, Tensor]:
    """Add x to the residual and normalise by ``layer``: (the norm, the new residual)."""
    if fallbacks.fuses(layer, nn.LayerNorm):
        x, residual, row_scale, x_bias = stream
        options: dict[str, Any] = dict(eps=layer.eps, row_scale=row_scale, x_bias=x_bias)
        return add_layer_norm(x, residual, layer.weight, layer.bias, **options)
    whole = total(stream)
    return layer(whole), whole


def norm_for(
    part: nn.Module, first: nn.Module, fallbacks: Fallbacks, layer: nn.LayerNorm, stream: Stream
) -> tuple[Any, Tensor]:
    """`norm` before ``part``; its norm is QuantizedRows if ``first``, the first layer of the part, is in fp8."""
    x, residual, row_scale, x_bias = stream
    plain = in_fp8(first) and untouched(part, type(part)) and untouched(layer, nn.LayerNorm, True)
    if plain and row_scale is None and x_bias is None:
        return add_layer_norm_rows(x, residual, layer.weight, layer.bias, eps=layer.eps)
    return norm(fallbacks, layer, stream)


def total(stream: Stream) -> Tensor:
    """The residual after x is added, in the residual's dtype."""
    x, residual, row_scale, x_bias = stream
    if residual is None:
        return x
    if x_bias is not None:
        x = x + x_bias
    if row_scale is not None:
        x = row_scale.view(-1, *[1] * (x.ndim - 1)) * x
    return (residual + x).to(residual.dtype)


def run_blocks(
    blocks: nn.ModuleList,
    x: Tensor,
    checkpointing: bool,
    last_rows: Tensor | None = None,
    segments: Segments | None = None,
) -> Stream:
    """x (B, N, D), or packed (total, D), through all blocks; the last one gives only ``last_rows`` (B, M) if given."""
    stream = Stream(x)
    for number, block in enumerate(blocks, 1):
        rows = last_rows if number == len(blocks) else None
        if checkpointing and torch.is_grad_enabled():
            stream = checkpoint(block, stream, rows, segments, use_reentrant=False)
        else:
            stream = block(stream, rows, segments)
    return stream


def mean_of_tokens(x: Tensor, segments: Segments | None) -> Tensor:
    """(B, N, D), or packed (total, D) -> (B, D): packed tokens are summed in float32 at least, in a fixed order."""
    if segments is None:
        return x.mean(1)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    total = torch.segment_reduce(wide, "sum", offsets=segments.cu_seqlens, axis=0, unsafe=True)
    return total / segments.cu_seqlens.diff()[:, None]

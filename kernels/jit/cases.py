"""Calls of real size for every kernel: what the compile matrix compiles and the tuner times."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from . import add_layer_norm as norm
from . import attention as flash
from . import attention_backward as flash_backward
from . import bias_gelu as gelu
from . import gather_patch_embed as gather
from . import gather_patch_embed_backward as gather_backward
from . import masked_patch_loss as loss
from . import scatter_tokens as scatter

Device = torch.device | str
Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """One shape of one op in one dtype. ``calls(device)`` makes its operands there and gives its passes by name."""

    op: str
    label: str
    dtype: torch.dtype
    calls: Callable[[Device], Calls]


FLOATS = (torch.bfloat16, torch.float16, torch.float32)


def bias_gelu_cases() -> Iterator[Case]:
    """The MLP's hidden activation."""
    for dtype in FLOATS:

        def calls(device: Device, dtype: torch.dtype = dtype) -> Calls:
            x = torch.empty(32 * 784, 3072, dtype=dtype, device=device).normal_()
            bias = torch.empty(3072, dtype=dtype, device=device).normal_()
            return {"forward": lambda: gelu.forward(x, bias), "backward": lambda: gelu.backward(x, x, bias)}

        yield Case("bias_gelu", "ViT-B, 32 clips, 50 %", dtype, calls)


def gather_patch_embed_cases() -> Iterator[Case]:
    """Tubelets of 2 x 16 x 16 of 16 frames of 224 x 224; float32 weights beside a 16-bit product as under autocast."""
    half = torch.bfloat16
    # Weights, product, pixels, channels last, clips, width.
    kinds = [(dtype, dtype, dtype, False, 32, 768) for dtype in FLOATS]
    kinds += [(half, half, pixels, True, 32, 768) for pixels in (half, torch.uint8)]
    kinds += [(half, half, torch.uint8, False, clips, 768) for clips in (1, 32)]
    kinds += [(torch.float32, half, torch.uint8, True, 32, 768)]
    kinds += [(half, half, half, False, clips, 384) for clips in (4, 32)]
    for dtype, work, pixels, channels_last, clips, width in kinds:

        def calls(
            device: Device,
            dtype: torch.dtype = dtype,
            work: torch.dtype = work,
            pixels: torch.dtype = pixels,
            channels_last: bool = channels_last,
            clips: int = clips,
            width: int = width,
        ) -> Calls:
            shape = (clips, 16, 224, 224, 3) if channels_last else (clips, 3, 16, 224, 224)
            video = torch.randint(256, shape, device=device, dtype=torch.uint8).to(pixels)
            video = video.permute(0, 4, 1, 2, 3) if channels_last else video
            keep_idx = torch.rand(clips, 1568, device=device).argsort(1)[:, :784].sort(1).values.int()
            weight = torch.empty(width, 3, 2, 16, 16, dtype=dtype, device=device).normal_(std=0.02)
            bias = torch.empty(width, dtype=dtype, device=device).normal_()
            pos_embed = torch.empty(1568, width, device=device).normal_()
            mean, std = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
            grad = torch.empty(clips, 784, width, dtype=dtype, device=device).normal_()
            needs = [pixels != torch.uint8, True, True, True]
            return {
                "forward": lambda: gather.forward(video, keep_idx, weight, bias, pos_embed, mean, std, work),
                "backward": lambda: gather_backward.backward(
                    grad, video, keep_idx, weight, pos_embed, mean, std, work, needs
                ),
            }

        layout = "channels-last" if channels_last else "planar"
        label = f"{layout} {str(pixels).removeprefix('torch.')}, width {width}, {clips} clips, 50 %"
        yield Case("gather_patch_embed", label, dtype, calls)


def add_layer_norm_cases() -> Iterator[Case]:
    """The encoder's and decoder's widths: a stream with its branch of one dtype, or of float32 as under autocast."""
    kinds = [(dtype, dtype, width) for dtype in FLOATS for width in (384, 768, 1024, 1280, 1408)]
    kinds += [(torch.float32, torch.bfloat16, width) for width in (384, 768, 1024, 1280, 1408)]
    kinds += [(torch.bfloat16, torch.bfloat16, 4096)]
    for dtype, work, width in kinds:

        def calls(device: Device, dtype: torch.dtype = dtype, work: torch.dtype = work, width: int = width) -> Calls:
            x = torch.empty(32, 784, width, dtype=dtype, device=device).normal_()
            branch = torch.empty(32, 784, width, dtype=work, device=device).normal_()
            weight, bias, gamma = torch.empty(3, width, dtype=dtype, device=device).normal_()
            scale = torch.ones(32, device=device)
            mean = torch.empty(32 * 784, device=device).normal_()
            wanted = [True, work != dtype, True, True, False, False]  # else the branch's gradient is that of x
            return {
                "forward": lambda: norm.forward(x, branch, weight, bias, 1e-6, None, None, work),
                "backward": lambda: norm.backward(
                    x, branch, x, mean, mean, weight, bias, None, None, None, work,
                    wanted,
                ),
                "scaled forward": lambda: norm.forward(x, branch, weight, bias, 1e-6, gamma, scale, work),
                "scaled backward": lambda: norm.backward(
                    x, branch, x, mean, mean, weight, bias, branch, gamma, scale, work, [True] * 5 + [False]
                ),
            }  # fmt: skip

        label = f"width {width}, branch {str(work).removeprefix('torch.')}, 32 clips, 50 %"
        yield Case("add_layer_norm", label, dtype, calls)


def scatter_tokens_cases() -> Iterator[Case]:
    """The decoder's input, with a constant position table and with a learnt one."""
    for dtype, width in [(dtype, width) for dtype in FLOATS for width in (384, 512)]:

        def calls(device: Device, dtype: torch.dtype = dtype, width: int = width) -> Calls:
            visible = torch.empty(32, 784, width, dtype=dtype, device=device).normal_()
            keep_idx = torch.rand(32, 1568, device=device).argsort(1)[:, :784].sort(1).values.int()
            mask_token = torch.empty(width, dtype=dtype, device=device).normal_()
            pos_embed = torch.empty(1568, width, device=device).normal_()
            grad = torch.empty(32, 1568, width, dtype=dtype, device=device).normal_()
            dtypes = (dtype, dtype, torch.float32)
            return {
                "forward": lambda: scatter.forward(visible, keep_idx, mask_token, pos_embed),
                "backward": lambda: scatter.backward(grad, keep_idx, dtypes, [True, True, False]),
                "backward of all": lambda: scatter.backward(grad, keep_idx, dtypes, [True, True, True]),
            }

        yield Case("scatter_tokens", f"width {width}, 32 clips, 50 %", dtype, calls)


def masked_patch_loss_cases() -> Iterator[Case]:
    """The loss of tubelets of 16 frames of 224 x 224, half of them dropped, from clips in both layouts."""
    layouts = (False, True)
    kinds = [(dtype, torch.uint8, last, 2) for dtype in FLOATS for last in layouts]
    kinds += [(dtype, dtype, last, 2) for dtype in (torch.bfloat16, torch.float32) for last in layouts]
    kinds += [(torch.bfloat16, torch.uint8, last, 4) for last in layouts]
    for dtype, pixel, channels_last, frames in kinds:

        def calls(
            device: Device,
            dtype: torch.dtype = dtype,
            pixel: torch.dtype = pixel,
            channels_last: bool = channels_last,
            frames: int = frames,
        ) -> Calls:
            dropped = 1568 // frames
            shape = (32, 16, 224, 224, 3) if channels_last else (32, 3, 16, 224, 224)
            video = torch.randint(256, shape, device=device, dtype=torch.uint8).to(pixel)
            video = video.permute(0, 4, 1, 2, 3) if channels_last else video
            pixels = torch.empty(32, dropped, 768 * frames, dtype=dtype, device=device).normal_()
            drop_idx = torch.rand(32, 2 * dropped, device=device).argsort(1)[:, :dropped].sort(1).values.int()
            grad = torch.ones((), device=device)
            options = ((frames, 16, 16), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), True)
            return {
                "forward": lambda: loss.forward(pixels, video, drop_idx, *options),
                "backward": lambda: loss.backward(grad, pixels, video, drop_idx, *options),
            }

        layout = "channels-last" if channels_last else "planar"
        label = f"{layout} {str(pixel).removeprefix('torch.')}, tubelets of {frames} frames, 32 clips, 50 %"
        yield Case("masked_patch_loss", label, dtype, calls)


def attention_cases() -> Iterator[Case]:
    """Head sizes of ViT-B and L (64), H (80), g (88) and others; 16 frames with 50 %, 75 % and none masked."""
    half = (torch.bfloat16, torch.float16)
    shapes = [(64, 12, tokens, dtype) for tokens in (784, 392, 1568) for dtype in half]
    shapes += [(size, 16, 784, torch.bfloat16) for size in (32, 80, 88, 96, 128)]
    shapes += [(size, 16, 784, torch.float32) for size in (32, 64, 80, 88, 96, 128)]
    shapes += [(64, 12, 49, dtype) for dtype in (torch.bfloat16, torch.float32)]  # 4 frames of 112 x 112, 50 %
    for size, heads, tokens, dtype in shapes:
        for ragged in (False, True):

            def calls(
                device: Device,
                size: int = size,
                heads: int = heads,
                tokens: int = tokens,
                dtype: torch.dtype = dtype,
                ragged: bool = ragged,
            ) -> Calls:
                lead = (16 * tokens,) if ragged else (16, tokens)
                qkv = torch.empty((*lead, 3, heads, size), dtype=dtype, device=device).normal_()
                grad = torch.empty((*lead, heads * size), dtype=dtype, device=device).normal_()
                offsets = torch.arange(17, dtype=torch.int32, device=device) * tokens if ragged else None
                scale = size**-0.5
                saved: list[torch.Tensor] = []

                def forward() -> Any:
                    saved[:] = flash.forward(qkv, scale, offsets, tokens)
                    return tuple(saved)

                def backward() -> Any:
                    if not saved:
                        forward()
                    out, lse = saved
                    return flash_backward.backward(grad, None, qkv, out, lse, scale, offsets, tokens)

                return {"forward": forward, "backward": backward}

            label = f"{'16 ragged clips' if ragged else '16 clips'}, {tokens} tokens, {heads} heads of {size}"
            yield Case("attention_varlen" if ragged else "attention", label, dtype, calls)


def cases() -> list[Case]:
    """All of them."""
    return [
        *bias_gelu_cases(),
        *add_layer_norm_cases(),
        *scatter_tokens_cases(),
        *masked_patch_loss_cases(),
        *gather_patch_embed_cases(),
        *attention_cases(),
    ]

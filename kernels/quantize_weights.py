"""Weights in fewer bits, computed with torch when a model is loaded, and the way back.

Per channel: one float32 scale an output channel, |largest| → 127 (int8) or 448 (float8_e4m3fn).
Blocks: one float32 scale for each 128 × 128 block, as checkpoints store in `weight_scale_inv`.
int4: 128 consecutive inputs of a channel form a group; weight = (code − zero) · scale with a code and a zero of 0 … 15.

How int4 lies in memory (`pack_int4`). Inputs are padded to whole spans of 256, two groups. A span of one channel is
64 int16 words; bits 4p … 4p+3 of word j hold input 64p + j, so each of the four planes p is 64 consecutive inputs:
planes 0 and 1 are the span's first group, 2 and 3 its second. A thread's 16-byte load is 8 words; a shift and a mask
then give 8 consecutive inputs of a plane, already in 16-bit lanes as matrix instructions want them.
Scales and zeros (`pack_scale_zero`) are int32 [groups, channels], one coalesced load for a tile of channels: float16
bits of the scale in the upper half, the zero in the lower. Padding has scale 0.
What GGUF files hold in 8 and 4 bits is described in kernels/weight_only_blocks.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

INT8_MAX = 127.0
FP8_MAX = 448.0
SCALE_BLOCK = 128
"""Side of a block of float8 weights that share a scale."""
GROUP = 128
"""Inputs that share an int4 scale."""
SPAN = 256
"""Inputs that are packed together."""
WORDS = SPAN // 4
"""int16 words of a span."""
BLOCK = 32
"""Inputs that share a scale in GGUF's Q8_0 and Q4_0."""
WIDENED_AT_ONCE = 2**20
"""Weights of such blocks that are widened in one go: bounds the float32 copies that this takes."""


def quantize_int8_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [N, K] float → (int8 [N, K], float32 scale [N]). Raises ValueError for weights that are not finite."""
    scale = _scale(_finite(weight).abs().amax(dim=1), INT8_MAX)
    return (weight.float() / scale.unsqueeze(1)).round().to(torch.int8), scale


def quantize_fp8_per_channel(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [N, K] float → (float8_e4m3fn [N, K], float32 scale [N]). Raises ValueError as above."""
    scale = _scale(_finite(weight).abs().amax(dim=1), FP8_MAX)
    return (weight.float() / scale.unsqueeze(1)).to(torch.float8_e4m3fn), scale


def dequantize_per_channel(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight: [N, K] int8 or float8_e4m3fn, scale: [N] → [N, K] of `dtype`, which holds either's values exactly."""
    return weight.to(dtype).mul_(scale.unsqueeze(1))


def quantize_fp8_block(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight: [N, K] float → (float8_e4m3fn [N, K], float32 scale [⌈N/128⌉, ⌈K/128⌉]). Raises ValueError as above."""
    blocks = F.pad(_finite(weight), (0, -weight.shape[1] % SCALE_BLOCK, 0, -weight.shape[0] % SCALE_BLOCK))
    blocks = blocks.unflatten(1, (-1, SCALE_BLOCK)).unflatten(0, (-1, SCALE_BLOCK))
    scale = _scale(blocks.abs().amax(dim=(1, 3)), FP8_MAX)
    return (weight.float() / _spread(scale, weight.shape)).to(torch.float8_e4m3fn), scale


def dequantize_fp8_block(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight: [N, K] float8_e4m3fn, scale: [⌈N/128⌉, ⌈K/128⌉] → [N, K] of `dtype`."""
    return weight.to(dtype).mul_(_spread(scale, weight.shape))


def quantize_int4_group(weight: Tensor, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Round weights to sixteen steps a group: around zero if symmetric, else between the group's extremes.

    Args:
        weight: [N, K] float, K a multiple of 128.

    Returns:
        (int16 [N, ⌈K/256⌉ · 64], int32 [⌈K/256⌉ · 2, N]): see the head of this file.

    Raises:
        ValueError: K is not a multiple of 128, or a weight is not finite or too large for a float16 scale.
    """
    if weight.dim() != 2 or weight.shape[1] % GROUP:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected [N, K] with K a multiple of {GROUP}")
    groups = _finite(weight).unflatten(1, (-1, GROUP))
    low, high = groups.amin(dim=2).clamp_max(0), groups.amax(dim=2).clamp_min(0)
    step = torch.maximum(-low, high) / 7 if symmetric else (high - low) / 15
    scale = step.half()
    if not torch.isfinite(scale).all():
        raise ValueError(f"weights reach {weight.abs().max().item():g}, too large for a float16 scale of int4")
    divisor = torch.where(scale == 0, 1.0, scale.float())
    zero = torch.full_like(low, 8) if symmetric else (-low / divisor).round().clamp(0, 15)
    codes = (groups / divisor.unsqueeze(2)).round().add_(zero.unsqueeze(2)).clamp_(0, 15)
    return pack_int4(codes.flatten(1).to(torch.uint8)), pack_scale_zero(scale, zero.to(torch.uint8))


def dequantize_int4_group(packed: Tensor, scale_zero: Tensor, in_features: int, dtype: torch.dtype) -> Tensor:
    """Inverse of `quantize_int4_group`: → [N, in_features] of `dtype`."""
    scale, zero = unpack_scale_zero(scale_zero)
    codes = unpack_int4(packed).unflatten(1, (-1, GROUP))
    weight = (codes.float() - zero.float().unsqueeze(2)) * scale.float().unsqueeze(2)
    return weight.flatten(1)[:, :in_features].to(dtype)


def pack_int4(codes: Tensor) -> Tensor:
    """codes: [N, K] uint8 of 0 … 15 → int16 [N, ⌈K/256⌉ · 64], padded with 0."""
    planes = F.pad(codes, (0, -codes.shape[1] % SPAN)).unflatten(1, (-1, 4, WORDS)).to(torch.int32)
    words = sum(planes[:, :, plane] << 4 * plane for plane in range(4))
    return torch.as_tensor(words).flatten(1).to(torch.int16)


def unpack_int4(packed: Tensor) -> Tensor:
    """packed: int16 [N, W] → uint8 [N, 4 · W]."""
    words = packed.unflatten(1, (-1, 1, WORDS))
    shifts = torch.arange(0, 16, 4, dtype=torch.int16, device=packed.device).view(4, 1)
    return ((words >> shifts) & 15).to(torch.uint8).flatten(1)


def pack_scale_zero(scale: Tensor, zero: Tensor) -> Tensor:
    """scale: [N, G] float16, zero: [N, G] uint8 → int32 [G rounded up to even, N]."""
    bits = (scale.to(torch.float16).contiguous().view(torch.int16).to(torch.int32) << 16) | zero.to(torch.int32)
    return F.pad(bits, (0, bits.shape[1] % 2)).t().contiguous()


def unpack_scale_zero(scale_zero: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse of `pack_scale_zero`, padding included: → (float16 [N, G], uint8 [N, G])."""
    bits = scale_zero.t()
    return (bits >> 16).to(torch.int16).view(torch.float16), (bits & 15).to(torch.uint8)


def dequantize_blocks(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight: codes, int8 [N, K] of Q8_0 or uint8 [N, K/2] of Q4_0; scale: [K/32, N] → [N, K] of `dtype`."""
    wide = torch.empty(weight.shape[0], scale.shape[0] * BLOCK, dtype=dtype, device=weight.device)
    rows = max(1, WIDENED_AT_ONCE // wide.shape[1])
    parts = zip(wide.split(rows), weight.split(rows), scale.t().split(rows), strict=True)
    for part, codes, scales in parts:
        blocks = codes.unflatten(1, (scale.shape[0], -1))
        if weight.dtype == torch.uint8:
            blocks = torch.cat((blocks & 15, blocks >> 4), dim=2).to(torch.int8) - 8
        torch.mul(blocks, scales.float().unsqueeze(2), out=part.unflatten(1, (-1, BLOCK)))
    return wide


def _scale(largest: Tensor, code_max: float) -> Tensor:
    # A channel of zeros keeps a scale that can be divided by.
    return largest.float().clamp_min(torch.finfo(torch.float32).smallest_normal * code_max) / code_max


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """scale of each weight of a [N, K] matrix."""
    rows = scale.float().repeat_interleave(SCALE_BLOCK, dim=0)[: shape[0]]
    return rows.repeat_interleave(SCALE_BLOCK, dim=1)[:, : shape[1]]


def _finite(weight: Tensor) -> Tensor:
    """weight in float32."""
    if not torch.isfinite(weight).all():
        raise ValueError(f"a weight of shape {tuple(weight.shape)} is infinite or not a number, expected finite ones")
    return weight.float()

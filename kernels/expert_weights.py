"""How quantized weights of experts are stored, told from their tensors; and what a layer of experts may be given."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.quantize_weights import BLOCK, GROUP, SCALE_BLOCK, SPAN, WORDS
from kernels.weight_only_blocks import BLOCK_BYTES

QUANTIZED_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.int16, torch.uint8)


def has_block_scales(weight: Tensor, scale: Tensor) -> bool:
    """Whether scales are those of `quantize_fp8_block`."""
    return weight.dtype == torch.float8_e4m3fn and scale.shape[2] != weight.shape[1]


class Scaling(NamedTuple):
    """How a quantized weight is stored: bits, inputs and rows that share a scale, type and shape of the scales."""

    bits: int
    inputs: int
    rows: int
    dtype: torch.dtype
    shape: tuple[int, int, int]
    block_bytes: int = 0
    """Of the codes of a block of GGUF; 0 if weights are not in such blocks."""


def scaling_of(weight: Tensor, scale: Tensor, inputs: int) -> Scaling:
    """What a weight's and its scale's types, and their shapes, say; only `check_experts` knows whether they fit."""
    num_experts, rows = weight.shape[:2]
    if weight.dtype == torch.int16:
        return Scaling(4, GROUP, 1, torch.int32, (num_experts, -(-inputs // SPAN) * 2, rows))
    if weight.dtype in BLOCK_BYTES and (weight.dtype == torch.uint8 or scale.dtype == torch.float16):
        num_bytes = BLOCK_BYTES[weight.dtype]
        return Scaling(num_bytes // 4, BLOCK, 1, torch.float16, (num_experts, inputs // BLOCK, rows), num_bytes)
    if has_block_scales(weight, scale):
        blocks = (num_experts, -(-inputs // SCALE_BLOCK), -(-rows // SCALE_BLOCK))
        return Scaling(8, SCALE_BLOCK, SCALE_BLOCK, torch.float32, blocks)
    return Scaling(8, inputs, 1, torch.float32, (num_experts, 1, rows))


def _check_scale(weight: Tensor, scale: Tensor, inputs: int) -> None:
    wanted = scaling_of(weight, scale, inputs)
    if weight.dtype not in QUANTIZED_DTYPES or scale.dtype != wanted.dtype:
        raise ValueError(
            f"weight is {weight.dtype} with scales of {scale.dtype}, expected one of {QUANTIZED_DTYPES} with float32, "
            "or int16 with int32, or int8 or uint8 with float16"
        )
    if wanted.block_bytes and inputs % BLOCK:
        raise ValueError(f"{inputs} inputs, expected a multiple of {BLOCK} for {weight.dtype} with scales of float16")
    if scale.shape != wanted.shape or not scale.is_contiguous():
        raise ValueError(f"scale is {tuple(scale.shape)}, expected contiguous {wanted.shape}")


def _width(weight: Tensor, inputs: int) -> int:
    """Numbers that a row of such a weight is stored in."""
    if weight.dtype == torch.int16:
        return -(-inputs // SPAN) * WORDS
    return inputs // 2 if weight.dtype == torch.uint8 else inputs


def check_experts(
    hidden: Tensor,
    router_logits: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    gate_up_scale: Tensor | None,
    down_scale: Tensor | None,
) -> None:
    """Raise ValueError unless tensors are as `fused_moe` wants them."""
    (num_tokens, hidden_size), (num_experts, rows) = hidden.shape, gate_up_weight.shape[:2]
    intermediate = rows // 2
    for name, weight, scale, inputs in (
        ("gate_up_weight", gate_up_weight, gate_up_scale, hidden_size),
        ("down_weight", down_weight, down_scale, intermediate),
    ):
        if scale is not None:
            _check_scale(weight, scale, inputs)
        elif weight.dtype != hidden.dtype:
            raise ValueError(f"hidden is {hidden.dtype}, {name} {weight.dtype}; expected one dtype")
    shapes = ((num_tokens, num_experts), (num_experts, 2 * intermediate, _width(gate_up_weight, hidden_size)))
    down_shape = (num_experts, hidden_size, _width(down_weight, intermediate))
    if (router_logits.shape, gate_up_weight.shape, down_weight.shape) != (*shapes, down_shape):
        raise ValueError(
            f"hidden is {tuple(hidden.shape)}, router_logits {tuple(router_logits.shape)}, gate_up_weight "
            f"{tuple(gate_up_weight.shape)}, down_weight {tuple(down_weight.shape)}; expected [tokens, hidden], "
            "[tokens, experts], [experts, 2 · intermediate, hidden] and [experts, hidden, intermediate]"
        )
    contiguous = gate_up_weight.is_contiguous() and down_weight.is_contiguous()
    if not contiguous or hidden.stride(1) != 1 or router_logits.stride(1) != 1:
        raise ValueError(
            f"strides are {hidden.stride()}, {router_logits.stride()}, {gate_up_weight.stride()} and "
            f"{down_weight.stride()}; expected contiguous weights, and contiguous rows of hidden and router_logits"
        )

"""How quantized checkpoints store one weight, and how it becomes what a QuantizedLinear holds. One class per format."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from engine.layers.quantized_linear import (
    BlockLinear,
    Fp8BlockLinear,
    Fp8Linear,
    Int4Linear,
    Int8Linear,
    Q4Linear,
    Q8Linear,
    QuantizedLinear,
)
from kernels.quantize_weights import (
    BLOCK,
    GROUP,
    SCALE_BLOCK,
    pack_int4,
    pack_scale_zero,
    quantize_fp8_per_channel,
    quantize_int4_group,
    quantize_int8_per_channel,
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
ROUNDED_AT_ONCE = 2**20
"""Weights that are rounded in one go: bounds the float32 copies that this takes."""
NIBBLES = 8
"""4-bit numbers in an int32 of AWQ and GPTQ."""
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""AWQ keeps the j-th of eight consecutive channels in nibble AWQ_ORDER[j]."""


class Axis(NamedTuple):
    """What a dimension of a tensor runs along: the weight's output channels or its inputs, `per` of them an entry."""

    of: Literal["outputs", "inputs"]
    per: int = 1


OUTPUTS, INPUTS = Axis("outputs"), Axis("inputs")


class Expected(NamedTuple):
    """A tensor that a checkpoint must hold for each quantized weight."""

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    axes: tuple[Axis, ...]
    """Of the first dimensions; a rank reads its share of them, and all of others."""
    is_optional: bool = False


class Format(Protocol):
    """What a checkpoint has in the place of a [out_features, in_features] weight."""

    layer: type[QuantizedLinear]

    def expected(self, out_features: int, in_features: int) -> dict[str, Expected]:
        """The checkpoint's tensors by the last part of their names. Raises ValueError for sizes that it cannot hold."""
        ...

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is in a checkpoint's tensors, as `layer` stores it. Raises ValueError for values that cannot be used."""
        ...


class RoundWhenLoaded:
    """An unquantized checkpoint, rounded to int8, int4 or FP8 as it is read.

    int4 rounds between each group's extremes; int8 and FP8 keep a scale for each output channel.
    """

    def __init__(self, scheme: str) -> None:
        self.layer, self._scale_name, self._round = _SCHEMES[scheme]

    def expected(self, out_features: int, in_features: int) -> dict[str, Expected]:
        return {"weight": Expected(((out_features, in_features),), (*FLOATS, torch.float64), (OUTPUTS, INPUTS))}

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["weight"]
        pieces = [self._round(rows) for rows in weight.split(max(1, ROUNDED_AT_ONCE // weight.shape[1]))]
        weights, scales = zip(*pieces, strict=True)
        return {"weight": torch.cat(weights), self._scale_name: torch.cat(scales)}


class ScaledChannels:
    """int8 or float8_e4m3fn weights with a scale for each output channel, or one for all: compressed-tensors W8A8."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self.layer: type[QuantizedLinear] = Int8Linear if dtype == torch.int8 else Fp8Linear

    def expected(self, out_features: int, in_features: int) -> dict[str, Expected]:
        return {
            "weight": Expected(((out_features, in_features),), (self._dtype,), (OUTPUTS, INPUTS)),
            "weight_scale": Expected(((out_features, 1), (out_features,), (1,), ()), FLOATS, (OUTPUTS,)),
        }

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weight = tensors["weight"]
        scale = _finite(tensors, "weight_scale").float().reshape(-1).expand(weight.shape[0])
        return {"weight": weight, "weight_scale": scale}


class ScaledBlocks:
    """float8_e4m3fn weights with a scale for each 128 × 128 of them: Qwen's and DeepSeek's own FP8 checkpoints.

    Args:
        scale_name: of the scales, by which weights are multiplied.
    """

    layer: type[QuantizedLinear] = Fp8BlockLinear

    def __init__(self, scale_name: str) -> None:
        self._scale_name = scale_name

    def expected(self, out_features: int, in_features: int) -> dict[str, Expected]:
        blocks = (-(-out_features // SCALE_BLOCK), -(-in_features // SCALE_BLOCK))
        return {
            "weight": Expected(((out_features, in_features),), (torch.float8_e4m3fn,), (OUTPUTS, INPUTS)),
            self._scale_name: Expected((blocks,), FLOATS, (Axis("outputs", SCALE_BLOCK), Axis("inputs", SCALE_BLOCK))),
        }

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": tensors["weight"], "weight_scale": _finite(tensors, self._scale_name).float()}


class Awq:
    """AutoAWQ's `gemm` layout: weight = (code − zero) · scale, codes and zeros eight channels to an int32."""

    layer: type[QuantizedLinear] = Int4Linear

    def expected(self, out_features: int, in_features: int) -> dict[str, Expected]:
        groups, words = in_features // GROUP, _words(out_features)
        return {
            "qweight": Expected(((in_features, words),), (torch.int32,), (INPUTS, Axis("outputs", NIBBLES))),
            "qzeros": Expected(((groups, words),), (torch.int32,), (Axis("inputs", GROUP), Axis("outputs", NIBBLES))),
            "scales": Expected(((groups, out_features),), FLOATS, (Axis("inputs", GROUP), OUTPUTS)),
        }

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        codes = _unpack_nibbles(tensors["qweight"], AWQ_ORDER).t()
        zeros = _unpack_nibbles(tensors["qzeros"], AWQ_ORDER).t()
        return _as_int4(codes, _finite(tensors, "scales").t(), zeros)


class Gptq:
    """GPTQ's layout: codes eight inputs to an int32, zeros eight channels to an int32.

    Args:
        zero_offset: what is to be added to the zeros: 1 in the original format, 0 in `gptq_v2`.
    """

    layer: type[QuantizedLinear] = Int4Linear

    def __init__(self, zero_offset: int) -> None:
        self._zero_offset = zero_offset

    def expected(self, out_features: int, in_features: int) -> dict[str, Expected]:
        groups, words = in_features // GROUP, _words(out_features)
        return {
            "qweight": Expected(
                ((in_features // NIBBLES, out_features),), (torch.int32,), (Axis("inputs", NIBBLES), OUTPUTS)
            ),
            "qzeros": Expected(((groups, words),), (torch.int32,), (Axis("inputs", GROUP), Axis("outputs", NIBBLES))),
            "scales": Expected(((groups, out_features),), FLOATS, (Axis("inputs", GROUP), OUTPUTS)),
            "g_idx": Expected(((in_features,),), (torch.int32, torch.int64), (), is_optional=True),
        }

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        codes = _unpack_nibbles(tensors["qweight"].t(), range(NIBBLES))
        zeros = _unpack_nibbles(tensors["qzeros"], range(NIBBLES)).t()
        group_of = tensors.get("g_idx")
        if group_of is not None and not torch.equal(group_of.cpu(), torch.arange(len(group_of)).int() // GROUP):
            raise ValueError("g_idx permutes the inputs, expected groups of 128 in order (desc_act: false)")
        return _as_int4(codes, _finite(tensors, "scales").t(), (zeros + self._zero_offset) & 15)


class GgufBlocks:
    """Blocks of a GGUF file, the scale in front of the codes of 32 inputs: Q8_0 or Q4_0.

    Args:
        layer: which of them.
        num_bytes: of a block.
    """

    def __init__(self, layer: type[BlockLinear], num_bytes: int) -> None:
        self.layer: type[QuantizedLinear] = layer
        self._codes_dtype = layer.codes_dtype
        self._num_bytes = num_bytes

    def expected(self, out_features: int, in_features: int) -> dict[str, Expected]:
        shape = (out_features, in_features // BLOCK, self._num_bytes)
        return {"weight": Expected((shape,), (torch.uint8,), (OUTPUTS, Axis("inputs", BLOCK)))}

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        blocks = tensors["weight"]
        scale = blocks[:, :, :2].contiguous().view(torch.float16).squeeze(2)
        codes = blocks[:, :, 2:].flatten(1)
        return {"weight": codes.view(self._codes_dtype), "scale": _finite({"blocks' scale": scale}, "blocks' scale")}


GGUF_BLOCKS: Mapping[int, GgufBlocks] = {2: GgufBlocks(Q4Linear, 18), 8: GgufBlocks(Q8Linear, 34)}
"""By ggml's number of the type: Q4_0, Q8_0."""


def _words(out_features: int) -> int:
    if out_features % NIBBLES:
        raise ValueError(f"{out_features} output channels, expected a multiple of {NIBBLES}")
    return out_features // NIBBLES


def _round_to_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    packed, scale_zero = quantize_int4_group(weight, symmetric=False)
    return packed, scale_zero.t()


_SCHEMES: Mapping[str, tuple[type[QuantizedLinear], str, Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "int8": (Int8Linear, "weight_scale", quantize_int8_per_channel),
    "int4": (Int4Linear, "scale_zero", _round_to_int4),
    "fp8": (Fp8Linear, "weight_scale", quantize_fp8_per_channel),
}


def _as_int4(codes: Tensor, scales: Tensor, zeros: Tensor) -> dict[str, Tensor]:
    """codes: [N, K] uint8; scales: [N, K/128]; zeros: [N, K/128] uint8."""
    return {"weight": pack_int4(codes), "scale_zero": pack_scale_zero(scales, zeros).t()}


def _unpack_nibbles(words: Tensor, order: tuple[int, ...] | range) -> Tensor:
    """words: [rows, columns] int32 → uint8 [rows, 8 · columns], number j of each word from its nibble order[j]."""
    shifts = 4 * torch.tensor(tuple(order), dtype=torch.int32, device=words.device)
    return ((words.unsqueeze(2) >> shifts) & 15).to(torch.uint8).flatten(1)


def _finite(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    scale = tensors[name]
    if not torch.isfinite(scale).all():
        raise ValueError(f"{name} holds numbers that are not finite, expected scales")
    return scale

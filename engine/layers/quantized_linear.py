"""Matrix products with weights of 8 or 4 bits. A model is built with `Linear`; where it is quantized, these take its
place before weights are loaded (engine/weights/quantized_checkpoint.py)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from engine.parallel.share import Share, whole
from kernels.quantize_weights import BLOCK, GROUP, SCALE_BLOCK, SPAN, WORDS
from kernels.scaled_mm_fp8 import scaled_mm_fp8
from kernels.weight_only_blocks import BLOCK_BYTES, weight_only_blocks
from kernels.weight_only_mm import weight_only_mm


class Stored(NamedTuple):
    """Shape and type of one parameter while weights are loaded. Its first dimension follows the output channels."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class QuantizedLinear(nn.Module, ABC):
    """y = x · weightᵀ + bias, as `Linear` computes it, from the parameters that `stored` lists.

    Args:
        in_features: width of x, or this rank's share of it.
        output_sizes: width of each part, or this rank's share of it; the checkpoint has tensors for each.

    Raises:
        ValueError: sizes that cannot be stored so.
    """

    in_multiple: ClassVar[int] = 1
    """What in_features must be a multiple of."""
    part_multiple: ClassVar[int] = 1
    """What the width of each part but the last must be a multiple of."""
    weight: nn.Parameter

    def __init__(self, in_features: int | Share, output_sizes: Sequence[int | Share], bias: bool = False) -> None:
        super().__init__()
        self.inputs = whole(in_features)
        self.outputs = tuple(map(whole, output_sizes))
        self.in_features = self.inputs.size
        self.output_sizes = tuple(output.size for output in self.outputs)
        if self.in_features % self.in_multiple:
            raise ValueError(f"in_features is {self.in_features}, expected a multiple of {self.in_multiple}")
        if any(size % self.part_multiple for size in self.output_sizes[:-1]):
            raise ValueError(f"parts are {list(self.output_sizes)} wide, expected multiples of {self.part_multiple}")
        for name, (shape, dtype) in self.stored(sum(self.output_sizes), self.in_features).items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
        self.bias = nn.Parameter(torch.empty(sum(self.output_sizes)), requires_grad=False) if bias else None

    @staticmethod
    @abstractmethod
    def stored(out_features: int, in_features: int) -> dict[str, Stored]:
        """The parameters, without bias, that hold a [out_features, in_features] weight."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] → [num_tokens, sum(output_sizes)]."""

    @property
    def parameter_dtypes(self) -> dict[str, torch.dtype]:
        """Of the parameters that do not have the model's dtype."""
        return {name: stored.dtype for name, stored in self.stored(1, self.in_features).items()}

    def shares(self, parameter: str) -> tuple[tuple[Share, ...], ...]:
        """As `Linear.shares`. But for the bias, tensors that fill it hold this rank's share alone."""
        if parameter == "bias":
            return tuple((output,) for output in self.outputs)
        shapes = (self.stored(size, self.in_features)[parameter].shape for size in self.output_sizes)
        return tuple(tuple(map(whole, shape)) for shape in shapes)

    def after_loading(self) -> None:
        """Of ranks whose outputs are added up, one adds the bias."""
        if self.bias is not None and self.inputs.start:
            self.bias.zero_()


class Int8Linear(QuantizedLinear):
    """int8 weights with a scale for each output channel; activations stay as they are."""

    weight_scale: nn.Parameter

    @staticmethod
    def stored(out_features: int, in_features: int) -> dict[str, Stored]:
        return {
            "weight": Stored((out_features, in_features), torch.int8),
            "weight_scale": Stored((out_features,), torch.float32),
        }

    def forward(self, x: Tensor) -> Tensor:
        return weight_only_mm(x, self.weight, self.weight_scale, self.bias)


class Fp8Linear(QuantizedLinear):
    """float8_e4m3fn weights with a scale for each output channel; activations are rounded to FP8 for each token."""

    in_multiple = 16
    weight_scale: nn.Parameter

    @staticmethod
    def stored(out_features: int, in_features: int) -> dict[str, Stored]:
        return {
            "weight": Stored((out_features, in_features), torch.float8_e4m3fn),
            "weight_scale": Stored((out_features,), torch.float32),
        }

    def forward(self, x: Tensor) -> Tensor:
        return scaled_mm_fp8(x, self.weight, self.weight_scale, self.bias)


class Fp8BlockLinear(Fp8Linear):
    """As `Fp8Linear`, with a scale for each 128 × 128 weights and each 128 values of a token."""

    part_multiple = SCALE_BLOCK

    @staticmethod
    def stored(out_features: int, in_features: int) -> dict[str, Stored]:
        blocks = (-(-out_features // SCALE_BLOCK), -(-in_features // SCALE_BLOCK))
        return {
            "weight": Stored((out_features, in_features), torch.float8_e4m3fn),
            "weight_scale": Stored(blocks, torch.float32),
        }


class Int4Linear(QuantizedLinear):
    """Weights of 4 bits, 128 inputs of a channel with a scale and a zero, laid out as kernels/quantize_weights.py says;
    activations stay as they are."""

    in_multiple = GROUP
    scale_zero: nn.Parameter

    @staticmethod
    def stored(out_features: int, in_features: int) -> dict[str, Stored]:
        spans = -(-in_features // SPAN)
        return {
            "weight": Stored((out_features, spans * WORDS), torch.int16),
            "scale_zero": Stored((out_features, 2 * spans), torch.int32),
        }

    def after_loading(self) -> None:
        """The kernel reads a group's scales for many channels at once, so groups come first."""
        super().after_loading()
        self.scale_zero.data = self.scale_zero.data.t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return weight_only_mm(x, self.weight, self.scale_zero, self.bias)


class BlockLinear(QuantizedLinear):
    """Codes of GGUF files, 32 inputs of a channel with a float16 scale; activations stay as they are."""

    in_multiple = BLOCK
    codes_dtype: ClassVar[torch.dtype]
    scale: nn.Parameter

    @classmethod
    def stored(cls, out_features: int, in_features: int) -> dict[str, Stored]:
        blocks = in_features // BLOCK
        return {
            "weight": Stored((out_features, blocks * BLOCK_BYTES[cls.codes_dtype]), cls.codes_dtype),
            "scale": Stored((out_features, blocks), torch.float16),
        }

    def after_loading(self) -> None:
        """The kernel reads a block's scales for many channels at once, so blocks come first."""
        super().after_loading()
        self.scale.data = self.scale.data.t().contiguous()

    def forward(self, x: Tensor) -> Tensor:
        return weight_only_blocks(x, self.weight, self.scale, self.bias)


class Q8Linear(BlockLinear):
    """Q8_0: codes of 8 bits."""

    codes_dtype = torch.int8


class Q4Linear(BlockLinear):
    """Q4_0: codes of 4 bits, two to a byte."""

    codes_dtype = torch.uint8

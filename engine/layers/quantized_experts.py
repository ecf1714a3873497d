"""The matrices of experts in 8 or 4 bits. They take the place of `ExpertWeights` before weights are loaded."""

import torch
from torch import Tensor, nn

from engine.layers.quantized_linear import QuantizedLinear
from engine.parallel.share import Share, whole


class QuantizedExperts(nn.Module):
    """As `ExpertWeights`, from what a kind of QuantizedLinear stores of each expert's weight.

    Weights stay quantized in memory, and are widened where they are multiplied; activations are not rounded.

    Args:
        kind: how a weight is stored.
        num_experts: how many.
        inputs: this rank's share of the width of what they are multiplied with.
        parts: its shares of an expert's parts.

    Raises:
        ValueError: sizes that cannot be stored so.
    """

    weight: nn.Parameter

    def __init__(self, kind: type[QuantizedLinear], num_experts: int, inputs: Share, parts: tuple[Share, ...]) -> None:
        super().__init__()
        kind(inputs, parts)  # raises where sizes do not fit
        self._num_experts = num_experts
        self._kind, self._inputs, self._sizes = kind, inputs.size, tuple(part.size for part in parts)
        self._scale_name = ""
        for name, (shape, dtype) in kind.stored(sum(self._sizes), inputs.size).items():
            values = torch.empty((num_experts * shape[0], *shape[1:]), dtype=dtype)
            self.register_parameter(name, nn.Parameter(values, requires_grad=False))
            self._scale_name = name if name != "weight" else self._scale_name

    @property
    def parameter_dtypes(self) -> dict[str, torch.dtype]:
        """Of the parameters; none has the model's dtype."""
        return {name: stored.dtype for name, stored in self._kind.stored(1, self._inputs).items()}

    def shares(self, parameter: str) -> tuple[tuple[Share, ...], ...]:
        """As `Linear.shares`. Tensors that fill a parameter hold this rank's share alone."""
        shapes = (self._kind.stored(size, self._inputs)[parameter].shape for size in self._sizes)
        return tuple(tuple(map(whole, shape)) for shape in shapes) * self._num_experts

    def after_loading(self) -> None:
        """Scales by expert, group of inputs and channel, as `fused_moe` reads them."""
        scales = self.scales.unflatten(0, (self._num_experts, -1))
        scales = scales.unsqueeze(1) if scales.dim() == 2 else scales.transpose(1, 2).contiguous()
        self.get_parameter(self._scale_name).data = scales

    @property
    def scales(self) -> Tensor:
        return self.get_parameter(self._scale_name)

    def stacked(self) -> Tensor:
        """[num_experts, out_features, …], a view."""
        return self.weight.unflatten(0, (self._num_experts, -1))

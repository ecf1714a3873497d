"""Linear layers with adapters beside them; see kernels/lora.py. Models are built without, and get them once loaded."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from engine.layers.linear import Linear
from engine.layers.quantized_linear import QuantizedLinear
from kernels.lora import AdapterRows, add_lora


class CurrentRows:
    """Which adapters the rows of the step have that is computed now. All layers of a model share one."""

    rows: AdapterRows | None = None
    """None: no row has any."""


class LoraLinear(nn.Module):
    """What `base` computes, and what the adapters of the rows add to it.

    Args:
        base: a layer with weights in place.
        current: tells which adapters.
        num_places: how many adapters there is room for.
        rank: most ranks of an adapter, a power of two.
        device, dtype: of adapters; dtype is that of activations.
    """

    def __init__(
        self,
        base: Linear | QuantizedLinear,
        current: CurrentRows,
        num_places: int,
        rank: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.base = base
        self.in_features = base.in_features if isinstance(base, QuantizedLinear) else base.weight.shape[1]
        self.output_sizes = base.output_sizes
        self._current = current
        self._rank = rank
        a_shape = (num_places, len(self.output_sizes) * rank, self.in_features)
        b_shape = (num_places, sum(self.output_sizes), rank)
        self.lora_a = nn.Parameter(torch.zeros(a_shape, dtype=dtype, device=device), requires_grad=False)
        self.lora_b = nn.Parameter(torch.zeros(b_shape, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] → [num_tokens, sum(output_sizes)]."""
        y: Tensor = self.base(x)
        if self._current.rows is not None:
            add_lora(y, x, self.lora_a, self.lora_b, self.output_sizes, self._current.rows)
        return y

    def put(self, place: int, parts: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Write an adapter into a place, 1 for the first; parts of the output that it does not have become zero.

        Args:
            parts: by part of the output, A [its rank, in_features] and B [size of the part, its rank].
        """
        lora_a, lora_b = self.lora_a[place - 1], self.lora_b[place - 1]
        lora_a.zero_()
        lora_b.zero_()
        for part, (a, b) in parts.items():
            first = sum(self.output_sizes[:part])
            lora_a[part * self._rank : part * self._rank + len(a)].copy_(a, non_blocking=True)
            lora_b[first : first + len(b), : b.shape[1]].copy_(b, non_blocking=True)


def add_adapters_to(
    model: nn.Module, current: CurrentRows, num_places: int, rank: int, device: torch.device, dtype: torch.dtype
) -> dict[str, LoraLinear]:
    """Put a LoraLinear in the place of every linear layer but the output projection. Returns them by path."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, (Linear, QuantizedLinear))}
    layers = {}
    for path, base in found.items():
        parent, _, name = path.rpartition(".")
        if name != "lm_head":
            layers[path] = LoraLinear(base, current, num_places, rank, device, dtype)
            setattr(model.get_submodule(parent), name, layers[path])
    return layers


def names_of_parts(model: nn.Module, layers: dict[str, LoraLinear]) -> Iterator[tuple[str, str, int]]:
    """For each part of each layer: its name in checkpoints, the layer's path, the part's number."""
    packed = getattr(model, "packed_parameters", {})
    for path in layers:
        parent, _, name = path.rpartition(".")
        for part, part_name in enumerate(packed.get(name, (name,))):
            yield f"{parent}.{part_name}", path, part

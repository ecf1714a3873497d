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

    Where ranks share the layer, A has this rank's inputs and B its outputs. So with a share of the inputs both base and
    adapter give a part of a sum over all ranks, which whoever holds the layer takes once for the two.

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
        self.output_sizes = base.output_sizes
        self._current = current
        self._rank = rank
        a_shape = (num_places, len(self.output_sizes) * rank, base.inputs.size)
        b_shape = (num_places, sum(self.output_sizes), rank)
        self.lora_a = nn.Parameter(torch.zeros(a_shape, dtype=dtype, device=device), requires_grad=False)
        self.lora_b = nn.Parameter(torch.zeros(b_shape, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] → [num_tokens, sum(output_sizes)]."""
        y: Tensor = self.base(x)
        if self._current.rows is not None:
            add_lora(y, x, self.lora_a, self.lora_b, self.output_sizes, self._current.rows)
        return y

    def clear(self, place: int) -> None:
        """Make a place, 1 for the first, one of an adapter that changes nothing here."""
        self.lora_a[place - 1].zero_()
        self.lora_b[place - 1].zero_()

    def put(self, place: int, part: int, a: Tensor, b: Tensor) -> None:
        """Write what an adapter does to a part of the output into a cleared place.

        Args:
            a: [its rank, all inputs of the layer], of which this rank of the model takes its own.
            b: [all outputs of the part, its rank], likewise.
        """
        own = b[self.base.outputs[part].span()]
        first = sum(self.output_sizes[:part])
        self.lora_a[place - 1, part * self._rank : part * self._rank + len(a)] = a[:, self.base.inputs.span()]
        self.lora_b[place - 1, first : first + len(own), : own.shape[1]] = own


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

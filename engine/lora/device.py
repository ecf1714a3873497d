"""Adapters on the device: the layers that compute them, and which one each row of a step has."""

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from engine.layers.lora import CurrentRows, add_adapters_to, names_of_parts
from engine.lora.adapter import Adapter, PartShape
from engine.request import Request
from engine.staging import Staging
from kernels.backend import uses_triton
from kernels.lora import MIN_RANK, AdapterRows


class DeviceAdapters:
    """Gives a loaded model places for adapters.

    Args:
        model: with weights in place; its linear layers are replaced.
        num_places: how many adapters there is room for.
        max_rank: most ranks of one.
        max_num_seqs: number of slots of requests; one more belongs to padding.
        staging: the way to the device.
        dtype: of activations.
    """

    def __init__(
        self, model: nn.Module, num_places: int, max_rank: int, max_num_seqs: int, staging: Staging, dtype: torch.dtype
    ) -> None:
        rank = max(MIN_RANK, 1 << (max_rank - 1).bit_length())
        self._current = CurrentRows()
        self._layers = add_adapters_to(model, self._current, num_places, rank, staging.device, dtype)
        self.parts = {
            name: PartShape(path, part, self._layers[path].in_features, self._layers[path].output_sizes[part])
            for name, path, part in names_of_parts(model, self._layers)
        }
        self._content: list[Adapter | None] = [None] * (num_places + 1)
        self._places = np.zeros(max_num_seqs + 1, dtype=np.int32)
        self._places_on_device = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=staging.device)
        self._is_changed = False
        self._staging = staging

    @property
    def num_bytes(self) -> int:
        """Memory of all places."""
        return sum(layer.lora_a.nbytes + layer.lora_b.nbytes for layer in self._layers.values())

    def admit(self, request: Request) -> None:
        """Note which adapter a request that has just got its slot uses, and see that the adapter is in its place."""
        place, adapter = request.adapter_place, cast(Adapter | None, request.adapter)
        if adapter is not None and self._content[place] is not adapter:
            for path, layer in self._layers.items():
                layer.put(place, adapter.layers.get(path, {}))
            self._content[place] = adapter
        if self._places[request.slot] != place:
            self._places[request.slot] = place
            self._is_changed = True

    def flush(self) -> None:
        """Send what was noted."""
        if self._is_changed:
            self._places_on_device.copy_(self._staging.send(self._places)[0])
            self._is_changed = False

    def begin(self, slots: Tensor, request_slots: np.ndarray | None = None) -> None:
        """Tell the layers about the rows that come next.

        Args:
            slots: [num_rows] int64 on the device, of the rows' requests.
            request_slots: all slots among them, where the host knows: rows without any adapter then cost nothing.
        """
        if request_slots is not None and not self._places[request_slots].any():
            self._current.rows = None
            return
        rows = AdapterRows.of(self._places_on_device.index_select(0, slots))
        self._current.rows = rows if rows.groups or uses_triton(slots) else None

    def begin_without(self) -> None:
        """Tell the layers that no row that comes next has an adapter."""
        self._current.rows = None

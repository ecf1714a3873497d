"""Adapters on the device: the layers that compute them, and which one each row of a step has.

Where several ranks hold the model, the first one alone reads adapters. When one gets its place, it sends the matrices
to the others layer by layer, in the order of the steps: ranks never have different contents of a file, nor could one of
them miss an adapter that others have.
"""

from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from engine.layers.lora import CurrentRows, add_adapters_to, names_of_parts
from engine.lora.adapter import Adapter, Outline, PartShape
from engine.parallel.group import TensorParallel
from engine.request import Request
from engine.staging import Staging
from kernels.backend import uses_triton
from kernels.lora import MIN_RANK, AdapterRows


@dataclass(slots=True)
class AdapterNotes:
    """What the host knows before the device does, as every rank hears of it."""

    places: np.ndarray | None = None
    """int32 [number of slots], the place of each one's adapter, 0 for none; None: as before."""
    contents: dict[int, Outline] = field(default_factory=dict)
    """By place, the adapters that come there."""


class DeviceAdapters:
    """Gives a loaded model places for adapters.

    Args:
        model: with weights in place; its linear layers are replaced.
        num_places: how many adapters there is room for.
        max_rank: most ranks of one.
        max_num_seqs: number of slots of requests; one more belongs to padding.
        staging: the way to the device.
        dtype: of activations.
        group: the ranks that share the model.
    """

    def __init__(
        self,
        model: nn.Module,
        num_places: int,
        max_rank: int,
        max_num_seqs: int,
        staging: Staging,
        dtype: torch.dtype,
        group: TensorParallel,
    ) -> None:
        rank = max(MIN_RANK, 1 << (max_rank - 1).bit_length())
        self._current = CurrentRows()
        self._layers = add_adapters_to(model, self._current, num_places, rank, staging.device, dtype)
        self.parts = {name: self._shape(path, part) for name, path, part in names_of_parts(model, self._layers)}
        self._content: list[Adapter | None] = [None] * (num_places + 1)
        """Of each place, on the first rank."""
        self._to_come: dict[int, Adapter] = {}
        self._places = np.zeros(max_num_seqs + 1, dtype=np.int32)
        self._places_on_device = torch.zeros(max_num_seqs + 1, dtype=torch.int32, device=staging.device)
        self.notes = AdapterNotes()
        self._staging = staging
        self._group = group
        # On its way to all ranks is a part at a time, here: an adapter takes no memory that was not counted.
        largest = max((shape.in_features + shape.out_features for shape in self.parts.values()), default=0)
        self._buffer = torch.empty(max_rank * largest, dtype=dtype, device=staging.device)

    @property
    def num_bytes(self) -> int:
        """Memory of all places."""
        return sum(layer.lora_a.nbytes + layer.lora_b.nbytes for layer in self._layers.values())

    def admit(self, request: Request) -> None:
        """Note which adapter a request that has just got its slot uses, and whether that has yet to get its place."""
        place, adapter = request.adapter_place, cast(Adapter | None, request.adapter)
        if adapter is not None and self._content[place] is not adapter:
            self.notes.contents[place] = adapter.outline
            self._to_come[place] = adapter
        if self._places[request.slot] != place:
            self._places[request.slot] = place
            self.notes.places = self._places

    def forget_notes(self) -> None:
        """Drop what is not on the device yet, for requests that will all be admitted anew."""
        self.notes.contents = {}
        self._to_come = {}

    def flush(self) -> None:
        """Bring what was noted to the device. All ranks do so at once."""
        notes = self.notes
        if notes.places is not None:
            self._places = notes.places
            self._places_on_device.copy_(self._staging.send(self._places)[0])
        for place, outline in notes.contents.items():
            self._content[place] = None  # until it is there: where this fails, it begins anew
            adapter = self._to_come.get(place)
            for path, layer in self._layers.items():
                layer.clear(place)
                for part, rank in outline.get(path, {}).items():
                    matrices = None if adapter is None else adapter.layers[path][part]
                    layer.put(place, part, *self._share_out(matrices, rank, self._shape(path, part)))
            self._content[place] = adapter
        self.notes = AdapterNotes()
        self._to_come = {}

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

    def _share_out(self, matrices: tuple[Tensor, Tensor] | None, rank: int, shape: PartShape) -> tuple[Tensor, Tensor]:
        """The first rank's A [rank, in_features] and B [out_features, rank], on the device of each; None on others."""
        num_in, num_out = rank * shape.in_features, rank * shape.out_features
        both = self._buffer[: num_in + num_out]
        a, b = both[:num_in].view(rank, -1), both[num_in:].view(-1, rank)
        if matrices is not None:
            a.copy_(matrices[0], non_blocking=True)
            b.copy_(matrices[1], non_blocking=True)
        self._group.broadcast(both)
        return a, b

    def _shape(self, path: str, part: int) -> PartShape:
        base = self._layers[path].base
        return PartShape(path, part, base.inputs.whole, base.outputs[part].whole)

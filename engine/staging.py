"""Host arrays to the device, without waiting for it and without allocating."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

NUM_BUFFERS = 16
"""A step sends up to six times. A copy waits for the steps launched before it, so no buffer's turn may come again until
the step after the next: the host would wait for the device, and steps would not overlap."""
ALIGNMENT = 16


class Staging:
    """Sends groups of arrays in one copy each, through pinned buffers that are reused in turn.

    A buffer is written again only when the copy out of it is done, which an event tells. On a CPU nothing is copied:
    the tensors share memory with the arrays, which the caller must not change while they are in use.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: list[Tensor] = []
        self._events: list[torch.cuda.Event] = []
        self._turn = 0

    def send(self, *arrays: np.ndarray, into: Tensor | None = None) -> list[Tensor]:
        """Tensors on the device with the arrays' contents, shapes and dtypes.

        Args:
            into: uint8 memory on the device to use; arrays of the same sizes go to the same places in it every time.
        """
        offsets = np.cumsum([0, *(-(-array.nbytes // ALIGNMENT) * ALIGNMENT for array in arrays)]).tolist()
        if self.device.type == "cpu":
            if into is None:
                return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
            _pack(arrays, offsets, into.numpy())
            return _unpack(arrays, offsets, into)
        buffer, event = self._next_buffer(offsets[-1])
        _pack(arrays, offsets, buffer.numpy())
        if into is None:
            into = torch.empty(offsets[-1], dtype=torch.uint8, device=self.device)
        into[: offsets[-1]].copy_(buffer[: offsets[-1]], non_blocking=True)
        event.record()
        return _unpack(arrays, offsets, into)

    def _next_buffer(self, size: int) -> tuple[Tensor, torch.cuda.Event]:
        """The buffer whose turn it is, at least so large, and the event of its next copy."""
        if not self._buffers:
            self._buffers = [torch.empty(0, dtype=torch.uint8)] * NUM_BUFFERS
            self._events = [torch.cuda.Event() for _ in range(NUM_BUFFERS)]
        turn = self._turn = (self._turn + 1) % NUM_BUFFERS
        self._events[turn].synchronize()
        if self._buffers[turn].numel() < size:
            self._buffers[turn] = torch.empty(2 * size, dtype=torch.uint8, pin_memory=True)
        return self._buffers[turn], self._events[turn]


def _pack(arrays: Sequence[np.ndarray], offsets: list[int], memory: np.ndarray) -> None:
    for array, offset in zip(arrays, offsets, strict=False):
        memory[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _unpack(arrays: Sequence[np.ndarray], offsets: list[int], memory: Tensor) -> list[Tensor]:
    return [
        memory[offset : offset + array.nbytes].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
        for array, offset in zip(arrays, offsets, strict=False)
    ]


class Readback:
    """Device results on their way to the host: started at once, waited for when read."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._host = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._done: torch.cuda.Event | None = None
        if any(tensor.is_cuda for tensor in tensors):
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> list[Tensor]:
        """The tensors on the host, in order."""
        if self._done is not None:
            self._done.synchronize()
        return self._host


def send(array: npt.NDArray | Tensor, device: torch.device) -> Tensor:
    """Copy a freshly made host array to the device, after what the device was told before and without waiting for it.

    torch keeps the pinned buffer until the copy is done. On the CPU the tensor shares memory with the array.
    """
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(array)
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)

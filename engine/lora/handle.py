"""What scheduler and requests know of an adapter, and which adapters are on the device. No torch here."""

import re
from collections import OrderedDict

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
"""Names of adapters. None is a path that leads elsewhere."""


class AdapterHandle:
    """An adapter in host memory.

    Args:
        name: what requests call it.
        version: how often the name stood for other content before, in this engine.
    """

    def __init__(self, name: str, version: int) -> None:
        self.name = name
        self.version = version
        self.num_requests = 0
        """Live requests that use it."""

    @property
    def salt_name(self) -> str:
        """Names the content in keys of the prefix cache."""
        return self.name if self.version == 0 else f"{self.name}#{self.version}"


class AdapterPlaces:
    """The places for adapters on the device, 1 … count. A running request pins the one that it uses.

    An adapter stays in its place when nobody uses it any more, until another needs the place: the one that has been of
    no use for longest makes way. Steps run in order, so new content comes after the last step that read the old.
    """

    def __init__(self, count: int) -> None:
        self._free = list(range(count, 0, -1))
        self._place_of: dict[AdapterHandle, int] = {}
        self._num_pins: dict[AdapterHandle, int] = {}
        self._unused: OrderedDict[AdapterHandle, None] = OrderedDict()

    def pin(self, adapter: AdapterHandle) -> int:
        """The adapter's place, which is its own until as many `unpin` follow; 0 if all places are pinned by others."""
        place = self._place_of.get(adapter, 0)
        if not place:
            if not self._free and not self._unused:
                return 0
            place = self._free.pop() if self._free else self._place_of.pop(self._unused.popitem(last=False)[0])
            self._place_of[adapter] = place
        self._unused.pop(adapter, None)
        self._num_pins[adapter] = self._num_pins.get(adapter, 0) + 1
        return place

    def unpin(self, adapter: AdapterHandle) -> None:
        """Take one `pin` back."""
        self._num_pins[adapter] -= 1
        if not self._num_pins[adapter]:
            del self._num_pins[adapter]
            self._unused[adapter] = None

    def drop(self, adapter: AdapterHandle) -> None:
        """Free the place of an adapter that nobody uses, if it has one."""
        if adapter in self._unused:
            del self._unused[adapter]
            self._free.append(self._place_of.pop(adapter))

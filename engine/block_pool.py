"""KV-cache blocks: who owns which, which ones can be found again by their content, and which one to reuse next.

Every block is in exactly one of three places, and num_free + num_cached + num_owned = num_blocks always:
  free    holds nothing of use
  cached  owned by nobody, but its content is known by key and can be taken up again; least recently freed first out
  owned   in the block table of one request, or of several that share a prefix (ref count ≥ 1)
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

import numpy as np

from engine.block_residency import SAMPLE_EVERY, BlockResidency

KEY_BYTES = 16


def extend_block_keys(keys: list[bytes], token_ids: Sequence[int], block_size: int, salt: str) -> None:
    """Append the keys of the full blocks of `token_ids` that `keys` does not have yet.

    A key is a 128-bit BLAKE2b digest of the parent block's key and the block's tokens, so equal keys mean equal tokens
    from the very start; the first block's parent is the salt. Blocks of different salts never match.
    """
    num_full = len(token_ids) // block_size
    if len(keys) == num_full:
        return
    parent = keys[-1] if keys else blake2b(salt.encode(), digest_size=KEY_BYTES).digest()
    start = len(keys) * block_size
    content = np.asarray(token_ids[start : num_full * block_size], dtype=np.int32).tobytes()
    stride = 4 * block_size
    for offset in range(0, len(content), stride):
        parent = blake2b(parent + content[offset : offset + stride], digest_size=KEY_BYTES).digest()
        keys.append(parent)


def block_keys(token_ids: Sequence[int], block_size: int, salt: str) -> list[bytes]:
    """The keys of all full blocks of a text, as a pool with this block size makes them. Needs no pool and no torch."""
    keys: list[bytes] = []
    extend_block_keys(keys, token_ids, block_size, salt)
    return keys


class BlockPool:
    """Hands out block ids 0 … num_blocks - 1.

    Args:
        num_blocks: blocks in the KV cache.
        enable_prefix_caching: whether a freed block can be found again by its content.
    """

    def __init__(self, num_blocks: int, enable_prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.enable_prefix_caching = enable_prefix_caching
        self.residency = BlockResidency()
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._ref_counts = [0] * num_blocks
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._changes: dict[bytes, bool] | None = None
        """Keys that became findable (True) or ceased to be (False) since `take_events`; None until its first call.
        A change and its opposite cancel out, so there are never more than 2 · num_blocks."""

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now: free and cached ones."""
        return len(self._free) + len(self._cached)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_owned(self) -> int:
        return self.num_blocks - self.num_available

    def keys(self) -> list[bytes]:
        """The keys of all blocks that can be found."""
        return list(self._block_of)

    def take_events(self) -> tuple[list[bytes], list[bytes]]:
        """The keys stored and evicted since the last call, net: no key is in both. The first call tells all there are.

        Nothing is recorded before the first call.
        """
        changes, self._changes = self._changes, {}
        if changes is None:
            return self.keys(), []
        stored = [key for key, is_stored in changes.items() if is_stored]
        return stored, [key for key, is_stored in changes.items() if not is_stored]

    def find_prefix(self, keys: Sequence[bytes]) -> list[int]:
        """Blocks that hold the longest known prefix of `keys`; until shared, the next `allocate` may take them."""
        blocks: list[int] = []
        for key in keys:
            block = self._block_of.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_cached_among(self, blocks: Iterable[int]) -> int:
        """How many of these blocks nobody owns: sharing them takes so many off `num_available`."""
        return sum(not self._ref_counts[block] for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Make the caller one more owner of blocks that `find_prefix` returned."""
        for block in blocks:
            if self._ref_counts[block] == 0:
                del self._cached[block]
                if block % SAMPLE_EVERY == 0:
                    self.residency.reused(block)
            self._ref_counts[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` ≤ `num_available` blocks for one owner; free ones first, then the longest-unused cached ones."""
        if count > self.num_available:
            raise ValueError(f"{count} blocks asked for, {self.num_available} available")
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self._forget(block)
                if block % SAMPLE_EVERY == 0:
                    self.residency.evicted(block)
            if block % SAMPLE_EVERY == 0:
                self.residency.taken(block)
            self._ref_counts[block] = 1
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Give up one request's blocks, in block-table order. Tails are reused first: a prefix outlives its ends."""
        for block in reversed(blocks):
            self._ref_counts[block] -= 1
            if self._ref_counts[block] == 0:
                if self._key_of[block] is None:
                    self._free.append(block)
                    if block % SAMPLE_EVERY == 0:
                        self.residency.freed(block)
                else:
                    self._cached[block] = None
                    if block % SAMPLE_EVERY == 0:
                        self.residency.idle(block)

    def discard(self, blocks: Sequence[int]) -> list[int]:
        """Like `release`, for blocks whose content may be bad: those without another owner cannot be found any more.

        Returns:
            The blocks without another owner.
        """
        own = [block for block in blocks if self._ref_counts[block] == 1]
        for block in own:
            self._forget(block)
        self.release(blocks)
        return own

    def register(self, block: int, key: bytes) -> None:
        """Make an owned block findable, now that all of it is computed. The first block with a key keeps it."""
        if self.enable_prefix_caching and key not in self._block_of:
            self._block_of[key] = block
            self._key_of[block] = key
            self._note(key, is_stored=True)

    def _forget(self, block: int) -> None:
        key = self._key_of[block]
        if key is not None:
            del self._block_of[key]
            self._key_of[block] = None
            self._note(key, is_stored=False)

    def _note(self, key: bytes, is_stored: bool) -> None:
        if self._changes is not None and self._changes.pop(key, None) is None:
            self._changes[key] = is_stored

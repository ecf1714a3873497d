"""Attention in plain torch, for CPUs and as the reference: gather the blocks, then scaled_dot_product_attention.

The query heads that share a KV head are folded into the query length, so keys and values are read once per KV head and
never repeated.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.attention.backend import AttentionBatch
from engine.staging import Staging

LENGTH_RATIO = 2
"""Decodes attend in one padded batch as long as the longest context is at most so many times the shortest."""
MASK_ELEMENTS = 2**21
"""Most (query, key) pairs in one call: bounds the memory that long prompts need."""


@dataclass(slots=True)
class Piece:
    """One call: `rows` of the query, as [num_requests, query_len], over `block_ids` [num_requests · num_blocks]."""

    rows: Tensor  # [num_requests · query_len] int64
    num_requests: int
    block_ids: Tensor
    num_keys: int
    mask: Tensor | None  # [num_requests, query_len, num_keys] bool, True where attended; None: everything
    num_unmasked: int = 0  # the first keys, which all queries attend to and which the mask leaves out


class TorchAttention:
    """The torch backend. Any dtype, head size and block size.

    Args:
        windows: those that layers of the model have, None for layers without.
    """

    def __init__(self, block_size: int, staging: Staging, windows: Iterable[int | None] = (None,)) -> None:
        self.device = staging.device
        self.block_size = block_size
        self._windows = tuple(windows)
        self._staging = staging

    def plan(self, batch: AttentionBatch) -> dict[int | None, list[Piece]]:
        """Pieces for each of the model's windows."""
        decode = np.flatnonzero(batch.query_lens == 1)
        plan: dict[int | None, list[Piece]] = {}
        for window in self._windows:
            seen = batch.context_lens if window is None else np.minimum(batch.context_lens, window)
            pieces = [self._decode_piece(batch, group, window) for group in _similar_lengths(seen, decode)]
            for request in np.flatnonzero(batch.query_lens > 1):
                pieces += self.prefill_pieces(batch, int(request), window)
            plan[window] = pieces
        return plan

    def forward(
        self,
        query: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        plan: dict[int | None, list[Piece]],
        window: int | None = None,
    ) -> Tensor:
        pieces = plan[window]
        if len(pieces) == 1:
            # The rows of a lone piece are all rows in order.
            return _attend(query, k_cache, v_cache, pieces[0])
        output = torch.empty_like(query)
        self.write(output, query, k_cache, v_cache, pieces)
        return output

    def write(self, output: Tensor, query: Tensor, k_cache: Tensor, v_cache: Tensor, pieces: list[Piece]) -> None:
        """Attend, and put the rows of each piece to their places in the output."""
        for piece in pieces:
            output.index_copy_(0, piece.rows, _attend(query.index_select(0, piece.rows), k_cache, v_cache, piece))

    def plan_decode(self, block_tables: Tensor, context_lens: Tensor) -> dict[int | None, list[Piece]]:
        num_requests, max_blocks = block_tables.shape
        num_keys = max_blocks * self.block_size
        rows, keys = (torch.arange(count, device=self.device) for count in (num_requests, num_keys))
        plan = {}
        for window in self._windows:
            mask = keys < context_lens[:, None]
            if window is not None:
                mask &= keys >= context_lens[:, None] - window
            plan[window] = [Piece(rows, num_requests, block_tables.reshape(-1), num_keys, mask.unsqueeze(1))]
        return plan

    def _decode_piece(self, batch: AttentionBatch, group: np.ndarray, window: int | None) -> Piece:
        """Requests with one new token each, padded to the longest context among them."""
        lens = batch.context_lens[group]
        tables = batch.block_tables
        if len(group) != len(tables):
            tables = tables.index_select(0, self._tensor(group))
        if window is not None:
            unseen = np.maximum(lens - window, 0) // self.block_size  # blocks
            lens = lens - unseen * self.block_size
            columns = unseen[:, None] + np.arange(-(-int(lens.max()) // self.block_size))
            tables = tables.gather(1, self._tensor(np.minimum(columns, tables.shape[1] - 1)))
        num_keys = int(lens.max())
        mask = None
        if lens.min() != num_keys or (window is not None and num_keys > window):
            keys = np.arange(num_keys)
            seen = keys < lens[:, None]
            mask = self._tensor(seen if window is None else seen & (keys >= lens[:, None] - window)).unsqueeze(1)
        blocks = tables[:, : -(-num_keys // self.block_size)].reshape(-1)
        return Piece(self._tensor(batch.query_starts[group]), len(group), blocks, num_keys, mask)

    def prefill_pieces(self, batch: AttentionBatch, request: int, window: int | None) -> list[Piece]:
        """One request with several new tokens, in spans of queries that keep the mask small."""
        query_len, context_len = int(batch.query_lens[request]), int(batch.context_lens[request])
        start = int(batch.query_starts[request])
        num_before = context_len - query_len
        # Long ones on CPUs, without a window, have a mask for the span's own keys alone: spans are longer then.
        is_long = query_len * context_len > MASK_ELEMENTS
        splits = is_long and self.device.type == "cpu" and window is None
        span = math.isqrt(MASK_ELEMENTS) if splits else max(1, MASK_ELEMENTS // context_len)
        pieces = []
        for first in range(0, query_len, span):
            last = min(first + span, query_len)
            end = num_before + last
            unseen = 0 if window is None else max(num_before + first - window + 1, 0) // self.block_size  # blocks
            blocks = batch.block_tables[request, unseen : -(-end // self.block_size)]
            num_unmasked = num_before + first if splits else 0
            keys = np.arange(unseen * self.block_size + num_unmasked, end)
            queries = np.arange(num_before + first, end)[:, None]
            mask = keys <= queries
            if window is not None:
                mask &= keys > queries - window
            rows = self._tensor(np.arange(start + first, start + last))
            num_keys = num_unmasked + len(keys)
            pieces.append(Piece(rows, 1, blocks, num_keys, self._tensor(mask).unsqueeze(0), num_unmasked))
        return pieces

    def _tensor(self, array: np.ndarray) -> Tensor:
        return self._staging.send(array)[0]


def _attend(query: Tensor, k_cache: Tensor, v_cache: Tensor, piece: Piece) -> Tensor:
    """One piece: query [num_requests · query_len, num_heads, head_dim] → the same shape."""
    num_rows, num_heads, head_dim = query.shape
    num_kv_heads = k_cache.shape[2]
    group = num_heads // num_kv_heads
    num_requests, query_len = piece.num_requests, num_rows // piece.num_requests
    keys, values = (
        _gather(cache, piece.block_ids)
        .view(num_requests, -1, num_kv_heads, head_dim)[:, : piece.num_keys]
        .transpose(1, 2)
        .to(query.dtype)
        for cache in (k_cache, v_cache)
    )
    folded = query.view(num_requests, query_len, num_kv_heads, group, head_dim).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(num_requests, num_kv_heads, group * query_len, head_dim)
    mask = piece.mask
    if mask is not None:
        mask = mask.unsqueeze(1).expand(-1, group, -1, -1).reshape(num_requests, 1, group * query_len, mask.shape[2])
    if piece.num_unmasked and mask is not None:
        output = _attend_in_two(folded, keys, values, mask, piece.num_unmasked)
    else:
        output = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask)
    output = output.view(num_requests, num_kv_heads, group, query_len, head_dim).permute(0, 3, 1, 2, 4)
    return output.reshape(num_rows, num_heads, head_dim)


def _attend_in_two(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, num_unmasked: int) -> Tensor:
    """Attention on a CPU over keys without a mask and the rest with one, several times as fast as with a mask for all.

    The operation is the one that scaled_dot_product_attention runs there; it also gives the logarithms of the sums of
    weights, by which the two results are put together.
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    first, first_sum = attend(query, keys[:, :, :num_unmasked], values[:, :, :num_unmasked])
    unseen = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
    last, last_sum = attend(query, keys[:, :, num_unmasked:], values[:, :, num_unmasked:], attn_mask=unseen)
    share = torch.sigmoid(first_sum - last_sum).unsqueeze(-1)
    return torch.lerp(last.float(), first.float(), share.float()).to(query.dtype)


def _gather(cache: Tensor, block_ids: Tensor) -> Tensor:
    """Blocks of a cache. Torch gathers float8 only as bytes."""
    if cache.dtype == torch.float8_e4m3fn:
        return cache.view(torch.uint8).index_select(0, block_ids).view(cache.dtype)
    return cache.index_select(0, block_ids)


def _similar_lengths(lens: np.ndarray, requests: np.ndarray) -> list[np.ndarray]:
    """Split requests into groups whose context lengths differ by at most LENGTH_RATIO, so that padding stays small."""
    if len(requests) == 0:
        return []
    shortest, longest = lens[requests].min(), lens[requests].max()
    if longest <= LENGTH_RATIO * shortest:
        return [requests]
    by_length = requests[np.argsort(lens[requests], kind="stable")]
    groups, first = [], 0
    for index in range(1, len(by_length) + 1):
        if index == len(by_length) or lens[by_length[index]] > LENGTH_RATIO * lens[by_length[first]]:
            groups.append(by_length[first:index])
            first = index
    return groups

"""Reductions over the vocabulary in two levels: first over blocks of ids, then over what the blocks have in common.

An argmax or top-k over rows of 150,000 logits costs ten times a plain maximum. Maxima of small blocks tell where the
large logits are, so only a few blocks have to be looked at closely. Everything here is exact, and the order of equal
logits is that of their ids, whatever the shape of the batch: a row's result never depends on other rows.
"""

from collections.abc import Callable

import torch
from torch import Tensor

BLOCK_SIZE = 128


def _reduce_blocks(values: Tensor, reduce: Callable[[Tensor, int], Tensor]) -> Tensor:
    """[R, V] → [R, ceil(V / BLOCK_SIZE)]; the last block may be short."""
    whole = values.shape[1] // BLOCK_SIZE
    reduced = reduce(values[:, : whole * BLOCK_SIZE].unflatten(1, (whole, BLOCK_SIZE)), 2)
    if whole * BLOCK_SIZE == values.shape[1]:
        return reduced
    rest = reduce(values[:, whole * BLOCK_SIZE :], 1)
    return torch.cat((reduced, rest[:, None]), dim=1)


def block_maxima(values: Tensor) -> Tensor:
    """The largest value of each block: [R, V] → [R, B], NaN where a block has one."""
    return _reduce_blocks(values, torch.amax)


def block_sums(values: Tensor) -> Tensor:
    """The sum of each block: [R, V] → float64 [R, B]. Blocks are summed in the type of `values`."""
    return _reduce_blocks(values, torch.sum).double()


def _block_token_ids(blocks: Tensor) -> Tensor:
    """Token ids in the given blocks, int64 [R, N] → [R, N * BLOCK_SIZE], as if no block were short."""
    offsets = torch.arange(BLOCK_SIZE, device=blocks.device)
    return (blocks[:, :, None] * BLOCK_SIZE + offsets).flatten(1)


def flags(compare: Callable[..., Tensor], values: Tensor, others: Tensor) -> Tensor:
    """Compare [R, V] with [R, 1] of the same type; 1 and 0 in that type, which on CPUs is much faster than to bool."""
    return compare(values, others, out=torch.empty_like(values))


def argmax(logits: Tensor, maxima: Tensor) -> Tensor:
    """Id of the largest logit, the lowest one among equals: [R, V] and its block maxima → int64 [R].

    A row with NaN gives the id of a NaN.
    """
    token_ids = _block_token_ids(maxima.argmax(1, keepdim=True)).clamp_(max=logits.shape[1] - 1)
    best = logits.gather(1, token_ids).argmax(1, keepdim=True)
    return token_ids.gather(1, best).squeeze(1)


def ordered_keys(values: Tensor) -> Tensor:
    """int32 keys that ascend as float32 values descend; equal ones, zeros of either sign too, have equal keys."""
    bits = (values + 0.0).view(torch.int32)
    return ((bits >> 31) & 0x7FFFFFFF).bitwise_xor_(bits).bitwise_not_()


def values_of(keys: Tensor) -> Tensor:
    """Inverse of `ordered_keys`."""
    bits = ~keys
    return ((bits >> 31) & 0x7FFFFFFF).bitwise_xor_(bits).view(torch.float32)


def _first_positions(values: Tensor, count: int) -> Tensor:
    """Positions of the `count` largest of float32 [R, N], descending; the lower position first among equals."""
    keys = ordered_keys(values).long() * 2**32 + torch.arange(values.shape[1], device=values.device)
    return keys.topk(count, dim=1, largest=False).values & 0xFFFFFFFF


def likeliest(logits: Tensor, maxima: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest logits, descending, lower ids first among equals: float32 and int64 [R, count].

    They are in the first `count` blocks of the same order: before any other block there are as many maxima that come
    before all it has.
    """
    blocks = _first_positions(maxima.float(), min(count, maxima.shape[1]))
    token_ids = _block_token_ids(blocks.sort(1).values)
    outside = token_ids >= logits.shape[1]
    values = logits.gather(1, token_ids.clamp_(max=logits.shape[1] - 1)).float().masked_fill_(outside, -torch.inf)
    positions = _first_positions(values, count)
    return values.gather(1, positions), token_ids.gather(1, positions)


def locate(measure: Tensor, sums: Tensor, target: Tensor) -> Tensor:
    """Lowest id at which the running sum of `measure` exceeds `target`.

    Args:
        measure: [R, V], non-negative whole numbers whose sum stays below 2**53, so that no sum is ever rounded.
        sums: float64 [R, B], its block sums.
        target: float64 [R, 1].

    Returns:
        int64 [R, 1]; some valid id where the sum never exceeds the target, or is NaN.
    """
    running = sums.cumsum(1)
    block = (running <= target).sum(1, keepdim=True).clamp_(max=sums.shape[1] - 1)
    before = running.gather(1, block) - sums.gather(1, block)
    token_ids = _block_token_ids(block).clamp_(max=measure.shape[1] - 1)
    inside = measure.gather(1, token_ids).double().cumsum_(1) + before
    position = (inside <= target).sum(1, keepdim=True).clamp_(max=BLOCK_SIZE - 1)
    return token_ids.gather(1, position)


def crossing(keys: Tensor, measure: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The key at which the running sum of `measure`, in ascending order of the keys, reaches `target`.

    Two histograms, over the high and then over the low half of the keys, take the place of sorting: on CPUs that is
    eight times as fast.

    Args:
        keys: int32 [R, V].
        measure: float64 [R, V], as in `locate`.
        target: float64 [R, 1].

    Returns:
        The key, int32 [R, 1], and the sum over smaller keys, float64 [R, 1].
    """
    high = (keys >> 16).add_(2**15).long()
    high_bin, before_bin = _histogram_crossing(high, measure, target)
    inside = torch.where(high == high_bin, measure, 0)
    low_bin, before_key = _histogram_crossing((keys & 0xFFFF).long(), inside, target - before_bin)
    key = (high_bin - 2**15) * 2**16 + low_bin
    return key.int(), before_bin + before_key


def _histogram_crossing(bins: Tensor, measure: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    histogram = torch.zeros(len(bins), 2**16, dtype=torch.float64, device=bins.device).scatter_add_(1, bins, measure)
    running = histogram.cumsum(1)
    first = (running < target).sum(1, keepdim=True).clamp_(max=2**16 - 1)
    return first, running.gather(1, first) - histogram.gather(1, first)

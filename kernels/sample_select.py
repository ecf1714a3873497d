"""The last launch of `sample_tokens`: the cuts and the token, found among candidates by bisection."""

from kernels.backend import tl, triton
from kernels.sample_common import choose_target, keys_of, load_settings, middle_of, scale, value_of, weigh


@triton.jit
def _candidates(
    source: tl.tensor,  # (list_ptr, logits_ptr, peak, temperature, number of candidates, whether they are listed)
    offsets: tl.tensor,
    SHIFT: tl.constexpr,
    LIBDEVICE: tl.constexpr,
) -> tl.tensor:
    """(ids, keys, float64 weights); past the last candidate, keys are 2**31 - 1."""
    list_ptr, logits_ptr, peak, temperature, num_candidates, is_listed = source
    mask = offsets < num_candidates
    ids = tl.where(is_listed, tl.load(list_ptr + offsets, mask=mask & is_listed, other=0), offsets)
    values = tl.load(logits_ptr + ids, mask=mask, other=float("-inf"))
    keys = tl.where(mask, keys_of(values, SHIFT), 0x7FFFFFFF)
    return ids, keys, weigh(scale(values, peak, temperature), LIBDEVICE).to(tl.float64)


@triton.jit
def _part(
    candidates: tl.tensor,
    first_key: tl.tensor,
    last_key: tl.tensor,
    last_id: tl.tensor,
    WEIGHED: tl.constexpr,
) -> tl.tensor:
    """What each candidate adds to `_measure`."""
    ids, keys, weights = candidates
    inside = (keys >= first_key) & (keys <= last_key) & (ids <= last_id)
    return tl.where(inside, weights, 0.0) if WEIGHED else inside.to(tl.float64)


@triton.jit
def _measure(
    tile: tl.tensor,  # the first TILE of `_candidates`
    source: tl.tensor,
    first_key: tl.tensor,
    last_key: tl.tensor,
    last_id: tl.tensor,
    WEIGHED: tl.constexpr,
    TILE: tl.constexpr,
    SHIFT: tl.constexpr,
    LIBDEVICE: tl.constexpr,
) -> tl.tensor:
    """The weight, or else the number, of candidates from first_key to last_key with ids up to last_id: float64."""
    measure = _part(tile, first_key, last_key, last_id, WEIGHED)
    for start in range(TILE, source[4], TILE):
        more = _candidates(source, start + tl.arange(0, TILE), SHIFT, LIBDEVICE)
        measure += _part(more, first_key, last_key, last_id, WEIGHED)
    return tl.sum(measure)


@triton.jit
def _crossing(
    tile: tl.tensor,
    source: tl.tensor,
    first_key: tl.tensor,
    last_key: tl.tensor,
    target: tl.tensor,
    BY_ID: tl.constexpr,
    WEIGHED: tl.constexpr,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    SHIFT: tl.constexpr,
    LIBDEVICE: tl.constexpr,
) -> tl.tensor:
    """Where the running measure of candidates from first_key to last_key exceeds the target: a key, or else an id."""
    low, high = (tl.full([], 0, tl.int32), tl.full([], VOCAB - 1, tl.int32)) if BY_ID else (first_key, last_key)
    while low < high:
        middle = middle_of(low, high)
        key, token_id = (last_key, middle) if BY_ID else (middle, 0x7FFFFFFF)
        is_past = _measure(tile, source, first_key, key, token_id, WEIGHED, TILE, SHIFT, LIBDEVICE) > target
        low, high = tl.where(is_past, low, middle + 1), tl.where(is_past, middle, high)
    return low


@triton.jit
def _first_unlikely(
    peak_key: tl.tensor,
    last_key: tl.tensor,
    peak: tl.tensor,
    temperature: tl.tensor,
    log_min_p: tl.tensor,
    SHIFT: tl.constexpr,
) -> tl.tensor:
    """The first key that min_p drops, or last_key if that comes before it."""
    low, high = peak_key, last_key
    while low < high:
        middle = middle_of(low, high)
        is_likely = scale(value_of(middle, SHIFT), peak, temperature) >= log_min_p
        low, high = tl.where(is_likely, middle + 1, low), tl.where(is_likely, high, middle)
    return low


@triton.jit
def select_kernel(
    logits_ptr: tl.tensor,  # [S, VOCAB or more], rows logits_stride apart
    settings_ptr: tl.tensor,  # [S, 5] float64 contiguous
    state_ptr: tl.tensor,  # [S, 3] int32: the key of the likeliest; the largest listed, or -2**31; how many are listed
    totals_ptr: tl.tensor,  # [S] float64: weight of all tokens, for rows without top_k
    list_ptr: tl.tensor,  # [S, CAPACITY] int32 contiguous
    token_ids_ptr: tl.tensor,  # [S] int64; left as it is for rows that list nothing
    logits_stride: tl.tensor,
    VOCAB: tl.constexpr,
    CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
    MAX_RANKED_TOP_K: tl.constexpr,
    SMALL_VOCAB: tl.constexpr,
    SHIFT: tl.constexpr,
    LIBDEVICE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    peak_key = tl.load(state_ptr + row * 3)
    last = tl.load(state_ptr + row * 3 + 1)
    if last != -0x80000000:
        temperature, top_k, top_p, log_min_p, uniform = load_settings(settings_ptr, row, VOCAB)
        peak = value_of(peak_key, SHIFT)
        num_listed = tl.load(state_ptr + row * 3 + 2)
        is_listed = num_listed <= CAPACITY
        num_candidates = tl.where(is_listed, num_listed, VOCAB)
        source = (
            list_ptr + row * CAPACITY, logits_ptr + row * logits_stride, peak, temperature, num_candidates, is_listed
        )  # fmt: skip
        tile = _candidates(source, tl.arange(0, TILE), SHIFT, LIBDEVICE)
        last = tl.minimum(last, 0x7F800000 >> SHIFT)  # -inf
        total = tl.load(totals_ptr + row)
        if top_k > 0:
            last = _crossing(
                tile, source, peak_key, last, top_k - 1, False, False, VOCAB, TILE, SHIFT, LIBDEVICE
            )  # fmt: skip
            total = _measure(tile, source, peak_key, last, 0x7FFFFFFF, True, TILE, SHIFT, LIBDEVICE)

        # Tokens before key `cut` are kept by top_p whole, of those at it as many as it takes, lower ids first.
        limit = tl.ceil(top_p * total)
        cut = _crossing(tile, source, peak_key, last, limit - 1, False, True, VOCAB, TILE, SHIFT, LIBDEVICE)
        scaled = scale(value_of(cut, SHIFT), peak, temperature)
        weight = tl.maximum(weigh(scaled, LIBDEVICE).to(tl.float64), 1.0)
        before_cut = _measure(tile, source, peak_key, cut - 1, 0x7FFFFFFF, True, TILE, SHIFT, LIBDEVICE)
        num_ties = _measure(tile, source, cut, cut, 0x7FFFFFFF, False, TILE, SHIFT, LIBDEVICE)
        num_ties = tl.minimum(tl.ceil((limit - before_cut) / weight), num_ties)
        num_ties = tl.where(scaled >= log_min_p, num_ties, 0.0)

        last_kept = _first_unlikely(peak_key, cut, peak, temperature, log_min_p, SHIFT) - 1
        kept = _measure(tile, source, peak_key, last_kept, 0x7FFFFFFF, True, TILE, SHIFT, LIBDEVICE)
        target = choose_target(uniform, kept + num_ties * weight)
        is_ranked = ((top_k > 0) & (top_k <= MAX_RANKED_TOP_K)) | (VOCAB <= SMALL_VOCAB)
        if (target < kept) & (is_ranked == 0):
            token_id = _crossing(
                tile, source, peak_key, last_kept, target, True, True, VOCAB, TILE, SHIFT, LIBDEVICE
            )  # fmt: skip
        else:
            key, before = cut, kept
            if target < kept:
                key = _crossing(
                    tile, source, peak_key, last_kept, target, False, True, VOCAB, TILE, SHIFT, LIBDEVICE
                )  # fmt: skip
                before = _measure(tile, source, peak_key, key - 1, 0x7FFFFFFF, True, TILE, SHIFT, LIBDEVICE)
                scaled = scale(value_of(key, SHIFT), peak, temperature)
                weight = tl.maximum(weigh(scaled, LIBDEVICE).to(tl.float64), 1.0)
            nth = tl.floor((target - before) / weight)
            token_id = _crossing(tile, source, key, key, nth, True, False, VOCAB, TILE, SHIFT, LIBDEVICE)
        tl.store(token_ids_ptr + row, token_id)

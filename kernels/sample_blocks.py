"""Launches one to four of `sample_tokens`: what can be found in blocks of the vocabulary."""

from kernels.backend import tl, triton
from kernels.sample_common import choose_target, keys_of, load_settings, middle_of, scale, value_of, weigh


@triton.jit
def chunk_ids(CHUNK: tl.constexpr, BLOCK: tl.constexpr) -> tl.tensor:
    """(int32 [blocks], int32 [blocks, BLOCK]): this program's blocks, and the ids in them."""
    blocks = tl.program_id(1) * (CHUNK // BLOCK) + tl.arange(0, CHUNK // BLOCK)
    return blocks, blocks[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def load_logits(
    logits_ptr: tl.tensor,  # of a row
    ids: tl.tensor,
    mask: tl.tensor,
    VOCAB: tl.constexpr,
    READABLE: tl.constexpr,  # columns up to a multiple of 16, so that a thread's 16 bytes are masked all or none
) -> tl.tensor:
    """Logits as float32, -inf past the vocabulary."""
    values = tl.load(logits_ptr + ids, mask=mask & (ids < READABLE), other=float("-inf"))
    return tl.where(ids < VOCAB, values.to(tl.float32), float("-inf"))


@triton.jit
def maxima_kernel(
    logits_ptr: tl.tensor,  # [S, VOCAB or more], rows logits_stride apart
    maxima_ptr: tl.tensor,  # [S, NUM_BLOCKS] int32 contiguous: least key of each block
    chunk_maxima_ptr: tl.tensor,  # [S, number of chunks] int32 contiguous
    logits_stride: tl.tensor,
    VOCAB: tl.constexpr,
    READABLE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    SHIFT: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    blocks, ids = chunk_ids(CHUNK, BLOCK)
    values = load_logits(logits_ptr + row * logits_stride, ids, True, VOCAB, READABLE)
    maxima = tl.min(keys_of(values, SHIFT), axis=1)
    tl.store(maxima_ptr + row * NUM_BLOCKS + blocks, maxima, mask=blocks < NUM_BLOCKS)
    tl.store(chunk_maxima_ptr + row * tl.num_programs(1) + tl.program_id(1), tl.min(maxima, axis=0))


@triton.jit
def sums_kernel(
    logits_ptr: tl.tensor,  # [S, VOCAB or more], rows logits_stride apart
    settings_ptr: tl.tensor,  # [S, 5] float64 contiguous
    chunk_maxima_ptr: tl.tensor,  # [S, number of chunks] int32 contiguous
    sums_ptr: tl.tensor,  # [S, NUM_BLOCKS] float64 contiguous: of the weights in each block
    logits_stride: tl.tensor,
    VOCAB: tl.constexpr,
    READABLE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNKS: tl.constexpr,  # power of two ≥ number of chunks
    SHIFT: tl.constexpr,
    LIBDEVICE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    temperature, top_k, top_p, log_min_p, _ = load_settings(settings_ptr, row, VOCAB)
    if (temperature > 0) & (top_k == 0):
        chunks = tl.arange(0, CHUNKS)
        maxima_ptr = chunk_maxima_ptr + row * tl.num_programs(1) + chunks
        peak = value_of(tl.min(tl.load(maxima_ptr, mask=chunks < tl.num_programs(1), other=0x7FFFFFFF)), SHIFT)
        blocks, ids = chunk_ids(CHUNK, BLOCK)
        values = load_logits(logits_ptr + row * logits_stride, ids, True, VOCAB, READABLE)
        scaled = scale(values, peak, temperature)
        # top_p is a share of all tokens, min_p comes after it.
        least = tl.where(top_p < 1, float("-inf"), log_min_p)
        weights = tl.where(scaled >= least, weigh(scaled, LIBDEVICE), 0.0)
        sums = tl.sum(weights.to(tl.float64), axis=1)
        tl.store(sums_ptr + row * NUM_BLOCKS + blocks, sums, mask=blocks < NUM_BLOCKS)


@triton.jit
def _kth_key(keys: tl.tensor, k: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """The k-th smallest key, which is between low and high."""
    while low < high:
        middle = middle_of(low, high)
        is_enough = tl.sum((keys <= middle).to(tl.int32)) >= k
        low, high = tl.where(is_enough, low, middle + 1), tl.where(is_enough, middle, high)
    return low


@triton.jit
def _nucleus_bound(
    total: tl.tensor,
    top_p: tl.tensor,
    peak: tl.tensor,
    temperature: tl.tensor,
    VOCAB: tl.constexpr,
    SHIFT: tl.constexpr,
) -> tl.tensor:
    """A key past which no token is in the nucleus.

    Tokens that weigh less than 1 / VOCAB of what top_p drops weigh less than that all together, so it drops them. Half
    a unit, a percent and the last bits make up for roundings.
    """
    weight = tl.maximum((total - top_p * total) / VOCAB - 0.5, 0.25) * (2.0**-35)
    value = peak + temperature.to(tl.float64) * (tl.log(weight.to(tl.float32)) - 0.01)
    return keys_of(value - tl.abs(value) * (2.0**-22), SHIFT)


@triton.jit
def bound_kernel(
    logits_ptr: tl.tensor,  # [S, VOCAB or more], rows logits_stride apart
    settings_ptr: tl.tensor,  # [S, 5] float64 contiguous
    maxima_ptr: tl.tensor,  # [S, NUM_BLOCKS] int32 contiguous
    sums_ptr: tl.tensor,  # [S, NUM_BLOCKS] float64 contiguous
    token_ids_ptr: tl.tensor,  # [S] int64
    is_finite_ptr: tl.tensor,  # [S] bool
    state_ptr: tl.tensor,  # [S, 3] int32: the key of the likeliest; the largest to list, or -2**31 for none; 0
    totals_ptr: tl.tensor,  # [S] float64
    logits_stride: tl.tensor,
    VOCAB: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,  # power of two ≥ NUM_BLOCKS
    SHIFT: tl.constexpr,
    LIBDEVICE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    temperature, top_k, top_p, log_min_p, uniform = load_settings(settings_ptr, row, VOCAB)
    logits_ptr += row * logits_stride
    blocks, offsets = tl.arange(0, BLOCKS), tl.arange(0, BLOCK)
    valid = blocks < NUM_BLOCKS
    maxima = tl.load(maxima_ptr + row * NUM_BLOCKS + blocks, mask=valid, other=0x7FFFFFFF)
    peak_key = tl.min(maxima)
    peak = value_of(peak_key, SHIFT)
    ids = tl.min(tl.where(maxima == peak_key, blocks, NUM_BLOCKS - 1)) * BLOCK + offsets
    values = tl.load(logits_ptr + ids, mask=ids < VOCAB, other=float("-inf"))
    token_id = tl.min(tl.where(keys_of(values, SHIFT) == peak_key, ids, VOCAB - 1))
    is_finite = (peak_key > (-0x7F800001 >> SHIFT)) & (peak_key < (0x7F800000 >> SHIFT))
    bound = tl.full([], -0x80000000, tl.int32)
    if is_finite & (temperature > 0):
        if top_k > 0:
            bound = tl.full([], 0x7FFFFFFF, tl.int32)
            if top_k <= NUM_BLOCKS:
                # The top_k largest of the blocks' maxima bound the top_k-th logit from below.
                largest = tl.max(tl.where(valid, maxima, peak_key))
                bound = _kth_key(maxima, top_k.to(tl.int32), peak_key, largest)
        else:
            sums = tl.load(sums_ptr + row * NUM_BLOCKS + blocks, mask=valid, other=0.0)
            total = tl.sum(sums)
            tl.store(totals_ptr + row, total)
            if top_p < 1:
                bound = _nucleus_bound(total, top_p, peak, temperature, VOCAB, SHIFT)
            else:
                target = choose_target(uniform, total)
                block = tl.sum((tl.cumsum(sums, axis=0) <= target).to(tl.int32))
                ids = block * BLOCK + offsets
                values = tl.load(logits_ptr + ids, mask=ids < VOCAB, other=float("-inf"))
                scaled = scale(values, peak, temperature)
                weights = tl.where(scaled >= log_min_p, weigh(scaled, LIBDEVICE), 0.0).to(tl.float64)
                running = tl.sum(tl.where(blocks < block, sums, 0.0)) + tl.cumsum(weights, axis=0)
                token_id = block * BLOCK + tl.sum((running <= target).to(tl.int32))
    tl.store(token_ids_ptr + row, token_id)
    tl.store(is_finite_ptr + row, is_finite)
    tl.store(state_ptr + row * 3, peak_key)
    tl.store(state_ptr + row * 3 + 1, bound)
    tl.store(state_ptr + row * 3 + 2, 0)


@triton.jit
def list_kernel(
    logits_ptr: tl.tensor,  # [S, VOCAB or more], rows logits_stride apart
    maxima_ptr: tl.tensor,  # [S, NUM_BLOCKS] int32 contiguous
    state_ptr: tl.tensor,  # [S, 3] int32: …, the largest key to list, how many are listed
    list_ptr: tl.tensor,  # [S, CAPACITY] int32 contiguous: ids in any order; those that do not fit are only counted
    logits_stride: tl.tensor,
    VOCAB: tl.constexpr,
    READABLE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    CAPACITY: tl.constexpr,
    SHIFT: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    bound = tl.load(state_ptr + row * 3 + 1)
    if bound != -0x80000000:
        blocks, ids = chunk_ids(CHUNK, BLOCK)
        mask = blocks < NUM_BLOCKS
        mask &= tl.load(maxima_ptr + row * NUM_BLOCKS + blocks, mask=mask, other=0x7FFFFFFF) <= bound
        if tl.max(mask.to(tl.int32)) > 0:
            values = load_logits(logits_ptr + row * logits_stride, ids, mask[:, None], VOCAB, READABLE)
            is_chosen = mask[:, None] & (ids < VOCAB) & (keys_of(values, SHIFT) <= bound)
            chosen = tl.reshape(is_chosen.to(tl.int32), [CHUNK])
            first = tl.atomic_add(state_ptr + row * 3 + 2, tl.sum(chosen), sem="relaxed")
            places = first + tl.cumsum(chosen, axis=0) - 1
            list_ptr += row * CAPACITY
            tl.store(list_ptr + places, tl.reshape(ids, [CHUNK]), mask=(chosen > 0) & (places < CAPACITY))

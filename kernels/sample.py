"""The next tokens of a decode step, drawn on the device by each row's temperature, top_k, top_p and min_p.

Five launches, the same for any rows, as CUDA graphs need. No row is sorted:

1. `maxima_kernel` finds the largest logit of each block of 128.
2. `sums_kernel` adds up each block's weights, for rows without top_k.
3. `bound_kernel` settles what blocks alone can settle: greedy rows, and rows that draw from all tokens. For the others
   it finds a logit below which nothing can be drawn.
4. `list_kernel` lists the ids from that logit up; it reads only blocks that have some.
5. `select_kernel` finds the cuts and the token among those listed, by bisection over the logits' bits.

Rows that a launch is not for leave it at once: a greedy batch reads its logits once, one with a top_k little more than
once, any other twice or three times.

All sums are of whole numbers (see sample_common.py), so neither the neighbours nor the timing can change a token.
"""

import torch
from torch import Tensor

from kernels.backend import CompileCase, triton, uses_triton
from kernels.sample_blocks import bound_kernel, list_kernel, maxima_kernel, sums_kernel
from kernels.sample_select import select_kernel

MAX_VOCAB = 2**18
"""More weights than that might not add up without rounding."""
MAX_RANKED_TOP_K = 512
"""Up to this top_k, tokens lie on the line of probability by rank, with a larger or none by id ..."""
SMALL_VOCAB = 4096
"""... unless there are no more tokens than this."""
BLOCK = 128
CHUNK = 4096  # logits of a program that reads all of them: 64 bytes of bfloat16 for each of its threads
TILE = 2048  # listed ids that the last kernel keeps in registers; more are read anew in each step of a search
CAPACITY = 16_384
"""Ids that a row can list. With more above its bound, it searches the whole row instead: as right, but slowly."""
KEY_SHIFT = {torch.float32: 0, torch.float16: 13, torch.bfloat16: 16}
"""Low bits of a logit as float32 that are always zero."""


def sample_tokens_reference(logits: Tensor, settings: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """As `sample_tokens`, with full sorts."""
    values = logits[:, :vocab_size].float()
    temperature, top_k, top_p, log_min_p, uniform = settings.split(1, dim=1)
    order = values.sort(dim=1, descending=True, stable=True).indices
    likeliest = order[:, :1]
    peak = values.gather(1, likeliest)
    scaled = (values - peak) / torch.where(temperature > 0, temperature, 1).float()
    weights = scaled.exp().mul(2.0**35).round().double().nan_to_num(0)

    has_top_k = (top_k > 0) & (top_k < vocab_size)
    last = torch.where(has_top_k, top_k, vocab_size).long() - 1
    ranked = values.gather(1, order)
    ranked_weights = weights.gather(1, order) * (ranked >= ranked.gather(1, last))
    running = ranked_weights.cumsum(1)
    is_kept = running - ranked_weights < top_p * running[:, -1:]
    weights = torch.zeros_like(weights).scatter(1, order, ranked_weights * is_kept)
    weights *= scaled >= log_min_p.float()

    # The line of probability: by rank; or by id, but with those last whose logit is the lowest that the cuts leave.
    cut = torch.where(is_kept, ranked, torch.inf).amin(1, keepdim=True)
    is_whole = ~has_top_k & (top_p >= 1)
    ids_with_cut_last = ((values == cut) & ~is_whole).sort(dim=1, stable=True).indices
    by_rank = (vocab_size <= SMALL_VOCAB) | (has_top_k & (top_k <= MAX_RANKED_TOP_K))
    line = torch.where(by_rank & ~is_whole, order, ids_with_cut_last)
    running = weights.gather(1, line).cumsum(1)
    mass = running[:, -1:]
    target = torch.minimum((uniform * mass).floor(), mass - 1)
    drawn = line.gather(1, (running <= target).sum(1, keepdim=True).clamp(max=vocab_size - 1))
    is_finite = peak.isfinite()
    return torch.where(is_finite & (temperature > 0), drawn, likeliest).squeeze(1), is_finite.squeeze(1)


def sample_tokens(logits: Tensor, settings: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Draw the next token of each row: temperature, top_k, top_p of what that leaves, min_p relative to the likeliest.

    Penalties are another operation (sample_penalties.py) that comes before this, logprobs one that comes after it
    (sample_logprobs.py). The engine's sampler in torch, for CPUs, draws the same tokens from the same logits.

    Args:
        logits: [S, at least vocab_size] float32, float16 or bfloat16, any row stride; columns past vocab_size are
            padding.
        settings: float64 [S, 5], contiguous: temperature (0: the likeliest token, the lowest id among equals), top_k
            (0 or vocab_size: off), top_p in (0, 1] (1: off), log(min_p) (-inf: off), a random number in (0, 1).
        vocab_size: at most 2**18.

    Returns:
        (token ids int64 [S], whether the row's largest logit is a finite number, bool [S]); where it is not, the token
        is some valid id that means nothing.

    Raises:
        ValueError: sizes, dtypes or strides that are not as above.
    """
    _check(logits, settings, vocab_size)
    if not uses_triton(logits):
        return sample_tokens_reference(logits, settings, vocab_size)
    num_rows, device = logits.shape[0], logits.device
    chunk, blocks, chunks, tile = sample_config(vocab_size)
    num_blocks, num_chunks = triton.cdiv(vocab_size, BLOCK), triton.cdiv(vocab_size, chunk)
    token_ids = torch.empty(num_rows, dtype=torch.int64, device=device)
    is_finite = torch.empty(num_rows, dtype=torch.bool, device=device)
    maxima = torch.empty(num_rows, num_blocks, dtype=torch.int32, device=device)
    chunk_maxima = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=device)
    sums = torch.empty(num_rows, num_blocks, dtype=torch.float64, device=device)
    state = torch.empty(num_rows, 3, dtype=torch.int32, device=device)
    totals = torch.empty(num_rows, dtype=torch.float64, device=device)
    listed = torch.empty(num_rows, CAPACITY, dtype=torch.int32, device=device)

    stride, rows, parts = logits.stride(0), (num_rows,), (num_rows, num_chunks)
    common = {"VOCAB": vocab_size, "SHIFT": KEY_SHIFT[logits.dtype]}
    in_blocks = {**common, "NUM_BLOCKS": num_blocks, "BLOCK": BLOCK}
    readable = readable_columns(logits, vocab_size)
    weighing = {"LIBDEVICE": not logits.is_cpu}
    maxima_kernel[parts](logits, maxima, chunk_maxima, stride, **in_blocks, READABLE=readable, CHUNK=chunk)
    sums_kernel[parts](
        logits,
        settings,
        chunk_maxima,
        sums,
        stride,
        **in_blocks,
        **weighing,
        READABLE=readable,
        CHUNK=chunk,
        CHUNKS=chunks,
    )
    bound_kernel[rows](
        logits, settings, maxima, sums, token_ids, is_finite, state, totals, stride, **in_blocks, **weighing,
        BLOCKS=blocks, num_warps=8,
    )  # fmt: skip
    list_kernel[parts](
        logits, maxima, state, listed, stride, **in_blocks, READABLE=readable, CHUNK=chunk, CAPACITY=CAPACITY
    )
    select_kernel[rows](
        logits, settings, state, totals, listed, token_ids, stride, **common, **weighing, CAPACITY=CAPACITY, TILE=tile,
        MAX_RANKED_TOP_K=MAX_RANKED_TOP_K, SMALL_VOCAB=SMALL_VOCAB, num_warps=8,
    )  # fmt: skip
    return token_ids, is_finite


def sample_config(vocab_size: int) -> tuple[int, int, int, int]:
    """(CHUNK, BLOCKS, CHUNKS, TILE), each no larger than the vocabulary needs."""
    rounded = max(BLOCK, triton.next_power_of_2(vocab_size))
    chunk = min(CHUNK, rounded)
    return chunk, rounded // BLOCK, rounded // chunk, min(TILE, rounded)


def readable_columns(logits: Tensor, vocab_size: int) -> int:
    """How many columns kernels may read, so that whole 16 bytes of any dtype are within where the tensor allows."""
    return min(triton.cdiv(vocab_size, 16) * 16, logits.shape[1])


def _check(logits: Tensor, settings: Tensor, vocab_size: int) -> None:
    if logits.dim() != 2 or not 1 <= vocab_size <= min(logits.shape[1], MAX_VOCAB):
        raise ValueError(
            f"logits are {tuple(logits.shape)} and vocab_size is {vocab_size}; expected [S, vocab_size or more] and "
            f"1 to {MAX_VOCAB}"
        )
    if logits.dtype not in KEY_SHIFT or logits.stride(1) != 1:
        raise ValueError(
            f"logits are {logits.dtype} with strides {logits.stride()}; expected float32, float16 or bfloat16, and the "
            "last stride 1"
        )
    if settings.shape != (logits.shape[0], 5) or settings.dtype != torch.float64 or not settings.is_contiguous():
        raise ValueError(
            f"settings are {settings.dtype} {tuple(settings.shape)} with strides {settings.stride()}; expected "
            f"contiguous float64 ({logits.shape[0]}, 5)"
        )


def compile_cases() -> list[CompileCase]:
    """The width of Qwen3's logits, all of it and as many as its tokenizer knows; edited rows end with the latter."""

    def case(vocab_size: int, dtype: torch.dtype, width: int = 151_936) -> CompileCase:
        logits = torch.empty(4, width, dtype=dtype, device="meta")
        settings = torch.empty(4, 5, dtype=torch.float64, device="meta")
        name = f"sample_tokens {vocab_size} of {width} {str(dtype).removeprefix('torch.')}"
        return CompileCase(name, lambda: sample_tokens(logits, settings, vocab_size))

    return [
        case(151_936, torch.bfloat16),
        case(151_669, torch.bfloat16),
        case(151_936, torch.float32),
        case(151_669, torch.float32, width=151_669),
    ]

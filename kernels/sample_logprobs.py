"""What log-probabilities of chosen tokens are made of, in one pass over the logits.

Two launches: `parts_kernel` sums up pieces of the vocabulary, `merge_kernel` adds up a row's pieces, always in the same
order: a row's numbers do not depend on its neighbours.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.backend import CompileCase, tl, triton, uses_triton
from kernels.sample import BLOCK, KEY_SHIFT, readable_columns, sample_config
from kernels.sample_blocks import chunk_ids, load_logits


class TokenLogprobs(NamedTuple):
    """Of N rows. The log-probability of any token is (its logit - peak) - log_sum, in float32."""

    logprobs: Tensor
    """float32 [N], of the chosen tokens."""
    ranks: Tensor
    """int64 [N]; 1 + the number of tokens with a larger logit."""
    peaks: Tensor
    """float32 [N, 1], the largest logit."""
    log_sums: Tensor
    """float32 [N, 1], log of the sum of exp(logit - peak)."""
    maxima: Tensor
    """float32 [N, ceil(V / 128)], the largest logit of each block of 128."""


def token_logprobs_reference(logits: Tensor, token_ids: Tensor, vocab_size: int) -> TokenLogprobs:
    """As `token_logprobs`."""
    values = logits[:, :vocab_size].float()
    peaks = values.amax(1, keepdim=True)
    log_sums = (values - peaks).exp().sum(1, keepdim=True).log()
    chosen = values.gather(1, token_ids[:, None])
    blocks = torch.nn.functional.pad(values, (0, -vocab_size % BLOCK), value=-torch.inf).unflatten(1, (-1, BLOCK))
    return TokenLogprobs(
        logprobs=((chosen - peaks) - log_sums).squeeze(1),
        ranks=1 + (values > chosen).sum(1),
        peaks=peaks,
        log_sums=log_sums,
        maxima=blocks.amax(2),
    )


@triton.jit
def parts_kernel(
    logits_ptr: tl.tensor,  # [N, VOCAB or more], rows logits_stride apart
    token_ids_ptr: tl.tensor,  # [N] int64
    maxima_ptr: tl.tensor,  # [N, NUM_BLOCKS] float32 contiguous
    peaks_ptr: tl.tensor,  # [N, number of chunks] float32 contiguous
    sums_ptr: tl.tensor,  # [N, number of chunks] float32 contiguous: of exp(logit - the chunk's peak)
    larger_ptr: tl.tensor,  # [N, number of chunks] int32 contiguous: logits that are larger than the chosen one
    logits_stride: tl.tensor,
    VOCAB: tl.constexpr,
    READABLE: tl.constexpr,
    NUM_BLOCKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    blocks, ids = chunk_ids(CHUNK, BLOCK)
    logits_ptr += row * logits_stride
    chosen = tl.load(logits_ptr + tl.load(token_ids_ptr + row)).to(tl.float32)
    values = load_logits(logits_ptr, ids, True, VOCAB, READABLE)
    maxima = tl.max(values, axis=1)
    peak = tl.max(maxima, axis=0)
    # Where nothing is possible the peak is -inf too, and their difference no number.
    shares = tl.where(values > float("-inf"), tl.exp(values - peak), 0.0)
    place = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(maxima_ptr + row * NUM_BLOCKS + blocks, maxima, mask=blocks < NUM_BLOCKS)
    tl.store(peaks_ptr + place, peak)
    tl.store(sums_ptr + place, tl.sum(tl.sum(shares, axis=1), axis=0))
    tl.store(larger_ptr + place, tl.sum(tl.sum((values > chosen).to(tl.int32), axis=1), axis=0))


@triton.jit(do_not_specialize=["num_chunks"])
def merge_kernel(
    logits_ptr: tl.tensor,  # [N, VOCAB or more], rows logits_stride apart
    token_ids_ptr: tl.tensor,  # [N] int64
    peaks_ptr: tl.tensor,  # [N, num_chunks] float32 contiguous
    sums_ptr: tl.tensor,  # [N, num_chunks] float32 contiguous
    larger_ptr: tl.tensor,  # [N, num_chunks] int32 contiguous
    logprobs_ptr: tl.tensor,  # [N] float32
    ranks_ptr: tl.tensor,  # [N] int64
    peak_ptr: tl.tensor,  # [N] float32
    log_sum_ptr: tl.tensor,  # [N] float32
    logits_stride: tl.tensor,
    num_chunks: tl.tensor,
    CHUNKS: tl.constexpr,  # power of two ≥ num_chunks
) -> None:
    row = tl.program_id(0).to(tl.int64)
    chunks = tl.arange(0, CHUNKS)
    mask, places = chunks < num_chunks, row * num_chunks + chunks
    peaks = tl.load(peaks_ptr + places, mask=mask, other=float("-inf"))
    peak = tl.max(peaks, axis=0)
    sums = tl.load(sums_ptr + places, mask=mask, other=0.0)
    log_sum = tl.log(tl.sum(tl.where(peaks > float("-inf"), sums * tl.exp(peaks - peak), 0.0), axis=0))
    chosen = tl.load(logits_ptr + row * logits_stride + tl.load(token_ids_ptr + row)).to(tl.float32)
    larger = tl.load(larger_ptr + places, mask=mask, other=0)
    tl.store(logprobs_ptr + row, (chosen - peak) - log_sum)
    tl.store(ranks_ptr + row, tl.sum(larger, axis=0).to(tl.int64) + 1)
    tl.store(peak_ptr + row, peak)
    tl.store(log_sum_ptr + row, log_sum)


def token_logprobs(logits: Tensor, token_ids: Tensor, vocab_size: int) -> TokenLogprobs:
    """Log-probabilities and ranks of one token in each row, as the softmax of the logits in float32 has them.

    Args:
        logits: [N, at least vocab_size] float32, float16 or bfloat16, any row stride; columns past vocab_size are
            padding. A row with NaN gives numbers that mean nothing.
        token_ids: int64 [N], contiguous, each in [0, vocab_size).
        vocab_size: V.

    Raises:
        ValueError: on a GPU, dtypes or strides that are not as above.
    """
    if not uses_triton(logits):
        return token_logprobs_reference(logits, token_ids, vocab_size)
    if logits.dtype not in KEY_SHIFT or logits.stride(1) != 1 or not 1 <= vocab_size <= logits.shape[1]:
        raise ValueError(
            f"logits are {logits.dtype} {tuple(logits.shape)} with strides {logits.stride()}, vocab_size is "
            f"{vocab_size}; expected float32, float16 or bfloat16, last stride 1, and no more tokens than columns"
        )
    num_rows, device = logits.shape[0], logits.device
    chunk, _, chunks, _ = sample_config(vocab_size)
    num_blocks, num_chunks = triton.cdiv(vocab_size, BLOCK), triton.cdiv(vocab_size, chunk)
    maxima, peaks, sums = (
        torch.empty(num_rows, width, dtype=torch.float32, device=device)
        for width in (num_blocks, num_chunks, num_chunks)
    )
    larger = torch.empty(num_rows, num_chunks, dtype=torch.int32, device=device)
    ranks = torch.empty(num_rows, dtype=torch.int64, device=device)
    logprobs, peak, log_sum = (torch.empty(num_rows, dtype=torch.float32, device=device) for _ in range(3))
    parts_kernel[(num_rows, num_chunks)](
        logits, token_ids, maxima, peaks, sums, larger, logits.stride(0), VOCAB=vocab_size,
        READABLE=readable_columns(logits, vocab_size), NUM_BLOCKS=num_blocks, CHUNK=chunk, BLOCK=BLOCK,
    )  # fmt: skip
    merge_kernel[(num_rows,)](
        logits, token_ids, peaks, sums, larger, logprobs, ranks, peak, log_sum, logits.stride(0), num_chunks,
        CHUNKS=chunks, num_warps=1,
    )  # fmt: skip
    return TokenLogprobs(logprobs, ranks, peak[:, None], log_sum[:, None], maxima)


def compile_cases() -> list[CompileCase]:
    """The width of Qwen3's logits, all of it and as many as its tokenizer knows."""

    def case(vocab_size: int, dtype: torch.dtype) -> CompileCase:
        logits = torch.empty(4, 151_936, dtype=dtype, device="meta")
        token_ids = torch.empty(4, dtype=torch.int64, device="meta")
        name = f"token_logprobs {vocab_size} {str(dtype).removeprefix('torch.')}"
        return CompileCase(name, lambda: token_logprobs(logits, token_ids, vocab_size))

    return [case(151_936, torch.bfloat16), case(151_669, torch.bfloat16), case(151_936, torch.float32)]

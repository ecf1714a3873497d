"""Penalties on the logits of tokens that a row has already: repetition, presence and frequency.

Two launches. `count_kernel` notes for each token of the vocabulary where it was seen and how often; `apply_kernel` goes
over the history again, and whoever takes a token's note away, which clears it, changes its logit. So nothing goes over
the vocabulary, each logit changes once however often its token was seen, and the notes are clear for the next rows.
"""

import torch
from torch import Tensor

from kernels.backend import CompileCase, tl, triton, uses_triton

TILE = 1024
MAX_ROWS = 64
"""Rows that are served at a time: their notes take 39 MB with Qwen3's vocabulary."""
LARGEST = torch.finfo(torch.float32).max


def penalize_reference(
    logits: Tensor, rows: Tensor, history: Tensor, num_tokens: Tensor, num_prompt_tokens: Tensor, factors: Tensor
) -> None:
    """As `penalize`."""
    flat, vocab_size = logits.view(-1), logits.shape[1]
    token_ids = history.long()
    positions = torch.arange(token_ids.shape[1], device=logits.device)
    valid = (positions < num_tokens) & (token_ids >= 0) & (token_ids < vocab_size)
    # Entries that mean nothing become copies of token 0, to be left alone unless that is one of the row's tokens too.
    token_ids = torch.where(valid, token_ids, 0)
    seen = valid | (valid & (token_ids == 0)).any(1, keepdim=True)
    in_output = (valid & (positions >= num_prompt_tokens)).float()
    counts = logits.new_zeros(len(token_ids), vocab_size).scatter_add_(1, token_ids, in_output).gather(1, token_ids)

    where = (rows * vocab_size + token_ids).flatten()
    old = flat.gather(0, where).view_as(token_ids)
    repetition, presence, frequency = factors.split(1, dim=1)
    # A tiny penalty may make a logit infinite, which would leave nothing to compare with.
    new = torch.where(old > 0, old / repetition, old * repetition).clamp_(max=LARGEST)
    new = new - presence * (counts > 0) - frequency * counts
    # A token that comes several times is written several times, with the same value.
    flat.scatter_(0, where, torch.where(seen, new, old).flatten())


@triton.jit
def _history(
    history_ptr: tl.tensor,
    num_tokens_ptr: tl.tensor,
    row: tl.tensor,
    history_stride: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """(int32 [TILE] columns, int32 [TILE] token ids, bool [TILE]: which of them are tokens of the row)."""
    columns = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = columns < tl.load(num_tokens_ptr + row)
    ids = tl.load(history_ptr + row * history_stride + columns, mask=mask, other=-1)
    return columns, ids, mask & (ids >= 0) & (ids < VOCAB)


@triton.jit(do_not_specialize=["history_stride"])
def count_kernel(
    history_ptr: tl.tensor,  # [P, any] int32, rows history_stride apart
    num_tokens_ptr: tl.tensor,  # [P] int64
    num_prompt_tokens_ptr: tl.tensor,  # [P] int64
    notes_ptr: tl.tensor,  # [P, VOCAB] int32 contiguous, all zero: how often in the output, and 2**30 if in the prompt
    history_stride: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns, ids, valid = _history(history_ptr, num_tokens_ptr, row, history_stride, VOCAB, TILE)
    in_output = columns >= tl.load(num_prompt_tokens_ptr + row)
    notes_ptr += row * VOCAB + ids
    tl.atomic_add(notes_ptr, 1, mask=valid & in_output, sem="relaxed")
    tl.atomic_or(notes_ptr, 1 << 30, mask=valid & (in_output == 0), sem="relaxed")


@triton.jit(do_not_specialize=["history_stride"])
def apply_kernel(
    logits_ptr: tl.tensor,  # [R, VOCAB] float32 contiguous
    rows_ptr: tl.tensor,  # [P] int64
    history_ptr: tl.tensor,  # [P, any] int32, rows history_stride apart
    num_tokens_ptr: tl.tensor,  # [P] int64
    notes_ptr: tl.tensor,  # [P, VOCAB] int32 contiguous, of `count_kernel`; all zero afterwards
    factors_ptr: tl.tensor,  # [P, 3] float32 contiguous
    history_stride: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    LARGEST: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    _, ids, valid = _history(history_ptr, num_tokens_ptr, row, history_stride, VOCAB, TILE)
    note = tl.atomic_xchg(notes_ptr + row * VOCAB + ids, tl.zeros([TILE], tl.int32), mask=valid, sem="relaxed")
    is_first = valid & (note != 0)
    count = (note & ((1 << 30) - 1)).to(tl.float32)
    repetition, presence = tl.load(factors_ptr + row * 3), tl.load(factors_ptr + row * 3 + 1)
    frequency = tl.load(factors_ptr + row * 3 + 2)
    logits_ptr += tl.load(rows_ptr + row) * VOCAB + ids
    old = tl.load(logits_ptr, mask=is_first, other=0.0)
    new = tl.where(old > 0, tl.div_rn(old, repetition), old * repetition)
    new = tl.where(new > LARGEST, LARGEST, new)
    new = new - tl.where(count > 0, presence, 0.0) - frequency * count
    tl.store(logits_ptr, new, mask=is_first)


def penalize(
    logits: Tensor, rows: Tensor, history: Tensor, num_tokens: Tensor, num_prompt_tokens: Tensor, factors: Tensor
) -> None:
    """Change the logits of tokens that rows have in prompt or output, in place.

    A positive logit of such a token is divided by the repetition penalty, any other multiplied. Then the presence
    penalty is subtracted if the token is in the output, and the frequency penalty as often as it is.

    Args:
        logits: float32 [R, V], contiguous.
        rows: int64 [P, 1], different rows of the logits.
        history: int32 [P, L], last stride 1: prompt and output of each; ids outside the vocabulary are skipped.
        num_tokens: int64 [P, 1], how many of the L columns mean anything.
        num_prompt_tokens: int64 [P, 1], how many of these are the prompt.
        factors: float32 [P, 3], contiguous: repetition (more than 0), presence and frequency penalty.

    Raises:
        ValueError: on a GPU, dtypes or strides that are not as above.
    """
    if not uses_triton(logits):
        penalize_reference(logits, rows, history, num_tokens, num_prompt_tokens, factors)
        return
    if logits.dtype != torch.float32 or not logits.is_contiguous():
        raise ValueError(
            f"logits are {logits.dtype} with strides {logits.stride()}; expected float32, contiguous [R, V]"
        )
    if history.dtype != torch.int32 or (history.shape[1] and history.stride(1) != 1) or not factors.is_contiguous():
        raise ValueError(
            f"history is {history.dtype} with strides {history.stride()}, factors have strides {factors.stride()}; "
            "expected int32 with last stride 1, and contiguous factors"
        )
    vocab_size = logits.shape[1]
    notes = torch.zeros(min(len(history), MAX_ROWS), vocab_size, dtype=torch.int32, device=logits.device)
    sizes = {"VOCAB": vocab_size, "TILE": TILE}
    parts = (tensor.split(MAX_ROWS) for tensor in (rows, history, num_tokens, num_prompt_tokens, factors))
    for own_rows, own_history, own_num, own_num_prompt, own_factors in zip(*parts, strict=True):
        grid, stride = (len(own_rows), triton.cdiv(history.shape[1], TILE)), history.stride(0)
        count_kernel[grid](own_history, own_num, own_num_prompt, notes, stride, **sizes)
        apply_kernel[grid](
            logits, own_rows, own_history, own_num, notes, own_factors, stride, **sizes, LARGEST=LARGEST,
            enable_fp_fusion=False,  # rounded as torch rounds
        )  # fmt: skip


def compile_cases() -> list[CompileCase]:
    """Qwen3's vocabulary, all of it and as much as its tokenizer knows."""

    def case(vocab_size: int) -> CompileCase:
        def integers(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        logits, factors = (torch.empty(4, width, device="meta") for width in (vocab_size, 3))
        ids = integers(4, 999, dtype=torch.int32)
        return CompileCase(
            f"penalize {vocab_size}",
            lambda: penalize(logits, integers(4, 1), ids, integers(4, 1), integers(4, 1), factors),
        )

    return [case(151_936), case(151_669)]

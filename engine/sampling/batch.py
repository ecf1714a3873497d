"""What goes into one sampling step, and what comes out."""

from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor

from engine.request import TokenLogprobs
from engine.sampling.logprobs import RawLogprobs, to_token_logprobs


class Method(IntEnum):
    """How the rows of a group are drawn."""

    GREEDY = 0
    """The likeliest token."""
    WHOLE = 1
    """From all tokens, less those that min_p drops."""
    NUCLEUS = 2
    """From the tokens that top_p and min_p leave."""
    TOP_K = 3
    """From those that top_k, top_p and min_p leave, where top_k is small enough to list the candidates in order."""
    LARGE_TOP_K = 4
    """The same for a larger top_k."""
    ANY = 5
    """However their settings say, by kernels that draw in all these ways at once."""


class RowSettings(NamedTuple):
    """Parameters of R rows, each float64 [R, 1] on the device."""

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    uniform: Tensor
    """A random number in (0, 1)."""


@dataclass(frozen=True, slots=True)
class Bias:
    """What to add to single logits: `values[i]` to that of token `token_ids[i]` in row `rows[i]` of the group."""

    rows: Tensor
    """int64 [N]."""
    token_ids: Tensor
    """int64 [N]."""
    values: Tensor
    """float32 [N]; -inf makes a token impossible."""


@dataclass(frozen=True, slots=True)
class Penalties:
    """The P rows of a group that have penalties, and the tokens that these depend on."""

    rows: Tensor
    """int64 [P, 1], rows of the group."""
    history: Tensor
    """int32 [P, L]: prompt and output; only the first `num_tokens` of a row mean anything."""
    num_tokens: Tensor
    """int64 [P, 1]."""
    num_prompt_tokens: Tensor
    """int64 [P, 1]."""
    factors: Tensor
    """float32 [P, 3]: repetition, presence and frequency penalty."""


@dataclass(frozen=True, slots=True)
class AllowedTokens:
    """The M rows of a group in which only some tokens are possible."""

    rows: Tensor
    """int64 [M], rows of the group."""
    masks: Tensor
    """int32 [M, ceil(V / 32)]: bit b of word w is 1 where token 32 * w + b is allowed."""


@dataclass(frozen=True, slots=True)
class BadWords:
    """The N last tokens of words that must not be completed, and the T tokens before these in the words."""

    rows: Tensor
    """int64 [N], rows of the group."""
    token_ids: Tensor
    """int64 [N]."""
    word_of: Tensor
    """int64 [T], to which of the N each of the T belongs."""
    expected: Tensor
    """int32 [T], the word's token; -1 where the output does not reach so far back."""
    found: Tensor
    """int32 [T], the output's token in its place."""


@dataclass(frozen=True, slots=True)
class ForcedTokens:
    """The F rows of a group that get a certain token if their output is within a block of reasoning."""

    rows: Tensor
    """int64 [F], rows of the group."""
    token_ids: Tensor
    """int64 [F, 1], the token."""
    history: Tensor
    """int32 [F, L]: prompt and output."""
    span: Tensor
    """int64 [F, 2]: columns of `history` where the output begins, and where the budget ends."""
    tags: Tensor
    """int64 [F, 2], the tokens that open and close a block."""
    is_open: Tensor
    """bool [F], whether the prompt opens one."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """R rows of the batch that are drawn the same way."""

    method: Method
    rows: Tensor | None
    """int64 [R], rows of the batch; None stands for all of them, in order."""
    settings: Tensor
    """float64 [R, 5], the columns of RowSettings."""
    num_candidates: int
    """For TOP_K, at least the largest top_k of the group."""
    bias: Bias | None
    penalties: Penalties | None
    allowed: AllowedTokens | None = None
    bad_words: BadWords | None = None
    forced: ForcedTokens | None = None

    @property
    def is_edited(self) -> bool:
        """Whether any row is drawn from other logits than the model's own."""
        edits = (self.bias, self.penalties, self.allowed, self.bad_words, self.forced)
        return any(edit is not None for edit in edits)


class SampledTokens(NamedTuple):
    """What one step sampled, on the device."""

    token_ids: Tensor
    """int64 [S]."""
    is_finite: Tensor
    """bool [S]; False where the logits are no numbers: the token is some valid id that means nothing."""
    logprobs: RawLogprobs | None
    """Of the rows that asked, in the order of `SamplingBatch.logprob_rows`; None if none did."""


@dataclass(frozen=True, slots=True)
class SamplingBatch:
    """All that `engine.sampling.sampler.sample` needs to know about the S rows of one step."""

    num_rows: int
    vocab_size: int
    groups: tuple[RowGroup, ...]
    """Rows in no group get the likeliest token of the model's own logits; or, with `settings`, what these say."""
    logprob_rows: npt.NDArray[np.int64]
    """Rows that want logprobs, ascending."""
    logprob_counts: npt.NDArray[np.int64]
    """How many of the likeliest tokens each of them wants beside its own."""
    logprob_index: Tensor | None
    """`logprob_rows` on the device; None stands for all rows."""
    logprob_token_ids: Tensor | None = None
    """int64, tokens that each of them names instead of the likeliest, -1 for none; None if no row names any."""
    settings: Tensor | None = None
    """float64 [S, 5], the columns of RowSettings, where kernels draw; `groups` are then of rows with edited logits."""

    def token_logprobs(self, sampled: SampledTokens) -> list[TokenLogprobs | None]:
        """What each of the S rows reports; None for rows that did not ask. Waits for the device."""
        found: list[TokenLogprobs | None] = [None] * self.num_rows
        if sampled.logprobs is None:
            return found
        token_ids = sampled.token_ids.cpu()[self.logprob_rows]
        entries = to_token_logprobs(sampled.logprobs, token_ids, self.logprob_counts.tolist())
        for row, entry in zip(self.logprob_rows.tolist(), entries, strict=True):
            found[row] = entry
        return found

"""What each running request asks of the sampler, kept on the host, and one step's share of it as tensors.

The table has a row for each slot. `SamplingTable.gather` picks the rows of a step, sorts them into groups that are
drawn the same way, draws one random number for each, and sends all that to the device. Which rows form which group is
known on the host, so the sampler never has to wait for the device to learn a shape.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch

from engine.errors import CheckpointError, RequestError
from engine.grammar import GrammarState, fill_masks
from engine.request import Request, SamplingParams, ThinkingBudget
from engine.sampling.batch import (
    AllowedTokens,
    Bias,
    ForcedTokens,
    Method,
    Penalties,
    RowGroup,
    SamplingBatch,
)
from engine.sampling.philox import uniforms
from engine.sampling.word_table import WordTable
from engine.staging import send
from kernels.backend import uses_triton
from kernels.sample import MAX_VOCAB

Int64s = npt.NDArray[np.int64]
Float64s = npt.NDArray[np.float64]

MAX_CANDIDATES = 512
"""A larger top_k is cheaper to apply by searching for the k-th logit than by listing k tokens in order ..."""
SMALL_VOCABULARY = 4096
"""... unless there are no more tokens than this."""
MIN_CANDIDATES = 32
_ROW = np.dtype(
    [
        ("method", np.int64),
        ("settings", np.float64, 4),  # temperature, top_k, top_p, log_min_p
        ("seed", np.uint64),
        ("num_prompt_tokens", np.int64),
        ("num_logprobs", np.int64),  # -1 if not wanted
        ("penalties", np.float32, 3),  # repetition, presence, frequency
        ("edited_before", np.int64),  # logits are not the model's own at positions before this one
        ("banned_before", np.int64),  # the ids that end the request are impossible at positions before this one
        ("forced_span", np.int64, 2),  # first position of tokens that end the reasoning, and the one after the last
    ]
)
_FOREVER = np.iinfo(np.int64).max
_SMALLEST = float(np.finfo(np.float32).tiny)


class SamplingTable:
    """Sampling parameters of the running requests, one row for each slot.

    Args:
        max_num_seqs: number of slots.
        vocab_size: ids that the tokenizer knows; the LM head may have more rows, which are never sampled nor reported.
        device: where the logits are.

    Raises:
        CheckpointError: there are more ids than sums over the vocabulary are exact for.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        if vocab_size > MAX_VOCAB:
            raise CheckpointError(f"the vocabulary has {vocab_size:,} tokens, expected at most {MAX_VOCAB:,}")
        self.vocab_size = vocab_size
        self.device = device
        self._by_kernels = uses_triton(torch.empty(0, device=device))
        self._rows = np.zeros(max_num_seqs, _ROW)
        no_ids, no_values = np.zeros(0, np.int64), np.zeros(0, np.float32)
        self._bias_ids = [no_ids] * max_num_seqs
        self._bias_values = [no_values] * max_num_seqs
        self._banned_ids = [no_ids] * max_num_seqs
        self._allowed: list[npt.NDArray[np.int32] | None] = [None] * max_num_seqs
        self._grammars: list[GrammarState | None] = [None] * max_num_seqs
        self._logprob_ids = [no_ids] * max_num_seqs
        self._bad_words = WordTable(max_num_seqs, device)
        self._thinking: list[ThinkingBudget | None] = [None] * max_num_seqs

    def check(self, params: SamplingParams) -> None:
        """Raise RequestError if a parameter names a token that the vocabulary does not have."""
        named: tuple[tuple[str, Iterable[int]], ...] = (
            ("logit_bias", params.logit_bias),
            ("allowed_token_ids", params.allowed_token_ids or ()),
            ("bad_words", chain.from_iterable(params.bad_word_ids)),
            ("thinking", params.thinking.closing_ids if params.thinking is not None else ()),
            ("logprob_token_ids", params.logprob_token_ids),
        )
        for param, token_ids in named:
            for token_id in token_ids:
                if not 0 <= token_id < self.vocab_size:
                    raise RequestError(f"{param} names token {token_id}, expected 0 to {self.vocab_size - 1}", param)

    def set_row(self, slot: int, request: Request) -> None:
        """Take over the parameters of a request that enters the running set.

        Raises:
            RequestError: as `check`; the row is left as it was.
        """
        params = request.params
        self.check(params)
        top_k = params.top_k if 0 < params.top_k < self.vocab_size else self.vocab_size
        log_min_p = math.log(params.min_p) if params.min_p > 0 else -math.inf
        penalties = (max(params.repetition_penalty, _SMALLEST), params.presence_penalty, params.frequency_penalty)
        banned = sorted(token_id for token_id in request.stop_token_ids if 0 <= token_id < self.vocab_size)
        banned_before = request.num_prompt_tokens + params.min_tokens if banned else 0
        is_limited = params.allowed_token_ids is not None or params.bad_word_ids or request.grammar is not None
        always_edited = params.logit_bias or penalties != (1, 0, 0) or is_limited
        self._rows[slot] = (
            self._method(params, top_k),
            (params.temperature and max(params.temperature, _SMALLEST), top_k, params.top_p, log_min_p),
            request.seed,
            request.num_prompt_tokens,
            -1 if params.logprobs is None else len(params.logprob_token_ids) or params.logprobs,
            penalties,
            _FOREVER if always_edited else banned_before,
            banned_before,
            _forced_span(request),
        )
        self._bias_ids[slot] = np.fromiter(params.logit_bias.keys(), np.int64)
        self._bias_values[slot] = np.fromiter(params.logit_bias.values(), np.float32)
        self._banned_ids[slot] = np.array(banned, np.int64)
        self._logprob_ids[slot] = np.array(params.logprob_token_ids, np.int64)
        self._allowed[slot] = _bit_mask(params.allowed_token_ids, self.vocab_size)
        self._grammars[slot] = request.grammar
        self._bad_words.set_row(slot, params.bad_word_ids)
        self._thinking[slot] = params.thinking

    def _method(self, params: SamplingParams, top_k: int) -> Method:
        if params.temperature == 0:
            return Method.GREEDY
        if top_k == self.vocab_size and params.top_p == 1:
            return Method.WHOLE
        if top_k <= MAX_CANDIDATES or self.vocab_size <= SMALL_VOCABULARY:
            return Method.TOP_K
        return Method.LARGE_TOP_K if top_k < self.vocab_size else Method.NUCLEUS

    def plain_settings(self, slots: Int64s, positions: Int64s) -> Float64s | None:
        """What `kernels.sample.sample_tokens` needs to draw the tokens of one step, if that is all there is to do.

        Args:
            slots, positions: as for `gather`.

        Returns:
            float64 [S, 5], the columns of RowSettings, with temperature 0 for greedy rows; None if a row has edited
            logits or reports logprobs, for which there is `gather`.
        """
        rows = self._rows.take(slots)
        if _are_edited(rows, positions).any() or (rows["num_logprobs"] >= 0).any():
            return None
        return _settings(rows, positions)

    def has_grammar(self, slots: Int64s) -> bool:
        """Whether `gather` will ask grammars which tokens may come next."""
        return any(self._grammars[slot] is not None for slot in slots.tolist())

    def gather(
        self, slots: Int64s, positions: Int64s, token_ids: npt.NDArray[np.int32] | torch.Tensor
    ) -> SamplingBatch:
        """Collect what one step needs.

        Args:
            slots: int64 [S], the slot of each row of the batch.
            positions: int64 [S], index in its sequence of the token about to be sampled: the number of tokens so far.
            token_ids: int32 [max_num_seqs, at least the largest position], whose row `slot` starts with the tokens so
                far; read only for rows with penalties or bad words, and during this call. A numpy array or tensor on
                the host, or a tensor on the device, which may then depend on work that the device has yet to do.
        """
        rows = self._rows.take(slots)
        edited = _are_edited(rows, positions)
        settings = _settings(rows, positions)
        groups = []
        for method, chosen in self._methods(rows["method"], edited):
            group = self._group(method, chosen, settings)
            if edited[chosen].any():
                group = self._edited(group, slots[chosen], positions[chosen], torch.as_tensor(token_ids))
            groups.append(group)
        counts = rows["num_logprobs"]
        wanted = np.flatnonzero(counts >= 0)
        return SamplingBatch(
            num_rows=len(slots),
            vocab_size=self.vocab_size,
            groups=tuple(groups),
            logprob_rows=wanted,
            logprob_counts=counts[wanted],
            logprob_index=self._index(wanted, len(slots)),
            logprob_token_ids=self._named_logprobs(slots[wanted]),
            settings=send(settings, self.device) if self._by_kernels else None,
        )

    def _methods(self, methods: Int64s, edited: npt.NDArray[np.bool_]) -> Iterator[tuple[Method, Int64s]]:
        """The groups that a step's rows form: how they are drawn, and which they are."""
        if self._by_kernels:
            wanted = [(Method.ANY, edited)]
        else:
            wanted = [(method, methods == method) for method in map(Method, np.unique(methods).tolist())]
            wanted = [(method, rows & edited if method is Method.GREEDY else rows) for method, rows in wanted]
        for method, rows in wanted:
            if rows.any():
                yield method, np.flatnonzero(rows)

    def _index(self, rows: Int64s, num_rows: int) -> torch.Tensor | None:
        return None if len(rows) == num_rows else send(rows, self.device)

    def _named_logprobs(self, slots: Int64s) -> torch.Tensor | None:
        """Tokens whose log-probabilities the rows want by name."""
        named = [self._logprob_ids[slot] for slot in slots.tolist()]
        most = max(map(len, named), default=0)
        if not most:
            return None
        table = np.full((len(named), most), -1)
        for row, token_ids in enumerate(named):
            table[row, : len(token_ids)] = token_ids
        return send(table, self.device)

    def _group(self, method: Method, rows: Int64s, settings: Float64s) -> RowGroup:
        chosen = settings if len(rows) == len(settings) else settings[rows]
        num_candidates = 0
        if method is Method.TOP_K:
            largest = max(int(chosen[:, 1].max()), MIN_CANDIDATES)
            num_candidates = min(1 << (largest - 1).bit_length(), self.vocab_size)
        return RowGroup(
            method=method,
            rows=self._index(rows, len(settings)),
            settings=send(chosen, self.device),
            num_candidates=num_candidates,
            bias=None,
            penalties=None,
        )

    def _edited(self, group: RowGroup, slots: Int64s, positions: Int64s, token_ids: torch.Tensor) -> RowGroup:
        """The group with all that changes its rows' logits."""
        return replace(
            group,
            bias=self._bias(slots, positions),
            penalties=self._history(slots, positions, token_ids),
            allowed=self._allowed_tokens(slots),
            bad_words=self._bad_words.match(slots, positions, self._rows["num_prompt_tokens"][slots], token_ids),
            forced=self._forced(slots, positions, token_ids),
        )

    def _bias(self, slots: Int64s, positions: Int64s) -> Bias | None:
        """Bias and bans of the rows of a group."""
        rows: list[int] = []
        token_ids: list[Int64s] = []
        values: list[npt.NDArray[np.float32]] = []
        banned = positions < self._rows["banned_before"][slots]
        for row, (slot, is_banned) in enumerate(zip(slots.tolist(), banned.tolist(), strict=True)):
            token_ids.append(self._bias_ids[slot])
            values.append(self._bias_values[slot])
            if is_banned:
                token_ids.append(self._banned_ids[slot])
                values.append(np.full(len(self._banned_ids[slot]), -np.inf, np.float32))
            rows += [row] * (sum(map(len, token_ids)) - len(rows))
        if not rows:
            return None
        return Bias(
            rows=send(np.array(rows), self.device),
            token_ids=send(np.concatenate(token_ids), self.device),
            values=send(np.concatenate(values), self.device),
        )

    def _history(self, slots: Int64s, positions: Int64s, token_ids: torch.Tensor) -> Penalties | None:
        """Penalties of the rows of a group."""
        penalties = self._rows["penalties"][slots]
        chosen = np.flatnonzero((penalties != (1, 0, 0)).any(1))
        if not len(chosen):
            return None
        slots, positions = slots[chosen], positions[chosen]
        known = token_ids[:, : int(positions.max())].index_select(0, send(slots, token_ids.device))
        return Penalties(
            rows=send(chosen[:, None], self.device),
            history=send(known, self.device),
            num_tokens=send(positions[:, None], self.device),
            num_prompt_tokens=send(self._rows["num_prompt_tokens"][slots][:, None], self.device),
            factors=send(penalties[chosen], self.device),
        )

    def _allowed_tokens(self, slots: Int64s) -> AllowedTokens | None:
        """Masks of the rows of a group that have one."""
        limited = [
            (row, slot)
            for row, slot in enumerate(slots.tolist())
            if self._allowed[slot] is not None or self._grammars[slot] is not None
        ]
        if not limited:
            return None
        masks = np.full((len(limited), -(-self.vocab_size // 32)), -1, np.int32)
        # Rows with a grammar are next to each other, as these are filled in one go.
        limited.sort(key=lambda item: self._grammars[item[1]] is None)
        if grammars := [grammar for _, slot in limited if (grammar := self._grammars[slot]) is not None]:
            fill_masks(grammars, masks[: len(grammars)])
        for index, (_, slot) in enumerate(limited):
            if (allowed := self._allowed[slot]) is not None:
                masks[index] &= allowed
        rows = np.array([row for row, _ in limited])
        return AllowedTokens(rows=send(rows, self.device), masks=send(masks, self.device))

    def _forced(self, slots: Int64s, positions: Int64s, token_ids: torch.Tensor) -> ForcedTokens | None:
        """Rows of a group whose reasoning ends now, if they are thinking: only the device knows that in time."""
        chosen = np.flatnonzero(_are_forced(self._rows.take(slots), positions))
        if not len(chosen):
            return None
        slots, positions = slots[chosen], positions[chosen]
        budgets = [budget for slot in slots.tolist() if (budget := self._thinking[slot]) is not None]
        ends = self._rows["forced_span"][slots, 0]
        next_ids = [
            budget.closing_ids[offset] for budget, offset in zip(budgets, (positions - ends).tolist(), strict=True)
        ]
        known = token_ids[:, : int(ends.max())].index_select(0, send(slots, token_ids.device))
        return ForcedTokens(
            rows=send(chosen, self.device),
            token_ids=send(np.array(next_ids)[:, None], self.device),
            history=send(known, self.device),
            span=send(np.stack([self._rows["num_prompt_tokens"][slots], ends], axis=1), self.device),
            tags=send(np.array([(budget.opening_id, budget.closing_id) for budget in budgets]), self.device),
            is_open=send(np.array([budget.is_open for budget in budgets]), self.device),
        )


def _forced_span(request: Request) -> tuple[int, int]:
    """Positions from which and before which a request's tokens are forced if it is thinking."""
    thinking = request.params.thinking
    if thinking is None:
        return 0, 0
    start = request.num_prompt_tokens + thinking.num_tokens
    return start, start + len(thinking.closing_ids)


def _are_forced(rows: npt.NDArray[np.void], positions: Int64s) -> npt.NDArray[np.bool_]:
    """Which rows of a step get a certain token if they are thinking: bool [S]."""
    spans = rows["forced_span"]
    return (positions >= spans[:, 0]) & (positions < spans[:, 1])


def _are_edited(rows: npt.NDArray[np.void], positions: Int64s) -> npt.NDArray[np.bool_]:
    """Which rows of a step have other logits than the model's own: bool [S]."""
    return (positions < rows["edited_before"]) | _are_forced(rows, positions)


def _settings(rows: npt.NDArray[np.void], positions: Int64s) -> Float64s:
    """The columns of RowSettings for rows of the table, float64 [S, 5]; zeros if all are greedy."""
    settings = np.zeros((len(rows), 5), np.float64)
    if rows["method"].any():
        settings[:, :4] = rows["settings"]
        settings[:, 4] = uniforms(rows["seed"], positions)
    return settings


def _bit_mask(token_ids: Sequence[int] | None, vocab_size: int) -> npt.NDArray[np.int32] | None:
    """int32 [ceil(vocab_size / 32)], as AllowedTokens has it; None allows all."""
    if token_ids is None:
        return None
    allowed = np.zeros(-(-vocab_size // 32) * 32, np.bool_)
    allowed[np.array(token_ids)] = True
    return np.packbits(allowed, bitorder="little").view(np.int32)

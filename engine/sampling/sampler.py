"""Logits → tokens and log-probabilities, each row by its own parameters, with no wait for the device.

On a GPU, kernels draw all rows from the model's logits, and then those with edited logits again. Elsewhere every row
starts as greedy: the likeliest token comes out of the same pass that finds rows whose logits are no numbers. Rows with
a temperature or edited logits are then drawn again, group by group. The order is logit bias and banned
tokens, allowed tokens, bad words, penalties, forced tokens, temperature, top_k, top_p of what that leaves, min_p
relative to the likeliest.

A row's token must not depend on its neighbours. Probabilities are therefore whole numbers here: a token's weight is its
probability relative to the likeliest one's in units of 2**-35, and float64 adds up to 2**18 of those without rounding,
in any order. Tokens are cut off in order of their logits, lower ids first among equals.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from engine.sampling.batch import (
    AllowedTokens,
    BadWords,
    Bias,
    ForcedTokens,
    Method,
    RowGroup,
    RowSettings,
    SampledTokens,
    SamplingBatch,
)
from engine.sampling.logprobs import gather_logprobs
from engine.sampling.vocab_blocks import (
    argmax,
    block_maxima,
    block_sums,
    crossing,
    flags,
    likeliest,
    locate,
    ordered_keys,
    values_of,
)
from kernels.sample import sample_tokens
from kernels.sample_penalties import penalize

WEIGHT_OF_LIKELIEST = 2.0**35
_UNWANTED = -1e30
"""Added to logits: far below any other, but where nothing else is possible still a token that is."""


def sample(logits: Tensor, batch: SamplingBatch) -> SampledTokens:
    """Choose the next token of every row.

    Args:
        logits: [S, at least vocab_size] of any float type; columns past `vocab_size` are padding. Left as they are.
        batch: the rows' parameters, from `SamplingTable.gather`.

    Raises:
        ValueError: the logits do not fit the batch.
    """
    if logits.shape[0] != batch.num_rows or logits.shape[1] < batch.vocab_size:
        raise ValueError(f"logits are {list(logits.shape)}, expected [{batch.num_rows}, {batch.vocab_size} or more]")
    maxima, vocab_size = None, batch.vocab_size
    if batch.settings is not None:
        token_ids, is_finite = sample_tokens(logits, batch.settings, vocab_size)
    else:
        maxima = block_maxima(logits[:, :vocab_size])
        token_ids, is_finite = argmax(logits[:, :vocab_size], maxima), maxima.amax(1).isfinite()
    for group in batch.groups:
        drawn = _draw(logits[:, :vocab_size], maxima, group)
        token_ids = drawn if group.rows is None else token_ids.index_copy(0, group.rows, drawn)
    logprobs = None
    if len(batch.logprob_rows):
        index, num_top = batch.logprob_index, int(batch.logprob_counts.max())
        wanted, chosen = (_select(tensor, index) for tensor in (logits, token_ids))
        logprobs = gather_logprobs(wanted, chosen, num_top, batch.logprob_token_ids, vocab_size)
    return SampledTokens(token_ids, is_finite, logprobs)


def _select(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor.index_select(0, rows)


def _draw(logits: Tensor, maxima: Tensor | None, group: RowGroup) -> Tensor:
    """The tokens of a group's rows: int64 [R]. `maxima` are those of the logits' blocks, where torch draws."""
    logits = _select(logits, group.rows)
    if group.is_edited:
        logits = logits.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        _edit(logits, group)
        maxima = None
    elif maxima is not None:
        maxima = _select(maxima, group.rows)
    if group.method is Method.ANY:
        return sample_tokens(logits, group.settings, logits.shape[1])[0]
    if maxima is None:
        maxima = block_maxima(logits)
    if group.method is Method.GREEDY:
        return argmax(logits, maxima)
    if group.method is Method.TOP_K:
        settings = RowSettings(*group.settings.split(1, dim=1))
        return _draw_from_candidates(logits, maxima, settings, group.num_candidates)
    # Scratch memory is up to 40 bytes for each logit. On CPUs that is best kept near the size of the caches; elsewhere
    # more rows at once mean fewer launches.
    num_rows = 4 if logits.device.type == "cpu" else 64
    drawn = []
    parts = zip(*(tensor.split(num_rows) for tensor in (logits, maxima, group.settings)), strict=True)
    for part_logits, part_maxima, part_settings in parts:
        settings = RowSettings(*part_settings.split(1, dim=1))
        if group.method is Method.WHOLE:
            drawn.append(_draw_from_whole(part_logits, part_maxima, settings))
        else:
            limit_top_k = group.method is Method.LARGE_TOP_K
            drawn.append(_draw_from_nucleus(part_logits, part_maxima, settings, limit_top_k))
    return torch.cat(drawn)


def _edit(logits: Tensor, group: RowGroup) -> None:
    """Apply all edits of a group in place, to contiguous float32 [R, V]."""
    if group.bias is not None:
        _add_bias(logits, group.bias)
    if group.allowed is not None:
        _keep_allowed(logits, group.allowed)
    if group.bad_words is not None:
        _avoid_bad_words(logits, group.bad_words)
    if group.penalties is not None:
        penalties = group.penalties
        penalize(
            logits,
            penalties.rows,
            penalties.history,
            penalties.num_tokens,
            penalties.num_prompt_tokens,
            penalties.factors,
        )
    if group.forced is not None:
        _force(logits, group.forced)


def _add_bias(logits: Tensor, bias: Bias) -> None:
    logits.view(-1).index_add_(0, bias.rows * logits.shape[1] + bias.token_ids, bias.values)


def _keep_allowed(logits: Tensor, allowed: AllowedTokens) -> None:
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    bits = (allowed.masks.unsqueeze(2) >> shifts).bitwise_and_(1).flatten(1)[:, : logits.shape[1]]
    kept = logits.index_select(0, allowed.rows).masked_fill_(bits == 0, -torch.inf)
    logits.index_copy_(0, allowed.rows, kept)


def _avoid_bad_words(logits: Tensor, words: BadWords) -> None:
    differs = (words.found != words.expected).float()
    num_different = logits.new_zeros(len(words.rows)).index_add_(0, words.word_of, differs)
    values = torch.where(num_different == 0, _UNWANTED, 0.0)
    logits.view(-1).index_add_(0, words.rows * logits.shape[1] + words.token_ids, values)


def _force(logits: Tensor, forced: ForcedTokens) -> None:
    columns = torch.arange(forced.history.shape[1], device=logits.device)
    in_output = (columns >= forced.span[:, :1]) & (columns < forced.span[:, 1:])
    opened = forced.is_open | (in_output & (forced.history == forced.tags[:, :1])).any(1)
    closed = (in_output & (forced.history == forced.tags[:, 1:])).any(1)
    free = logits.index_select(0, forced.rows)
    only = torch.full_like(free, -torch.inf).scatter_(1, forced.token_ids, 0.0)
    logits.index_copy_(0, forced.rows, torch.where((opened & ~closed)[:, None], only, free))


def _weigh(logits: Tensor, peak: Tensor, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Logits relative to the likeliest one and divided by the temperature, and the tokens' weights; both float32."""
    scaled = (logits - peak.float()).div_(temperature.float())
    return scaled, scaled.exp().mul_(WEIGHT_OF_LIKELIEST).round_()


def _target(uniform: Tensor, mass: Tensor) -> Tensor:
    """A whole number from 0 to mass - 1, uniformly: the first token past it is drawn.

    NaN where logits are no numbers or all tokens are banned; comparisons with that are false, which leads to some id.
    """
    return torch.minimum((uniform * mass).floor_(), mass - 1)


def _draw_from_whole(logits: Tensor, maxima: Tensor, settings: RowSettings) -> Tensor:
    """[R, V] → int64 [R], from all tokens that min_p leaves."""
    scaled, weights = _weigh(logits, maxima.amax(1, keepdim=True), settings.temperature)
    weights.mul_(scaled.ge_(settings.log_min_p.float()))
    sums = block_sums(weights.double())
    return locate(weights, sums, _target(settings.uniform, sums.sum(1, keepdim=True))).squeeze(1)


class _Ties(NamedTuple):
    """Tokens whose logit is the last one that top_k or top_p leaves; they share the fate of being cut, by id."""

    equal: Tensor
    """[R, V], 1 for them and 0 for others."""
    block_counts: Tensor
    """float64 [R, B]."""
    total: Tensor
    """float64 [R, 1], how many."""
    scaled: Tensor
    """float32 [R, 1]."""
    weight: Tensor
    """float64 [R, 1], of each."""


def _find_ties(logits: Tensor, value: Tensor, scaled: Tensor, weight: Tensor) -> _Ties:
    equal = flags(torch.eq, logits, value.to(logits.dtype))
    counts = block_sums(equal)
    return _Ties(equal, counts, counts.sum(1, keepdim=True), scaled, weight.double())


def _draw_from_candidates(logits: Tensor, maxima: Tensor, settings: RowSettings, num_candidates: int) -> Tensor:
    """[R, V] → int64 [R], from the tokens whose logit is at least the top_k-th, less what top_p and min_p cut."""
    values, token_ids = likeliest(logits, maxima, num_candidates)
    last = settings.top_k.long() - 1
    bound = values.gather(1, last)
    scaled, weights = _weigh(values, values[:, :1], settings.temperature)
    ties = _find_ties(logits, bound, scaled.gather(1, last), weights.gather(1, last))

    weights = weights.double() * (values > bound)
    running = weights.cumsum(1)
    mass = running[:, -1:]
    limit = settings.top_p * (mass + ties.total * ties.weight)
    weights *= (running - weights < limit) & (scaled >= settings.log_min_p.float())
    running, mass_kept = weights.cumsum(1), weights.sum(1, keepdim=True)
    ties_kept = _ties_kept(ties, limit - mass, settings.log_min_p)
    target = _target(settings.uniform, mass_kept + ties_kept * ties.weight)
    above = (running <= target).sum(1, keepdim=True).clamp_(max=num_candidates - 1)
    drawn = torch.where(target < mass_kept, token_ids.gather(1, above), _nth_tie(ties, target - mass_kept))
    return drawn.squeeze(1)


def _ties_kept(ties: _Ties, mass: Tensor, log_min_p: Tensor) -> Tensor:
    """How many ties it takes to reach a mass, if min_p leaves any: float64 [R, 1]."""
    kept = torch.minimum((mass / ties.weight.clamp(min=1)).ceil_().clamp_(min=0), ties.total)
    return kept * (ties.scaled >= log_min_p.float())


def _nth_tie(ties: _Ties, mass: Tensor) -> Tensor:
    """The tie that a running sum over ties alone reaches at the given mass: int64 [R, 1]."""
    return locate(ties.equal, ties.block_counts, (mass / ties.weight.clamp(min=1)).floor_())


def _draw_from_nucleus(logits: Tensor, maxima: Tensor, settings: RowSettings, limit_top_k: bool) -> Tensor:
    """As `_draw_from_candidates`, for any top_k or none, by searching for the last logit instead of sorting."""
    logits = logits.float()
    peak = maxima.amax(1, keepdim=True)
    scaled, weights = _weigh(logits, peak, settings.temperature)
    keys = ordered_keys(logits)
    measure = weights.double()
    if limit_top_k:
        bound, _ = crossing(keys, torch.ones_like(measure), settings.top_k)
        measure *= keys <= bound
    limit = settings.top_p * block_sums(measure).sum(1, keepdim=True)
    key, mass = crossing(keys, measure, limit)
    value = values_of(key)
    ties = _find_ties(logits, value, *_weigh(value, peak, settings.temperature))

    weights.mul_(flags(torch.gt, logits, value)).mul_(scaled.ge_(settings.log_min_p.float()))
    sums = block_sums(weights.double())
    mass_kept = sums.sum(1, keepdim=True)
    ties_kept = _ties_kept(ties, limit - mass, settings.log_min_p)
    target = _target(settings.uniform, mass_kept + ties_kept * ties.weight)
    drawn = torch.where(target < mass_kept, locate(weights, sums, target), _nth_tie(ties, target - mass_kept))
    return drawn.squeeze(1)

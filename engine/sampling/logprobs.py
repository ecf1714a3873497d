"""Log-probabilities of the model's own distribution, before penalties, bias and temperature."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.request import TokenLogprobs
from engine.sampling.vocab_blocks import block_maxima, block_sums, flags, likeliest
from kernels.backend import uses_triton
from kernels.sample_logprobs import token_logprobs


class RawLogprobs(NamedTuple):
    """Log-probabilities of N tokens, and the K likeliest tokens in each one's place. On the device of the logits."""

    logprobs: Tensor
    """float32 [N]."""
    ranks: Tensor
    """int64 [N]; 1 + the number of tokens with a larger logit."""
    top_token_ids: Tensor
    """int64 [N, K], likeliest first, the lowest id first among equals."""
    top_logprobs: Tensor
    """float32 [N, K]."""


def gather_logprobs(
    logits: Tensor, token_ids: Tensor, num_top: int, named: Tensor | None = None, vocab_size: int | None = None
) -> RawLogprobs:
    """Compute log-probabilities as the softmax of the logits in float32 has them.

    A token that is also among the likeliest has bit for bit the same value in both places.

    Args:
        logits: [N, V or more] of any float type.
        token_ids: int64 [N], each in [0, V).
        num_top: K; more than V means V.
        named: int64 [N, at most K], tokens to report in place of the likeliest; those below 0 replace none.
        vocab_size: V, where columns past it are the LM head's padding; None for all columns.
    """
    vocab_size = vocab_size or logits.shape[1]
    whole, logits = logits, logits[:, :vocab_size]
    if uses_triton(logits):
        logprobs, ranks, peak, log_sum, maxima = token_logprobs(whole, token_ids, vocab_size)
    else:
        maxima = block_maxima(logits)
        peak = maxima.amax(1, keepdim=True).float()
        log_sum = block_sums((logits - peak).exp_()).sum(1, keepdim=True).log().float()
        chosen = logits.gather(1, token_ids[:, None])
        ranks = block_sums(flags(torch.gt, logits, chosen)).sum(1).long() + 1
        logprobs = ((chosen - peak) - log_sum).squeeze(1)
    top_values, top_token_ids = likeliest(logits, maxima, min(num_top, logits.shape[1]))
    if named is not None:
        # A vocabulary may have fewer tokens than a request names: it can name one several times.
        missing = max(named.shape[1] - top_token_ids.shape[1], 0)
        top_values, top_token_ids = (torch.nn.functional.pad(top, (0, missing)) for top in (top_values, top_token_ids))
        named = torch.nn.functional.pad(named, (0, top_token_ids.shape[1] - named.shape[1]), value=-1)
        top_token_ids = torch.where(named >= 0, named, top_token_ids)
        top_values = torch.where(named >= 0, logits.gather(1, top_token_ids).float(), top_values)
    return RawLogprobs(
        logprobs=logprobs,
        ranks=ranks,
        top_token_ids=top_token_ids,
        top_logprobs=(top_values - peak) - log_sum,
    )


def to_token_logprobs(raw: RawLogprobs, token_ids: Tensor, num_top: int | Sequence[int]) -> list[TokenLogprobs]:
    """Convert to what is reported, one entry for each of the N tokens. Waits for the device.

    Args:
        raw: log-probabilities of the tokens.
        token_ids: int64 [N], the tokens.
        num_top: how many of the likeliest tokens each entry keeps: one number for all, or N.
    """
    counts = [num_top] * len(token_ids) if isinstance(num_top, int) else num_top
    columns = (token_ids, *raw)
    return [
        TokenLogprobs(token_id, logprob, rank, top_ids[:count], top_logprobs[:count])
        for token_id, logprob, rank, top_ids, top_logprobs, count in zip(
            *(column.tolist() for column in columns), counts, strict=True
        )
    ]

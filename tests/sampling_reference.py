"""What sampling should do, computed a second way: in numpy float64, one row at a time, with full sorts."""

import dataclasses

import numpy as np
import torch

from engine.request import EngineRequest, Request, SamplingParams
from engine.sampling.batch import RowGroup, SamplingBatch
from engine.sampling.table import SamplingTable


def make_request(params: SamplingParams, prompt=(0,), output=(), eos=()) -> Request:
    source = EngineRequest(request_id="request", prompt_token_ids=list(prompt), params=params)
    request = Request(source, eos, 1000)
    request.token_ids += output
    return request


def make_batch(requests: list[Request], vocab_size: int) -> SamplingBatch:
    """The batch that samples the next token of each request."""
    table = SamplingTable(len(requests), vocab_size, torch.device("cpu"))
    history = np.full((len(requests), max(request.num_tokens for request in requests) + 1), 10**6, np.int32)
    for slot, request in enumerate(requests):
        table.set_row(slot, request)
        history[slot, : request.num_tokens] = request.token_ids
    positions = np.array([request.num_tokens for request in requests])
    return table.gather(np.arange(len(requests)), positions, history)


def one_group(group: RowGroup, num_rows: int, vocab_size: int) -> SamplingBatch:
    """A batch of one group, without logprobs."""
    nothing = np.zeros(0, np.int64)
    return SamplingBatch(num_rows, vocab_size, (group,), nothing, nothing, None)


def on_meta(value):
    """The same batch on the meta device, where tensors have shapes but no content."""
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        return dataclasses.replace(value, **{field.name: on_meta(getattr(value, field.name)) for field in fields})
    return tuple(map(on_meta, value)) if isinstance(value, tuple) else value


def edited_logits(logits: np.ndarray, params: SamplingParams, prompt=(), output=(), banned=()) -> np.ndarray:
    """float64 [V] after bias, bans, allowed tokens, bad words and penalties."""
    edited = np.array(logits, np.float64)
    for token_id, bias in params.logit_bias.items():
        edited[token_id] += bias
    edited[list(banned)] = -np.inf
    if params.allowed_token_ids is not None:
        edited[[token_id for token_id in range(len(edited)) if token_id not in params.allowed_token_ids]] = -np.inf
    for *before, last in params.bad_word_ids:
        if list(output)[len(output) - len(before) :] == before:
            edited[last] -= 1e30
    for token_id in {*prompt, *output}:
        factor = params.repetition_penalty
        edited[token_id] *= factor if edited[token_id] < 0 else 1 / factor
    for token_id in set(output):
        edited[token_id] -= params.presence_penalty + params.frequency_penalty * list(output).count(token_id)
    return edited


def probabilities(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """float64 [V]: how likely each token is to be drawn from edited logits."""
    if params.temperature == 0:
        return np.eye(len(logits))[np.argmax(logits)]
    scaled = logits / params.temperature
    likelihood = np.exp(scaled - scaled.max())
    if 0 < params.top_k < len(logits):
        likelihood[logits < np.sort(logits)[-params.top_k]] = 0
    likelihood /= likelihood.sum()
    order = np.argsort(-likelihood, kind="stable")
    before = np.cumsum(likelihood[order]) - likelihood[order]
    if params.top_p < 1:
        likelihood[order[before >= params.top_p]] = 0
    likelihood[likelihood < params.min_p * likelihood.max()] = 0
    return likelihood / likelihood.sum()


def draw_by_full_sort(logits: torch.Tensor, settings: list[float], by_rank: bool) -> int:
    """The token of one row: float32 [V] and temperature, top_k (0 for none), top_p, log(min_p) and a number in (0, 1).

    Tokens lie on the line of probability by rank, or by id; in both cases those equal to the last one kept come last.
    """
    temperature, top_k, top_p, log_min_p, uniform = settings
    scaled = (logits - logits.max()) / torch.tensor(temperature, dtype=torch.float32)
    weights = [round(weight * 2**35) for weight in scaled.exp().tolist()]
    values, tokens = logits.tolist(), range(len(logits))
    order = sorted(tokens, key=lambda token: (-values[token], token))
    if top_k:
        order = [token for token in order if values[token] >= values[order[int(top_k) - 1]]]
    limit = top_p * sum(weights[token] for token in order)
    kept, mass = [], 0
    for token in order:
        if mass < limit:
            kept.append(token)
        mass += weights[token]
    last = values[kept[-1]] if not by_rank else values[order[-1]]
    kept = [token for token in kept if scaled[token].item() >= float(np.float32(log_min_p))]
    if by_rank:
        line = kept
    else:
        line = sorted(token for token in kept if values[token] != last)
        line += [token for token in kept if values[token] == last]
    target = min(int(uniform * sum(weights[token] for token in line)), sum(weights[token] for token in line) - 1)
    for token in line:
        target -= weights[token]
        if target < 0:
            return token
    raise AssertionError("the line is shorter than its parts")

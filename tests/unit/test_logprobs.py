import numpy as np
import pytest
import torch

from engine.request import SamplingParams
from engine.sampling.logprobs import gather_logprobs, to_token_logprobs
from engine.sampling.sampler import sample
from tests.sampling_reference import make_batch, make_request

VOCAB_SIZE = 1000


def random_logits(num_rows=6, dtype=torch.float32) -> torch.Tensor:
    return (torch.randn(num_rows, VOCAB_SIZE + 24, generator=torch.Generator().manual_seed(0)) * 4).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_equals_log_softmax(dtype, num_top):
    logits = random_logits(dtype=dtype)[:, :VOCAB_SIZE]
    token_ids = torch.tensor([0, 999, 5, 127, 128, 500])
    raw = gather_logprobs(logits, token_ids, num_top)
    expected = torch.log_softmax(logits.float(), 1)
    torch.testing.assert_close(raw.logprobs, expected.gather(1, token_ids[:, None])[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(raw.top_logprobs, expected.topk(num_top).values, rtol=1e-5, atol=1e-6)
    for row, token_id in enumerate(token_ids.tolist()):
        values = logits[row].float().numpy()
        assert raw.ranks[row] == 1 + (values > values[token_id]).sum()
        assert raw.top_token_ids[row].tolist() == np.argsort(-values, kind="stable")[:num_top].tolist()
    assert raw.logprobs.dtype == raw.top_logprobs.dtype == torch.float32


def test_chosen_token_is_bit_identical_among_the_top():
    logits = random_logits(dtype=torch.bfloat16)[:, :VOCAB_SIZE]
    for position in range(20):
        token_ids = gather_logprobs(logits, torch.zeros(6, dtype=torch.long), 20).top_token_ids[:, position]
        entries = to_token_logprobs(gather_logprobs(logits, token_ids, 20), token_ids, 20)
        assert all(entry.logprob == entry.top_logprobs[position] for entry in entries)


def test_ties_share_a_rank_and_come_by_id():
    logits = torch.zeros(1, VOCAB_SIZE)
    logits[0, [300, 7, 900]] = 2.0
    raw = gather_logprobs(logits, torch.tensor([900]), 5)
    assert raw.ranks.tolist() == [1]
    assert raw.top_token_ids.tolist() == [[7, 300, 900, 0, 1]]


def test_sure_and_impossible_tokens():
    logits = torch.full((1, VOCAB_SIZE), -torch.inf)
    logits[0, 3] = 1e4
    raw = gather_logprobs(logits.expand(2, -1), torch.tensor([3, 4]), 2)
    assert raw.logprobs.tolist() == [0.0, -torch.inf]
    assert raw.ranks.tolist() == [1, 2]
    assert raw.top_token_ids.tolist() == [[3, 0], [3, 0]]


def test_more_tops_than_tokens():
    raw = gather_logprobs(torch.tensor([[1.0, 3.0]]), torch.tensor([0]), 20)
    assert raw.top_token_ids.tolist() == [[1, 0]]


def test_rows_ask_for_different_numbers():
    """Of the model's own distribution, whatever is done to it before sampling."""
    params = [None, 0, 3, None, 20, 1]
    requests = [
        make_request(SamplingParams(seed=i, logprobs=count, temperature=3.0, top_k=7, logit_bias={i: 90.0}))
        for i, count in enumerate(params)
    ]
    logits = random_logits()
    logits[:, VOCAB_SIZE:] = 100.0
    batch = make_batch(requests, VOCAB_SIZE)
    sampled = sample(logits, batch)
    expected = torch.log_softmax(logits[:, :VOCAB_SIZE], 1)
    for row, (count, entry) in enumerate(zip(params, batch.token_logprobs(sampled), strict=True)):
        if count is None:
            assert entry is None
            continue
        assert entry.token_id == sampled.token_ids[row] == row
        assert entry.logprob == pytest.approx(expected[row, row].item(), rel=1e-5)
        assert entry.top_logprobs == pytest.approx(expected[row].topk(count).values.tolist(), rel=1e-5)
        assert entry.top_token_ids == expected[row].topk(count).indices.tolist()


def test_nobody_asks():
    batch = make_batch([make_request(SamplingParams())] * 2, VOCAB_SIZE)
    sampled = sample(random_logits(2), batch)
    assert sampled.logprobs is None
    assert batch.token_logprobs(sampled) == [None, None]


@pytest.mark.parametrize("num_top", [0, 2, 5, 9])
def test_named_tokens_take_the_place_of_the_likeliest(num_top: int):
    logits = torch.randn(2, 7, generator=torch.Generator().manual_seed(1))
    named = torch.tensor([[6, 0, 3], [-1, -1, -1]])
    raw = gather_logprobs(logits, torch.tensor([0, 1]), num_top, named)
    expected = logits.log_softmax(1)
    assert raw.top_token_ids[0, :3].tolist() == [6, 0, 3]
    torch.testing.assert_close(raw.top_logprobs[0, :3], expected[0, [6, 0, 3]])
    assert raw.top_logprobs[0, 1] == raw.logprobs[0]
    count = min(num_top, 7)
    assert raw.top_token_ids[1, :count].tolist() == expected[1].argsort(descending=True)[:count].tolist()


def test_named_tokens_are_reported_in_their_order():
    requests = [
        make_request(SamplingParams(temperature=0, **params))
        for params in ({"logprobs": 1}, {"logprobs": 3, "logprob_token_ids": (5, 2)}, {}, {"logprobs": 0})
    ]
    batch = make_batch(requests, 9)
    sampled = sample(torch.arange(36.0).view(4, 9), batch)
    entries = batch.token_logprobs(sampled)
    assert [entry and entry.top_token_ids for entry in entries] == [[8], [5, 2], None, []]

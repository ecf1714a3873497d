"""Log-probabilities of chosen tokens under the interpreter, against their reference and their users' own path."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import engine.sampling.logprobs
from engine.sampling.logprobs import gather_logprobs
from kernels.sample_logprobs import token_logprobs, token_logprobs_reference
from tests.kernels import DTYPES, interpreted, padded_rows, poisoned_memory

pytestmark = [  # the interpreter's numpy; a GPU says nothing of infinities
    pytest.mark.filterwarnings("ignore:invalid value encountered in subtract"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log"),
]


def check(logits, token_ids, vocab_size):
    """Exact but for sums, whose order differs."""
    expected = token_logprobs_reference(logits, token_ids, vocab_size)
    with poisoned_memory():
        found = token_logprobs(logits, token_ids, vocab_size)
    for name in ("ranks", "peaks", "maxima"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for name in ("logprobs", "log_sums"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-5)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert [tensor.shape for tensor in found] == [tensor.shape for tensor in expected]
    return found


@interpreted
@given(
    num_rows=st.integers(1, 3),
    vocab_size=st.integers(1, 700) | st.sampled_from([1, 128, 256, 512]),
    dtype=st.sampled_from(DTYPES),
    is_coarse=st.booleans(),
    padding=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_any_rows(num_rows, vocab_size, dtype, is_coarse, padding, seed):
    torch.manual_seed(seed)
    logits = torch.randn(num_rows, vocab_size) * 4
    logits = logits.round() if is_coarse else logits
    logits[:, 1::3] = -torch.inf  # as masks leave them
    token_ids = torch.randint(vocab_size, (num_rows,))
    check(padded_rows(logits.to(dtype), padding), token_ids, vocab_size)


def test_vocabulary_of_more_than_one_chunk():
    torch.manual_seed(0)
    logits = padded_rows((torch.randn(5, 9001) * 3).bfloat16(), 31)
    token_ids = torch.tensor([0, 9000, 4096, 4095, 77])
    together = check(logits, token_ids, 9001)
    alone = token_logprobs(logits[2:3], token_ids[2:3], 9001)
    assert all(torch.equal(one, many[2:3]) for one, many in zip(alone, together, strict=True))


def test_sure_and_impossible_tokens():
    logits = torch.full((3, 300), -torch.inf)
    logits[:2, 3] = 1e4
    found = token_logprobs(logits, torch.tensor([3, 4, 0]), 300)
    assert found.logprobs[:2].tolist() == [0.0, -torch.inf]
    assert found.ranks.tolist() == [1, 2, 1]


@pytest.mark.parametrize("num_top", [0, 3, 20])
def test_equals_the_path_without_kernels(monkeypatch, num_top):
    """With the likeliest tokens, and with named ones in their place."""
    torch.manual_seed(1)
    logits = (torch.randn(4, 1000) * 3).bfloat16()
    token_ids = torch.tensor([1, 999, 500, 20])
    named = torch.tensor([[7, -1, -1], [3, 999, 4], [-1, -1, -1], [0, 1, 2]]) if num_top == 3 else None
    found = gather_logprobs(logits, token_ids, num_top, named)
    monkeypatch.setattr(engine.sampling.logprobs, "uses_triton", lambda tensor: False)
    expected = gather_logprobs(logits, token_ids, num_top, named)
    assert torch.equal(found.ranks, expected.ranks) and torch.equal(found.top_token_ids, expected.top_token_ids)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(found.top_logprobs, expected.top_logprobs, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize(
    ("logits", "vocab_size", "found"),
    [
        (torch.zeros(2, 40).double(), 40, "torch.float64"),
        (torch.zeros(40, 2).T, 40, r"strides \(1, 2\)"),
        (torch.zeros(2, 40), 41, "vocab_size is 41"),
        (torch.zeros(2, 40), 0, "vocab_size is 0"),
    ],
)
def test_refuses(logits, vocab_size, found):
    with pytest.raises(ValueError, match=found):
        token_logprobs(logits, torch.zeros(2, dtype=torch.int64), vocab_size)

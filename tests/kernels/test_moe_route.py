"""Routing under the interpreter, against softmax and a sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.moe_route import MAX_SINGLE, TOKENS, choose_experts_reference, route, route_reference
from tests.kernels import DTYPES, assert_close, interpreted, padded_rows, poisoned_memory


def random_logits(num_tokens, num_experts, dtype, device="cpu"):
    torch.manual_seed(num_tokens + num_experts)
    return torch.randn(num_tokens, num_experts).mul(2).to(device, dtype)


def pairs_of(routed):
    """The pairs of each expert, as sets; each row of the table must hold every pair once."""
    rows = [row[:count].tolist() for row, count in zip(routed.pairs.cpu(), routed.counts.tolist(), strict=True)]
    assert all(len(set(row)) == len(row) for row in rows)
    return [set(row) for row in rows]


def check_route(logits, top_k, norm_topk_prob):
    with poisoned_memory():
        routed = route(logits, top_k, norm_topk_prob)
    expected = route_reference(logits, top_k, norm_topk_prob)
    assert pairs_of(routed) == pairs_of(expected)
    assert routed.weights.dtype == torch.float32
    assert_close(routed.weights, expected.weights)


@settings(interpreted, max_examples=20)
@given(
    num_tokens=st.integers(1, 12) | st.sampled_from([MAX_SINGLE, MAX_SINGLE + 1, 3 * TOKENS + MAX_SINGLE]),
    num_experts=st.integers(1, 40) | st.just(128),
    top_k=st.integers(1, 8),
    norm_topk_prob=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    padding=st.integers(0, 3),
)
def test_any_shape(num_tokens, num_experts, top_k, norm_topk_prob, dtype, padding):
    logits = random_logits(num_tokens, num_experts, dtype)
    check_route(padded_rows(logits, padding), min(top_k, num_experts), norm_topk_prob)


def test_equal_logits_go_to_the_first_experts():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0], [2.0] * 5])
    check_route(logits, 2, True)
    assert choose_experts_reference(logits, 2, True)[1].tolist() == [[1, 2], [0, 1]]


def test_every_token_to_one_expert():
    logits = torch.zeros(40, 6)
    logits[:, 4] = 5.0
    check_route(logits, 1, False)


def test_far_apart():
    check_route(torch.tensor([[1e4, -1e4, 0.0, -torch.inf]]), 4, True)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
@pytest.mark.parametrize("row", [[torch.nan] * 5, [1.0, torch.nan, 2.0, torch.nan, 0.0], [torch.inf] * 5])
@pytest.mark.parametrize("norm_topk_prob", [False, True])
def test_what_is_not_finite_still_goes_to_different_experts(row, norm_topk_prob):
    """Places in the table count on it; other tokens are not touched, and this one's weights show it."""
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0], row, [4.0, 3.0, 2.0, 1.0, 0.0]])
    routed = route(logits, 3, norm_topk_prob)
    pairs = pairs_of(routed)
    experts = [
        [expert for expert in range(5) if token * 3 + rank in pairs[expert]] for token in range(3) for rank in range(3)
    ]
    assert all(len(places) == 1 for places in experts), "each pair is with one expert"
    assert len({places[0] for places in experts[3:6]}) == 3
    assert routed.weights[1].isnan().all()
    assert torch.equal(routed.weights[[0, 2]], route(logits[[0, 2]], 3, norm_topk_prob).weights)


@pytest.mark.parametrize("top_k", [0, 6])
def test_refuses_top_k(top_k):
    with pytest.raises(ValueError, match=f"top_k is {top_k}, expected 1 to 5"):
        route(torch.zeros(2, 5), top_k, True)

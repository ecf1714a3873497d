"""Penalties under the interpreter, against their reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels import sample_penalties as module
from kernels.sample_penalties import penalize, penalize_reference
from tests.kernels import interpreted, poisoned_memory

pytestmark = [  # the interpreter's numpy; a GPU says nothing of infinities
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]
EDGES = [0.0, -0.0, -torch.inf, torch.inf, 3e38, -3e38]


def random_rows(num_rows, num_penalized, vocab_size, length, num_distinct, device="cpu"):
    """The arguments of `penalize`, with ids that mean nothing here and there and what is no history behind it."""
    logits = torch.randn(num_rows, vocab_size, device=device) * 3
    edges = torch.tensor(EDGES, device=device)
    is_edge = torch.rand(logits.shape, device=device) < 0.1
    logits[is_edge] = edges[torch.randint(len(EDGES), (int(is_edge.sum()),), device=device)]
    rows = torch.randperm(num_rows, device=device)[:num_penalized, None].contiguous()
    wide = torch.full((num_penalized, length + 3), 7, dtype=torch.int32, device=device)
    history = wide[:, :length]
    history.copy_(torch.randint(-1, num_distinct + 1, (num_penalized, length), device=device))
    num_tokens = torch.randint(0, length + 1, (num_penalized, 1), device=device)
    num_prompt_tokens = (torch.rand(num_penalized, 1, device=device) * (num_tokens + 1)).long()
    factors = torch.stack(
        [
            torch.tensor([1.0, 0.5, 1.3, 1e-38, 100.0], device=device)[torch.randint(5, (num_penalized,))],
            torch.tensor([0.0, 0.7, -2.0], device=device)[torch.randint(3, (num_penalized,))],
            torch.tensor([0.0, 0.3, -1.1], device=device)[torch.randint(3, (num_penalized,))],
        ],
        dim=1,
    )
    return logits, rows, history, num_tokens, num_prompt_tokens, factors.contiguous()


def check(arguments):
    """In place, and with the very numbers of the reference."""
    logits, *rest = arguments
    expected = logits.clone()
    penalize_reference(expected, *rest)
    with poisoned_memory():
        penalize(logits, *rest)
    torch.testing.assert_close(logits, expected, rtol=0, atol=0)


@interpreted
@given(
    num_penalized=st.integers(1, 4),
    num_others=st.integers(0, 2),
    vocab_size=st.integers(1, 200),
    length=st.integers(0, 40),
    num_distinct=st.sampled_from([1, 3, 300]),
    seed=st.integers(0, 2**31),
)
def test_any_rows(num_penalized, num_others, vocab_size, length, num_distinct, seed):
    torch.manual_seed(seed)
    check(random_rows(num_penalized + num_others, num_penalized, vocab_size, length, num_distinct))


def test_histories_of_several_tiles_and_rows_in_turns(monkeypatch):
    """A token's first program changes its logit, and the notes of some rows serve the next."""
    monkeypatch.setattr(module, "TILE", 16)
    monkeypatch.setattr(module, "MAX_ROWS", 2)
    torch.manual_seed(0)
    for num_distinct in (2, 90):
        check(random_rows(9, 7, 80, 100, num_distinct))


def test_each_penalty_by_hand():
    logits = torch.tensor([[2.0, -2.0, 4.0, 1.0, 9.0]])
    history = torch.tensor([[0, 1, 2, 2, 0, 3]], dtype=torch.int32)  # 3 is past what counts
    one = torch.ones(1, 1, dtype=torch.int64)
    penalize(logits, 0 * one, history, 5 * one, 2 * one, torch.tensor([[2.0, 0.5, 0.25]]))
    #        in the prompt, and once in the output; in the prompt alone; twice in the output; not at all
    assert logits.tolist() == [[1 - 0.5 - 0.25, -4.0, 2 - 0.5 - 0.5, 1.0, 9.0]]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"logits": torch.zeros(2, 8).bfloat16()}, "logits are torch.bfloat16"),
        ({"logits": torch.zeros(8, 2).T}, r"strides \(1, 2\)"),
        ({"history": torch.zeros(1, 4)}, "history is torch.float32"),
        ({"history": torch.zeros(4, 1, dtype=torch.int32).T.expand(1, 4)[:, ::2]}, r"strides \("),
        ({"factors": torch.zeros(1, 6)[:, ::2]}, r"factors have strides \(6, 2\)"),
    ],
)
def test_refuses(change, found):
    one = torch.ones(1, 1, dtype=torch.int64)
    arguments = {
        "logits": torch.zeros(2, 8),
        "rows": one,
        "history": torch.zeros(1, 4, dtype=torch.int32),
        "num_tokens": one,
        "num_prompt_tokens": one,
        "factors": torch.zeros(1, 3),
    } | change
    with pytest.raises(ValueError, match=found):
        penalize(**arguments)

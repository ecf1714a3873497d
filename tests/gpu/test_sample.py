"""Drawing tokens on a GPU, in the shape of Qwen3's logits: the very tokens of the engine's sampler."""

import pytest
import torch

from engine.sampling.batch import Method, RowGroup, SamplingBatch
from engine.sampling.sampler import sample
from kernels.sample import sample_tokens
from tests.gpu import captured, needs_cuda
from tests.kernels import DTYPES, padded_rows, test_sample_logprobs, test_sample_penalties
from tests.kernels.test_sample import MIXED, OFF, check, random_logits, with_uniforms
from tests.sampling_reference import one_group

pytestmark = needs_cuda
VOCAB = 151_669
PADDING = 151_936 - VOCAB


@pytest.mark.parametrize("num_values", [0, 50])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_rows(dtype, num_values):
    torch.manual_seed(num_values)
    rows = MIXED * 4
    logits = padded_rows(random_logits(len(rows), VOCAB, dtype, num_values, "cuda"), PADDING)
    check(logits, with_uniforms(rows, "cuda"), VOCAB)


@pytest.mark.parametrize(
    ("method", "row"),
    [
        (Method.WHOLE, OFF),
        (Method.WHOLE, (0.7, 0, 1.0, -3.0)),
        (Method.NUCLEUS, (1.0, 0, 0.9, -5.0)),
        (Method.NUCLEUS, (0.6, 0, 0.95, -torch.inf)),
        (Method.TOP_K, (0.6, 20, 0.95, -torch.inf)),
        (Method.TOP_K, (1.3, 500, 0.99, -4.0)),
        (Method.LARGE_TOP_K, (1.0, 5000, 0.9, -torch.inf)),
    ],
)
def test_equals_the_sampler_of_the_engine(method, row):
    torch.manual_seed(5)
    logits = random_logits(256, VOCAB, torch.bfloat16, device="cuda")
    rows = with_uniforms([row] * 256, "cuda")
    as_in_table = rows.clone()
    as_in_table[:, 1] = torch.where(rows[:, 1] == 0, VOCAB, rows[:, 1])
    group = RowGroup(method, None, as_in_table, 512, None, None)
    batch: SamplingBatch = one_group(group, 256, VOCAB)
    assert torch.equal(sample_tokens(logits, rows, VOCAB)[0], sample(logits, batch).token_ids)


@pytest.mark.parametrize("row", [(1.0, 0, 1.0, -torch.inf), (1.0, 0, 0.9, -1e9), (1.0, 512, 0.9, -torch.inf)], ids=str)
def test_all_equal(row):
    """All tokens are candidates, more than can be listed."""
    check(torch.zeros(3, VOCAB, dtype=torch.bfloat16, device="cuda"), with_uniforms([row] * 3, "cuda"), VOCAB)


def test_rows_that_are_no_numbers():
    torch.manual_seed(6)
    logits = random_logits(len(MIXED), VOCAB, torch.bfloat16, device="cuda")
    logits[::3, VOCAB - 1] = torch.nan
    logits[1::3] = -torch.inf
    check(logits, with_uniforms(MIXED, "cuda"), VOCAB)


@pytest.mark.parametrize("num_distinct", [3, VOCAB + 50])
def test_penalties(num_distinct):
    torch.manual_seed(8)
    test_sample_penalties.check(test_sample_penalties.random_rows(80, 70, VOCAB, 3000, num_distinct, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logprobs(dtype):
    torch.manual_seed(9)
    logits = padded_rows(random_logits(100, VOCAB, dtype, device="cuda"), PADDING)
    test_sample_logprobs.check(logits, torch.randint(VOCAB, (100,), device="cuda"), VOCAB)


def test_in_a_graph():
    """One graph serves any rows, in a batch of any of them."""
    torch.manual_seed(7)
    logits = random_logits(len(MIXED), VOCAB, torch.bfloat16, device="cuda")
    rows = with_uniforms(MIXED, "cuda")
    graph, token_ids = captured(lambda: sample_tokens(logits, rows, VOCAB)[0])
    for _ in range(3):
        logits.copy_(torch.randn_like(logits) * 3)
        rows.copy_(with_uniforms(MIXED, "cuda")[torch.randperm(len(MIXED))])
        graph.replay()
        expected = [sample_tokens(logits[row : row + 1], rows[row : row + 1], VOCAB)[0] for row in range(len(rows))]
        assert torch.equal(token_ids, torch.cat(expected))

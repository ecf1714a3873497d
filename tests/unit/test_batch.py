"""Batches: rows of single tokens first, results in the order of the step."""

import numpy as np
import pytest
import torch

from engine.attention import triton_backend
from engine.attention.backend import AttentionBatch
from engine.attention.torch_backend import TorchAttention
from engine.attention.triton_backend import TritonAttention
from engine.batch import BatchTables
from engine.request import EngineRequest, Request, SamplingParams
from engine.scheduler import Step
from engine.staging import Staging
from kernels.paged_attention import paged_attention
from kernels.paged_decode import paged_decode
from tests.tiny_models import make_tiny_qwen3

STAGING = Staging(torch.device("cpu"))


def make_step(starts, num_new_tokens, sampling) -> Step:
    requests = []
    for slot, (start, num_new) in enumerate(zip(starts, num_new_tokens, strict=True)):
        source = EngineRequest(request_id="", prompt_token_ids=[0] * (start + num_new), params=SamplingParams())
        request = Request(source, (), 100)
        request.slot = 10 + slot
        requests.append(request)
    return Step(requests, list(starts), list(num_new_tokens), list(sampling))


def test_single_tokens_come_first():
    tables = BatchTables(20, 64, 4, padding_block=99, staging=STAGING)
    batch = tables.build(make_step(starts=[7, 0, 3, 5, 0], num_new_tokens=[1, 3, 2, 1, 1], sampling=[0, 2, 3]))
    assert batch.order.tolist() == [0, 3, 4, 1, 2]
    assert batch.request_slots.tolist() == [10, 13, 14, 11, 12]
    assert batch.row_slots.tolist() == [10, 13, 14, 11, 11, 11, 12, 12]
    assert batch.positions.tolist() == [7, 5, 0, 0, 1, 2, 3, 4]
    assert batch.context_lens.tolist() == [8, 6, 1, 3, 5]
    assert batch.sample_rows.tolist() == [0, 7, 1]
    assert batch.sample_slots.tolist() == [10, 12, 13]
    assert batch.sample_positions.tolist() == [8, 5, 6]
    assert not batch.is_decode


def test_decode_is_where_each_request_has_one_row_and_gets_a_token():
    tables = BatchTables(20, 64, 4, padding_block=99, staging=STAGING)
    assert tables.build(make_step([7, 5], [1, 1], [0, 1])).is_decode
    assert not tables.build(make_step([7, 5], [1, 1], [1])).is_decode
    assert not tables.build(make_step([7, 5], [1, 2], [0, 1])).is_decode


@pytest.mark.parametrize("query_lens", [[1, 1, 1], [1, 1, 5, 3], [4, 2], [1, 9]], ids=str)
def test_each_kernel_gets_its_rows(tmp_path, monkeypatch, query_lens):
    """Against the torch backend; and no row goes to both kernels."""
    calls = []

    def spy(operation):
        def called(query, *args, **kwargs):
            calls.append((operation.__name__, len(query)))
            return operation(query, *args, **kwargs)

        return called

    monkeypatch.setattr(triton_backend, "paged_decode", spy(paged_decode))
    monkeypatch.setattr(triton_backend, "paged_attention", spy(paged_attention))
    make_tiny_qwen3(tmp_path, head_dim=64, num_attention_heads=4, num_key_value_heads=2)
    model = triton_backend.ModelConfig.from_dir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    lens = np.array(query_lens)
    tables = torch.randperm(20, generator=generator)[: 4 * len(lens)].view(-1, 4).int()
    context_lens = lens + np.arange(3, 3 + 11 * len(lens), 11)
    batch = AttentionBatch(np.cumsum(lens) - lens, lens, context_lens, tables)
    query = torch.randn(int(lens.sum()), 4, 64, generator=generator)
    k_cache, v_cache = torch.randn(2, 20, 16, 2, 64, generator=generator)
    ours, torchs = TritonAttention(model, STAGING), TorchAttention(16, STAGING)
    expected = torchs.forward(query, k_cache, v_cache, torchs.plan(batch))
    torch.testing.assert_close(ours.forward(query, k_cache, v_cache, ours.plan(batch)), expected)
    num_single = query_lens.count(1)
    assert calls == [("paged_decode", num_single)] * bool(num_single) + [("paged_attention", len(query))] * (
        num_single < len(lens)
    )

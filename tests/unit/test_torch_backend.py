"""Chunks of prompts on a CPU, whose spans of queries attend to what lies before them without a mask."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.attention import AttentionBatch, torch_backend
from engine.attention.torch_backend import TorchAttention
from engine.staging import Staging

BLOCK_SIZE, HEADS, KV_HEADS, HEAD_DIM = 16, 6, 2, 24
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("span", [3, 8, 1000])
@pytest.mark.parametrize(("query_lens", "context_lens"), [([1, 7, 20], [30, 7, 61]), ([33], [33]), ([2], [100])])
def test_each_query_sees_what_is_before_it(monkeypatch, dtype, window, span, query_lens, context_lens):
    """Against one masked product a request. Scores are large: one part may outweigh the other by any factor."""
    monkeypatch.setattr(torch_backend, "MASK_ELEMENTS", span**2)
    torch.manual_seed(0)
    caches = [torch.randn(32, BLOCK_SIZE, KV_HEADS, HEAD_DIM).to(dtype) for _ in range(2)]
    query = (4 * torch.randn(sum(query_lens), HEADS, HEAD_DIM)).to(dtype)
    tables = torch.randperm(32).int()[: len(query_lens) * 8].view(-1, 8)
    lens = np.array(query_lens, dtype=np.int64)
    batch = AttentionBatch(lens.cumsum() - lens, lens, np.array(context_lens), tables)
    backend = TorchAttention(BLOCK_SIZE, Staging(torch.device("cpu")), (window,))
    plan = backend.plan(batch)
    found = backend.forward(query, *caches, plan, window)
    for rows, table, length in zip(query.split(query_lens), tables, context_lens, strict=True):
        keys, values = (cache[table.long()].flatten(0, 1)[:length].transpose(0, 1).float() for cache in caches)
        mask = torch.ones(len(rows), length, dtype=torch.bool).tril(length - len(rows))
        mask = mask if window is None else mask.triu(length - len(rows) - window + 1)
        queries = rows.transpose(0, 1).float()
        expected = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
        result, found = found[: len(rows)], found[len(rows) :]
        torch.testing.assert_close(
            result.float(), expected.transpose(0, 1), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype]
        )

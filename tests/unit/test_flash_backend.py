"""The flash-attn backend without flash-attn: its choice, its errors, and the arguments that it passes.

The signatures are those of flash_attn_interface.py in FlashAttention 2. What the arguments mean is worked out here from
that file's documentation and compared with the torch backend; the library itself runs on a GPU alone.
"""

import inspect
import sys
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine.attention import AttentionBatch, create_backend
from engine.attention.flash_backend import FlashAttention
from engine.attention.torch_backend import TorchAttention
from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.llm import LLM
from engine.staging import Staging

BLOCK_SIZE = 256
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 16
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    """As documented: row i of q attends to the first cache_seqlens[i] tokens of the blocks block_table[i]."""
    assert q.shape[1:] == (1, HEADS, HEAD_DIM) and k is None and v is None and causal
    check_cache(k_cache, v_cache, block_table, len(q))
    assert cache_seqlens.dtype == torch.int32 and cache_seqlens.shape == (len(q),)
    return torch.stack(
        [
            attend(q[index], *gather(k_cache, v_cache, block_table[index], length), window_size)
            for index, length in enumerate(cache_seqlens.tolist())
        ]
    )


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """As documented: rows cu_seqlens_q[i] … of q attend to as many tokens as cu_seqlens_k says, aligned at the end."""
    num_requests = len(cu_seqlens_q) - 1
    assert causal and dropout_p == 0 and q.shape == (int(cu_seqlens_q[-1]), HEADS, HEAD_DIM)
    check_cache(k, v, block_table, num_requests)
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32 and len(cu_seqlens_k) == num_requests + 1
    assert type(max_seqlen_q) is int and max_seqlen_q == cu_seqlens_q.diff().max()
    assert type(max_seqlen_k) is int and max_seqlen_k == cu_seqlens_k.diff().max()
    starts = cu_seqlens_q.tolist()
    return torch.cat(
        [
            attend(q[starts[index] : starts[index + 1]], *gather(k, v, block_table[index], length), window_size)
            for index, length in enumerate(cu_seqlens_k.diff().tolist())
        ]
    )


def check_cache(k_cache, v_cache, block_table, num_requests):
    assert k_cache.shape[1] % 256 == 0 and k_cache.stride(-1) == v_cache.stride(-1) == 1
    assert block_table.dtype == torch.int32 and len(block_table) == num_requests and block_table.stride(-1) == 1


def gather(k_cache, v_cache, blocks, length):
    return (cache[blocks.long()].flatten(0, 1)[:length] for cache in (k_cache, v_cache))


def attend(query, keys, values, window_size):
    """[n, HEADS, HEAD_DIM] over [m, KV_HEADS, HEAD_DIM]: the last query sees all keys, or as many as window_size says.

    As documented: query i sees keys i + seqlen_k - seqlen_q - window_size[0] … + window_size[1]; -1 is no limit.
    """
    before = len(keys) - len(query)
    mask = torch.ones(len(query), len(keys), dtype=torch.bool).tril(before)
    if window_size[0] >= 0:
        mask = mask.triu(before - window_size[0])
        assert window_size[1] == 0
    parts = (part.transpose(0, 1) for part in (query, keys, values))
    return F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True).transpose(0, 1)


@pytest.mark.parametrize(
    ("query_lens", "context_lens"),
    [
        ([1, 1, 1], [1, 300, 700]),
        ([5, 2], [5, 513]),
        ([1, 1, 3, 260], [256, 600, 3, 400]),
    ],
)
@pytest.mark.parametrize("window", [None, 1, 100])
def test_arguments_mean_what_the_torch_backend_computes(query_lens, context_lens, window):
    generator = torch.Generator().manual_seed(0)
    staging = Staging(CPU)
    num_blocks, max_blocks = 16, 3
    caches = [torch.randn(num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM, generator=generator) for _ in range(2)]
    query = torch.randn(sum(query_lens), HEADS, HEAD_DIM, generator=generator)
    tables = torch.randperm(num_blocks, generator=generator).int()[: len(query_lens) * max_blocks]
    lens = np.array(query_lens, dtype=np.int64)
    batch = AttentionBatch(lens.cumsum() - lens, lens, np.array(context_lens), tables.view(-1, max_blocks))
    flash = FlashAttention(flash_attn_with_kvcache, flash_attn_varlen_func, staging)
    plain = TorchAttention(BLOCK_SIZE, staging, (None, 100, 1))
    found = flash.forward(query, *caches, flash.plan(batch), window)
    expected = plain.forward(query, *caches, plain.plan(batch), window)
    torch.testing.assert_close(found, expected)
    if max(query_lens) == 1:
        plan = flash.plan_decode(batch.block_tables, torch.tensor(context_lens, dtype=torch.int32))
        torch.testing.assert_close(flash.forward(query, *caches, plan, window), expected)


def test_the_recorded_signatures_are_those_of_an_installed_library():
    library = pytest.importorskip("flash_attn")
    for recorded in (flash_attn_with_kvcache, flash_attn_varlen_func):
        theirs = inspect.signature(getattr(library, recorded.__name__)).parameters
        assert set(theirs) >= set(inspect.signature(recorded).parameters)


def create(device=CUDA, choice="flash", block_size=BLOCK_SIZE, dtype=torch.bfloat16, cache_dtype=None, head_dim=128):
    staging = SimpleNamespace(device=device)
    model = SimpleNamespace(head_dim=head_dim, num_attention_heads=16, num_key_value_heads=8, layer_windows=(None,))
    return create_backend(model, block_size, staging, dtype, cache_dtype or dtype, choice)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"device": CPU}, ["the device is cpu", "expected attention_backend: auto"]),
        ({"capability": (7, 5)}, ["needs compute capability 8.0", "Tesla"]),
        ({"dtype": torch.float32}, ["dtype is float32"]),
        ({"cache_dtype": torch.float8_e4m3fn}, ["no FP8 KV cache", "kv_cache_dtype: auto"]),
        ({"block_size": 16}, ["multiple of 256 tokens, and block_size is 16"]),
        ({"head_dim": 320}, ["multiple of 8 values up to 256", "320"]),
        ({}, ["flash-attn cannot be imported", "install the extra `flash`"]),
    ],
)
def test_what_flash_attn_does_not_take(monkeypatch, arguments, expected):
    capability = arguments.pop("capability", (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    if not arguments:
        monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ConfigError) as caught:
        create(**arguments)
    assert all(text in str(caught.value) for text in expected) and "\n" not in str(caught.value)


def test_an_installed_library_is_used(monkeypatch):
    functions = {"flash_attn_with_kvcache": object(), "flash_attn_varlen_func": object()}
    monkeypatch.setitem(sys.modules, "flash_attn", namedtuple("Library", functions)(**functions))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    backend = create()
    assert isinstance(backend, FlashAttention)
    assert [backend._attend_single, backend._attend_several] == list(functions.values())


def test_torch_can_be_chosen_and_triton_is_refused_on_a_cpu():
    assert type(create(CPU, "torch", dtype=torch.float32)) is TorchAttention
    with pytest.raises(ConfigError, match="'triton' does not take head_dim 128 with block_size 256 on cpu"):
        create(CPU, "triton")


def test_the_choice_reaches_the_engine():
    assert EngineConfig().attention_backend == "auto"
    with pytest.raises(ConfigError, match="attention_backend 'flash' runs on CUDA devices alone"):
        LLM("demo", attention_backend="flash", device="cpu", kv_cache_memory=2**22, show_progress=False)
    llm = LLM("demo", attention_backend="torch", device="cpu", kv_cache_memory=2**22, show_progress=False)
    assert type(llm.engine.runner.backend) is TorchAttention

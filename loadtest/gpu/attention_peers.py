"""What other libraries have for attention, on the same keys and values: torch, flash-attn and FlashInfer."""

import inspect
from collections.abc import Callable
from importlib.util import find_spec
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

Peers = dict[str, Callable[[], Tensor]]
FLASHINFER_WORKSPACE_BYTES = 2**28


def packed_peers(query: Tensor, keys: Tensor, values: Tensor, query_lens: list[int], context_lens: list[int]) -> Peers:
    """Those that take requests of any lengths, one after the other.

    Args:
        query: [sum(query_lens), heads, head_dim], the last tokens of each request.
        keys: [sum(context_lens), kv_heads, head_dim].
        values: as `keys`.
    """
    query_starts, starts = (
        torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=query.device)
        for lens in (query_lens, context_lens)
    )
    arguments = (query, keys, values, query_starts, starts, max(query_lens), max(context_lens))
    peers: Peers = {}
    if find_spec("torch.nn.attention.varlen") is not None:

        def varlen() -> Tensor:
            from torch.nn.attention.varlen import varlen_attn

            # Torch 2.11 has no such parameter, and takes fewer KV heads without it.
            options = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
            return varlen_attn(*arguments, window_size=(-1, 0), **options)

        peers["torch varlen_attn"] = varlen
    if find_spec("flash_attn") is not None:

        def flash() -> Tensor:
            from flash_attn import flash_attn_varlen_func

            return flash_attn_varlen_func(*arguments, causal=True)

        peers["flash-attn"] = flash
    return peers


def dense_peers(query: Tensor, keys: Tensor, values: Tensor) -> Peers:
    """Torch's flash attention, of requests with one length: [requests, tokens, heads, head_dim] each."""
    q, k, v = (t.transpose(1, 2) for t in (query, keys, values))
    causal = query.shape[1] > 1
    return {"torch SDPA": lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)}


def paged_decode_peers(query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lens: list[int]) -> Peers:
    """FlashInfer, on the paged cache itself.

    Args:
        query: [requests, heads, head_dim].
        keys: [num_blocks, block_size, kv_heads, head_dim].
        values: as `keys`.
        block_table: [requests, most blocks].
        lens: tokens of each request.
    """
    if find_spec("flashinfer") is None:
        return {}
    prepared: list[Callable[[], Tensor]] = []

    def run() -> Tensor:
        if not prepared:  # here, where it may fail
            prepared.append(_flashinfer(query, keys, values, block_table, lens))
        return prepared[0]()

    return {"FlashInfer": run}


def _flashinfer(
    query: Tensor, keys: Tensor, values: Tensor, block_table: Tensor, lens: list[int]
) -> Callable[[], Tensor]:
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    block_size = keys.shape[1]
    counts = [-(-length // block_size) for length in lens]
    indices = torch.cat([row[:count] for row, count in zip(block_table, counts, strict=True)])
    starts = torch.tensor([0, *accumulate(counts)], dtype=torch.int32, device=query.device)
    last = torch.tensor([(length - 1) % block_size + 1 for length in lens], dtype=torch.int32, device=query.device)
    workspace = torch.empty(FLASHINFER_WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    wrapper.plan(
        starts, indices, last, query.shape[1], keys.shape[2], keys.shape[3], block_size, q_data_type=query.dtype
    )
    return lambda: wrapper.run(query, (keys, values))

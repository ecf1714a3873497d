"""What the two paged attention kernels share: which tensors they take, addresses in the paged cache, the exact math."""

import math

import torch
from torch import Tensor

from kernels.backend import tl, triton

LOG2_E = math.log2(math.e)
HEAD_DIMS = (64, 128, 256)
BLOCK_SIZES = (16, 32, 64, 128, 256)
MAX_GROUP = 64
"""Most query heads of one KV head: their rows share a tile."""
QUERY_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOAT8 = torch.float8_e4m3fn
TRITON_TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def attend_tiles(
    query: tl.tensor,  # [BLOCK_M, HEAD_DIM] DTYPE, rows of one request and one KV head
    last_key: tl.tensor,  # [BLOCK_M], the last key that a row sees
    k_ptr: tl.tensor,  # the caches, at the KV head
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,  # [max_blocks] int32, the request's blocks
    first_tile: tl.tensor,
    stop_tile: tl.tensor,
    num_common: tl.tensor,  # how many keys all rows see
    num_keys: tl.tensor,  # how many keys any row sees
    scale: tl.tensor,
    block_stride: tl.tensor,
    token_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DTYPE: tl.constexpr,  # what is multiplied
    WINDOW: tl.constexpr,  # how many keys up to its last one a row sees; 0: all
) -> tl.tensor:
    """Attention to the keys of tiles first_tile … stop_tile - 1, with an online softmax in base 2.

    (Σ weight · value [BLOCK_M, HEAD_DIM], Σ weight [BLOCK_M], maximum [BLOCK_M]), weights being 2 ** (score - maximum).
    """
    # Small tiles are spread over warps by keys, large ones (64 rows and more) by rows.
    IS_SMALL: tl.constexpr = BLOCK_M < 64
    IN_PAIRS: tl.constexpr = IS_SMALL and v_ptr.dtype.element_ty == tl.float8e4nv
    VALUE_DIM: tl.constexpr = HEAD_DIM // 2 if IN_PAIRS else HEAD_DIM
    key = tl.arange(0, BLOCK_N)
    dim = tl.arange(0, HEAD_DIM)[None, :]
    maximum = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    # Summing across warps in each tile would cost two barriers, so small tiles are summed at the end.
    total = tl.zeros((BLOCK_M, BLOCK_N if IS_SMALL else 1), tl.float32)
    accumulator = tl.zeros((BLOCK_M, VALUE_DIM), tl.float32)
    if IN_PAIRS:
        odd_accumulator = tl.zeros((BLOCK_M, VALUE_DIM), tl.float32)
    block_ids = _load_block_ids(table_ptr, first_tile * BLOCK_N, num_keys, BLOCK_SIZE, BLOCK_N)
    for tile in range(first_tile, stop_tile):
        first_key = tile * BLOCK_N
        is_key = (key < num_keys - first_key)[:, None]
        within = first_key % BLOCK_SIZE + key % BLOCK_SIZE
        # In 64 bits: caches pass 2³¹ elements.
        offsets = (block_ids.to(tl.int64) * block_stride + within * token_stride)[:, None]
        # What a block holds past num_keys was written by others, may be NaN, and must not be multiplied even by zero.
        keys = tl.load(k_ptr + offsets + dim, mask=is_key, other=0.0).to(DTYPE)
        if IN_PAIRS:
            values, odd_values = _load_pairs(v_ptr, offsets, is_key, VALUE_DIM, DTYPE)
        else:
            values = tl.load(v_ptr + offsets + dim, mask=is_key, other=0.0).to(DTYPE)
        block_ids = _load_block_ids(table_ptr, first_key + BLOCK_N, num_keys, BLOCK_SIZE, BLOCK_N)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee")
        if first_key + BLOCK_N > num_common:
            scores = tl.where(first_key + key[None, :] <= last_key[:, None], scores, float("-inf"))
        if WINDOW > 0:
            scores = tl.where(first_key + key[None, :] > last_key[:, None] - WINDOW, scores, float("-inf"))
        new_maximum = tl.maximum(maximum, tl.max(scores, axis=1) * scale)
        if WINDOW > 0:
            # A row may see no key of its block's first tiles. A finite maximum makes their weights 0, not NaN.
            new_maximum = tl.maximum(new_maximum, -1e30)
        decay = tl.exp2(maximum - new_maximum)[:, None]
        weights = tl.exp2(scores * scale - new_maximum[:, None])
        total = total * decay + (weights if IS_SMALL else tl.sum(weights, axis=1, keep_dims=True))
        accumulator = tl.dot(weights.to(DTYPE), values, accumulator * decay, input_precision="ieee")
        if IN_PAIRS:
            odd_accumulator = tl.dot(weights.to(DTYPE), odd_values, odd_accumulator * decay, input_precision="ieee")
        maximum = new_maximum
    if IN_PAIRS:
        accumulator = tl.interleave(accumulator, odd_accumulator)
    return accumulator, tl.sum(total, axis=1), maximum


@triton.jit
def _load_block_ids(
    table_ptr: tl.tensor,
    first_key: tl.tensor,  # a multiple of BLOCK_N
    num_keys: tl.tensor,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    """The blocks [BLOCK_N] that hold keys first_key … first_key + BLOCK_N - 1; block 0 for those past num_keys."""
    key = tl.arange(0, BLOCK_N)
    # Both sizes are powers of two: the tile is whole blocks, or lies within one.
    return tl.load(table_ptr + first_key // BLOCK_SIZE + key // BLOCK_SIZE, mask=first_key + key < num_keys, other=0)


@triton.jit
def _load_pairs(
    v_ptr: tl.tensor,
    offsets: tl.tensor,  # [BLOCK_N, 1] int64, even
    is_key: tl.tensor,  # [BLOCK_N, 1]
    VALUE_DIM: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """Even and odd elements [BLOCK_N, VALUE_DIM] of float8 values, which are loaded as pairs.

    As the right side of a product they must be transposed on their way from shared memory to registers, and the
    hardware does that with 16 bits at a time; single bytes would be gathered one by one.
    """
    pairs_ptr = v_ptr.to(tl.pointer_type(tl.int16))
    pairs = tl.load(pairs_ptr + offsets // 2 + tl.arange(0, VALUE_DIM)[None, :], mask=is_key, other=0)
    even = (pairs & 0xFF).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
    odd = (pairs >> 8).to(tl.int8).to(tl.float8e4nv, bitcast=True).to(DTYPE)
    return even, odd


def check_attention(query: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor) -> None:
    """Whether the kernels can take these tensors; shapes as `paged_attention` has them.

    Raises:
        ValueError: naming the tensor, what it is and what was expected.
    """
    if query.dim() != 3 or k_cache.dim() != 4 or k_cache.shape != v_cache.shape:
        raise ValueError(
            f"query has shape {tuple(query.shape)}, k_cache {tuple(k_cache.shape)}, v_cache {tuple(v_cache.shape)}; "
            "expected [num_tokens, num_heads, head_dim] and twice [num_blocks, block_size, num_kv_heads, head_dim]"
        )
    _, block_size, num_kv_heads, head_dim = k_cache.shape
    num_heads = query.shape[1]
    if query.shape[2] != head_dim or head_dim not in HEAD_DIMS:
        raise ValueError(
            f"head_dim is {query.shape[2]} in query and {head_dim} in the caches, expected the same of {HEAD_DIMS}"
        )
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size of the caches is {block_size}, expected one of {BLOCK_SIZES}")
    if num_heads % num_kv_heads or not 1 <= num_heads // num_kv_heads <= MAX_GROUP:
        raise ValueError(
            f"query has {num_heads} heads and the caches {num_kv_heads}; expected 1 to {MAX_GROUP} query heads for "
            "each KV head, the same number for all"
        )
    if query.dtype not in QUERY_DTYPES or k_cache.dtype not in (query.dtype, FLOAT8) or v_cache.dtype != k_cache.dtype:
        raise ValueError(
            f"query is {query.dtype}, k_cache {k_cache.dtype}, v_cache {v_cache.dtype}; expected float16, bfloat16 or "
            "float32, and caches both of that dtype or both float8_e4m3fn"
        )
    if block_table.dtype != torch.int32 or block_table.dim() != 2:
        raise ValueError(
            f"block_table is {block_table.dtype} {tuple(block_table.shape)}, expected int32 [num_requests, max_blocks]"
        )
    _check_strides(query, k_cache, v_cache, block_table)
    if k_cache.dtype == FLOAT8 and k_cache.is_cuda and torch.cuda.get_device_capability(k_cache.device) < (8, 9):
        raise ValueError(f"{k_cache.device} has no float8 conversions (they came with compute capability 8.9)")


def _check_strides(query: Tensor, k_cache: Tensor, v_cache: Tensor, block_table: Tensor) -> None:
    strides = k_cache.stride()
    # 16 elements are at least 16 bytes, the widest load of a thread.
    if strides[3] != 1 or any(stride % 16 for stride in strides[:3]) or v_cache.stride() != strides:
        raise ValueError(
            f"k_cache has strides {strides}, v_cache {v_cache.stride()}; expected the same, the last 1 and the others "
            "multiples of 16"
        )
    if query.stride(2) != 1 or block_table.stride(1) != 1:
        raise ValueError(
            f"query has strides {query.stride()}, block_table {block_table.stride()}; expected the last of each to be 1"
        )


def output_like(query: Tensor, output: Tensor | None) -> Tensor:
    """`output` if it can take the result, or a new tensor.

    Raises:
        ValueError: `output` has another shape or dtype, or its last stride is not 1.
    """
    if output is None:
        return torch.empty(query.shape, dtype=query.dtype, device=query.device)
    if output.shape != query.shape or output.dtype != query.dtype or output.stride(2) != 1:
        raise ValueError(
            f"output is {output.dtype} {tuple(output.shape)} with strides {output.stride()}, expected {query.dtype} "
            f"{tuple(query.shape)} with the last stride 1"
        )
    return output


def softmax_scale_base2(softmax_scale: float | None, head_dim: int, k_scale: float) -> float:
    """The factor that turns dots of query and stored key into exponents of two.

    Raises:
        ValueError: a scale that is not a positive finite number (a maximum would not survive scaling).
    """
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    if not 0 < scale * k_scale < math.inf:
        raise ValueError(f"softmax_scale {scale} and k_scale {k_scale}: expected positive finite numbers")
    return scale * k_scale * LOG2_E


def matmul_dtype(query: Tensor, k_cache: Tensor) -> torch.dtype:
    """What tiles are multiplied in, with float32 sums.

    Every float8_e4m3fn is exactly a float16, converted two at a time by one instruction; bfloat16 would take three.
    """
    return torch.float16 if k_cache.dtype == FLOAT8 else query.dtype


def check_window(window: int | None) -> int:
    """The kernels' WINDOW.

    Raises:
        ValueError: a window of no token.
    """
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected at least 1, or None")
    return window or 0


def attend_reference(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_ids: Tensor,
    position: int,
    scale: float,
    scales: tuple[float, float],
    window: int | None,
) -> Tensor:
    """softmax(scale · q · Kᵀ) · V for consecutive tokens of one request, in float32.

    Args:
        query: [num_tokens, num_heads, head_dim]; row i attends to the keys of tokens 0 … position + i.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim].
        block_ids: [max_blocks] blocks of the request, in order.
        position: place of query's first token in the request.
        scales: (k_scale, v_scale), what stored keys and values are multiplied by.
        window: how many keys up to its own a token sees; None: all.

    Returns:
        [num_tokens, num_heads, head_dim], the dtype of query.
    """
    num_tokens, num_heads, _ = query.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    num_keys = position + num_tokens
    used = block_ids[: -(-num_keys // block_size)].long()
    keys, values = (
        cache[used].flatten(0, 1)[:num_keys].float().mul(factor).repeat_interleave(num_heads // num_kv_heads, dim=1)
        for cache, factor in zip((k_cache, v_cache), scales, strict=True)
    )
    scores = torch.einsum("thd,khd->htk", query.float(), keys) * scale
    visible = torch.ones(num_tokens, num_keys, dtype=torch.bool, device=query.device).tril(position)
    if window is not None:
        visible = visible.triu(position - window + 1)
    weights = scores.masked_fill_(~visible, -math.inf).softmax(dim=-1)
    return torch.einsum("htk,khd->thd", weights, values).to(query.dtype)

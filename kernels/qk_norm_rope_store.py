"""Between the qkv projection and attention: per-head norms of q and k, rotary positions, K and V into the cache."""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu_ops
from kernels.backend import CompileCase, tl, triton, uses_triton

FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max
MAX_ROWS = 8  # heads that a program takes at most


def qk_norm_rope_store_reference(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: float,
    v_scale: float,
) -> Tensor:
    """As `qk_norm_rope_store`. The heads of q and k are treated as one tensor: on CPUs, calls are what costs time."""
    num_kv_heads, head_dim = k_cache.shape[-2:]
    heads = qkv.view(qkv.shape[0], -1, head_dim)
    num_heads = heads.shape[1] - 2 * num_kv_heads
    qk, v = heads.split([num_heads + num_kv_heads, num_kv_heads], dim=1)
    qk = qk.float()
    if q_weight is not None and k_weight is not None:
        qk = F.rms_norm(qk, (head_dim,), None, eps)
        q, k = qk.split([num_heads, num_kv_heads], dim=1)
        q.mul_(q_weight)
        k.mul_(k_weight)
    q, k = rotate(qk, cos_sin).to(qkv.dtype).split([num_heads, num_kv_heads], dim=1)
    _store(k, k_scale, k_cache, slot_mapping)
    _store(v, v_scale, v_cache, slot_mapping)
    return q


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotary position embedding, halves paired as in GPT-NeoX (arXiv:2104.09864).

    Args:
        x: [num_tokens, heads, head_dim] float32, contiguous within a token.
        cos_sin: [num_tokens, head_dim] float32.

    Returns:
        [num_tokens, heads, head_dim] float32.
    """
    num_tokens, num_heads, head_dim = x.shape
    halves = x.view(num_tokens, num_heads, 2, head_dim // 2)
    first, second = halves.unbind(2)
    cos, sin = cos_sin.view(num_tokens, 1, 2, head_dim // 2).unbind(2)
    rotated = halves * cos.unsqueeze(2)
    rotated_first, rotated_second = rotated.unbind(2)
    rotated_first.addcmul_(second, sin, value=-1)
    rotated_second.addcmul_(first, sin)
    return rotated.view(num_tokens, num_heads, head_dim)


def _store(x: Tensor, scale: float, cache: Tensor, slot_mapping: Tensor) -> None:
    """Write x / scale, [num_tokens, num_kv_heads, head_dim], to its slots in the cache's dtype."""
    if scale != 1.0:
        x = x.float() * (1.0 / scale)
    slots = cache.view(-1, *x.shape[1:])
    if cache.dtype == torch.float8_e4m3fn:
        # As GPUs do, too large becomes the largest. Torch copies float8 by index only as bytes.
        x = x.float().clamp(-FLOAT8_MAX, FLOAT8_MAX).to(cache.dtype).view(torch.uint8)
        slots = slots.view(torch.uint8)
    slots.index_copy_(0, slot_mapping, x.to(slots.dtype))


@triton.jit
def _turn_heads(
    source_ptr: tl.tensor,  # [NUM_HEADS, HEAD_DIM] contiguous: q or k of a token
    target_ptr: tl.tensor,  # the same, written
    weight_ptr: tl.tensor,  # [HEAD_DIM], None: no norm
    cos_sin_ptr: tl.tensor,  # [HEAD_DIM] float32, the token's
    program: tl.tensor,  # which ROWS of the heads
    eps: tl.tensor,
    inverse_scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    half: tl.constexpr = HEAD_DIM // 2
    heads = program * ROWS + tl.arange(0, ROWS)[:, None]
    # Of the shape of the tile, so that all loads have one layout among threads.
    columns = tl.arange(0, BLOCK_HALF)[None, :] + tl.zeros([ROWS, 1], tl.int32)
    mask = (columns < half) & (heads < NUM_HEADS)
    offsets = heads * HEAD_DIM + columns
    first = tl.load(source_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source_ptr + offsets + half, mask=mask, other=0.0).to(tl.float32)
    cos = tl.load(cos_sin_ptr + columns, mask=mask, other=0.0)
    sin = tl.load(cos_sin_ptr + half + columns, mask=mask, other=0.0)
    if weight_ptr is not None:
        weight_first = tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        weight_second = tl.load(weight_ptr + half + columns, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(first * first + second * second, axis=1) / HEAD_DIM + eps)
        first = first * scale[:, None] * weight_first
        second = second * scale[:, None] * weight_second
    # First the model's rounding, then the cache's, as where k is a tensor before it is stored.
    turned_first = (first * cos - second * sin).to(source_ptr.dtype.element_ty).to(tl.float32) * inverse_scale
    turned_second = (second * cos + first * sin).to(source_ptr.dtype.element_ty).to(tl.float32) * inverse_scale
    tl.store(target_ptr + offsets, turned_first.to(target_ptr.dtype.element_ty), mask=mask)
    tl.store(target_ptr + offsets + half, turned_second.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _copy_heads(
    source_ptr: tl.tensor,  # [NUM_HEADS, HEAD_DIM] contiguous: v of a token
    target_ptr: tl.tensor,  # the same, written
    program: tl.tensor,  # which ROWS of the heads
    inverse_scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    heads = program * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (columns < HEAD_DIM) & (heads < NUM_HEADS)
    offsets = heads * HEAD_DIM + columns
    x = tl.load(source_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * inverse_scale
    tl.store(target_ptr + offsets, x.to(target_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _qk_norm_rope_store_kernel(
    qkv_ptr: tl.tensor,  # [num_tokens, (NUM_HEADS + 2 · NUM_KV_HEADS) · HEAD_DIM], rows qkv_stride apart
    q_weight_ptr: tl.tensor,  # [HEAD_DIM] or None
    k_weight_ptr: tl.tensor,  # [HEAD_DIM] or None
    cos_sin_ptr: tl.tensor,  # [num_tokens, HEAD_DIM] float32 contiguous
    q_ptr: tl.tensor,  # [num_tokens, NUM_HEADS, HEAD_DIM] contiguous, dtype of qkv, written
    k_cache_ptr: tl.tensor,  # [num_slots, NUM_KV_HEADS, HEAD_DIM] contiguous, written
    v_cache_ptr: tl.tensor,  # the same, same dtype
    slot_mapping_ptr: tl.tensor,  # [num_tokens] int64
    qkv_stride: tl.tensor,
    eps: tl.tensor,
    k_inverse_scale: tl.tensor,
    v_inverse_scale: tl.tensor,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_HALF: tl.constexpr,  # power of two ≥ HEAD_DIM / 2
    Q_ROWS: tl.constexpr,  # heads a program; powers of two
    KV_ROWS: tl.constexpr,
) -> None:
    """Programs of a token: first those for its q heads, then those for k, then those for v."""
    # Not by tl.cdiv, which up to Triton 3.6 gives no constant.
    q_programs: tl.constexpr = (NUM_HEADS + Q_ROWS - 1) // Q_ROWS
    kv_programs: tl.constexpr = (NUM_KV_HEADS + KV_ROWS - 1) // KV_ROWS
    k_start: tl.constexpr = NUM_HEADS * HEAD_DIM
    kv_size: tl.constexpr = NUM_KV_HEADS * HEAD_DIM
    token = (tl.program_id(0) // (q_programs + 2 * kv_programs)).to(tl.int64)
    program = tl.program_id(0) % (q_programs + 2 * kv_programs)
    cos_sin_ptr += token * HEAD_DIM
    qkv_ptr += token * qkv_stride
    if program < q_programs:
        q_ptr += token * k_start
        _turn_heads(
            qkv_ptr, q_ptr, q_weight_ptr, cos_sin_ptr, program, eps, 1.0, NUM_HEADS, HEAD_DIM, BLOCK_HALF, Q_ROWS
        )
    elif program < q_programs + kv_programs:
        program -= q_programs
        k_ptr = k_cache_ptr + tl.load(slot_mapping_ptr + token) * kv_size
        _turn_heads(
            qkv_ptr + k_start, k_ptr, k_weight_ptr, cos_sin_ptr, program, eps, k_inverse_scale,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_HALF, KV_ROWS,
        )  # fmt: skip
    else:
        program -= q_programs + kv_programs
        v_ptr = v_cache_ptr + tl.load(slot_mapping_ptr + token) * kv_size
        _copy_heads(
            qkv_ptr + k_start + kv_size,
            v_ptr,
            program,
            v_inverse_scale,
            NUM_KV_HEADS,
            HEAD_DIM,
            2 * BLOCK_HALF,
            KV_ROWS,
        )


def qk_norm_rope_store_config(num_heads: int, num_kv_heads: int, head_dim: int) -> dict[str, int]:
    """Tile sizes and num_warps: 8 elements of either half a thread, which are 16 bytes of bfloat16."""
    block_half = triton.next_power_of_2(head_dim // 2)
    q_rows = min(MAX_ROWS, triton.next_power_of_2(num_heads))
    kv_rows = min(MAX_ROWS, triton.next_power_of_2(num_kv_heads))
    num_warps = max(1, min(4, q_rows * block_half // 256))
    return {"BLOCK_HALF": block_half, "Q_ROWS": q_rows, "KV_ROWS": kv_rows, "num_warps": num_warps}


def qk_norm_rope_store(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> Tensor:
    """Normalise q and k per head, rotate them, and write k and v of every token into the paged cache.

    Args:
        qkv: [num_tokens, (num_heads + 2 · num_kv_heads) · head_dim], heads of q, then k, then v; any row stride.
        q_weight, k_weight: [head_dim], or both None for models without these norms.
        cos_sin: [num_tokens, head_dim] float32: head_dim/2 cosines for the token's position, then the sines.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim] contiguous, written in place; both of one
            float dtype, not necessarily that of qkv.
        slot_mapping: [num_tokens] int64, block · block_size + offset of each token; all ≥ 0, and different where the
            slot is read again (rows of padding may share one).
        k_scale, v_scale: the cache holds k / k_scale and v / v_scale, for float8_e4m3fn limited to ±448. Constants of
            a layer: a CUDA graph keeps those it was captured with.

    Returns:
        q: [num_tokens, num_heads, head_dim], the dtype of qkv; not necessarily contiguous on a CPU.

    Raises:
        ValueError: on a GPU, sizes, dtypes or strides that are not as above.
    """
    if not uses_triton(qkv):
        if k_scale == v_scale == 1.0:
            on_cpu = cpu_ops.qk_norm_rope_store(qkv, q_weight, k_weight, eps, cos_sin, k_cache, v_cache, slot_mapping)
            if on_cpu is not None:
                return on_cpu
        return qk_norm_rope_store_reference(
            qkv, q_weight, k_weight, eps, cos_sin, k_cache, v_cache, slot_mapping, k_scale, v_scale
        )
    num_tokens, num_kv_heads, head_dim = qkv.shape[0], *k_cache.shape[-2:]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    _check(qkv, (q_weight, k_weight), cos_sin, (k_cache, v_cache), slot_mapping)
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype, device=qkv.device)
    config = qk_norm_rope_store_config(num_heads, num_kv_heads, head_dim)
    programs = triton.cdiv(num_heads, config["Q_ROWS"]) + 2 * triton.cdiv(num_kv_heads, config["KV_ROWS"])
    tensors = (qkv, q_weight, k_weight, cos_sin, q, k_cache, v_cache, slot_mapping)
    scalars = (qkv.stride(0), eps, 1.0 / k_scale, 1.0 / v_scale)
    sizes = {"NUM_HEADS": num_heads, "NUM_KV_HEADS": num_kv_heads, "HEAD_DIM": head_dim}
    _qk_norm_rope_store_kernel[(num_tokens * programs,)](*tensors, *scalars, **sizes, **config)
    return q


def _check(
    qkv: Tensor,
    weights: tuple[Tensor | None, Tensor | None],
    cos_sin: Tensor,
    caches: tuple[Tensor, Tensor],
    slot_mapping: Tensor,
) -> None:
    """Raise ValueError for what the kernel would read or write wrongly."""
    num_tokens, width = qkv.shape
    num_kv_heads, head_dim = caches[0].shape[-2:]
    if head_dim % 2 or width % head_dim or width // head_dim <= 2 * num_kv_heads or qkv.stride(1) != 1:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)} and strides {qkv.stride()}, expected contiguous rows of q, k and v "
            f"heads for a cache of {num_kv_heads} heads of even size {head_dim}"
        )
    for name, cache in zip(("k_cache", "v_cache"), caches, strict=True):
        _expect(name, cache, caches[0].dtype, caches[0].shape)
    _expect("cos_sin", cos_sin, torch.float32, (num_tokens, head_dim))
    _expect("slot_mapping", slot_mapping, torch.int64, (num_tokens,))
    if (weights[0] is None) != (weights[1] is None):
        raise ValueError("one of q_weight and k_weight is None, expected both or none")
    for name, weight in zip(("q_weight", "k_weight"), weights, strict=True):
        if weight is not None:
            _expect(name, weight, weight.dtype, (head_dim,))


def _expect(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if tensor.dtype != dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}, "
            f"expected contiguous {dtype} {tuple(shape)}"
        )


def compile_cases() -> list[CompileCase]:
    """Qwen3-0.6B, 32B with a float8 cache, Qwen2.5-0.5B without norms, heads of 256."""

    def case(num_heads: int, num_kv_heads: int, head_dim: int, norm: bool, cache: torch.dtype) -> CompileCase:
        qkv = torch.empty(64, (num_heads + 2 * num_kv_heads) * head_dim, dtype=torch.bfloat16, device="meta")
        weight = qkv[0, :head_dim] if norm else None
        cos_sin = torch.empty(64, head_dim, device="meta")
        k_cache, v_cache = torch.empty(2, 16, 16, num_kv_heads, head_dim, dtype=cache, device="meta").unbind(0)
        slots = torch.empty(64, dtype=torch.int64, device="meta")
        return CompileCase(
            f"qk_norm_rope_store {num_heads}/{num_kv_heads}x{head_dim} {str(cache).removeprefix('torch.')}",
            lambda: qk_norm_rope_store(qkv, weight, weight, 1e-6, cos_sin, k_cache, v_cache, slots),
            min_capability=89 if cache == torch.float8_e4m3fn else 80,
        )

    return [
        case(16, 8, 128, True, torch.bfloat16),
        case(64, 8, 128, True, torch.float8_e4m3fn),
        case(14, 2, 64, False, torch.bfloat16),
        case(8, 4, 256, True, torch.bfloat16),
    ]

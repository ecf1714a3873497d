"""A layer of experts: each token goes through the few that the router chose, and their outputs are added by weight.

Four launches: route; gate and up projections with silu · mul; down projection; weighted sum. The projections run in
tiles of the tokens of one expert. How many tiles there are is known on the device alone: as many programs start as
there could be, and those past the last tile leave. Both are weight · xᵀ: of the factors of Hopper's matrix instruction,
the left one has 64 rows, the right one as few as eight.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import CompileCase, tl, triton, uses_triton
from kernels.moe_route import Route, route, route_reference
from kernels.silu_and_mul import silu_and_mul_reference
from kernels.split_k import pipeline_stages, shared_memory_limit

BLOCK_K = 64
SUM_BLOCK = 1024
"""Columns that a program of the final sum takes."""


def fused_moe_reference(
    hidden: Tensor,
    router_logits: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    top_k: int,
    norm_topk_prob: bool,
) -> Tensor:
    """As `fused_moe`: expert by expert."""
    routed = route_reference(router_logits, top_k, norm_topk_prob)
    outputs = hidden.new_empty(hidden.shape[0] * top_k, hidden.shape[1])
    for expert, count in enumerate(routed.counts.tolist()):
        if count:
            pairs = routed.pairs[expert, :count]
            gate_up = F.linear(hidden[pairs // top_k], gate_up_weight[expert])
            outputs[pairs] = F.linear(silu_and_mul_reference(gate_up), down_weight[expert])
    weighted = outputs.unflatten(0, (-1, top_k)).float() * routed.weights.unsqueeze(2)
    return weighted.sum(dim=1).to(hidden.dtype)


@triton.jit
def _find_tile(
    counts_ptr: tl.tensor,  # [EXPERTS] int32
    tile: tl.tensor,
    EXPERTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> tl.tensor:
    """(expert of the tile, the expert's pairs before it, its pairs); expert ≥ EXPERTS: there is no such tile."""
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < EXPERTS, other=0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    is_before = tl.cumsum(tiles, axis=0) <= tile
    expert = tl.sum(is_before.to(tl.int32), axis=0)
    first_tile = tl.sum(tl.where(is_before, tiles, 0), axis=0)
    return expert, (tile - first_tile) * BLOCK_M, tl.sum(tl.where(experts == expert, counts, 0), axis=0)


@triton.jit(do_not_specialize=["num_tokens"])
def _expert_mm_kernel(
    x_ptr: tl.tensor,  # rows of K, x_stride apart: those of tokens if GATED, else of pairs
    weight_ptr: tl.tensor,  # [EXPERTS, N, K], or if GATED [EXPERTS, 2 · N, K] with gates first; contiguous
    counts_ptr: tl.tensor,  # [EXPERTS] int32
    pairs_ptr: tl.tensor,  # [EXPERTS, num_tokens] int32
    y_ptr: tl.tensor,  # [num_tokens · TOP_K, N] contiguous
    num_tokens: tl.tensor,
    x_stride: tl.tensor,
    N: tl.constexpr,
    K: tl.constexpr,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    GATED: tl.constexpr,  # y = silu(gate · x) · (up · x), else y = weight · x
    BLOCK_E: tl.constexpr,  # power of two ≥ EXPERTS
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    expert, first, count = _find_tile(counts_ptr, tl.program_id(0), EXPERTS, BLOCK_E, BLOCK_M)
    if expert >= EXPERTS:
        return
    places = first + tl.arange(0, BLOCK_M)
    is_pair = places < count
    pairs = tl.load(pairs_ptr + expert.to(tl.int64) * num_tokens + places, mask=is_pair, other=0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    is_column = columns < N
    inner = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + (pairs // TOP_K if GATED else pairs)[:, None] * x_stride + inner[None, :]
    weight_rows = expert.to(tl.int64) * (2 * N if GATED else N) + columns
    weight_ptrs = weight_ptr + weight_rows[:, None] * K + inner[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    total_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k in range(0, K, BLOCK_K):
        in_range = inner[None, :] < (BLOCK_K if K % BLOCK_K == 0 else K - k)
        x = tl.trans(tl.load(x_ptrs + k, mask=is_pair[:, None] & in_range, other=0.0))
        weight_mask = is_column[:, None] & in_range
        weight = tl.load(weight_ptrs + k, mask=weight_mask, other=0.0)
        total = tl.dot(weight, x, total, input_precision="ieee")
        if GATED:
            up = tl.load(weight_ptrs + N * K + k, mask=weight_mask, other=0.0)
            total_up = tl.dot(up, x, total_up, input_precision="ieee")
    if GATED:
        total = total / (1.0 + tl.exp(-total)) * total_up
    y_ptrs = y_ptr + pairs[:, None] * N + columns[None, :]
    tl.store(y_ptrs, tl.trans(total.to(y_ptr.dtype.element_ty)), mask=is_pair[:, None] & is_column[None, :])


@triton.jit
def _weighted_sum_kernel(
    x_ptr: tl.tensor,  # [num_tokens, TOP_K, N] contiguous
    weights_ptr: tl.tensor,  # [num_tokens, TOP_K] float32
    y_ptr: tl.tensor,  # [num_tokens, N] contiguous
    N: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(TOP_K):
        pair = token * TOP_K + rank
        x = tl.load(x_ptr + pair * N + columns, mask=columns < N, other=0.0)
        total += x.to(tl.float32) * tl.load(weights_ptr + pair)
    tl.store(y_ptr + token * N + columns, total.to(y_ptr.dtype.element_ty), mask=columns < N)


def fused_moe_config(
    num_pairs: int, num_experts: int, item_bytes: int, shared_memory: int
) -> tuple[int, int, int, int]:
    """(BLOCK_M, rows of weights in a tile, num_warps, num_stages) for the mean number of tokens an expert gets.

    Twice the mean fits most experts' tokens in one tile, so that weights are read once. Wide tiles, for many tokens,
    read little per product: 85 operations a byte of L2. float32 has no matrix units here, and small tiles.
    """
    mean = -(-num_pairs // num_experts)
    block_m = max(16, min(128 if item_bytes == 2 else 32, triton.next_power_of_2(2 * mean)))
    weight_rows = 64 if item_bytes == 4 else 128 if block_m < 64 else 256
    stages = pipeline_stages((weight_rows + block_m) * BLOCK_K * item_bytes, shared_memory)
    return block_m, weight_rows, 4 if block_m < 64 else 8, stages


def max_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """The most tiles that pairs can make: every expert that has any may have one tile that is not full."""
    return (num_pairs + min(num_experts, num_pairs) * (block_m - 1)) // block_m


def fused_moe(
    hidden: Tensor,
    router_logits: Tensor,
    gate_up_weight: Tensor,
    down_weight: Tensor,
    top_k: int,
    norm_topk_prob: bool,
) -> Tensor:
    """Σ over the chosen experts of routing weight · down(silu(gate(x)) · up(x)).

    Args:
        hidden: [num_tokens, hidden_size] float, any row stride.
        router_logits: [num_tokens, num_experts] any float dtype, any row stride; softmax is taken here, in float32.
        gate_up_weight: [num_experts, 2 · intermediate_size, hidden_size], gates first, contiguous, the dtype of hidden.
        down_weight: [num_experts, hidden_size, intermediate_size], contiguous, the dtype of hidden.
        top_k: experts a token goes to.
        norm_topk_prob: whether the routing weights of a token are divided by their sum.

    Returns:
        [num_tokens, hidden_size], the dtype of hidden.

    Raises:
        ValueError: shapes, dtypes or strides that are not as above, or top_k is not 1 … num_experts.
    """
    _check(hidden, router_logits, gate_up_weight, down_weight)
    if not hidden.shape[0]:
        return torch.empty_like(hidden)
    if not uses_triton(hidden):
        return fused_moe_reference(hidden, router_logits, gate_up_weight, down_weight, top_k, norm_topk_prob)
    routed = route(router_logits, top_k, norm_topk_prob)
    gated = _expert_mm(hidden, gate_up_weight, routed, is_gated=True)
    outputs = _expert_mm(gated, down_weight, routed, is_gated=False)
    num_tokens, hidden_size = hidden.shape
    y = torch.empty(num_tokens, hidden_size, dtype=hidden.dtype, device=hidden.device)
    block = min(SUM_BLOCK, triton.next_power_of_2(hidden_size))
    _weighted_sum_kernel[num_tokens, triton.cdiv(hidden_size, block)](
        outputs, routed.weights, y, N=hidden_size, TOP_K=top_k, BLOCK=block, num_warps=max(1, block // 256)
    )
    return y


def _check(hidden: Tensor, router_logits: Tensor, gate_up_weight: Tensor, down_weight: Tensor) -> None:
    (num_tokens, hidden_size), (num_experts, _, intermediate) = hidden.shape, down_weight.shape
    shapes = ((num_tokens, num_experts), (num_experts, 2 * intermediate, hidden_size))
    if (router_logits.shape, gate_up_weight.shape) != shapes or down_weight.shape[1] != hidden_size:
        raise ValueError(
            f"hidden is {tuple(hidden.shape)}, router_logits {tuple(router_logits.shape)}, gate_up_weight "
            f"{tuple(gate_up_weight.shape)}, down_weight {tuple(down_weight.shape)}; expected [tokens, hidden], "
            "[tokens, experts], [experts, 2 · intermediate, hidden] and [experts, hidden, intermediate]"
        )
    if not gate_up_weight.dtype == down_weight.dtype == hidden.dtype:
        raise ValueError(
            f"hidden is {hidden.dtype}, gate_up_weight {gate_up_weight.dtype}, down_weight {down_weight.dtype}; "
            "expected one dtype"
        )
    contiguous = gate_up_weight.is_contiguous() and down_weight.is_contiguous()
    if not contiguous or hidden.stride(1) != 1 or router_logits.stride(1) != 1:
        raise ValueError(
            f"strides are {hidden.stride()}, {router_logits.stride()}, {gate_up_weight.stride()} and "
            f"{down_weight.stride()}; expected contiguous weights, and contiguous rows of hidden and router_logits"
        )


def _expert_mm(x: Tensor, weight: Tensor, routed: Route, is_gated: bool) -> Tensor:
    """One of the two products; → [num_tokens · top_k, N]."""
    (num_tokens, top_k), (num_experts, weight_size, inner) = routed.weights.shape, weight.shape
    num_pairs = num_tokens * top_k
    block_m, weight_rows, num_warps, num_stages = fused_moe_config(
        num_pairs, num_experts, x.element_size(), shared_memory_limit(x.device)
    )
    channels, block_n = (weight_size // 2, weight_rows // 2) if is_gated else (weight_size, weight_rows)
    y = torch.empty(num_pairs, channels, dtype=x.dtype, device=x.device)
    # Tiles of the same weights are neighbours: they run together, and memory is read once for all.
    _expert_mm_kernel[max_tiles(num_pairs, num_experts, block_m), triton.cdiv(channels, block_n)](
        x,
        weight,
        routed.counts,
        routed.pairs,
        y,
        num_tokens,
        x.stride(0),
        N=channels,
        K=inner,
        EXPERTS=num_experts,
        TOP_K=top_k,
        GATED=is_gated,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=BLOCK_K,
        num_warps=num_warps,
        num_stages=num_stages,
    )
    return y


def compile_cases() -> list[CompileCase]:
    """Every configuration for Qwen3 30B-A3B, and float32."""

    def case(num_tokens: int, dtype: torch.dtype) -> CompileCase:
        hidden = torch.empty(num_tokens, 2048, dtype=dtype, device="meta")
        logits = torch.empty(num_tokens, 128, dtype=dtype, device="meta")
        gate_up = torch.empty(128, 1536, 2048, dtype=dtype, device="meta")
        down = torch.empty(128, 2048, 768, dtype=dtype, device="meta")
        name = f"fused_moe {num_tokens} {str(dtype).removeprefix('torch.')}"
        return CompileCase(
            name, lambda: fused_moe(hidden, logits, gate_up, down, 8, True), wgmma=dtype == torch.bfloat16
        )

    return [*(case(num_tokens, torch.bfloat16) for num_tokens in (1, 256, 512, 4096)), case(1, torch.float32)]

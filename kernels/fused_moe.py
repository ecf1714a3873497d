"""A layer of experts: each token goes through the few that the router chose, and their outputs are added by weight.

Four launches: route; gate and up projections with silu · mul; down projection; weighted sum. The projections run in
tiles of the tokens of one expert. How many tiles there are is known on the device alone: as many programs start as
there could be, and those past the last tile leave. Both are weight · xᵀ: of the factors of Hopper's matrix instruction,
the left one has 64 rows, the right one as few as eight.

Weights of 8 or 4 bits stay so in memory, and are widened tile by tile on their way to the matrix units; x is not
rounded. Scales are by expert, group of inputs and channel: a step of the inner loop has one for each channel, or of
GGUF's blocks a few, which weights are multiplied with before the product instead of after it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import CompileCase, tl, triton, uses_triton
from kernels.expert_weights import check_experts, has_block_scales, scaling_of
from kernels.moe_route import Route, route, route_reference
from kernels.quantize_weights import BLOCK, GROUP, SCALE_BLOCK, SPAN, WORDS, dequantize_fp8_block
from kernels.silu_and_mul import silu_and_mul_reference
from kernels.split_k import pipeline_stages, shared_memory_limit
from kernels.weight_only_blocks import weight_only_blocks_cpu, weight_only_blocks_reference, widened
from kernels.weight_only_mm import weight_only_mm_cpu, weight_only_mm_reference

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
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """As `fused_moe`: expert by expert."""
    routed = route_reference(router_logits, top_k, norm_topk_prob)
    outputs = hidden.new_empty(hidden.shape[0] * top_k, hidden.shape[1])
    for expert, count in enumerate(routed.counts.tolist()):
        if count:
            pairs = routed.pairs[expert, :count]
            gate_up = _linear(hidden[pairs // top_k], gate_up_weight, gate_up_scale, expert)
            outputs[pairs] = _linear(silu_and_mul_reference(gate_up), down_weight, down_scale, expert)
    weighted = outputs.unflatten(0, (-1, top_k)).float() * routed.weights.unsqueeze(2)
    return weighted.sum(dim=1).to(hidden.dtype)


def _linear(x: Tensor, weight: Tensor, scale: Tensor | None, expert: int) -> Tensor:
    """x · weight[expert]ᵀ."""
    if scale is None:
        return F.linear(x, weight[expert])
    if has_block_scales(weight, scale):
        return F.linear(x, dequantize_fp8_block(weight[expert], scale[expert].t(), x.dtype))
    if scale.dtype == torch.float16:
        product = weight_only_blocks_cpu if x.is_cpu else weight_only_blocks_reference
        return product(x, weight[expert], scale[expert])
    product = weight_only_mm_cpu if x.is_cpu else weight_only_mm_reference
    return product(x, weight[expert], scale[expert] if weight.dtype == torch.int16 else scale[expert, 0])


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


@triton.jit
def _add_product(
    total: tl.tensor,  # [BLOCK_N, BLOCK_M] float32
    x: tl.tensor,  # [BLOCK_K, BLOCK_M]
    weight_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    expert: tl.tensor,
    columns: tl.tensor,  # [BLOCK_N] of y; rows of the expert's weight from FIRST on
    is_row: tl.tensor,
    k: tl.tensor,  # first input
    in_range: tl.tensor,  # [1, BLOCK_K]
    HALF: tl.constexpr,  # of each byte, where it holds the codes of two inputs
    FIRST: tl.constexpr,
    ROWS: tl.constexpr,  # of an expert's weight
    K: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BITS: tl.constexpr,
    SCALE_K: tl.constexpr,
    SCALE_N: tl.constexpr,
    BLOCK_BYTES: tl.constexpr,
) -> tl.tensor:
    """total + weight[expert, FIRST + columns, those inputs from k on that x has] · x."""
    # Gates' and ups' addresses differ by a constant, so that they share registers.
    weight_rows = (expert.to(tl.int64) * ROWS + columns)[:, None]
    rows = FIRST + columns
    inner = tl.arange(0, BLOCK_K)[None, :]
    if BITS == 16:
        weight = tl.load(
            weight_ptr + weight_rows * K + inner + (FIRST * K + k), mask=is_row[:, None] & in_range, other=0.0
        )
        total = tl.dot(weight, x, total, input_precision="ieee")
    elif BLOCK_BYTES > 0:
        block = tl.arange(0, BLOCK_K // BLOCK_BYTES)
        scale_row = (expert.to(tl.int64) * (K // 32) + k // 32 + block) * ROWS
        is_block = is_row[:, None] & (k // 32 + block < K // 32)[None, :]
        scale = tl.load(scale_ptr + scale_row[None, :] + rows[:, None], mask=is_block, other=0.0)
        bytes_of_row: tl.constexpr = K // 32 * BLOCK_BYTES
        codes_ptrs = weight_ptr + weight_rows * bytes_of_row + inner + (FIRST * bytes_of_row + k // 32 * BLOCK_BYTES)
        codes = tl.load(codes_ptrs, mask=is_row[:, None] & in_range, other=0)
        codes = tl.reshape(codes, [columns.shape[0], BLOCK_K // BLOCK_BYTES, BLOCK_BYTES])
        total = tl.dot(widened(codes, scale, HALF, BLOCK_BYTES, x.dtype), x, total, input_precision="ieee")
    elif BITS == 8:
        scale_row = (expert.to(tl.int64) * tl.cdiv(K, SCALE_K) + k // SCALE_K) * tl.cdiv(ROWS, SCALE_N)
        scale = tl.load(scale_ptr + scale_row + rows // SCALE_N, mask=is_row, other=0.0)
        weight = tl.load(
            weight_ptr + weight_rows * K + inner + (FIRST * K + k), mask=is_row[:, None] & in_range, other=0.0
        )
        total += tl.dot(weight.to(tl.float32).to(x.dtype), x, input_precision="ieee") * scale[:, None]
    else:
        # A plane of a span (see quantize_weights): 64 inputs of a row are the same four bits of as many words.
        scale_row = (expert.to(tl.int64) * ((K + 255) // 256 * 2) + k // SCALE_K) * ROWS
        scale_zero = tl.load(scale_ptr + scale_row + rows, mask=is_row, other=0)
        words_of_row: tl.constexpr = (K + 255) // 256 * 64
        words_ptrs = weight_ptr + weight_rows * words_of_row + inner + (FIRST * words_of_row + k // 256 * 64)
        words = tl.load(words_ptrs, mask=is_row[:, None], other=0)
        code = ((words.to(tl.int32) >> (k // 64 % 4 * 4)) & 15) - (scale_zero & 15)[:, None]
        scale = (scale_zero >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        total += tl.dot(code.to(tl.float32).to(x.dtype), x, input_precision="ieee") * scale[:, None]
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _expert_mm_kernel(
    x_ptr: tl.tensor,  # rows of K, x_stride apart: those of tokens if GATED, else of pairs
    weight_ptr: tl.tensor,  # [EXPERTS, N, K], or if GATED [EXPERTS, 2 · N, K] with gates first; contiguous
    scale_ptr: tl.tensor,  # [EXPERTS, groups of inputs, groups of rows], or None
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
    BITS: tl.constexpr,  # of a weight; 16: those of x
    SCALE_K: tl.constexpr,  # inputs that share a scale
    SCALE_N: tl.constexpr,  # rows that do
    BLOCK_BYTES: tl.constexpr,  # of the codes of a block of GGUF; 0: there are no such blocks
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
    # A byte of Q4_0 holds the codes of two inputs, 16 apart: those of the lower halves are multiplied first.
    halves: tl.constexpr = 2 if BLOCK_BYTES == 16 else 1
    if halves == 2:
        inner = inner // 16 * 32 + inner % 16
    x_ptrs = x_ptr + (pairs // TOP_K if GATED else pairs)[:, None] * x_stride + inner[None, :]
    rows: tl.constexpr = 2 * N if GATED else N
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    total_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    step: tl.constexpr = BLOCK_K * halves
    for k in range(0, K, step):
        in_range = inner[None, :] < (step if K % step == 0 else K - k)
        for half in tl.static_range(halves):
            x = tl.trans(tl.load(x_ptrs + k + 16 * half, mask=is_pair[:, None] & in_range, other=0.0))
            total = _add_product(
                total, x, weight_ptr, scale_ptr, expert, columns, is_column, k, in_range, half, 0, rows, K, BLOCK_K,
                BITS, SCALE_K, SCALE_N, BLOCK_BYTES,
            )  # fmt: skip
            if GATED:
                total_up = _add_product(
                    total_up, x, weight_ptr, scale_ptr, expert, columns, is_column, k, in_range, half, N, rows, K,
                    BLOCK_K, BITS, SCALE_K, SCALE_N, BLOCK_BYTES,
                )  # fmt: skip
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
    WIDTH: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], tl.float32)
    for rank in tl.static_range(TOP_K):
        pair = token * TOP_K + rank
        x = tl.load(x_ptr + pair * N + columns, mask=columns < N, other=0.0)
        total += x.to(tl.float32) * tl.load(weights_ptr + pair)
    tl.store(y_ptr + token * N + columns, total.to(y_ptr.dtype.element_ty), mask=columns < N)


def fused_moe_config(
    num_pairs: int, num_experts: int, item_bytes: int, shared_memory: int, is_quantized: bool = False
) -> tuple[int, int, int, int]:
    """(BLOCK_M, rows of weights in a tile, num_warps, num_stages) for the mean number of tokens an expert gets.

    Twice the mean fits most experts' tokens in one tile, so that weights are read once. Wide tiles, for many tokens,
    read little per product: 85 operations a byte of L2. float32 has no matrix units here, and small tiles. Products of
    quantized weights are scaled before they are added, which takes registers: those tiles are half as large each way.
    """
    mean = -(-num_pairs // num_experts)
    block_m = max(16, min(128 if item_bytes == 2 else 32, triton.next_power_of_2(2 * mean)))
    weight_rows = 64 if item_bytes == 4 else 128 if block_m < 64 else 256
    if is_quantized:
        block_m, weight_rows = min(block_m, 64), min(weight_rows, 128)
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
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """Σ over the chosen experts of routing weight · down(silu(gate(x)) · up(x)).

    Args:
        hidden: [num_tokens, hidden_size] float, any row stride.
        router_logits: [num_tokens, num_experts] any float dtype, any row stride; softmax is taken here, in float32.
        gate_up_weight: [num_experts, 2 · intermediate_size, hidden_size], gates first, contiguous, the dtype of hidden.
        down_weight: [num_experts, hidden_size, intermediate_size], contiguous, the dtype of hidden.
            With scales, each is int8 or float8_e4m3fn, or int16 as `pack_int4` makes them of each expert's weight, or
            uint8 with two codes in a byte as `weight_only_blocks` takes them.
        top_k: experts a token goes to.
        norm_topk_prob: whether the routing weights of a token are divided by their sum.
        gate_up_scale, down_scale: contiguous, of each expert: float32 [1, rows]; or float32 [⌈inputs/128⌉, ⌈rows/128⌉]
            for blocks of float8; or int32 [groups, rows] as `pack_scale_zero` makes them; or float16 [inputs/32, rows]
            for int8 and uint8 in blocks of GGUF. None: weights as above.

    Returns:
        [num_tokens, hidden_size], the dtype of hidden.

    Raises:
        ValueError: shapes, dtypes or strides that are not as above, or top_k is not 1 … num_experts.
    """
    check_experts(hidden, router_logits, gate_up_weight, down_weight, gate_up_scale, down_scale)
    if not hidden.shape[0]:
        return torch.empty_like(hidden)
    if not uses_triton(hidden):
        return fused_moe_reference(
            hidden, router_logits, gate_up_weight, down_weight, top_k, norm_topk_prob, gate_up_scale, down_scale
        )
    routed = route(router_logits, top_k, norm_topk_prob)
    gated = _expert_mm(hidden, gate_up_weight, gate_up_scale, routed, is_gated=True)
    outputs = _expert_mm(gated, down_weight, down_scale, routed, is_gated=False)
    num_tokens, hidden_size = hidden.shape
    y = torch.empty(num_tokens, hidden_size, dtype=hidden.dtype, device=hidden.device)
    block = min(SUM_BLOCK, triton.next_power_of_2(hidden_size))
    _weighted_sum_kernel[num_tokens, triton.cdiv(hidden_size, block)](
        outputs, routed.weights, y, N=hidden_size, TOP_K=top_k, WIDTH=block, num_warps=max(1, block // 256)
    )
    return y


def _expert_mm(x: Tensor, weight: Tensor, scale: Tensor | None, routed: Route, is_gated: bool) -> Tensor:
    """One of the two products; → [num_tokens · top_k, N]."""
    (num_tokens, top_k), (num_experts, weight_size), inner = routed.weights.shape, weight.shape[:2], x.shape[1]
    scaling = None if scale is None else scaling_of(weight, scale, inner)
    num_pairs = num_tokens * top_k
    block_m, weight_rows, num_warps, num_stages = fused_moe_config(
        num_pairs, num_experts, x.element_size(), shared_memory_limit(x.device), scale is not None
    )
    channels, block_n = (weight_size // 2, weight_rows // 2) if is_gated else (weight_size, weight_rows)
    y = torch.empty(num_pairs, channels, dtype=x.dtype, device=x.device)
    # Tiles of the same weights are neighbours: they run together, and memory is read once for all.
    _expert_mm_kernel[max_tiles(num_pairs, num_experts, block_m), triton.cdiv(channels, block_n)](
        x,
        weight,
        scale,
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
        BITS=16 if scaling is None else scaling.bits,
        SCALE_K=inner if scaling is None else scaling.inputs,
        SCALE_N=1 if scaling is None else scaling.rows,
        BLOCK_BYTES=0 if scaling is None else scaling.block_bytes,
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

    def quantized(num_tokens: int, dtype: torch.dtype, scale_dtype: torch.dtype, group: int, rows: int) -> CompileCase:
        """group: inputs that share a scale, 0 for all; rows: how many rows do."""
        hidden = torch.empty(num_tokens, 2048, dtype=torch.bfloat16, device="meta")
        logits = torch.empty(num_tokens, 128, dtype=torch.bfloat16, device="meta")
        weights, scales = [], []
        for channels, inputs in ((1536, 2048), (2048, 768)):
            width = {torch.int16: inputs // SPAN * WORDS, torch.uint8: inputs // 2}.get(dtype, inputs)
            weights.append(torch.empty(128, channels, width, dtype=dtype, device="meta"))
            groups = inputs // group if group else 1
            scales.append(torch.empty(128, groups, channels // rows, dtype=scale_dtype, device="meta"))
        name = f"fused_moe {num_tokens} {dtype} by {group} {rows}".replace("torch.", "")
        is_float8 = dtype == torch.float8_e4m3fn
        return CompileCase(
            name,
            lambda: fused_moe(hidden, logits, weights[0], weights[1], 8, True, scales[0], scales[1]),
            min_capability=89 if is_float8 else 80,
        )

    return [
        *(case(num_tokens, torch.bfloat16) for num_tokens in (1, 256, 512, 4096)),
        case(1, torch.float32),
        *(
            quantized(num_tokens, *stored)
            for num_tokens in (1, 4096)
            for stored in (
                (torch.int8, torch.float32, 0, 1),
                (torch.int16, torch.int32, GROUP, 1),
                (torch.float8_e4m3fn, torch.float32, 0, 1),
                (torch.float8_e4m3fn, torch.float32, SCALE_BLOCK, SCALE_BLOCK),
                (torch.int8, torch.float16, BLOCK, 1),
                (torch.uint8, torch.float16, BLOCK, 1),
            )
        ),
    ]

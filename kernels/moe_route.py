"""Which experts a token goes to, and which tokens go to an expert."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.backend import CompileCase, tl, triton, uses_triton

TOKENS = 8
"""Tokens of a program where several share the work."""
MAX_SINGLE = 32
"""Up to so many tokens one program takes all; it then also zeroes the counts, which saves a launch."""


@dataclass(frozen=True, slots=True)
class Route:
    """Pairs of a token and an expert; pair token · top_k + rank is the token's rank-th choice."""

    weights: Tensor
    """[num_tokens, top_k] float32."""
    counts: Tensor
    """[num_experts] int32, pairs of each expert."""
    pairs: Tensor
    """[num_experts, num_tokens] int32: the first counts[expert] of a row are its pairs, in no order. Rest: anything."""


def choose_experts_reference(router_logits: Tensor, top_k: int, norm_topk_prob: bool) -> tuple[Tensor, Tensor]:
    """(weights, experts), each [num_tokens, top_k]: the largest logits, of equal ones the first experts."""
    experts = router_logits.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    weights = router_logits.float().softmax(dim=1).gather(1, experts)
    return weights / weights.sum(dim=1, keepdim=True) if norm_topk_prob else weights, experts


def route_reference(router_logits: Tensor, top_k: int, norm_topk_prob: bool) -> Route:
    """As `route`."""
    num_tokens, num_experts = router_logits.shape
    weights, experts = choose_experts_reference(router_logits, top_k, norm_topk_prob)
    counts = torch.bincount(experts.flatten(), minlength=num_experts)
    expert, pair = experts.flatten().sort(stable=True)
    rank = torch.arange(pair.numel(), device=pair.device) - (counts.cumsum(0) - counts)[expert]
    pairs = torch.zeros(num_experts, num_tokens, dtype=torch.int32, device=pair.device)
    pairs[expert, rank] = pair.to(torch.int32)
    return Route(weights, counts.to(torch.int32), pairs)


@triton.jit(do_not_specialize=["num_tokens"])
def _route_kernel(
    logits_ptr: tl.tensor,  # [num_tokens, EXPERTS] any float, rows logits_stride apart
    weights_ptr: tl.tensor,  # [num_tokens, TOP_K] float32
    counts_ptr: tl.tensor,  # [EXPERTS] int32, zeros unless SINGLE
    pairs_ptr: tl.tensor,  # [EXPERTS, num_tokens] int32
    num_tokens: tl.tensor,
    logits_stride: tl.tensor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK_E: tl.constexpr,  # power of two ≥ EXPERTS
    BLOCK_K: tl.constexpr,  # power of two ≥ TOP_K
    ROWS: tl.constexpr,  # power of two
    SINGLE: tl.constexpr,  # whether this is the only program
) -> None:
    experts, ranks = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    if SINGLE:
        tl.store(counts_ptr + experts, tl.zeros([BLOCK_E], tl.int32), mask=experts < EXPERTS)
        tl.debug_barrier()  # before counting below, by other threads
    tokens = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    is_token, is_expert = tokens < num_tokens, (experts < EXPERTS)[None, :]
    logits_ptrs = logits_ptr + tokens[:, None] * logits_stride + experts[None, :]
    logits = tl.load(logits_ptrs, mask=is_token[:, None] & is_expert, other=0.0).to(tl.float32)
    # What is not a number ranks last, but before padding and what was chosen: TOP_K different experts always exist.
    scores = tl.where(is_expert, tl.where(logits > -3.0e38, logits, -3.0e38), float("-inf"))
    largest = tl.max(scores, axis=1)
    total = tl.sum(tl.where(is_expert, tl.exp(logits - largest[:, None]), 0.0), axis=1)
    weights = tl.zeros([ROWS, BLOCK_K], tl.float32)
    for rank in tl.static_range(TOP_K):
        best, expert = tl.max(scores, axis=1, return_indices=True)
        scores = tl.where(experts[None, :] == expert[:, None], float("-inf"), scores)
        weights = tl.where(ranks[None, :] == rank, (tl.exp(best - largest) / total)[:, None], weights)
        place = tl.atomic_add(counts_ptr + expert, 1, mask=is_token, sem="relaxed")
        pairs_ptrs = pairs_ptr + expert.to(tl.int64) * num_tokens + place
        tl.store(pairs_ptrs, (tokens * TOP_K + rank).to(tl.int32), mask=is_token)
    if NORM:
        weights /= tl.sum(weights, axis=1)[:, None]
    weights_ptrs = weights_ptr + tokens[:, None] * TOP_K + ranks[None, :]
    tl.store(weights_ptrs, weights, mask=is_token[:, None] & (ranks < TOP_K)[None, :])


def route_config(num_tokens: int) -> tuple[int, int, bool]:
    """(ROWS, num_warps, SINGLE): a warp for each token until there are many."""
    single = num_tokens <= MAX_SINGLE
    rows = triton.next_power_of_2(num_tokens) if single else TOKENS
    return rows, min(8, rows), single


def route(router_logits: Tensor, top_k: int, norm_topk_prob: bool) -> Route:
    """Softmax over experts in float32, then the top_k experts of each token, and from that the tokens of each expert.

    Args:
        router_logits: [num_tokens, num_experts] any float dtype, any row stride; at least one token.
        norm_topk_prob: whether the weights of a token are divided by their sum.

    Raises:
        ValueError: top_k is not 1 … num_experts.
    """
    num_tokens, num_experts = router_logits.shape
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}, expected 1 to {num_experts}, the number of experts")
    if not uses_triton(router_logits):
        return route_reference(router_logits, top_k, norm_topk_prob)
    rows, num_warps, single = route_config(num_tokens)
    device = router_logits.device
    counts = (torch.empty if single else torch.zeros)(num_experts, dtype=torch.int32, device=device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    pairs = torch.empty(num_experts, num_tokens, dtype=torch.int32, device=device)
    _route_kernel[(triton.cdiv(num_tokens, rows),)](
        router_logits,
        weights,
        counts,
        pairs,
        num_tokens,
        router_logits.stride(0),
        EXPERTS=num_experts,
        TOP_K=top_k,
        NORM=norm_topk_prob,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_K=triton.next_power_of_2(top_k),
        ROWS=rows,
        SINGLE=single,
        num_warps=num_warps,
    )
    return Route(weights, counts, pairs)


def compile_cases() -> list[CompileCase]:
    """One token, the most of one program, and many; 128 experts as in Qwen3 30B-A3B and 235B-A22B."""

    def case(num_tokens: int) -> CompileCase:
        logits = torch.empty(num_tokens, 128, dtype=torch.bfloat16, device="meta")
        return CompileCase(f"moe_route {num_tokens}", lambda: route(logits, 8, True))

    return [case(num_tokens) for num_tokens in (1, MAX_SINGLE, 4096)]

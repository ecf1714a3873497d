"""Cases of `kernels_part` beside attention: norms, positions, sampling, quantized products, experts."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.fused_moe import fused_moe, fused_moe_reference
from kernels.linear import linear
from kernels.qk_norm_rope_store import qk_norm_rope_store, qk_norm_rope_store_reference
from kernels.quantize_weights import (
    dequantize_fp8_block,
    dequantize_int4_group,
    dequantize_per_channel,
    quantize_fp8_block,
    quantize_fp8_per_channel,
    quantize_int4_group,
    quantize_int8_per_channel,
)
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.sample import sample_tokens, sample_tokens_reference
from kernels.sample_logprobs import token_logprobs, token_logprobs_reference
from kernels.sample_penalties import penalize, penalize_reference
from kernels.scaled_mm_fp8 import scaled_mm_fp8
from kernels.silu_and_mul import silu_and_mul
from kernels.weight_only_mm import weight_only_mm
from loadtest.gpu.cases import Case, randn

FLOAT8 = torch.float8_e4m3fn
FP8_TOLERANCE = 7e-2
"""Of what is rounded to FP8, which may be off by 1/16: one rounding the other way is twice that of a small number."""


@dataclass(frozen=True)
class Sizes:
    """Qwen3-8B's layers, Qwen3-30B-A3B's experts."""

    tokens: tuple[int, ...] = (128, 8192)
    hidden: int = 4096
    inner: int = 12_288
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 151_936
    few_rows: int = 16
    small: int = 2048
    """Width of Qwen3-0.6B's query heads together; half of it is its hidden_size, one and a half times its MLP's."""
    experts: tuple[int, int, int] = (2048, 768, 128)
    """hidden_size, intermediate_size, number of experts."""


def has_fp8(device: str) -> bool:
    """Whether it computes with float8_e4m3fn."""
    return device == "cpu" or torch.cuda.get_device_capability() >= (8, 9)


def norm_cases(sizes: Sizes, device: str) -> list[Case]:
    """rms_norm, add_rms_norm and silu_and_mul."""
    cases, hidden = [], sizes.hidden
    for num_tokens in sizes.tokens:
        x, residual = (randn(num_tokens, hidden, device=device) for _ in range(2))
        weight, gate_up = randn(hidden, device=device), randn(num_tokens, 2 * sizes.inner, device=device)
        gate, up = gate_up.chunk(2, dim=1)
        size = x.numel() * 2
        cases += [
            Case(
                f"rms_norm {num_tokens} x {hidden}",
                lambda x=x, w=weight: rms_norm(x, w, 1e-6),
                lambda x=x, w=weight: F.rms_norm(x.float(), w.shape, w.float(), 1e-6),
                2 * size,
                peers={"torch": lambda x=x, w=weight: F.rms_norm(x, w.shape, w, 1e-6)},
            ),
            Case(
                f"add_rms_norm {num_tokens} x {hidden}",
                lambda x=x, r=residual, w=weight: add_rms_norm(x.clone(), r, w, 1e-6)[0],
                lambda x=x, r=residual, w=weight: F.rms_norm((x + r).float(), w.shape, w.float(), 1e-6),
                6 * size,  # with the copy of x made here
            ),
            Case(
                f"silu_and_mul {num_tokens} x {2 * sizes.inner}",
                lambda g=gate_up: silu_and_mul(g),
                lambda g=gate, u=up: F.silu(g.float()) * u.float(),
                1.5 * gate_up.numel() * 2,
            ),
        ]
    return cases


def store_cases(sizes: Sizes, device: str) -> list[Case]:
    """qk_norm_rope_store, with both kinds of caches."""
    dtypes = (torch.bfloat16, FLOAT8)[: 1 + has_fp8(device)]
    return [_store_case(sizes, num_tokens, dtype, device) for num_tokens in sizes.tokens for dtype in dtypes]


def _store_case(sizes: Sizes, num_tokens: int, dtype: torch.dtype, device: str) -> Case:
    """Compared are q and what the caches hold afterwards."""
    heads, kv_heads, head_dim = sizes.heads, sizes.kv_heads, sizes.head_dim
    qkv = randn(num_tokens, (heads + 2 * kv_heads) * head_dim, device=device)
    weight = randn(head_dim, device=device)
    angles = torch.rand(num_tokens, head_dim // 2, device=device) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    num_blocks = -(-num_tokens // 16)
    slots = torch.randperm(num_blocks * 16, device=device)[:num_tokens]
    caches = torch.zeros(2, num_blocks, 16, kv_heads, head_dim, device=device).to(dtype)

    def store(operation: Callable[..., Tensor]) -> Tensor:
        return operation(qkv, weight, weight, 1e-6, cos_sin, *caches.unbind(0), slots, 1.0, 1.0)

    def everything(operation: Callable[..., Tensor]) -> Tensor:
        caches.view(torch.uint8).zero_()
        return torch.cat([store(operation).flatten().float(), caches.flatten().float()])

    return Case(
        f"qk_norm_rope_store {num_tokens} tokens, {heads}/{kv_heads} heads, {str(dtype)[6:]}",
        lambda: store(qk_norm_rope_store),
        lambda: everything(qk_norm_rope_store_reference),
        qkv.numel() * 2 + (heads * 2 + 2 * kv_heads * dtype.itemsize) * head_dim * num_tokens,
        checked=lambda: everything(qk_norm_rope_store),
        tolerance=FP8_TOLERANCE if dtype == FLOAT8 else None,
    )


def sample_cases(sizes: Sizes, device: str) -> list[Case]:
    """sample_tokens: ids must be the very same."""
    rows = {
        "greedy": (0.0, 0.0, 1.0, -torch.inf),
        "from all": (0.6, 0.0, 1.0, -torch.inf),
        "top_k 20, top_p 0.95": (0.6, 20.0, 0.95, -torch.inf),
        "top_p 0.95": (0.6, 0.0, 0.95, -torch.inf),
    }
    cases = []
    logits = randn(sizes.tokens[0], sizes.vocab, device=device) * 3
    for name, row in rows.items():
        settings = torch.tensor(row, dtype=torch.float64, device=device).repeat(len(logits), 1)
        uniforms = torch.rand(len(logits), 1, dtype=torch.float64, device=device)
        settings = torch.cat((settings, uniforms), dim=1)
        cases.append(
            Case(
                f"sample_tokens {len(logits)} x {sizes.vocab}, {name}",
                lambda s=settings: sample_tokens(logits, s, sizes.vocab)[0],
                lambda s=settings: sample_tokens_reference(logits, s, sizes.vocab)[0],
                logits.numel() * 2,
                tolerance=0.0,
            )
        )
    token_ids = torch.randint(sizes.vocab, (len(logits),), device=device)
    cases.append(
        Case(
            f"token_logprobs {len(logits)} x {sizes.vocab}",
            lambda: token_logprobs(logits, token_ids, sizes.vocab).logprobs,
            lambda: token_logprobs_reference(logits, token_ids, sizes.vocab).logprobs,
            logits.numel() * 2,
        )
    )
    return [*cases, _penalty_case(sizes, device)]


def _penalty_case(sizes: Sizes, device: str) -> Case:
    """All rows have penalties, on as many tokens as decoding requests have."""
    logits = randn(sizes.tokens[0], sizes.vocab, device=device).float()
    num_rows, length = len(logits), min(1024, sizes.vocab)
    history = torch.randint(sizes.vocab, (num_rows, length), dtype=torch.int32, device=device)
    rows = torch.arange(num_rows, device=device)[:, None]
    lengths = torch.full_like(rows, length)
    factors = torch.tensor([[1.1, 0.5, 0.2]], device=device).repeat(num_rows, 1)

    def edited(function: Callable[..., None], own: Tensor) -> Tensor:
        function(own, rows, history, lengths, lengths // 2, factors)
        return own

    return Case(
        f"penalize {num_rows} x {length} tokens",
        lambda: edited(penalize, logits),
        lambda: edited(penalize_reference, logits.clone()),
        num_rows * (length * 2 * 4 + length * 2 * 4 + sizes.vocab * 4),  # ids twice, logits, and the notes are cleared
        checked=lambda: edited(penalize, logits.clone()),
    )


def linear_cases(sizes: Sizes, device: str) -> list[Case]:
    """Products in bfloat16, which are cuBLAS's, with as many rows as streams: most of a decode step."""
    shapes = {
        "qkv_proj": (2 * sizes.small, sizes.small // 2),
        "o_proj": (sizes.small // 2, sizes.small),
        "gate_up_proj": (3 * sizes.small, sizes.small // 2),
        "down_proj": (sizes.small // 2, 3 * sizes.small // 2),
        "lm_head": (sizes.vocab, sizes.small // 2),
    }
    cases = []
    for name, (channels, inner) in shapes.items():
        weight = randn(channels, inner, device=device) / inner**0.5
        for num_rows in (1, sizes.few_rows, sizes.tokens[0]):
            x = randn(num_rows, inner, device=device)
            cases.append(
                Case(
                    f"{name} of Qwen3-0.6B, {num_rows} rows of {channels} x {inner}",
                    lambda x=x, w=weight: linear(x, w),
                    lambda x=x, w=weight: x.float() @ w.float().T,
                    2 * (weight.numel() + x.numel() + num_rows * channels),
                    2 * num_rows * weight.numel(),
                )
            )
    return cases


def product_cases(sizes: Sizes, device: str) -> list[Case]:
    """Quantized linear layers at few rows and, in FP8, at many."""
    weight = randn(2 * sizes.inner, sizes.hidden, device=device) / sizes.hidden**0.5
    few, many = (randn(count, sizes.hidden, device=device) for count in (sizes.few_rows, sizes.tokens[-1]))
    int8, int4 = quantize_int8_per_channel(weight), quantize_int4_group(weight, symmetric=False)
    cases = [
        _product_case("weight_only_mm int8", weight_only_mm, few, int8, dequantize_per_channel(*int8, few.dtype)),
        _product_case(
            "weight_only_mm int4", weight_only_mm, few, int4, dequantize_int4_group(*int4, sizes.hidden, few.dtype)
        ),
    ]
    if has_fp8(device):
        by_channel, by_block = quantize_fp8_per_channel(weight), quantize_fp8_block(weight)
        full = dequantize_per_channel(*by_channel, few.dtype)
        cases.append(_product_case("weight_only_mm fp8", weight_only_mm, few, by_channel, full))
        for x in (few, many):
            cases.append(_product_case("scaled_mm_fp8 by channel", scaled_mm_fp8, x, by_channel, full))
            full_blocks = dequantize_fp8_block(*by_block, x.dtype)
            cases.append(_product_case("scaled_mm_fp8 by block", scaled_mm_fp8, x, by_block, full_blocks))
    return cases


def _product_case(
    name: str, operation: Callable[..., Tensor], x: Tensor, quantized: tuple[Tensor, Tensor], full: Tensor
) -> Case:
    """Against the product with the weights that the quantized ones stand for. Products count at bfloat16's rate."""
    return Case(
        f"{name}, {len(x)} rows of {full.shape[0]} x {full.shape[1]}",
        lambda: operation(x, *quantized),
        lambda: x.float() @ full.float().T,
        sum(tensor.numel() * tensor.itemsize for tensor in (*quantized, x)) + 2 * len(x) * len(full),
        2 * len(x) * full.numel(),
        peers={"torch in bfloat16": lambda: F.linear(x, full)},
        tolerance=FP8_TOLERANCE if operation is scaled_mm_fp8 else None,
    )


def moe_cases(sizes: Sizes, device: str) -> list[Case]:
    """fused_moe with 8 experts a token; the floor counts the experts' weights once."""
    hidden_size, inner, num_experts = sizes.experts
    gate_up = randn(num_experts, 2 * inner, hidden_size, device=device) / hidden_size**0.5
    down = randn(num_experts, hidden_size, inner, device=device) / inner**0.5
    cases = []
    for num_tokens in (sizes.few_rows, sizes.tokens[-1]):
        hidden = randn(num_tokens, hidden_size, device=device)
        logits = torch.randn(num_tokens, num_experts, device=device)  # in float32: no ties between experts
        num_used = min(num_experts, num_tokens * 8)
        cases.append(
            Case(
                f"fused_moe {num_tokens} tokens, {num_experts} experts of {hidden_size} x {inner}",
                lambda h=hidden, r=logits: fused_moe(h, r, gate_up, down, 8, True),
                lambda h=hidden, r=logits: fused_moe_reference(h.float(), r, gate_up.float(), down.float(), 8, True),
                num_used / num_experts * (gate_up.numel() + down.numel()) * 2,
                2 * num_tokens * 8 * 3 * inner * hidden_size,
            )
        )
    return cases


LAYER_CASES: dict[str, Callable[[Sizes, str], list[Case]]] = {
    "products": linear_cases,
    "norms": norm_cases,
    "keys and values": store_cases,
    "sampling": sample_cases,
    "quantized products": product_cases,
    "experts": moe_cases,
}
"""All of this file, by name."""

"""A layer of experts under the interpreter, against a loop over tokens in float32."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.fused_moe import fused_moe, fused_moe_config, fused_moe_reference, max_tiles
from kernels.moe_route import choose_experts_reference
from kernels.quantize_weights import (
    dequantize_fp8_block,
    dequantize_int4_group,
    dequantize_per_channel,
    quantize_fp8_block,
    quantize_fp8_per_channel,
    quantize_int4_group,
    quantize_int8_per_channel,
)
from kernels.split_k import PLANNED_SHARED_MEMORY
from tests.gguf_blocks import KINDS, encode_blocks, split_blocks, wide_weights
from tests.kernels import DTYPES, SUM_ERROR, UNIT_ROUNDOFF, interpreted, padded_rows, poisoned_memory


def random_inputs(num_tokens, hidden_size, intermediate, num_experts, dtype, device="cpu"):
    torch.manual_seed(num_tokens + hidden_size + intermediate)

    def random(*shape, size=1.0):
        return torch.randn(*shape, dtype=dtype, device=device).mul_(size)

    return [
        random(num_tokens, hidden_size),
        random(num_tokens, num_experts, size=2.0),
        random(num_experts, 2 * intermediate, hidden_size, size=hidden_size**-0.5),
        random(num_experts, hidden_size, intermediate, size=intermediate**-0.5),
    ]


def by_token(hidden, logits, gate_up, down, top_k, norm_topk_prob):
    """The definition in float32; and for each token, the size of the last sum's terms, and of all sums' terms."""
    weights, experts = choose_experts_reference(logits, top_k, norm_topk_prob)
    y, terms, all_terms = torch.zeros(3, *hidden.shape)
    for token in range(hidden.shape[0]):
        for weight, expert in zip(weights[token], experts[token].tolist(), strict=True):
            x, first, second = hidden[token].float(), gate_up[expert].float(), down[expert].float()
            gate, up = F.linear(x, first).chunk(2)
            gate_size, up_size = F.linear(x.abs(), first.abs()).chunk(2)
            y[token] += weight * F.linear(F.silu(gate) * up, second)
            terms[token] += weight * F.linear((F.silu(gate) * up).abs(), second.abs())
            all_terms[token] += weight * F.linear(gate_size * up_size, second.abs())
    return y, terms.norm(dim=1), all_terms.norm(dim=1)


def check_moe(inputs, top_k, norm_topk_prob, operation=fused_moe, definition=by_token):
    with poisoned_memory():
        y = operation(*inputs, top_k, norm_topk_prob)
    hidden = inputs[0]
    assert y.dtype == hidden.dtype and y.shape == hidden.shape and y.is_contiguous()
    expected, terms, all_terms = definition(*inputs, top_k, norm_topk_prob)
    # Each product's result is rounded, and in the reference what silu · mul takes and gives.
    allowed = 6 * UNIT_ROUNDOFF[hidden.dtype] * terms + SUM_ERROR * all_terms
    error = (y.float() - expected).norm(dim=1)
    assert (error <= allowed).all(), (error / allowed).max()


@settings(interpreted, max_examples=15)
@given(
    num_tokens=st.integers(1, 12) | st.just(40),
    hidden_size=st.integers(1, 150),
    intermediate=st.integers(1, 90),
    num_experts=st.integers(1, 6),
    top_k=st.integers(1, 4),
    norm_topk_prob=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    padding=st.integers(0, 5),
)
def test_any_shape(num_tokens, hidden_size, intermediate, num_experts, top_k, norm_topk_prob, dtype, padding):
    hidden, *rest = random_inputs(num_tokens, hidden_size, intermediate, num_experts, dtype)
    check_moe((padded_rows(hidden, padding), *rest), min(top_k, num_experts), norm_topk_prob)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 30])
def test_reference(num_tokens, dtype):
    check_moe(random_inputs(num_tokens, 64, 48, 10, dtype), 4, True, fused_moe_reference)


def quantized(weight, scheme):
    """(stored, scale, what they stand for) of [num_experts, rows, inputs] weights."""
    made = []
    for expert in weight.float():
        if scheme in KINDS:
            blocks = encode_blocks(expert, scheme)
            # Widened in the kernel, they are rounded to the type of x.
            made.append((*split_blocks(blocks), wide_weights(blocks, scheme).to(weight.dtype)))
        elif scheme == "int4":
            packed, scale = quantize_int4_group(expert, symmetric=False)
            made.append((packed, scale, dequantize_int4_group(packed, scale, expert.shape[1], torch.float32)))
        elif scheme == "fp8 blocks":
            stored, scale = quantize_fp8_block(expert)
            made.append((stored, scale.t(), dequantize_fp8_block(stored, scale, torch.float32)))
        else:
            stored, scale = (quantize_int8_per_channel if scheme == "int8" else quantize_fp8_per_channel)(expert)
            made.append((stored, scale[None], dequantize_per_channel(stored, scale, torch.float32)))
    return tuple(torch.stack(parts).contiguous() for parts in zip(*made, strict=True))


@pytest.mark.parametrize("operation", [fused_moe, fused_moe_reference])
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8", "fp8 blocks", *KINDS])
@pytest.mark.parametrize(("num_tokens", "dtype"), [(1, torch.bfloat16), (30, torch.float16)], ids=str)
def test_weights_of_8_and_4_bits(num_tokens, dtype, scheme, operation):
    """Against a loop over tokens with the numbers that the weights stand for: x is not rounded."""
    inputs = random_inputs(num_tokens, 384, 128, 5, dtype)
    gate_up, down = (quantized(weight, scheme) for weight in inputs[2:])

    def run(hidden, logits, _gate_up, _down, top_k, norm_topk_prob):
        return operation(hidden, logits, gate_up[0], down[0], top_k, norm_topk_prob, gate_up[1], down[1])

    check_moe((*inputs[:2], gate_up[2], down[2]), 3, True, operation=run)


@settings(interpreted, max_examples=5)
@given(
    num_tokens=st.integers(1, 20),
    hidden_blocks=st.integers(1, 7),
    intermediate_blocks=st.integers(1, 5),
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from([*KINDS, "wide"])),
    dtype=st.sampled_from(DTYPES),
)
def test_blocks_of_any_shape(num_tokens, hidden_blocks, intermediate_blocks, kinds, dtype):
    """Widths that are no multiples of what the kernel takes at once; a file may have each matrix in its own type."""
    inputs = random_inputs(num_tokens, 32 * hidden_blocks, 32 * intermediate_blocks, 3, dtype)
    stored = [
        quantized(weight, kind) if kind in KINDS else (weight, None, weight)
        for weight, kind in zip(inputs[2:], kinds, strict=True)
    ]
    (gate_up, gate_up_scale, wide_gate_up), (down, down_scale, wide_down) = stored

    def run(hidden, logits, _gate_up, _down, top_k, norm_topk_prob):
        return fused_moe(hidden, logits, gate_up, down, top_k, norm_topk_prob, gate_up_scale, down_scale)

    check_moe((*inputs[:2], wide_gate_up, wide_down), 2, True, operation=run)


def test_scales_that_do_not_fit_are_refused():
    hidden, logits, *weights = random_inputs(2, 256, 128, 3, torch.bfloat16)
    (gate_up, gate_up_scale, _), (down, down_scale, _) = (quantized(weight, "int8") for weight in weights)
    with pytest.raises(ValueError, match=r"scale is \(3, 1, 255\), expected contiguous \(3, 1, 256\)"):
        fused_moe(hidden, logits, gate_up, down, 2, True, gate_up_scale[..., 1:], down_scale)
    with pytest.raises(ValueError, match=r"weight is torch\.int8 with scales of torch\.int32"):
        fused_moe(hidden, logits, gate_up, down, 2, True, gate_up_scale.int(), down_scale)
    with pytest.raises(ValueError, match="expected one dtype"):
        fused_moe(hidden, logits, gate_up, down, 2, True)
    with pytest.raises(ValueError, match=r"scale is \(3, 1, 256\), expected contiguous \(3, 8, 256\)"):
        fused_moe(hidden, logits, gate_up, down, 2, True, gate_up_scale.half(), down_scale)
    with pytest.raises(ValueError, match="136 inputs, expected a multiple of 32"):
        fused_moe(hidden[:, :136], logits, gate_up[..., :136], down[:, :136], 2, True, gate_up_scale.half(), down_scale)


def test_all_tokens_to_the_same_experts():
    """Two experts with several tiles each, the others with none."""
    hidden, logits, gate_up, down = random_inputs(40, 64, 32, 6, torch.bfloat16)
    logits[:, [1, 5]] += 50.0
    check_moe((hidden, logits, gate_up, down), 2, True)


def test_every_expert():
    check_moe(random_inputs(3, 64, 32, 6, torch.float32), 6, False)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
def test_what_is_not_a_number_stays_in_its_token():
    inputs = random_inputs(5, 64, 32, 6, torch.bfloat16)
    clean = fused_moe(*inputs, 2, True)
    inputs[0][3, 7] = torch.nan
    inputs[1][1] = torch.nan
    y = fused_moe(*inputs, 2, True)
    assert y[[1, 3]].isnan().all() and torch.equal(y[[0, 2, 4]], clean[[0, 2, 4]])


def test_no_tokens():
    assert fused_moe(*random_inputs(0, 64, 32, 6, torch.bfloat16), 2, True).shape == (0, 64)


@given(st.integers(1, 500), st.integers(1, 130), st.sampled_from([16, 32, 64, 128]), st.randoms(use_true_random=False))
def test_enough_programs_start(num_pairs, num_experts, block_m, random):
    counts = [0] * num_experts
    favourites = random.sample(range(num_experts), random.randint(1, num_experts))
    for _ in range(num_pairs):
        counts[random.choice(favourites)] += 1
    tiles = sum(-(-count // block_m) for count in counts)
    assert tiles <= max_tiles(num_pairs, num_experts, block_m) <= num_pairs


@pytest.mark.parametrize("item_bytes", [2, 4])
def test_configurations(item_bytes):
    for num_tokens in (1, 4, 64, 100, 500, 2000, 10_000):
        block_m, weight_rows, _, stages = fused_moe_config(num_tokens * 8, 128, item_bytes, PLANNED_SHARED_MEMORY)
        assert 16 <= block_m <= 128 and block_m >= min(num_tokens * 8 // 128, 32)
        assert stages * (block_m + weight_rows) * 64 * item_bytes < PLANNED_SHARED_MEMORY


def test_refusals():
    hidden, logits, gate_up, down = random_inputs(2, 64, 32, 6, torch.bfloat16)
    with pytest.raises(ValueError, match=r"router_logits \(2, 5\).*expected \[tokens, hidden\]"):
        fused_moe(hidden, logits[:, :5], gate_up, down, 2, True)
    with pytest.raises(ValueError, match=r"gate_up_weight \(6, 60, 64\)"):
        fused_moe(hidden, logits, gate_up[:, :60], down, 2, True)
    with pytest.raises(ValueError, match=r"down_weight torch.float32; expected one dtype"):
        fused_moe(hidden, logits, gate_up, down.float(), 2, True)
    with pytest.raises(ValueError, match="expected contiguous weights"):
        fused_moe(hidden, logits, gate_up.mT.contiguous().mT, down, 2, True)
    with pytest.raises(ValueError, match="top_k is 7, expected 1 to 6"):
        fused_moe(hidden, logits, gate_up, down, 7, True)

"""Layers of experts on a GPU, in the shapes of real models."""

import pytest
import torch

from kernels.fused_moe import fused_moe, fused_moe_reference
from tests.gguf_blocks import KINDS
from tests.gpu import captured, needs_cuda
from tests.kernels import DTYPES, padded_rows
from tests.kernels.test_fused_moe import check_moe, quantized, random_inputs
from tests.kernels.test_moe_route import check_route, random_logits

pytestmark = needs_cuda
QWEN3_30B = (2048, 768, 128)
SMALLER = (1024, 384, 16)


def expert_by_expert(hidden, logits, gate_up, down, top_k, norm_topk_prob):
    y = fused_moe_reference(hidden.float(), logits, gate_up.float(), down.float(), top_k, norm_topk_prob)
    return y, y.norm(dim=1), 16 * y.norm(dim=1)


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 33, 300, 700, 3000])
@pytest.mark.parametrize("size", [QWEN3_30B, SMALLER], ids=str)
def test_layers(num_tokens, size):
    check_moe(random_inputs(num_tokens, *size, torch.bfloat16, "cuda"), 8, True, definition=expert_by_expert)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_tokens", [1, 20, 200])
def test_dtypes(num_tokens, dtype):
    hidden, *rest = random_inputs(num_tokens, 1000, 392, 16, dtype, "cuda")
    check_moe((padded_rows(hidden, 8), *rest), 4, False, definition=expert_by_expert)


@pytest.mark.parametrize("scheme", ["int8", "int4", *KINDS])
@pytest.mark.parametrize("num_tokens", [1, 33, 700])
def test_weights_of_8_and_4_bits(num_tokens, scheme):
    inputs = random_inputs(num_tokens, 1024, 384, 16, torch.bfloat16)
    (gate_up, gate_up_scale, wide_gate_up), (down, down_scale, wide_down) = (
        [tensor.cuda() for tensor in quantized(weight, scheme)] for weight in inputs[2:]
    )
    hidden, logits = (tensor.cuda() for tensor in inputs[:2])

    def run(hidden, logits, _gate_up, _down, top_k, norm_topk_prob):
        return fused_moe(hidden, logits, gate_up, down, top_k, norm_topk_prob, gate_up_scale, down_scale)

    check_moe((hidden, logits, wide_gate_up, wide_down), 8, True, operation=run, definition=expert_by_expert)


def test_all_tokens_to_the_same_experts():
    hidden, logits, gate_up, down = random_inputs(500, *SMALLER, torch.bfloat16, "cuda")
    logits[:, [3, 15]] += 50.0
    check_moe((hidden, logits, gate_up, down), 2, True, definition=expert_by_expert)


@pytest.mark.parametrize("num_tokens", [1, 32, 33, 5000])
def test_route(num_tokens):
    check_route(random_logits(num_tokens, 128, torch.bfloat16, "cuda"), 8, True)


@pytest.mark.parametrize("num_tokens", [4, 200])
def test_the_same_every_time(num_tokens):
    """Where a token stands among those of its expert depends on timing; what comes out does not."""
    inputs = random_inputs(num_tokens, *SMALLER, torch.bfloat16, "cuda")
    first = fused_moe(*inputs, 4, True)
    assert all(torch.equal(first, fused_moe(*inputs, 4, True)) for _ in range(20))


@pytest.mark.parametrize("num_tokens", [4, 200])
def test_in_a_graph(num_tokens):
    """Replayed with other tokens, which go to other experts."""
    inputs = random_inputs(num_tokens, *SMALLER, torch.bfloat16, "cuda")
    graph, y = captured(lambda: fused_moe(*inputs, 4, True))
    for tensor in inputs[:2]:
        tensor.copy_(torch.randn_like(tensor))
    for _ in range(3):
        graph.replay()
    assert torch.equal(y, fused_moe(*inputs, 4, True))

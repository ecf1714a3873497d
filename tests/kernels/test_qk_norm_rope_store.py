"""Norms, rotation and cache writes under the interpreter, against their reference in float32."""

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.qk_norm_rope_store import qk_norm_rope_store, qk_norm_rope_store_reference
from tests.kernels import DTYPES, assert_close, interpreted, padded_rows, poisoned_memory

BLOCK_SIZE = 4
EPS = 1e-6
FLOAT8 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Inputs:
    """The arguments of the operation, in its order."""

    qkv: torch.Tensor
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    eps: float
    cos_sin: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    slot_mapping: torch.Tensor
    k_scale: float = 1.0
    v_scale: float = 1.0

    def arguments(self):
        return [getattr(self, name) for name in self.__dataclass_fields__]

    def in_float32(self):
        """The same, the caches too, so that what is stored can be seen before it is rounded."""
        tensors = {name: getattr(self, name) for name in ("qkv", "q_weight", "k_weight", "k_cache", "v_cache")}
        return replace(self, **{name: None if t is None else t.float().clone() for name, t in tensors.items()})


def random_inputs(num_tokens, num_heads, num_kv_heads, head_dim, dtype, cache_dtype=None, norm=True, device="cpu"):
    """Random arguments; caches start as all ones, slots are distinct and in no order."""
    torch.manual_seed(num_tokens + num_heads + num_kv_heads + head_dim)
    num_blocks = -(-num_tokens // BLOCK_SIZE) + 2
    angles = torch.rand(num_tokens, head_dim // 2) * 100
    weights = [torch.randn(head_dim).to(device, dtype) if norm else None for _ in range(2)]
    cache = torch.ones(2, num_blocks, BLOCK_SIZE, num_kv_heads, head_dim).to(device, cache_dtype or dtype)
    return Inputs(
        torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim).mul(2).to(device, dtype),
        *weights,
        EPS,
        torch.cat((angles.cos(), angles.sin()), -1).to(device),
        *cache.unbind(0),
        torch.randperm(num_blocks * BLOCK_SIZE)[:num_tokens].to(device),
    )


def check(inputs):
    """Compare q and both caches, all slots of them, with the reference's."""
    expected = inputs.in_float32()
    expected_q = qk_norm_rope_store_reference(*expected.arguments())
    with poisoned_memory():
        q = qk_norm_rope_store(*inputs.arguments())
    assert q.dtype == inputs.qkv.dtype
    assert_close(q, expected_q, magnitude=16)
    largest = torch.finfo(inputs.k_cache.dtype).max
    for cache, expected_cache in ((inputs.k_cache, expected.k_cache), (inputs.v_cache, expected.v_cache)):
        assert_close(cache, expected_cache.clamp(-largest, largest), 16, rounded_before_to=inputs.qkv.dtype)


@interpreted
@given(
    num_tokens=st.integers(1, 4),
    group=st.integers(1, 4),
    num_kv_heads=st.integers(1, 9),
    half=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    cache_dtype=st.sampled_from((*DTYPES, FLOAT8)),
    norm=st.booleans(),
    padding=st.integers(0, 9),
)
def test_any_shape(num_tokens, group, num_kv_heads, half, dtype, cache_dtype, norm, padding):
    inputs = random_inputs(num_tokens, group * num_kv_heads, num_kv_heads, 2 * half, dtype, cache_dtype, norm)
    check(replace(inputs, qkv=padded_rows(inputs.qkv, padding)))


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("heads", [(16, 8), (14, 2), (1, 1)], ids=str)
def test_shapes_of_models(head_dim, heads):
    check(random_inputs(3, *heads, head_dim, torch.bfloat16))


def test_other_slots_stay():
    inputs = random_inputs(5, 2, 1, 8, torch.float32)
    check(inputs)
    untouched = torch.ones(inputs.k_cache.shape[0] * BLOCK_SIZE, dtype=torch.bool)
    untouched[inputs.slot_mapping] = False
    for cache in (inputs.k_cache, inputs.v_cache):
        assert (cache.view(-1, 8)[untouched] == 1).all()


def test_padding_may_share_a_slot():
    inputs = random_inputs(4, 2, 1, 8, torch.float32)
    slots = inputs.slot_mapping.clone()
    slots[2:] = slots[2]
    q = qk_norm_rope_store(*replace(inputs, slot_mapping=slots).arguments())
    assert torch.equal(q, qk_norm_rope_store(*inputs.arguments()))


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, FLOAT8])
def test_scales(cache_dtype):
    inputs = random_inputs(6, 4, 2, 16, torch.bfloat16, cache_dtype)
    check(replace(inputs, k_scale=0.03, v_scale=2.5))


def test_float8_saturates():
    inputs = replace(random_inputs(6, 4, 2, 16, torch.bfloat16, FLOAT8), k_scale=1e-3, v_scale=1e-3)
    check(inputs)
    assert inputs.v_cache.float().abs().max() == 448


@pytest.mark.parametrize("norm", [True, False])
def test_reference_is_the_formula(norm):
    """Pairs (x[i], x[i + head_dim/2]) as complex numbers, turned by the position's angles."""
    inputs = random_inputs(5, 6, 2, 12, torch.float32, norm=norm)
    q = qk_norm_rope_store_reference(*inputs.arguments())
    heads = inputs.qkv.double().view(5, 10, 12)
    cos, sin = inputs.cos_sin.double().unsqueeze(1).chunk(2, -1)

    def expected(x, weight):
        if weight is not None:
            x = x / (x.square().mean(-1, keepdim=True) + EPS).sqrt() * weight.double()
        turned = torch.complex(*x.chunk(2, -1)) * torch.complex(cos, sin)
        return torch.cat((turned.real, turned.imag), -1).float()

    assert_close(q, expected(heads[:, :6], inputs.q_weight), magnitude=16)
    k, v = (cache.view(-1, 2, 12)[inputs.slot_mapping] for cache in (inputs.k_cache, inputs.v_cache))
    assert_close(k, expected(heads[:, 6:8], inputs.k_weight), magnitude=16)
    assert torch.equal(v, heads[:, 8:].float())


def test_no_tokens():
    inputs = random_inputs(0, 4, 2, 8, torch.float32)
    assert qk_norm_rope_store(*inputs.arguments()).shape == (0, 4, 8)


GOOD = random_inputs(3, 4, 2, 8, torch.float32)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"qkv": GOOD.qkv[:, :-1]}, r"qkv has shape \(3, 63\)"),
        ({"qkv": GOOD.qkv[:, :32]}, r"qkv has shape \(3, 32\)"),
        ({"qkv": GOOD.qkv.T.contiguous().T}, r"strides \(1, 3\)"),
        ({"k_cache": GOOD.k_cache.transpose(0, 1)}, "k_cache is .* expected contiguous"),
        ({"v_cache": GOOD.v_cache.bfloat16()}, "v_cache is torch.bfloat16 .* torch.float32"),
        ({"cos_sin": GOOD.cos_sin[:, :4]}, r"cos_sin is torch.float32 \(3, 4\)"),
        ({"cos_sin": GOOD.cos_sin.bfloat16()}, "cos_sin is torch.bfloat16"),
        ({"slot_mapping": GOOD.slot_mapping.int()}, "slot_mapping is torch.int32"),
        ({"slot_mapping": GOOD.slot_mapping[:2]}, r"\(2,\)"),
        ({"q_weight": None}, "expected both or none"),
        ({"k_weight": torch.ones(4)}, r"k_weight is torch.float32 \(4,\)"),
    ],
)
def test_refuses(change, found):
    with pytest.raises(ValueError, match=found):
        qk_norm_rope_store(*replace(GOOD, **change).arguments())

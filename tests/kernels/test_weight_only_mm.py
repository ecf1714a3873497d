"""Products with narrow weights under the interpreter, against dequantised weights in float32."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from kernels.int4_codes import NIBBLE_BASE, UNPACK_ASSEMBLY
from kernels.quantize_weights import (
    dequantize_int4_group,
    dequantize_per_channel,
    quantize_fp8_per_channel,
    quantize_int4_group,
    quantize_int8_per_channel,
)
from kernels.split_k import PLANNED_SHARED_MEMORY, tile_counters
from kernels.weight_only_mm import (
    INT8_CPU_ROWS,
    MAX_ROWS,
    weight_only_config,
    weight_only_mm,
    weight_only_mm_cpu,
    weight_only_mm_reference,
)
from tests.kernels import DTYPES, SUM_ERROR, UNIT_ROUNDOFF, assert_close, interpreted, padded_rows, poisoned_memory

FORMATS = {
    "int8": quantize_int8_per_channel,
    "fp8": quantize_fp8_per_channel,
    "int4": lambda weight: quantize_int4_group(weight, symmetric=False),
    "int4 symmetric": lambda weight: quantize_int4_group(weight, symmetric=True),
}
HALVES = (torch.bfloat16, torch.float16)


def random_inputs(num_rows, channels, inner, weights, dtype, device="cpu"):
    torch.manual_seed(num_rows + channels + inner)
    quantized, scale = FORMATS[weights](torch.randn(channels, inner) + 0.3)
    x, bias = torch.randn(num_rows, inner).to(dtype), torch.randn(channels).to(dtype)
    return x.to(device), quantized.to(device), scale.to(device), bias.to(device)


def check_product(x, quantized, scale, bias):
    with poisoned_memory():
        y = weight_only_mm(x, quantized, scale, bias)
    inner = x.shape[1]
    wide = (
        dequantize_int4_group(quantized, scale, inner, torch.float32)
        if quantized.dtype == torch.int16
        else dequantize_per_channel(quantized, scale, torch.float32)
    )
    assert y.dtype == x.dtype and y.shape == (x.shape[0], wide.shape[0]) and y.is_contiguous()
    expected = F.linear(x.float(), wide, None if bias is None else bias.float())
    assert_close(y, expected, magnitude=float((x.float().abs() @ wide.abs().t()).max()))
    assert not tile_counters(x.device).any(), "counters must be left as they were found"


@interpreted
@given(
    num_rows=st.integers(1, 20) | st.sampled_from([33, 64]),
    channels=st.integers(1, 150),
    groups=st.integers(1, 9),
    weights=st.sampled_from(sorted(FORMATS)),
    dtype=st.sampled_from(HALVES),
    padding=st.integers(0, 5),
    has_bias=st.booleans(),
)
def test_any_shape(num_rows, channels, groups, weights, dtype, padding, has_bias):
    x, quantized, scale, bias = random_inputs(num_rows, channels, groups * 128, weights, dtype)
    check_product(padded_rows(x, padding), quantized, scale, bias if has_bias else None)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("inner", [1, 40, 300])
def test_8_bits_of_any_width(weights, inner):
    check_product(*random_inputs(3, 70, inner, weights, torch.bfloat16))


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_many_parts(weights):
    """Long rows of few channels: eight and sixteen programs a tile."""
    check_product(*random_inputs(2, 64, 4096, weights, torch.bfloat16))


@pytest.mark.parametrize("weights", FORMATS)
def test_more_rows_than_the_kernel_takes(weights):
    x, quantized, scale, bias = random_inputs(MAX_ROWS + 1, 30, 256, weights, torch.bfloat16)
    y = weight_only_mm(x, quantized, scale, bias)
    assert torch.equal(y, weight_only_mm_reference(x, quantized, scale, bias))


@pytest.mark.parametrize("weights", ["fp8", "int4"])
def test_a_row_is_the_same_alone(weights):
    x, quantized, scale, bias = random_inputs(16, 70, 1280, weights, torch.bfloat16)
    together = weight_only_mm(x, quantized, scale, bias)
    assert torch.equal(together[5:6], weight_only_mm(x[5:6], quantized, scale, bias))


def test_what_is_not_a_number_stays_in_its_row():
    x, quantized, scale, _ = random_inputs(4, 30, 640, "int4", torch.bfloat16)
    clean = weight_only_mm(x, quantized, scale)
    x[2, 7] = torch.nan
    y = weight_only_mm(x, quantized, scale)
    assert y[2].isnan().all() and torch.equal(y[[0, 1, 3]], clean[[0, 1, 3]])


def test_no_rows():
    x, quantized, scale, bias = random_inputs(0, 30, 256, "int4", torch.bfloat16)
    assert weight_only_mm(x, quantized, scale, bias).shape == (0, 30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [1, INT8_CPU_ROWS, INT8_CPU_ROWS + 1])
@pytest.mark.parametrize("inner", [192, 200])
def test_int8_on_a_cpu(num_rows, dtype, inner):
    x, quantized, scale, bias = random_inputs(num_rows, 50, inner, "int8", dtype)
    y = weight_only_mm_cpu(x, quantized, scale, bias)
    expected = F.linear(x.float(), dequantize_per_channel(quantized, scale, torch.float32), bias.float())
    assert y.dtype == dtype
    # Scales, the product before the bias, or the widened weights are rounded too.
    atol = expected.abs().max().item() * (4 * UNIT_ROUNDOFF[dtype] + SUM_ERROR)
    torch.testing.assert_close(y.float(), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("num_rows", range(1, MAX_ROWS + 1))
def test_configurations(num_rows, bits):
    block_m, block_n, block_k, _, num_warps, stages = weight_only_config(num_rows, bits, PLANNED_SHARED_MEMORY)
    assert block_m >= num_rows and block_k * bits == 1024 and num_warps == block_n // 16
    assert stages * (block_n * 128 + block_m * block_k * 2) < PLANNED_SHARED_MEMORY


def run_assembly(assembly, words, less, dtype):
    """What the PTX of UNPACK_ASSEMBLY does to two 16-bit words and −(base + zero), for the instructions it has."""
    registers = {"$1": words, "$2": less}

    def value(operand):
        return registers[operand] if operand in registers else int(operand, 16 if operand.startswith("0x") else 10)

    def floats(bits):
        pair = torch.tensor([bits & 0xFFFF, bits >> 16], dtype=torch.int32).to(torch.int16)
        return pair.view(dtype).double()

    for line in re.findall(r"([a-z][\w.]+) ([^;]+);", assembly.replace(".reg .b32 one;", "")):
        operation, (target, *operands) = line[0], line[1].split(", ")
        a, b, c = [*map(value, operands[:3]), 0, 0][:3]
        if operation == "mov.b32":
            registers[target] = a
        elif operation == "shr.u32":
            registers[target] = a >> b
        elif operation == "lop3.b32" and operands[3] == "0xea":
            registers[target] = a & b | c
        else:
            assert operation == f"fma.rn.{'bf16x2' if dtype == torch.bfloat16 else 'f16x2'}"
            return (floats(a) * floats(b) + floats(c)).to(dtype)
    raise AssertionError("no fma")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("plane", range(4))
def test_assembly_for_gpus(plane, dtype):
    """The interpreter cannot run it, so its bits are followed here; a GPU's test compares what it computes."""
    base = NIBBLE_BASE[dtype]
    for code in range(16):
        for zero in (0, 7, 15):
            low, high = (
                0xA5C3 & ~(15 << 4 * plane) | code << 4 * plane,
                0x5A3C & ~(15 << 4 * plane) | (15 - code) << 4 * plane,
            )
            less = zero | base | 0x8000
            result = run_assembly(UNPACK_ASSEMBLY[dtype][plane], low | high << 16, less | less << 16, dtype)
            assert result.tolist() == [code - zero, 15 - code - zero]


def test_refusals():
    x, quantized, scale, bias = random_inputs(2, 30, 256, "int8", torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected contiguous rows and weight \(30, 200\)"):
        weight_only_mm(x[:, :200], quantized, scale)
    with pytest.raises(ValueError, match=r"strides \(1, 256\)"):
        weight_only_mm(torch.zeros(256, 256).t(), quantized, scale)
    with pytest.raises(ValueError, match=r"scale is torch.float64 \(30,\), expected torch.float32 \(30,\)"):
        weight_only_mm(x, quantized, scale.double())
    with pytest.raises(ValueError, match=r"bias is torch.float32 \(30,\), expected torch.bfloat16 \(30,\)"):
        weight_only_mm(x, quantized, scale, bias.float())
    with pytest.raises(ValueError, match=r"weight is torch.float32"):
        weight_only_mm(x, quantized.float(), scale)
    with pytest.raises(ValueError, match=r"x is torch.float32, expected bfloat16 or float16 on a GPU"):
        weight_only_mm(x.float(), quantized, scale)
    with pytest.raises(ValueError, match=r"scale is torch.int32 \(1, 30\), expected torch.int32 \(2, 30\)"):
        x, quantized, scale, _ = random_inputs(2, 30, 256, "int4", torch.bfloat16)
        weight_only_mm(x, quantized, scale[:1])

"""Adapters under the interpreter, against merged weights in float32."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.lora import AdapterRows, add_lora, add_lora_reference
from tests.kernels import DTYPES, UNIT_ROUNDOFF, interpreted, padded_rows, poisoned_memory


def random_inputs(num_rows, in_features, part_sizes, num_adapters, rank, dtype, device="cpu"):
    torch.manual_seed(num_rows + in_features)

    def random(*shape, size=1.0):
        return torch.randn(*shape, dtype=dtype, device=device).mul_(size)

    numbers = torch.randint(0, num_adapters + 1, (num_rows,), dtype=torch.int32, device=device)
    return (
        random(num_rows, sum(part_sizes)),
        random(num_rows, in_features),
        random(num_adapters, len(part_sizes) * rank, in_features, size=in_features**-0.5),
        random(num_adapters, sum(part_sizes), rank, size=rank**-0.5),
        part_sizes,
        numbers,
    )


def by_row(y, x, lora_a, lora_b, part_sizes, numbers):
    """The definition in float32: each row with its adapter as one matrix."""
    expected = y.float().clone()
    rank = lora_b.shape[2]
    for row, number in enumerate(numbers.tolist()):
        first = 0
        for part, size in enumerate(part_sizes if number else ()):
            a = lora_a[number - 1, part * rank : (part + 1) * rank].float()
            b = lora_b[number - 1, first : first + size].float()
            expected[row, first : first + size] += (b @ a) @ x[row].float()
            first += size
    return expected


def check(inputs, operation=add_lora, rows_of=AdapterRows.of):
    *given_inputs, numbers = inputs
    expected = by_row(*inputs)
    y = inputs[0]
    before = y.clone()
    with poisoned_memory():
        operation(*given_inputs, rows_of(numbers))
    tolerance = 8 * UNIT_ROUNDOFF[y.dtype] + 1e-5
    torch.testing.assert_close(y.float(), expected, rtol=tolerance, atol=4 * tolerance)
    assert torch.equal(y[numbers == 0], before[numbers == 0])


def with_groups(numbers):
    """What `AdapterRows.of` makes where nothing is interpreted."""
    found = [number for number in numbers.unique().tolist() if number]
    return AdapterRows(numbers, [(number, (numbers == number).nonzero().squeeze(1)) for number in found])


@settings(interpreted, max_examples=15)
@given(
    num_rows=st.integers(1, 20) | st.just(70),
    in_features=st.integers(1, 150),
    part_sizes=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    num_adapters=st.integers(1, 4),
    rank=st.sampled_from([16, 32, 128]),
    dtype=st.sampled_from(DTYPES),
    padding=st.integers(0, 5),
)
def test_any_shape(num_rows, in_features, part_sizes, num_adapters, rank, dtype, padding):
    y, x, *rest = random_inputs(num_rows, in_features, part_sizes, num_adapters, rank, dtype)
    check((padded_rows(y, padding), padded_rows(x, padding), *rest))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part_sizes", [(40,), (32, 16, 16)], ids=str)
def test_reference(dtype, part_sizes):
    check(random_inputs(9, 64, part_sizes, 3, 16, dtype), add_lora_reference, with_groups)


def test_reference_where_all_rows_have_one_adapter():
    inputs = random_inputs(5, 64, (40,), 3, 16, torch.float32)
    inputs[-1].fill_(2)
    check(inputs, add_lora_reference, lambda numbers: AdapterRows(numbers, [(2, None)]))


@pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered")
@pytest.mark.parametrize("operation", [add_lora, add_lora_reference])
def test_what_is_not_a_number_stays_in_the_rows_of_its_adapter(operation):
    y, x, lora_a, lora_b, sizes, numbers = random_inputs(40, 64, (32, 16), 3, 16, torch.bfloat16)
    lora_a[1] = torch.nan
    operation(y, x, lora_a, lora_b, sizes, with_groups(numbers))
    assert y[numbers == 2].isnan().all() and not y[numbers != 2].isnan().any()


def test_no_rows():
    y, x, lora_a, lora_b, sizes, numbers = random_inputs(0, 64, (32,), 3, 16, torch.bfloat16)
    add_lora(y, x, lora_a, lora_b, sizes, AdapterRows.of(numbers))


def test_refusals():
    y, x, lora_a, lora_b, sizes, numbers = random_inputs(2, 64, (32,), 3, 16, torch.bfloat16)
    rows = AdapterRows.of(numbers)
    with pytest.raises(ValueError, match=r"lora_a \(3, 15, 64\).*power of two"):
        add_lora(y, x, lora_a[:, 1:], lora_b, sizes, rows)
    with pytest.raises(ValueError, match="expected contiguous adapters"):
        add_lora(y, x, lora_a.mT.contiguous().mT, lora_b, sizes, rows)

"""The C++ operations against the torch references, and what happens where they cannot be compiled."""

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from kernels import cpu_build, cpu_ops
from kernels.cache_folder import cache_folder
from kernels.qk_norm_rope_store import qk_norm_rope_store_reference
from kernels.rms_norm import add_rms_norm_reference, rms_norm_reference
from kernels.silu_and_mul import silu_and_mul_reference

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, cpu_build.COMPILERS)), reason="needs a C++ compiler, which this machine has not"
)
DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1e-2, "atol": 1e-2}}


def close(got: torch.Tensor | None, expected: torch.Tensor) -> None:
    assert got is not None
    torch.testing.assert_close(got, expected.to(got.dtype), **TOLERANCE[got.dtype])


@pytest.fixture(params=DTYPES, ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    torch.manual_seed(0)
    return request.param


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 128), (5, 1040), (40, 1024)])
def test_norms(dtype, rows, size):
    x, residual, weight = (torch.randn(*shape, dtype=dtype) * 3 for shape in ((rows, size), (rows, size), (size,)))
    close(cpu_ops.rms_norm(x, weight, 1e-6), rms_norm_reference(x.float(), weight.float(), 1e-6))
    normed, total = cpu_ops.add_rms_norm(x, residual, weight, 1e-6)
    expected, expected_total = add_rms_norm_reference(x, residual, weight, 1e-6)
    close(normed, expected)
    assert torch.equal(total, expected_total)


@pytest.mark.parametrize(("rows", "size"), [(1, 16), (3, 144), (64, 1024)])
def test_silu_and_mul(dtype, rows, size):
    gate_up = torch.randn(rows, 2 * size, dtype=dtype) * 20
    gate_up[0, :6] = torch.tensor([0.0, -0.0, 88.5, -88.5, 1e4, -1e4])
    close(cpu_ops.silu_and_mul(gate_up), silu_and_mul_reference(gate_up.float()))


def test_what_is_no_number_stays_so(dtype):
    """A request whose numbers are broken is found by them."""
    bad = torch.zeros(1, 32, dtype=dtype)
    bad[0, 3] = float("nan")
    assert cpu_ops.silu_and_mul(bad).isnan().any()
    assert cpu_ops.rms_norm(bad, torch.ones(32, dtype=dtype), 1e-6).isnan().all()
    assert cpu_ops.linear(bad, torch.ones(3, 32, dtype=dtype), None).isnan().all()


@pytest.mark.parametrize("head_dim", cpu_ops.HEAD_DIMS)
@pytest.mark.parametrize("normed", [True, False])
def test_qk_norm_rope_store(dtype, head_dim, normed):
    num_tokens, num_heads, num_kv_heads = 5, 6, 2
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, dtype=dtype)
    weights = [torch.rand(head_dim, dtype=dtype) if normed else None for _ in range(2)]
    angles = torch.rand(num_tokens, head_dim // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), dim=1)
    slots = torch.tensor([7, 0, 3, 31, 12])
    caches = [torch.zeros(4, 8, num_kv_heads, head_dim, dtype=dtype) for _ in range(4)]
    got = cpu_ops.qk_norm_rope_store(qkv, *weights, 1e-6, cos_sin, *caches[:2], slots)
    expected = qk_norm_rope_store_reference(qkv, *weights, 1e-6, cos_sin, *caches[2:], slots, 1.0, 1.0)
    close(got, expected)
    close(caches[0], caches[2])
    assert torch.equal(caches[1], caches[3])


@pytest.mark.parametrize("num_rows", [1, 2, 4, 7, 16])
@pytest.mark.parametrize(("in_features", "out_features"), [(32, 1), (96, 7), (256, 512), (1024, 33)])
@pytest.mark.parametrize("has_bias", [True, False])
def test_linear(dtype, num_rows, in_features, out_features, has_bias):
    x = torch.randn(num_rows, in_features, dtype=dtype)
    weight = torch.randn(out_features, in_features, dtype=dtype) * in_features**-0.5
    bias = torch.randn(out_features, dtype=dtype) if has_bias else None
    expected = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    close(cpu_ops.linear(x, weight, bias), expected)


@pytest.mark.parametrize("out_features", [100, 4099], ids=["of caches", "of memory"])
def test_a_row_does_not_depend_on_those_beside_it(dtype, out_features):
    """One and two rows of a large weight take a way of their own."""
    x, weight = torch.randn(16, 256, dtype=dtype), torch.randn(out_features, 256, dtype=dtype)
    together = cpu_ops.linear(x, weight, None)
    for num_rows in (1, 2, 3, 7):
        apart = torch.cat([cpu_ops.linear(rows, weight, None) for rows in x.split(num_rows)])
        assert torch.equal(together, apart)


@pytest.mark.parametrize("head_dim", cpu_ops.HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 2, 5, 8])
@pytest.mark.parametrize(("block_size", "window"), [(1, None), (16, None), (48, None), (1, 5), (16, 17), (48, 50)])
def test_paged_attention(dtype, head_dim, group, block_size, window):
    num_kv_heads, lengths = 2, torch.tensor([1, 17, 100])
    num_blocks = 100 // block_size + 1
    tables = torch.randperm(3 * num_blocks).view(3, num_blocks).int()
    k_cache, v_cache = (torch.randn(3 * num_blocks, block_size, num_kv_heads, head_dim, dtype=dtype) for _ in range(2))
    query = torch.randn(5, num_kv_heads * group, head_dim, dtype=dtype) * 2
    output = torch.full_like(query, 9.0)
    rows = torch.tensor([4, 0, 2])
    assert cpu_ops.paged_attention(query, k_cache, v_cache, rows, tables, lengths, output, window)
    for row, table, length in zip(rows.tolist(), tables, lengths.tolist(), strict=True):
        seen = slice(max(length - (window or length), 0), length)
        keys, values = (cache[table.long()].flatten(0, 1)[seen].float() for cache in (k_cache, v_cache))
        heads = query[row].float().view(num_kv_heads, group, head_dim)
        weights = torch.einsum("hgd,thd->hgt", heads, keys).mul(head_dim**-0.5).softmax(-1)
        close(output[row], torch.einsum("hgt,thd->hgd", weights, values).flatten(0, 1))
    assert (output[[1, 3]] == 9.0).all()


def test_what_they_do_not_serve_is_left_to_torch():
    assert cpu_ops.rms_norm(torch.ones(2, 20), torch.ones(20), 1e-6) is None
    assert cpu_ops.linear(torch.ones(17, 32), torch.ones(4, 32), None) is None
    assert cpu_ops.linear(torch.ones(1, 33), torch.ones(4, 33), None) is None
    assert not cpu_ops.serves(torch.float16) and not cpu_ops.serves_heads(torch.float32, 80)


def test_without_a_compiler_the_log_says_so(monkeypatch, caplog):
    monkeypatch.setattr(cpu_build, "COMPILERS", ("no-such-compiler",))
    assert cpu_build.load_library.__wrapped__() is None
    assert "found no C++ compiler" in caplog.text and "install g++" in caplog.text


def test_a_library_is_compiled_once_in_a_folder_of_our_own(monkeypatch, tmp_path):
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "tiny.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(cpu_build, "SOURCES", sources)
    path = cpu_build._compiled()
    assert ctypes.CDLL(str(path)).answer() == 42
    made = path.stat().st_mtime_ns
    assert cpu_build._compiled() == path and path.stat().st_mtime_ns == made
    (tmp_path / ".cache" / "qwen3-serve").chmod(0o777)
    assert not cache_folder().is_relative_to(tmp_path / ".cache")
    (sources / "tiny.cpp").write_text("no C++")
    with pytest.raises(OSError, match="ended with status"):
        cpu_build._compiled()

"""Every kernel compiles for every target, and the judge of what comes out judges rightly."""

import ast
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton")

from kernels.backend import CompileCase
from tests.kernels.offline_compile import Report, complaints, widest_access

REPORT = Report("case", "kernel", 90, 4, 3, 128, 0, 100_000, 128, 128, "wgmma.mma")
CASE = CompileCase("case", lambda: None)


def run(*arguments, interpret):
    """Run Python in a process of its own, where kernels are interpreted or not."""
    environment = os.environ | {"TRITON_INTERPRET": str(int(interpret))}
    root = Path(__file__).parents[2]
    return subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )


def test_all_kernels_compile():
    result = run("-m", "tests.kernels.offline_compile", interpret=False)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr


def test_refuses_the_interpreter():
    result = run("-m", "tests.kernels.offline_compile", interpret=True)
    assert result.returncode == 1
    assert "TRITON_INTERPRET is set" in result.stderr


COUNT_VARIANTS = """
import torch
from kernels.backend import CompileCase
from kernels.qk_norm_rope_store import qk_norm_rope_store
from kernels.rms_norm import add_rms_norm
from kernels.silu_and_mul import silu_and_mul
from tests.kernels.offline_compile import compile_launches

def launch(num_tokens):
    x = torch.empty(num_tokens, 4 * 64, device="meta")
    add_rms_norm(x, x, x[0], 1e-6)
    silu_and_mul(x)
    cache = torch.empty(2, 16, 1, 64, device="meta")
    slots = torch.empty(num_tokens, dtype=torch.int64, device="meta")
    qk_norm_rope_store(x, None, None, 1e-6, x[:, :64].contiguous(), cache, cache, slots)

cases = [CompileCase(str(num_tokens), lambda num_tokens=num_tokens: launch(num_tokens)) for num_tokens in (1, 16, 33)]
print(len({kernel.hash for case in cases for kernel in compile_launches(case, 90)}))
"""


def test_one_kernel_serves_all_counts_of_tokens():
    """A variant for a count of one, or for multiples of 16, would be compiled while requests wait."""
    result = run("-c", COUNT_VARIANTS, interpret=False)
    assert result.stdout.strip() == "3", result.stdout + result.stderr


def test_constants_are_computed_without_cdiv():
    """Triton 3.6, the oldest that serves, has tl.cdiv give a tensor where 3.7 gives a constant."""
    root = Path(__file__).parents[2] / "kernels"
    nodes = [(path.name, node) for path in root.glob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    constants = [(name, node) for name, node in nodes if isinstance(node, ast.AnnAssign) and node.value is not None]
    constants = [(name, ast.unparse(node)) for name, node in constants if "constexpr" in ast.unparse(node.annotation)]
    assert len(constants) > 10
    assert [(name, line) for name, line in constants if "cdiv" in line] == []


def test_nothing_to_complain_about():
    assert list(complaints(replace(CASE, wgmma=True), [REPORT])) == []


@pytest.mark.parametrize(
    ("case", "reports", "found"),
    [
        (CASE, [replace(REPORT, spill_bytes=8)], "8 bytes of registers spilled, at most 0 expected"),
        (CASE, [replace(REPORT, shared_bytes=240_000)], "240000 bytes of shared memory, the chip has 232448"),
        (CASE, [replace(REPORT, shared_bytes=170_000, capability=80)], "sm_80: 170000 bytes of shared memory"),
        (replace(CASE, wgmma=True), [replace(REPORT, matrix_instruction="mma.sync")], "no kernel uses wgmma"),
        (CASE, [], "launched no kernel"),
    ],
)
def test_complaints(case, reports, found):
    (line,) = complaints(case, reports)
    assert found in line


@pytest.mark.parametrize(
    ("ptx", "operation", "bits"),
    [
        ("@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];", "ld", 128),
        ("ld.global.L1::evict_last.v2.b32 { %r1, %r2 }, [ %rd1 + 0 ];", "ld", 64),
        ("ld.global.b16 { %rs1 }, [ %rd1 + 0 ];", "ld", 16),
        ("st.global.v8.b32 [ %rd1 + 0 ], { %r1 };", "st", 256),
        ("ld.shared.v4.b32 { %r1 }, [ %r9 ];", "ld", 0),
        ("cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;", "ld", 128),
        (
            "cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2}], [%r3];",
            "ld",
            128,
        ),
    ],
)
def test_widest_access(ptx, operation, bits):
    assert widest_access(ptx, operation) == bits

"""Compile the kernels for real GPUs on a machine that has none, and judge what the compiler made of them.

    python -m tests.kernels.offline_compile [part of a case's name]

Every `compile_cases()` in kernels/ is walked. An operation is called with tensors on the "meta" device, Triton sees a
driver that knows nothing but its target's compute capability, and each launch becomes a compilation, specialised on the
arguments exactly as on a GPU. The assembler and the disassembler come with Triton.
"""

import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

import kernels
from kernels.backend import CompileCase

CAPABILITIES = (80, 90, 100)
SHARED_MEMORY_LIMIT = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes a block may ask for
MATRIX_INSTRUCTIONS = ("tcgen05.mma", "wgmma.mma", "mma.sync")


@dataclass(frozen=True, slots=True)
class Report:
    """What became of one kernel of a case on one target."""

    case: str
    kernel: str
    capability: int
    num_warps: int
    num_stages: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    load_bits: int
    store_bits: int
    matrix_instruction: str


class OfflineDriver(DriverBase):
    """A driver for a target that is not there. Its device number is the compute capability, so caches stay apart."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, _device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_active_torch_device(self) -> Any:
        raise NotImplementedError("nothing is launched")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is launched")


def compile_launches(case: CompileCase, capability: int) -> list[Any]:
    """The CompiledKernel of each launch that the case causes."""
    compiled = []
    launch = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(kernel)
        return kernel

    driver.set_active(OfflineDriver(capability))
    JITFunction.run = run
    try:
        case.launch()
    finally:
        JITFunction.run = launch
    return compiled


def describe(case: CompileCase, capability: int, kernel: Any) -> Report:
    """Read a compiled kernel's properties off its metadata, its PTX and its machine code."""
    ptx, metadata = kernel.asm["ptx"], kernel.metadata
    registers, stack_bytes = resource_usage(kernel.asm["cubin"])
    return Report(
        case=case.name,
        kernel=metadata.name,
        capability=capability,
        num_warps=metadata.num_warps,
        num_stages=metadata.num_stages,
        registers=registers,
        spill_bytes=stack_bytes,
        shared_bytes=metadata.shared,
        load_bits=widest_access(ptx, "ld"),
        store_bits=widest_access(ptx, "st"),
        matrix_instruction=next((name for name in MATRIX_INSTRUCTIONS if name in ptx), "-"),
    )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread. Kernels have no local arrays, so what is on the stack was spilled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if usage is None:
        raise ValueError(f"{tool} -res-usage printed {text!r}, expected REG and STACK")
    return int(usage[1]), int(usage[2])


def widest_access(ptx: str, operation: str) -> int:
    """Bits of the widest access of one thread to global memory; operation: ld or st. The copy engine counts as 128."""
    widths = [
        int(count or 1) * int(bits)
        for count, bits in re.findall(rf"\b{operation}\.global[.\w:]*?(?:\.v(\d))?\.[bufs](\d+)", ptx)
    ]
    if operation == "ld":
        widths += [8 * int(size, 0) for size in re.findall(r"cp\.async\.c[ag][^;]*?\], (0x\w+|\d+)", ptx)]
    if "cp.async.bulk.tensor" in ptx:
        widths.append(128)
    return max(widths, default=0)


def complaints(case: CompileCase, reports: list[Report]) -> Iterator[str]:
    """What is wrong with the kernels of one case on one target."""
    for report in reports:
        where = f"{report.case} / {report.kernel} on sm_{report.capability}"
        if report.spill_bytes > case.max_spill_bytes:
            yield f"{where}: {report.spill_bytes} bytes of registers spilled, at most {case.max_spill_bytes} expected"
        limit = SHARED_MEMORY_LIMIT[report.capability]
        if report.shared_bytes > limit:
            yield f"{where}: {report.shared_bytes} bytes of shared memory, the chip has {limit}"
    if not reports:
        yield f"{case.name}: launched no kernel"
    elif case.wgmma and reports[0].capability == 90 and all(r.matrix_instruction != "wgmma.mma" for r in reports):
        yield f"{case.name}: no kernel uses wgmma on sm_90"


def compile_case(case: CompileCase, capability: int) -> tuple[list[Report], list[str]]:
    """Reports and complaints. A case that does not compile is a complaint too."""
    try:
        compiled = {kernel.hash: kernel for kernel in compile_launches(case, capability)}
        reports = [describe(case, capability, kernel) for kernel in compiled.values()]
    except Exception as error:
        return [], [f"{case.name} on sm_{capability}: {what_is_wrong(error)}"]
    return reports, list(complaints(case, reports))


def what_is_wrong(error: BaseException) -> str:
    """The gist of a compiler's error: its first cause, without the source code that Triton puts before it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^")]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"


def all_cases() -> list[CompileCase]:
    """The cases of every file in kernels/."""
    modules = [importlib.import_module(f"kernels.{module.name}") for module in pkgutil.iter_modules(kernels.__path__)]
    return [case for module in modules if hasattr(module, "compile_cases") for case in module.compile_cases()]


_work: list[tuple[CompileCase, int]] = []  # filled before workers are forked, for a case's launch cannot be pickled


def _compile_work(index: int) -> tuple[list[Report], list[str]]:
    return compile_case(*_work[index])


def compile_all(wanted: str = "") -> tuple[list[Report], list[str]]:
    """Compile the cases whose name contains `wanted` for every target that can run them, on all cores."""
    _work[:] = [
        (case, capability)
        for case in all_cases()
        for capability in CAPABILITIES
        if wanted in case.name and capability >= case.min_capability
    ]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as workers:
        results = list(workers.map(_compile_work, range(len(_work))))
    return [row for reports, _ in results for row in reports], [line for _, lines in results for line in lines]


def table(reports: list[Report]) -> str:
    """One line a kernel and target."""
    columns = ("case", "kernel", "sm", "warps", "stages", "regs", "spill", "shared", "load", "store", "matrix")
    rows = [columns, *((*(str(getattr(report, name)) for name in Report.__slots__),) for report in reports)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> int:
    """Print the table and the complaints; 1 if there are any."""
    if triton.knobs.runtime.interpret:
        raise SystemExit("TRITON_INTERPRET is set; expected a process without it, where kernels are compiled")
    reports, lines = compile_all(*sys.argv[1:2])
    print(table(reports))
    for line in lines:
        print(f"FAILED {line}")
    return 1 if lines or not reports else 0


if __name__ == "__main__":
    sys.exit(main())

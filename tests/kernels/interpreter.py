"""What Triton's interpreter gets wrong, mended for tests.

Dots of bfloat16 (it multiplies the raw bits), and conversions to narrower floats (it truncates to bfloat16 where GPUs
round to nearest even, and loses carries and infinities of float8). Arithmetic on bfloat16 without a cast to float32
stays wrong; kernels must not rely on it.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

FLOAT_TYPES = {
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
SAME_SIZE_INT = {8: torch.uint8, 16: torch.int16, 32: torch.int32}
interpreter_convert_float = interpreter._convert_float


def install() -> None:
    """Put the mended functions in place of the interpreter's."""
    interpreter._convert_float = convert_float
    interpreter.InterpreterBuilder.create_dot = create_dot


def convert_float(bits: np.ndarray, source: Any, target: Any, rounding_mode: Any) -> np.ndarray:
    """Convert floats given as raw bits to another format, also as raw bits, rounding as GPUs do."""
    to_nearest_even = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
    if not to_nearest_even or source not in FLOAT_TYPES or target not in FLOAT_TYPES:
        return interpreter_convert_float(bits, source, target, rounding_mode)
    same_size = "uint8" if source.primitive_bitwidth == 8 else f"int{source.primitive_bitwidth}"
    raw = np.ascontiguousarray(bits).reshape(-1).view(same_size).copy()
    values = torch.from_numpy(raw).view(FLOAT_TYPES[source]).float()
    if target is tl.float8e4nv:  # cvt.rn.satfinite: too large becomes the largest
        values = values.clamp(-448.0, 448.0)
    width = target.primitive_bitwidth
    converted = values.to(FLOAT_TYPES[target]).view(SAME_SIZE_INT[width])
    return converted.numpy().view(f"uint{width}").reshape(bits.shape)


def create_dot(_builder: Any, a: Any, b: Any, accumulator: Any, *_options: Any) -> Any:
    """a · b + accumulator, in the accumulator's type."""
    dtype = accumulator.data.dtype
    product = np.matmul(widened(a), widened(b)).astype(dtype) + accumulator.data
    return interpreter.TensorHandle(product, accumulator.dtype.scalar)


def widened(handle: Any) -> np.ndarray:
    """An operand of a dot as numbers that numpy can multiply without overflow."""
    dtype = handle.dtype.scalar
    if dtype in FLOAT_TYPES:
        return convert_float(handle.data, dtype, tl.float32, None).view(np.float32)
    return handle.data.astype(np.int64)

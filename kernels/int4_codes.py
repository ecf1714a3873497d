"""int4 words, as quantize_weights packs them, to 16-bit floats, within a kernel."""

import torch

from kernels.backend import tl, triton

NIBBLE_BASE = {torch.bfloat16: 0x4300, torch.float16: 0x6400}
"""The bits of 128 and 1024: numbers whose last mantissa bit is worth 1, so that base | nibble is base + nibble."""


def _unpack_assembly(base: int, one: int, kind: str) -> tuple[str, ...]:
    """For each plane, PTX that takes int16 words two at a time: $0 = (base | nibble of $1) + $2, as 16-bit floats.

    $2 is −(base + zero). The compiler would work on one word at a time, with three times the instructions.
    """
    shifts = ("mov.b32 $0, $1;", *(f"shr.u32 $0, $1, {4 * plane};" for plane in (1, 2, 3)))
    return tuple(
        f"{{ .reg .b32 one; mov.b32 one, {one:#x}; {shift} lop3.b32 $0, $0, 0x000f000f, {base:#x}, 0xea; "
        f"fma.rn.{kind} $0, $0, one, $2; }}"
        for shift in shifts
    )


UNPACK_ASSEMBLY = {
    torch.bfloat16: _unpack_assembly(0x43004300, 0x3F803F80, "bf16x2"),
    torch.float16: _unpack_assembly(0x64006400, 0x3C003C00, "f16x2"),
}


@triton.jit
def int4_codes(
    words: tl.tensor,  # [BLOCK_N, 64] int16
    scale_zero: tl.tensor,  # [BLOCK_N] int32
    PLANE: tl.constexpr,
    BASE: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    DTYPE: tl.constexpr,
) -> tl.tensor:
    """[BLOCK_N, 64] of DTYPE: the plane's codes less the channel's zero, exactly."""
    if ASSEMBLY is None:
        codes = ((words.to(tl.int32) >> (4 * PLANE)) & 15) - (scale_zero & 15)[:, None]
        codes = codes.to(tl.float32).to(DTYPE)
    else:
        less = ((scale_zero & 15) | BASE | 0x8000).to(tl.int16).to(DTYPE, bitcast=True)
        less = tl.broadcast_to(less[:, None], words.shape)
        codes = tl.inline_asm_elementwise(ASSEMBLY[PLANE], "=r,r,r", [words, less], less.dtype, is_pure=True, pack=2)
    return codes

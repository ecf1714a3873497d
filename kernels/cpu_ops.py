"""The CPU's side of the kernels: calls into the C++ operations, from tensors to pointers.

Each function computes what the kernel of its name does, or returns None where it does not serve the tensors; torch then
has to. They share torch's OpenMP threads, and one request's numbers do not depend on the rows beside it.
"""

import ctypes
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from kernels.cpu_build import load_library
from kernels.quantize_weights import GROUP

NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
LANES = 16
UNIT = 32
"""Weights are read in pieces of so many bfloat16."""
MAX_LINEAR_ROWS = 16
"""With more rows a matrix product is worth torch's own, which packs the weights."""
HEAD_DIMS = (32, 64, 128, 256)

_C_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "x": ctypes.c_double}
_SIGNATURES = {
    "add_rms_norm": "pppppnnx",
    "silu_and_mul": "ppnn",
    "qk_norm_rope_store": "pppppppp" + "nnnnx",
    "linear": "ppppnnn",
    "linear_int8": "pppppnnn",
    "linear_int4": "ppppppnnn",
    "linear_q8_0": "pppppnnn",
    "linear_q4_0": "pppppnnn",
    "paged_attention": "ppppppp" + "nnnnnnnx",
}
"""p: pointer, n: whole number, x: number."""


@cache
def _operation(name: str, dtype: torch.dtype) -> Callable[..., None] | None:
    """The C++ function of an operation for a dtype, taking pointers and numbers."""
    library = load_library()
    if library is None or dtype not in NAMES:
        return None
    signature = _SIGNATURES[name]
    function = getattr(library, f"{name}_{NAMES[dtype]}")
    function.argtypes = [_C_TYPES[letter] for letter in signature]
    function.restype = None
    return function


def serves(dtype: torch.dtype) -> bool:
    """Whether there are operations for this dtype."""
    return _operation("linear", dtype) is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """As kernels.rms_norm.rms_norm."""
    function = _operation("add_rms_norm", x.dtype)
    size = x.shape[-1]
    if function is None or size % LANES or not (x.is_contiguous() and _matches(weight, x.dtype)):
        return None
    normed = torch.empty_like(x)
    function(x.data_ptr(), None, weight.data_ptr(), normed.data_ptr(), None, x.numel() // size, size, eps)
    return normed


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
    """As kernels.rms_norm.add_rms_norm."""
    function = _operation("add_rms_norm", x.dtype)
    size = x.shape[-1]
    if function is None or size % LANES or not (x.is_contiguous() and _matches(weight, x.dtype)):
        return None
    if residual.shape != x.shape or not _matches(residual, x.dtype):
        return None
    normed, total = torch.empty_like(x), torch.empty_like(x)
    pointers = (x.data_ptr(), residual.data_ptr(), weight.data_ptr(), normed.data_ptr(), total.data_ptr())
    function(*pointers, x.numel() // size, size, eps)
    return normed, total


def silu_and_mul(gate_up: Tensor) -> Tensor | None:
    """As kernels.silu_and_mul.silu_and_mul."""
    function = _operation("silu_and_mul", gate_up.dtype)
    size = gate_up.shape[-1] // 2
    if function is None or gate_up.shape[-1] % (2 * LANES) or not gate_up.is_contiguous():
        return None
    output = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype)
    function(gate_up.data_ptr(), output.data_ptr(), output.numel() // size, size)
    return output


def qk_norm_rope_store(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos_sin: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor | None:
    """As kernels.qk_norm_rope_store.qk_norm_rope_store, for caches of the dtype of qkv, unscaled."""
    function = _operation("qk_norm_rope_store", qkv.dtype)
    num_kv_heads, head_dim = k_cache.shape[-2:]
    if function is None or head_dim not in HEAD_DIMS or not (qkv.is_contiguous() and cos_sin.is_contiguous()):
        return None
    weights = [weight for weight in (q_weight, k_weight) if weight is not None]
    if not all(_matches(tensor, qkv.dtype) for tensor in (k_cache, v_cache, *weights)):
        return None
    num_tokens = qkv.shape[0]
    num_heads = qkv.shape[1] // head_dim - 2 * num_kv_heads
    q = torch.empty(num_tokens, num_heads, head_dim, dtype=qkv.dtype)
    function(
        qkv.data_ptr(),
        None if q_weight is None else q_weight.data_ptr(),
        None if k_weight is None else k_weight.data_ptr(),
        cos_sin.data_ptr(),
        q.data_ptr(),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        slot_mapping.data_ptr(),
        *(num_tokens, num_heads, num_kv_heads, head_dim, eps),
    )
    return q


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x · weightᵀ + bias for at most MAX_LINEAR_ROWS rows, summed in float32 in an order that no other row changes."""
    function = _operation("linear", x.dtype)
    num_rows, in_features = x.shape
    if function is None or num_rows > MAX_LINEAR_ROWS or in_features % UNIT or not x.is_contiguous():
        return None
    if not _matches(weight, x.dtype):
        return None
    out_features = weight.shape[0]
    output = torch.empty(num_rows, out_features, dtype=x.dtype)
    bias_pointer = None if bias is None else bias.data_ptr()
    function(x.data_ptr(), weight.data_ptr(), bias_pointer, output.data_ptr(), num_rows, in_features, out_features)
    return output


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor | None:
    """As kernels.weight_only_mm.weight_only_mm with weights of 8 bits, in an order that no other row changes."""
    function = _operation("linear_int8", x.dtype)
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    if function is None or in_features % UNIT or out_features % LANES or not x.is_contiguous():
        return None
    if weight.dtype != torch.int8 or not (weight.is_contiguous() and scale.is_contiguous()):
        return None
    output = torch.empty(num_rows, out_features, dtype=x.dtype)
    pointers = (x.data_ptr(), weight.data_ptr(), scale.data_ptr(), None if bias is None else bias.data_ptr())
    function(*pointers, output.data_ptr(), num_rows, in_features, out_features)
    return output


def linear_int4(x: Tensor, weight: Tensor, scale_zero: Tensor, bias: Tensor | None) -> Tensor | None:
    """As kernels.weight_only_mm.weight_only_mm with weights of 4 bits, in an order that no other row changes."""
    function = _operation("linear_int4", x.dtype)
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    if function is None or in_features % GROUP or out_features % LANES or not x.is_contiguous():
        return None
    if weight.dtype != torch.int16 or not (weight.is_contiguous() and scale_zero.is_contiguous()):
        return None
    output = torch.empty(num_rows, out_features, dtype=x.dtype)
    sums = x.unflatten(1, (-1, GROUP)).sum(2, dtype=torch.float32)
    pointers = (x.data_ptr(), sums.data_ptr(), weight.data_ptr(), scale_zero.data_ptr())
    bias_pointer = None if bias is None else bias.data_ptr()
    function(*pointers, bias_pointer, output.data_ptr(), num_rows, in_features, out_features)
    return output


def linear_blocks(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor | None:
    """As kernels.weight_only_blocks.weight_only_blocks, in an order that no other row changes."""
    function = _operation("linear_q4_0" if weight.dtype == torch.uint8 else "linear_q8_0", x.dtype)
    (num_rows, in_features), out_features = x.shape, weight.shape[0]
    if function is None or out_features % LANES or not x.is_contiguous():
        return None
    output = torch.empty(num_rows, out_features, dtype=x.dtype)
    pointers = (x.data_ptr(), weight.data_ptr(), scale.data_ptr(), None if bias is None else bias.data_ptr())
    function(*pointers, output.data_ptr(), num_rows, in_features, out_features)
    return output


def paged_attention(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    rows: Tensor,
    block_tables: Tensor,
    lengths: Tensor,
    output: Tensor,
    window: int | None = None,
) -> bool:
    """Attention of single tokens: query row rows[i] over the first lengths[i] tokens of the blocks block_tables[i].

    Args:
        query, output: [num_tokens, num_heads, head_dim], contiguous; the rows named in `rows` are written.
        k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim], contiguous, the dtype of query.
        rows, lengths: int64 [n], contiguous.
        block_tables: int32 [n, max_blocks], contiguous rows.
        window: how many of these tokens, the last ones, are attended to; None: all.

    Returns:
        Whether it was done.
    """
    function = _operation("paged_attention", query.dtype)
    block_size, num_kv_heads, head_dim = k_cache.shape[1:]
    if function is None or not (serves_heads(query.dtype, head_dim) and k_cache.dtype == query.dtype):
        return False
    pointers = (query, k_cache, v_cache, rows, block_tables, lengths, output)
    function(
        *(tensor.data_ptr() for tensor in pointers),
        *(len(rows), block_tables.stride(0), query.shape[1], num_kv_heads, head_dim, block_size, window or 0),
        head_dim**-0.5,
    )
    return True


def serves_heads(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether `paged_attention` computes heads of this dtype and size."""
    return serves(dtype) and head_dim in HEAD_DIMS


def _matches(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.dtype == dtype and tensor.is_contiguous()

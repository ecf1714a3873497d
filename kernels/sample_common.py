"""What the kernels of `sample_tokens` share: logits as keys in order, weights, settings.

Weights are whole numbers: a token's is its probability relative to the likeliest one's in units of 2**-35, and float64
adds up to 2**18 of those without rounding, in any order. So neither the neighbours nor the timing can change a token.

SHIFT is the number of low bits of a logit as float32 that are always zero, as its own type has fewer.
"""

from kernels.backend import tl, triton


@triton.jit
def keys_of(values: tl.tensor, SHIFT: tl.constexpr) -> tl.tensor:
    """int32 keys that ascend as values descend; NaN comes first, zeros of either sign have one key."""
    bits = (values.to(tl.float32) + 0.0).to(tl.int32, bitcast=True)
    keys = ~(((bits >> 31) & 0x7FFFFFFF) ^ bits)
    return tl.where((bits & 0x7FFFFFFF) > 0x7F800000, -0x80000000, keys) >> SHIFT


@triton.jit
def value_of(key: tl.tensor, SHIFT: tl.constexpr) -> tl.tensor:
    """Inverse of `keys_of`."""
    low_bits: tl.constexpr = (1 << SHIFT) - 1
    shifted = key << SHIFT
    return tl.where(key < 0, ~(shifted | low_bits), shifted | -0x80000000).to(tl.float32, bitcast=True)


@triton.jit
def scale(values: tl.tensor, peak: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """Logits relative to the likeliest one and divided by the temperature, float32."""
    return tl.div_rn(values.to(tl.float32) - peak, temperature)


@triton.jit
def weigh(scaled: tl.tensor, LIBDEVICE: tl.constexpr) -> tl.tensor:
    """Weights of tokens, whole numbers in float32."""
    # What torch has on GPUs is libdevice's exponential. Triton's own is rounded differently.
    weights = (tl.extra.cuda.libdevice.exp(scaled) if LIBDEVICE else tl.exp(scaled)) * 34359738368.0
    # Adding 2**23 rounds to whole numbers, half to even; from there on float32 has no others.
    return tl.where(weights < 8388608.0, (weights + 8388608.0) - 8388608.0, weights)


@triton.jit
def load_settings(settings_ptr: tl.tensor, row: tl.tensor, VOCAB: tl.constexpr) -> tl.tensor:
    """(temperature float32, top_k float64 or 0 for none, top_p float64, log_min_p float32, uniform float64)."""
    settings_ptr += row * 5
    top_k = tl.load(settings_ptr + 1)
    top_k = tl.where(top_k < VOCAB, tl.maximum(top_k, 0.0), 0.0)
    temperature, log_min_p = tl.load(settings_ptr).to(tl.float32), tl.load(settings_ptr + 3).to(tl.float32)
    return temperature, top_k, tl.load(settings_ptr + 2), log_min_p, tl.load(settings_ptr + 4)


@triton.jit
def choose_target(uniform: tl.tensor, mass: tl.tensor) -> tl.tensor:
    """A whole number from 0 to mass - 1, uniformly: the first token past it is drawn."""
    return tl.minimum(tl.floor(uniform * mass), mass - 1)


@triton.jit
def middle_of(low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """Half-way, rounded down; the sum of the two might overflow."""
    return (low & high) + ((low ^ high) >> 1)

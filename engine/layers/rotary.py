"""Rotary position tables (arXiv:2104.09864), and the ways to stretch them over longer contexts."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.model_config import RopeParameters


def build_cos_sin(
    rope: RopeParameters, head_dim: int, max_positions: int, trained_positions: int, device: torch.device
) -> Tensor:
    """[max_positions, head_dim] float32: for each position head_dim/2 cosines, then as many sines.

    Args:
        rope: what config.json says.
        head_dim: of the model's heads.
        max_positions: the longest context to be run.
        trained_positions: max_position_embeddings of config.json.
        device: where the table goes.

    Raises:
        CheckpointError: a rope type that is not supported.
    """
    if rope.rope_type not in _FREQUENCIES:
        known = ", ".join(map(repr, _FREQUENCIES))
        raise CheckpointError(f"config.json: rope_type is {rope.rope_type!r}, expected one of {known}")
    frequencies = _FREQUENCIES[rope.rope_type](rope, head_dim, max(max_positions, trained_positions), trained_positions)
    angles = torch.outer(torch.arange(max_positions).float(), frequencies)
    table = torch.cat((angles.cos(), angles.sin()), dim=-1) * _attention_factor(rope)
    return table.to(device)


def _default(rope: RopeParameters, head_dim: int, max_positions: int, trained_positions: int) -> Tensor:
    """Radians a token, [head_dim / 2], falling geometrically from 1."""
    return _inverse_powers(rope.rope_theta, head_dim)


def _linear(rope: RopeParameters, head_dim: int, max_positions: int, trained_positions: int) -> Tensor:
    """Positions are squeezed (arXiv:2306.15595)."""
    return _inverse_powers(rope.rope_theta, head_dim) / rope.factor


def _dynamic(rope: RopeParameters, head_dim: int, max_positions: int, trained_positions: int) -> Tensor:
    """A larger base for contexts beyond those trained on. One base serves all requests: that of the longest context."""
    stretch = rope.factor * max_positions / trained_positions - (rope.factor - 1)
    return _inverse_powers(rope.rope_theta * stretch ** (head_dim / (head_dim - 2)), head_dim)


def _yarn(rope: RopeParameters, head_dim: int, max_positions: int, trained_positions: int) -> Tensor:
    """Slow dimensions are squeezed, fast ones are not, with a ramp between (arXiv:2309.00071)."""
    original = rope.original_max_position_embeddings or trained_positions

    def dimension_with(rotations: float) -> float:
        """Which dimension turns so many times over the original context."""
        return head_dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = dimension_with(rope.beta_fast), dimension_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    steps = torch.arange(head_dim // 2).float()
    squeezed = ((steps - low) / (max(high - low, 0.001))).clamp(0, 1)
    frequencies = _inverse_powers(rope.rope_theta, head_dim)
    return frequencies / rope.factor * squeezed + frequencies * (1 - squeezed)


def _llama3(rope: RopeParameters, head_dim: int, max_positions: int, trained_positions: int) -> Tensor:
    """As YaRN, with the ramp over wavelengths (Llama 3.1)."""
    original = rope.original_max_position_embeddings or trained_positions
    frequencies = _inverse_powers(rope.rope_theta, head_dim)
    rotations = original * frequencies / (2 * math.pi)
    kept = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = kept.clamp(0, 1)
    return frequencies / rope.factor * (1 - kept) + frequencies * kept


_FREQUENCIES: dict[str, Callable[[RopeParameters, int, int, int], Tensor]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "llama3": _llama3,
}


def _inverse_powers(theta: float, head_dim: int) -> Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return 1.0 / (theta**exponents)


def _attention_factor(rope: RopeParameters) -> float:
    """What cosines and sines are multiplied by, so that attention over a longer context stays as sharp."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)

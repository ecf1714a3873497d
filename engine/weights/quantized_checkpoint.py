"""A quantized model and the checkpoint that fills it: linear layers are swapped, tensors converted as they are read."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError, ConfigError
from engine.layers.linear import Linear
from engine.layers.moe import ExpertWeights
from engine.layers.quantized_experts import QuantizedExperts
from engine.parallel.share import Share
from engine.weights.checkpoint import Checkpoint, TensorInfo
from engine.weights.messages import dtype_text, shape_text, shown
from engine.weights.quantization import Quantization
from engine.weights.quantized_formats import Axis, Expected, Format

OUTPUT_PROJECTION = "lm_head"
"""Never quantized, nor are embeddings and norms."""


@dataclass(frozen=True, slots=True)
class Part:
    """One weight of the checkpoint: a linear layer, or one of those that a packed layer computes at once."""

    name: str
    outputs: tuple[Share, ...]
    """What a rank has of it; several shares where the checkpoint has one tensor for several parts."""
    inputs: Share

    @property
    def out_features(self) -> int:
        return sum(share.whole for share in self.outputs)

    def take(self, tensor: Tensor, axes: tuple[Axis, ...]) -> Tensor:
        """A rank's part of one of the weight's tensors, a view if it is in one piece. Raises ValueError."""
        for dim, axis in enumerate(axes[: tensor.dim()]):
            shares = self.outputs if axis.of == "outputs" else (self.inputs,)
            if tensor.shape[dim] != -(-sum(share.whole for share in shares) // axis.per):
                continue  # one for all
            first, pieces = 0, []
            for share in shares:
                span = share.span(axis.per)
                pieces.append(tensor.narrow(dim, first + span.start, span.stop - span.start))
                first += -(-share.whole // axis.per)
            tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)
        return tensor


class QuantizedCheckpoint:
    """`source` with the tensors of each quantized layer replaced by what a `QuantizedLinear` of this rank stores.

    A layer's tensors are read, converted and handed over one layer at a time.

    Args:
        source: the checkpoint as it lies on disk.
        parts: the quantized weights in it, and how they are stored.
        label: for messages, what says that they are quantized.
        device: where they are converted.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape or type: the first one is named, others are counted.
        ConfigError: ranks' shares are no whole groups of the quantization.
    """

    def __init__(self, source: Checkpoint, parts: Mapping[Part, Format], label: str, device: torch.device) -> None:
        self._source, self._device = source, device
        problems: list[str] = []
        self._parts = {part.name: (part, stored) for part, stored in parts.items()}
        self._sources: dict[str, dict[str, Expected]] = {}
        converted: dict[str, dict[str, TensorInfo]] = {}
        part_of: dict[str, str] = {}
        for part, stored in parts.items():
            expected = stored.expected(part.out_features, part.inputs.whole)
            problems += _problems(source.tensors, part, expected, label)
            self._sources[part.name] = {
                name: each for name, each in expected.items() if f"{part.name}.{name}" in source.tensors
            }
            part_of |= {f"{part.name}.{name}": part.name for name in self._sources[part.name]}
            converted[part.name] = {
                f"{part.name}.{name}": TensorInfo("", *each)
                for name, each in stored.layer.stored(
                    sum(share.size for share in part.outputs), part.inputs.size
                ).items()
            }
        if problems:
            more = f" ({len(problems) - 1:,} more such errors)" if len(problems) > 1 else ""
            raise CheckpointError(problems[0] + more)
        self.tensors: dict[str, TensorInfo] = {}
        """Where the first tensor of a layer lies in the source, all of the layer's converted ones are listed."""
        for name, info in source.tensors.items():
            if name not in part_of:
                self.tensors[name] = info
            else:
                for new_name, new_info in converted.pop(part_of[name], {}).items():
                    self.tensors[new_name] = new_info._replace(file=info.file)
        self._converted: dict[str, Tensor] = {}

    def read(self, name: str) -> Tensor:
        """The tensor as `tensors` describes it. Those of a quantized layer can be read once.

        Raises:
            CheckpointError: the data cannot be read, or cannot be what it should be.
        """
        part, _, attribute = name.rpartition(".")
        if part not in self._parts or attribute not in self._parts[part][1].layer.stored(1, 1):
            return self._source.read(name)
        if name not in self._converted:
            self._converted = self._convert(part)
        return self._converted.pop(name)

    def _convert(self, part: str) -> dict[str, Tensor]:
        expected = self._sources[part]
        weight, stored = self._parts[part]
        tensors = {
            name: weight.take(self._source.read(f"{part}.{name}"), axes).to(self._device)
            for name, (_, _, axes, _) in expected.items()
        }
        try:
            return {f"{part}.{name}": tensor for name, tensor in stored.convert(tensors).items()}
        except ValueError as error:
            file = self._source.tensors[f"{part}.{next(iter(expected))}"].file
            raise CheckpointError(f"{file}: {shown(part)}: {error}") from None


def quantize(
    model: nn.Module, checkpoint: Checkpoint, quantization: Quantization, device: torch.device
) -> QuantizedCheckpoint:
    """Swap the model's linear layers, experts' too, for quantized ones, and get the checkpoint that fills it then.

    Args:
        model: built on the meta device, of `Linear` layers and `ExpertWeights`.
        checkpoint: what config.json, or the operator, says is quantized, or is to be.
        device: where the model will run.

    Raises:
        CheckpointError: the checkpoint does not hold what its quantization needs.
        ConfigError: ranks' shares of a layer are no whole groups of the quantization.
    """
    parts: dict[Part, Format] = {}
    for path, layer, found in quantizable_layers(model, checkpoint.tensors):
        covered = {quantization.covers(part.name) for part in found}
        if len(covered) == 2:
            some = ", ".join(part.name for part in found[:3]) + (", …" if len(found) > 3 else "")
            raise CheckpointError(
                f"config.json: quantization_config leaves some of {some} unquantized, expected all of them or none: "
                "they are computed at once"
            )
        if covered == {False}:
            continue
        parts |= dict.fromkeys(found, quantization.format)
        try:
            swap(model, path, layer, found, quantization.format)
        except ValueError as error:
            message = f"{path} cannot be quantized ({quantization.label}): {error}"
            if any(share.size < share.whole for share in (layer.inputs, *layer.outputs)):
                raise ConfigError(f"{message}: lower tensor_parallel_size") from None
            raise CheckpointError(message) from None
    return QuantizedCheckpoint(checkpoint, parts, quantization.label, device)


def quantizable_layers(
    model: nn.Module, tensors: Mapping[str, TensorInfo]
) -> Iterator[tuple[str, Linear | ExpertWeights, list[Part]]]:
    """Each layer that may be quantized: its name, itself, and the weights of the checkpoint that fill it."""
    for path, layer in list(model.named_modules()):
        if isinstance(layer, (Linear, ExpertWeights)) and path != OUTPUT_PROJECTION:
            yield path, layer, _parts(model, path, layer, tensors)


def swap(model: nn.Module, path: str, layer: Linear | ExpertWeights, parts: list[Part], stored: Format) -> None:
    """Put a quantized layer in the place of `layer`. Raises ValueError, and does not, for sizes that do not fit."""
    quantized: nn.Module
    with torch.device("meta"):
        if isinstance(layer, ExpertWeights):
            quantized = QuantizedExperts(stored.layer, layer.num_experts, layer.inputs, layer.parts)
        else:
            quantized = stored.layer(layer.inputs, layer.outputs, layer.bias is not None)
    _check_groups(parts, stored)
    model.set_submodule(path, quantized)


def _parts(model: nn.Module, path: str, layer: Linear | ExpertWeights, tensors: Mapping[str, TensorInfo]) -> list[Part]:
    """The checkpoint's weights that fill a layer."""
    prefix = "" if any(name.startswith("model.") for name in tensors) else "model."
    path = path.removeprefix(prefix)
    parent, _, leaf = path.rpartition(".")
    leaves = getattr(model, "packed_parameters", {}).get(leaf, ())
    if not leaves or any(name.startswith(f"{path}.") for name in tensors):
        return [Part(path, layer.outputs, layer.inputs)]
    return [
        Part(f"{parent}.{leaf}", (output,), layer.inputs) for leaf, output in zip(leaves, layer.outputs, strict=True)
    ]


def _check_groups(parts: list[Part], stored: Format) -> None:
    """Raise ValueError unless ranks' shares are whole words, groups and blocks of the checkpoint's tensors."""
    for part in parts:
        for expected in stored.expected(part.out_features, part.inputs.whole).values():
            for axis in expected.axes:
                for share in part.outputs if axis.of == "outputs" else (part.inputs,):
                    share.span(axis.per)


def _problems(
    tensors: Mapping[str, TensorInfo], part: Part, expected: Mapping[str, Expected], label: str
) -> Iterator[str]:
    """What is wrong with the tensors of one quantized weight."""
    for leaf, (shapes, dtypes, _, is_optional) in expected.items():
        name = f"{part.name}.{leaf}"
        info = tensors.get(name)
        if info is None:
            if not is_optional:
                yield f"tensor {shown(name)} is missing, expected shape {shape_text(shapes[0])} ({label})"
        elif info.dtype not in dtypes:
            wanted = ", ".join(map(dtype_text, dtypes))
            yield (
                f"{info.file}: tensor {shown(name)} has dtype {dtype_text(info.dtype)}, expected {wanted} ({label}): "
                "does config.json belong to these weights?"
            )
        elif info.shape not in shapes:
            wanted = " or ".join(map(shape_text, shapes))
            yield (
                f"{info.file}: tensor {shown(name)} has shape {shape_text(info.shape)}, expected {wanted} ({label}): "
                "does config.json belong to these weights?"
            )

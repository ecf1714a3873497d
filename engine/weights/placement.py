"""Which part of each checkpoint tensor fills which rows of which parameter.

Every mismatch is found here, before any data is read. Of a model that several ranks share, a rank copies its own part.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from engine.errors import CheckpointError
from engine.parallel.share import Share, whole
from engine.weights.checkpoint import TensorInfo
from engine.weights.messages import dtype_text, shape_text, shown

_FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_HINT = "does config.json belong to these weights?"


class Copy(NamedTuple):
    """A part of a tensor and its place."""

    source: tuple[slice, ...]
    """Of the checkpoint's tensor; empty for all of it."""
    rows: slice | None
    """Of the parameter, None for all of it. Rows that are left over are padding."""


class Placement(NamedTuple):
    """Where one checkpoint tensor goes."""

    parameter: str
    copies: tuple[Copy, ...]


class _Found(NamedTuple):
    """A tensor that the checkpoint holds, under the name that the checkpoint gives it."""

    name: str
    info: TensorInfo


class _Wanted(NamedTuple):
    """A tensor that fills a parameter or some of its rows, under the name that the model gives it."""

    name: str
    shape: tuple[int | None, ...]
    """None where the checkpoint decides."""
    parts: tuple[tuple[Share, ...], ...] = ()
    """What of each dimension goes into the model, for each part of its rows; empty: all, as it is."""


def place_tensors(model: torch.nn.Module, tensors: Mapping[str, TensorInfo]) -> dict[str, Placement]:
    """Where each tensor of a checkpoint goes, by its name there; tensors the model has no use for are left out.

    Raises:
        CheckpointError: naming the first tensor that is missing, unknown to the model, of the wrong shape or type, and
            how many more there are.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied: Mapping[str, str] = getattr(model, "tied_parameters", {})
    found = _found_by_model_name(model, tensors, roots={name.partition(".")[0] for name in (*parameters, *tied)})
    placements: dict[str, Placement] = {}
    problems: list[str] = []
    leftover = dict(found)
    for key, parameter in parameters.items():
        wanted = _wanted(model, key, tuple(parameter.shape), found, tied)
        for part in wanted:
            leftover.pop(part.name, None)
        new_problems = list(_problems(key, parameter, wanted, found, tensors))
        problems += new_problems
        if not new_problems:
            placements.update(_placements(key, wanted, found))
    for name, tensor in leftover.items():
        if name not in tied:
            problems.append(f"{_where(tensor)} has no place in the model: {_HINT}")
        elif tensor.info.shape != parameters[tied[name]].shape:
            problems.append(_wrong_shape(tensor, parameters[tied[name]].shape))
    if problems:
        raise CheckpointError(problems[0] + (f" ({len(problems) - 1:,} more such errors)" if len(problems) > 1 else ""))
    return placements


def _found_by_model_name(
    model: torch.nn.Module, tensors: Mapping[str, TensorInfo], roots: set[str]
) -> dict[str, _Found]:
    """What the checkpoint holds, by the model's names: an export of the base model lacks `model.` in all of them."""
    ignored = tuple(getattr(model, "ignored_tensors", ()))
    names = [name for name in tensors if not name.endswith(ignored)]
    is_base_model = "model" in roots and not any(name.startswith("model.") for name in names)

    def model_name(name: str) -> str:
        return f"model.{name}" if is_base_model and name.partition(".")[0] not in roots else name

    return {model_name(name): _Found(name, tensors[name]) for name in names}


def _wanted(
    model: torch.nn.Module, key: str, shape: tuple[int, ...], found: Mapping[str, _Found], tied: Mapping[str, str]
) -> list[_Wanted]:
    """The checkpoint tensors that fill parameter `key`, in the order of its rows."""
    module_path, _, attribute = key.rpartition(".")
    parent, _, module_name = module_path.rpartition(".")
    names: tuple[str, ...] = getattr(model, "packed_parameters", {}).get(module_name, ())
    aliases = [alias for alias, target in tied.items() if target == key and alias in found]
    parts = _parts(model, key)
    if key in found or aliases or not names:
        name = key if key in found or not aliases else aliases[0]
        return [_Wanted(name, whole_shape(model, key, shape), parts)]
    names = tuple(".".join(filter(None, (parent, name, attribute))) for name in names)
    if parts:
        return [
            _Wanted(name, tuple(share.whole for share in part), (part,))
            for name, part in zip(names, parts, strict=True)
        ]
    sizes = getattr(model.get_submodule(module_path), "output_sizes", [None] * len(names))
    return [_Wanted(name, (size, *shape[1:])) for name, size in zip(names, sizes, strict=True)]


def whole_shape(model: torch.nn.Module, key: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of parameter `key`, which has `shape` here, if one rank held all of it."""
    parts = _parts(model, key)
    if not parts:
        return shape
    return (sum(part[0].whole for part in parts), *(share.whole for share in parts[0][1:]))


def _parts(model: torch.nn.Module, key: str) -> tuple[tuple[Share, ...], ...]:
    """What parameter `key` holds of each dimension, part by part; nothing if its module does not say."""
    path, _, attribute = key.rpartition(".")
    module = model.get_submodule(path)
    shares: Callable[[str], tuple[tuple[Share, ...], ...]] | None = getattr(module, "shares", None)
    return () if shares is None else shares(attribute)


def _problems(
    key: str, parameter: Tensor, wanted: list[_Wanted], found: Mapping[str, _Found], tensors: Mapping[str, TensorInfo]
) -> Iterator[str]:
    """What is wrong with the tensors that should fill parameter `key`."""
    dtypes = _FLOAT_DTYPES if parameter.dtype in _FLOAT_DTYPES else (parameter.dtype,)
    rows: list[int] = []
    for name, shape, _ in wanted:
        tensor = found.get(name)
        if tensor is None:
            yield f"tensor {shown(name)} is missing in {_files(tensors)}, expected shape {shape_text(shape)}: {_HINT}"
        elif tensor.info.dtype not in dtypes:
            yield (
                f"{_where(tensor)} has dtype {dtype_text(tensor.info.dtype)}, expected one of "
                f"{', '.join(map(dtype_text, dtypes))}: config.json does not say that it is quantized"
            )
        elif not _fits(tensor.info.shape, shape):
            yield _wrong_shape(tensor, shape)
        else:
            rows += tensor.info.shape[:1]
    num_rows = parameter.shape[:1].numel()
    if len(rows) == len(wanted) > 1 and not wanted[0].parts and sum(rows) != num_rows:
        names = ", ".join(shown(part.name) for part in wanted)
        total = f"{' + '.join(map(str, rows))} = {sum(rows)}"
        yield f"tensors {names} have {total} rows, expected {num_rows} for {shown(key)}: {_HINT}"


def _placements(key: str, wanted: list[_Wanted], found: Mapping[str, _Found]) -> Iterator[tuple[str, Placement]]:
    if len(wanted) == 1 and not wanted[0].parts:
        yield found[wanted[0].name].name, Placement(key, (Copy((), None),))
        return
    start = 0
    for each in wanted:
        tensor = found[each.name]
        copies = []
        source = 0
        for rows, *others in each.parts or (tuple(map(whole, tensor.info.shape)),):
            span = slice(source + rows.span().start, source + rows.span().stop)
            copies.append(Copy((span, *(share.span() for share in others)), slice(start, start + rows.size)))
            source += rows.whole
            start += rows.size
        yield tensor.name, Placement(key, tuple(copies))


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(want in (None, size) for size, want in zip(shape, wanted, strict=True))


def _wrong_shape(tensor: _Found, wanted: tuple[int | None, ...]) -> str:
    return f"{_where(tensor)} has shape {shape_text(tensor.info.shape)}, expected {shape_text(wanted)}: {_HINT}"


def _where(tensor: _Found) -> str:
    return f"{tensor.info.file}: tensor {shown(tensor.name)}"


def _files(tensors: Mapping[str, TensorInfo]) -> str:
    files = sorted({info.file for info in tensors.values()})
    if not files:
        return "a checkpoint without tensors"
    return files[0] + (f" and {len(files) - 1} more files" if len(files) > 1 else "")

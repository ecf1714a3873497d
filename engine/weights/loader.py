"""From a checkpoint into a model: decide where each tensor goes and check all of it, then copy.

What the model says about itself is read here and nowhere else:

- `packed_parameters`: `{"qkv_proj": ("q_proj", "k_proj", "v_proj")}` means that checkpoint tensor `*.k_proj.weight`
  fills the second group of rows of parameter `*.qkv_proj.weight`.
- `shares(parameter)` of a module, if it has it: for each part of a parameter, what it holds of each dimension of the
  checkpoint's tensor. Of `[1024, 64]`, a rank may want rows 512 … 1023. Nothing but that is read from mapped files.
- `output_sizes` of the module that owns a packed parameter, if it has that instead: the rows of each part.
- `tied_parameters`: `{"lm_head.weight": "model.embed_tokens.weight"}`, names that are no parameters of their own.
- `ignored_tensors`: endings of tensor names that some checkpoints hold and no model needs.
- `parameter_dtypes` of a module: types of its parameters that do not have the model's.
- `after_loading()` of any module: called as soon as every parameter in the module is in place.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterator

import psutil
import torch
from tqdm import tqdm

from engine.errors import ConfigError
from engine.weights.checkpoint import Checkpoint
from engine.weights.placement import Copy, Placement, place_tensors

logger = logging.getLogger(__name__)


def load_weights(
    model: torch.nn.Module, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, progress: bool = True
) -> None:
    """Give every parameter of `model` its values.

    Nothing is allocated before everything is checked. Parameters are then made one by one, in the order of the
    checkpoint's files, so the peak of host memory is the weights plus what the checkpoint maps. Buffers are left alone.

    Args:
        model: built on the meta device; its parameters have their final, packed shapes.
        device: where the parameters go.
        dtype: floating-point type of parameters; the checkpoint's values are rounded to it. Quantized weights and their
            scales keep their own.
        progress: show a bar on stderr if loading takes more than two seconds.

    Raises:
        CheckpointError: a tensor is missing, unknown to the model, of the wrong shape or type, or cannot be read.
        ConfigError: the weights do not fit into the free memory of the host.
    """
    placements = place_tensors(model, checkpoint.tensors)
    if device.type == "cpu":
        _check_host_memory(model, dtype)
    start = time.perf_counter()
    num_bytes = sum(checkpoint.tensors[name].num_bytes for name in placements)
    with tqdm(
        total=num_bytes, desc="loading weights", unit="B", unit_scale=True, delay=2, disable=not progress
    ) as progress_bar:
        for name in _fill(model, checkpoint, placements, device, dtype):
            progress_bar.update(checkpoint.tensors[name].num_bytes)
    seconds = time.perf_counter() - start
    gigabytes = num_bytes / 1e9
    logger.info("loaded %.2f GB of weights in %.2f s (%.2f GB/s)", gigabytes, seconds, gigabytes / seconds)


def _check_host_memory(model: torch.nn.Module, dtype: torch.dtype) -> None:
    needed = sum(
        parameter.numel() * _dtype_of(model, key, dtype).itemsize for key, parameter in model.named_parameters()
    )
    available = psutil.virtual_memory().available
    if needed > available:
        raise ConfigError(
            f"the weights need {needed / 1e9:,.1f} GB of host memory as {str(dtype).removeprefix('torch.')}, "
            f"{available / 1e9:,.1f} GB are available: free memory, or use a smaller model or dtype"
        )


def _fill(
    model: torch.nn.Module,
    checkpoint: Checkpoint,
    placements: dict[str, Placement],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[str]:
    """Copy each placed tensor, and yield its name."""
    hooks = _AfterLoading(model)
    parts_to_come = Counter(placement.parameter for placement in placements.values())
    incomplete: dict[str, torch.nn.Parameter] = {}
    for name in checkpoint.tensors:
        if name not in placements:
            continue
        key, copies = placements[name]
        if key not in incomplete:
            incomplete[key] = _allocate(model, key, device, dtype)
        _copy(checkpoint.read(name), incomplete[key], copies)
        parts_to_come[key] -= 1
        if parts_to_come[key] == 0:
            # No reference may outlive this line: the hook may replace the parameter to free it.
            del incomplete[key]
            hooks.parameter_loaded(key)
        yield name


def _copy(tensor: torch.Tensor, parameter: torch.nn.Parameter, copies: tuple[Copy, ...]) -> None:
    for source, rows in copies:
        part = tensor[source]
        target = parameter if rows is None else parameter[rows]
        if len(target.shape) and len(part) < len(target):
            target[len(part) :].zero_()
            target = target[: len(part)]
        target.copy_(part)


def _allocate(model: torch.nn.Module, key: str, device: torch.device, dtype: torch.dtype) -> torch.nn.Parameter:
    """Put an uninitialised parameter in the place of the meta parameter `key`."""
    path, _, attribute = key.rpartition(".")
    owner = model.get_submodule(path)
    shape = owner.get_parameter(attribute).shape
    values = torch.empty(shape, dtype=_dtype_of(model, key, dtype), device=device)
    parameter = torch.nn.Parameter(values, requires_grad=False)
    setattr(owner, attribute, parameter)
    return parameter


def _dtype_of(model: torch.nn.Module, key: str, dtype: torch.dtype) -> torch.dtype:
    """The type of parameter `key` in a model of `dtype`."""
    path, _, attribute = key.rpartition(".")
    return getattr(model.get_submodule(path), "parameter_dtypes", {}).get(attribute, dtype)


class _AfterLoading:
    """Calls `after_loading` of each module that has it when its last parameter is in place, inner modules first."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._hooks = {
            path: module.after_loading for path, module in model.named_modules() if hasattr(module, "after_loading")
        }
        self._parameters_to_come = Counter(
            path for key, _ in model.named_parameters(remove_duplicate=False) for path in self._hooked_owners(key)
        )

    def parameter_loaded(self, key: str) -> None:
        for path in self._hooked_owners(key):
            self._parameters_to_come[path] -= 1
            if self._parameters_to_come[path] == 0:
                self._hooks[path]()

    def _hooked_owners(self, key: str) -> Iterator[str]:
        """Paths of the modules around parameter `key` that have the hook, from the inside out."""
        while key:
            key = key.rpartition(".")[0]
            if key in self._hooks:
                yield key

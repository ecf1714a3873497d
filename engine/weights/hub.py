"""From what the user calls a model to the folder that holds it."""

import os
from pathlib import Path

from engine.errors import CheckpointError
from engine.weights.gguf_folder import gguf_folder
from engine.weights.messages import shown

_DEMO = Path(__file__).parent / "demo"

_NEEDED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt")
# Sub-folders and `consolidated` files repeat the same weights in other formats.
_NOT_NEEDED = ("*/*", "consolidated*.safetensors")


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The local folder of a model, downloaded first if need be.

    Args:
        model: `demo` (comes with the package), a local directory or GGUF file, or a hub id such as `Qwen/Qwen3-0.6B`.
            Text that looks like a path (starts with `.`, `/` or `~`, ends with `.gguf`, or has not exactly one `/`) is
            never sent to the hub.
        revision: branch, tag or commit of a hub id.

    Raises:
        CheckpointError: no such directory, or the hub did not deliver.
    """
    local = _DEMO if model == "demo" else _local_gguf(model) or _local_directory(model)
    if local is not None:
        if revision is not None:
            raise CheckpointError(
                f"model {shown(model)} is the local directory {local}, which has no revision {shown(revision)}: "
                "leave the revision out, or give a hub id such as Qwen/Qwen3-0.6B"
            )
        return local
    if model.startswith((".", "/", "~")) or model.endswith(".gguf") or model.count("/") != 1:
        found = "is a file" if os.path.isfile(model) else "is not an existing directory"
        raise CheckpointError(
            f'model {shown(model)} {found}, and not a hub id either: give "demo", a directory with config.json and '
            "*.safetensors, a .gguf file, or a hub id such as Qwen/Qwen3-0.6B"
        )
    return _download(model, revision)


def _local_gguf(model: str) -> Path | None:
    """The folder made from a GGUF file, or from the only one in a directory that has no config.json."""
    path = os.path.expanduser(model)
    if model.endswith(".gguf") and os.path.isfile(path):
        return gguf_folder(Path(path))
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        files = sorted(Path(path).glob("*.gguf"))
        if len(files) > 1:
            names = ", ".join(file.name for file in files[:5])
            raise CheckpointError(f"{path}: has {len(files)} GGUF files, give the path of one: {names}")
        return gguf_folder(files[0]) if files else None
    return None


def _local_directory(model: str) -> Path | None:
    # os.path.isdir answers False where Path.is_dir raises: a name too long, a NUL in it, a folder we may not enter.
    path = os.path.expanduser(model)
    return Path(path) if os.path.isdir(path) else None


def _download(model: str, revision: str | None) -> Path:
    """Fetch what is missing of a hub repository into the hub's cache; an interrupted download is resumed."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            model, revision=revision, allow_patterns=list(_NEEDED), ignore_patterns=list(_NOT_NEEDED)
        )
    except Exception as error:
        # The library lets errors of its HTTP, cache and transfer layers through; all of them mean "no model".
        what = f"model {shown(model)}" + (f" at revision {shown(revision)}" if revision is not None else "")
        raise CheckpointError(f"{what}: no such local directory, and {_advice(error)}") from error
    return Path(folder)


def _advice(error: Exception) -> str:
    """Why the hub did not deliver, and what the user can do."""
    from huggingface_hub import errors

    if isinstance(error, errors.HFValidationError):
        return "not a valid hub id: expected owner/name, such as Qwen/Qwen3-0.6B"
    if isinstance(error, errors.GatedRepoError):
        return (
            "the hub asks for permission: accept the terms on the model's page, then run `hf auth login` "
            "or set HF_TOKEN"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has no such revision of it: check the branch, tag or commit"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "the hub has no such repository, or it is private: check the spelling; "
            "for a private one run `hf auth login` or set HF_TOKEN"
        )
    # The library looks into its cache when the hub does not answer; what stopped the hub is then the cause.
    reason = error.__cause__ or error
    if isinstance(reason, errors.OfflineModeIsEnabled):
        return (
            "it is not (or not all) in the hub's cache while HF_HUB_OFFLINE forbids a download: "
            "unset HF_HUB_OFFLINE, or give a local directory"
        )
    text = next(iter(str(reason).splitlines()), "")
    return (
        f"the download from the hub failed ({type(reason).__name__}: {text[:300]}): check the network and try again "
        "(it will resume), or give a local directory"
    )

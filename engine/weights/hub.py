"""From what the user calls a model to the folder that holds it."""

import glob
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from engine.errors import CheckpointError
from engine.weights.gguf_folder import gguf_folder
from engine.weights.gguf_parts import GgufName, group_parts
from engine.weights.messages import shown

_DEMO = Path(__file__).parent / "demo"

_NEEDED = ("*.json", "*.safetensors", "*.jinja", "merges.txt", "vocab.txt")
_NEEDED_WITHOUT_SAFETENSORS = "pytorch_model*.bin"
# Sub-folders and `consolidated` files repeat the same weights in other formats.
_NOT_NEEDED = ("*/*", "consolidated*.safetensors")


def resolve_model(model: str, revision: str | None = None) -> Path:
    """The local folder of a model, downloaded first if need be.

    Args:
        model: `demo` (comes with the package), a local directory or GGUF file, or a hub id such as `Qwen/Qwen3-0.6B`.
            Of a repository with GGUF files, `owner/name:Q8_0` is the one whose name ends so, with all its parts; where
            there is but one and nothing else, `owner/name` will do. Only the files that are needed are downloaded.
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
    """The folder made from a GGUF file, or from the only one in a directory that has no config.json; parts are one."""
    path = os.path.expanduser(model)
    if model.endswith(".gguf") and os.path.isfile(path):
        return gguf_folder(Path(path))
    if os.path.isdir(path) and not os.path.exists(os.path.join(path, "config.json")):
        models = list(group_parts(file.name for file in Path(path).glob("*.gguf")).values())
        if len(models) > 1:
            names = ", ".join(parts[0] for parts in models[:5])
            raise CheckpointError(f"{path}: has {len(models)} GGUF files, give the path of one: {names}")
        return gguf_folder(Path(path, models[0][0])) if models else None
    return None


def _local_directory(model: str) -> Path | None:
    # os.path.isdir answers False where Path.is_dir raises: a name too long, a NUL in it, a folder we may not enter.
    path = os.path.expanduser(model)
    return Path(path) if os.path.isdir(path) else None


def _download(model: str, revision: str | None) -> Path:
    """Fetch what is missing of a hub repository into the hub's cache. A connection that breaks is taken up again where
    it broke. A download that is started anew keeps the files that are complete, and no others: the library gives each
    try a file of its own, as two processes may write to one where locks do not hold."""
    from huggingface_hub import snapshot_download

    repository, _, variant = model.partition(":")
    try:
        names = _names(repository, revision)
        gguf = _gguf_among(names, model, variant)
        needed, not_needed = [glob.escape(name) for name in gguf], list[str]()
        if not gguf:
            needed, not_needed = list(_NEEDED), list(_NOT_NEEDED)
            if not any(fnmatch(name, "*.safetensors") and "/" not in name for name in names):
                needed.append(_NEEDED_WITHOUT_SAFETENSORS)
        folder = Path(
            snapshot_download(repository, revision=revision, allow_patterns=needed, ignore_patterns=not_needed)
        )
    except CheckpointError:
        raise
    except Exception as error:
        # The library lets errors of its HTTP, cache and transfer layers through; all of them mean "no model".
        what = f"model {shown(model)}" + (f" at revision {shown(revision)}" if revision is not None else "")
        raise CheckpointError(f"{what}: no such local directory, and {_advice(error)}") from error
    return gguf_folder(folder / gguf[0]) if gguf else folder


def _names(repository: str, revision: str | None) -> list[str]:
    """Files of a repository, as the hub lists them; or last did, if it does not answer."""
    from huggingface_hub import HfApi, errors, get_cached_repo_tree

    try:
        info = HfApi().model_info(repository, revision=revision or "main")
        return [file.rfilename for file in info.siblings or ()]
    except errors.HFValidationError:
        raise
    except Exception as error:
        if isinstance(error, errors.HfHubHTTPError) and error.response.status_code < 500:
            raise
        try:
            return [entry.path for entry in get_cached_repo_tree(repository, revision=revision)]
        except errors.CachedRepoTreeNotFoundError:
            raise error from None


def _gguf_among(names: Sequence[str], model: str, variant: str) -> list[str]:
    """The GGUF file that is meant, or all its parts, also in a sub-folder; none: a folder with config.json is.

    Raises:
        CheckpointError: several may be meant, none has this ending, or a part is missing.
    """
    files = group_parts(name for name in names if name.endswith(".gguf"))
    if not variant and (not files or "config.json" in names):
        return []
    endings = (f"-{variant}.gguf".lower(), f".{variant}.gguf".lower())
    found = [name for name in files if name.lower().endswith(endings)] if variant else list(files)
    if len(found) == 1:
        parts = files[found[0]]
        wanted = GgufName.of(parts[0]).num_parts
        if len(parts) != wanted:
            raise CheckpointError(f"model {shown(model)}: {shown(found[0])} has {wanted} parts, {len(parts)} are there")
        return parts
    some = ", ".join(map(shown, list(files)[:8])) + (f" and {len(files) - 8} more" if len(files) > 8 else "")
    raise CheckpointError(
        f"model {shown(model)}: {len(found)} GGUF files are meant, expected one of {some or 'none that are there'}: "
        "give the end of its name, as in owner/name:Q8_0"
    )


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
        "(complete files are kept), or give a local directory"
    )

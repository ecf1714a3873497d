"""From a GGUF file to a checkpoint folder: its metadata says what config.json, tokenizer.json and the others would.

The rest of the engine, and an ingress, then need not know that there is such a format.
"""

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from engine.errors import CheckpointError
from engine.weights.gguf_file import GgufFile
from engine.weights.gguf_metadata import GgufMetadata
from engine.weights.gguf_parts import GGUF_NAME, part_name, part_paths, read_parts
from engine.weights.gguf_tokenizer import special_tokens, tokenizer_of
from engine.weights.messages import shown
from kernels.cache_folder import cache_folder

FORMAT_VERSION = 2
"""Changes when the files written here do."""
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""How all Llama 3.1 to 3.3 stretch their rotary embedding, but for the factor."""


def gguf_folder(path: Path) -> Path:
    """A folder with the files that describe the model, and links to the weights; made once for a file.

    Args:
        path: of the file, or of any part of it.

    Raises:
        CheckpointError: a file is missing or damaged, or holds no model that is supported.
    """
    paths = [part.resolve() for part in part_paths(path.absolute())]
    try:
        seen = [(str(part), status.st_size, status.st_mtime_ns) for part in paths for status in (part.stat(),)]
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error
    parent = cache_folder()
    folder = parent / f"gguf-{hashlib.sha256(repr((FORMAT_VERSION, seen)).encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        _write_all(read_parts(path.absolute()), made)
        for number, part in enumerate(paths, start=1):
            (made / part_name(GGUF_NAME, number, len(paths))).symlink_to(part)
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():  # another process was faster
                raise
            shutil.rmtree(made)
    return folder


def _write_all(files: list[GgufFile], folder: Path) -> None:
    metadata = GgufMetadata(files[0])
    architecture = metadata.get("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{metadata.path}: architecture {shown(architecture)} is not supported, expected {', '.join(ARCHITECTURES)}"
        )
    holder = {name: file for file in files for name in file.tensors}
    num_tokens = len(metadata.texts("tokenizer.ggml.tokens"))
    config = _config(metadata, architecture, num_tokens, is_tied="output.weight" not in holder)
    if config["num_hidden_layers"] > len(holder):
        raise CheckpointError(
            f"{metadata.path}: {architecture}.block_count is {config['num_hidden_layers']:,}, expected at most the "
            f"{len(holder):,} tensors that there are: damaged; download it again"
        )
    if "rope_freqs.weight" in holder:
        config["rope_scaling"] = _llama3_scaling(holder["rope_freqs.weight"], config)
    eos = metadata.find("tokenizer.ggml.eos_token_id", int)
    template = metadata.find("tokenizer.chat_template", str)
    _write(folder, "config.json", config)
    _write(folder, "generation_config.json", {} if eos is None else {"eos_token_id": eos})
    _write(
        folder,
        "tokenizer_config.json",
        special_tokens(metadata) | ({} if template is None else {"chat_template": template}),
    )
    tokenizer_of(metadata).save(str(folder / "tokenizer.json"))


def _config(metadata: GgufMetadata, architecture: str, vocab_size: int, is_tied: bool) -> dict[str, Any]:
    """config.json."""

    def required(name: str, kind: type) -> Any:
        return metadata.get(f"{architecture}.{name}", kind)

    num_heads = required("attention.head_count", int)
    config = {
        "architectures": [ARCHITECTURES[architecture]],
        "vocab_size": vocab_size,
        "hidden_size": required("embedding_length", int),
        "intermediate_size": required("feed_forward_length", int),
        "num_hidden_layers": required("block_count", int),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.find(f"{architecture}.attention.head_count_kv", int) or num_heads,
        "max_position_embeddings": required("context_length", int),
        "rms_norm_eps": required("attention.layer_norm_rms_epsilon", float),
        "rope_theta": metadata.find(f"{architecture}.rope.freq_base", float) or 10_000.0,
        "tie_word_embeddings": is_tied,
    }
    if architecture == "qwen3moe":
        config |= {
            "num_experts": required("expert_count", int),
            "num_experts_per_tok": required("expert_used_count", int),
            "moe_intermediate_size": required("expert_feed_forward_length", int),
            "norm_topk_prob": True,  # of all models of this architecture
        }
    head_dim = metadata.find(f"{architecture}.attention.key_length", int)
    if head_dim is not None:
        config["head_dim"] = head_dim
    scaling = metadata.find(f"{architecture}.rope.scaling.type", str)
    if scaling not in (None, "none"):
        config["rope_scaling"] = {
            "rope_type": scaling,
            "factor": metadata.find(f"{architecture}.rope.scaling.factor", float),
            "original_max_position_embeddings": metadata.find(
                f"{architecture}.rope.scaling.original_context_length", int
            ),
        }
    return config


def _llama3_scaling(file: GgufFile, config: dict[str, Any]) -> dict[str, Any]:
    """What the divisors of frequencies in a file say: they are Llama 3's, with a factor that the largest one is."""
    tensor = file.tensors["rope_freqs.weight"]
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    end = tensor.offset + 2 * head_dim
    if tensor.type_id != 0 or tensor.shape != (head_dim // 2,) or end > file.num_bytes:
        raise CheckpointError(f"{file.path}: rope_freqs.weight is {tensor.shape}, expected {head_dim // 2} of float32")
    found = np.fromfile(file.path, np.dtype("<f4"), count=head_dim // 2, offset=tensor.offset)
    factor = float(found.max())
    frequencies = config["rope_theta"] ** -(np.arange(head_dim // 2) * 2 / head_dim)
    turns = LLAMA3["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = LLAMA3["low_freq_factor"], LLAMA3["high_freq_factor"]
    kept = ((turns - low) / (high - low)).clip(0, 1)
    if not (factor >= 1 and np.allclose(found, 1 / ((1 - kept) / factor + kept), rtol=1e-3)):
        raise CheckpointError(
            f"{file.path}: rope_freqs.weight is not as in Llama 3, expected its scaling of frequencies"
        )
    return LLAMA3 | {"rope_type": "llama3", "factor": factor}


def _write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")

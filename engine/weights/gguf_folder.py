"""From a GGUF file to a checkpoint folder: its metadata says what config.json, tokenizer.json and the others would.

The rest of the engine, and an ingress, then need not know that there is such a format.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import CheckpointError
from engine.weights.gguf_checkpoint import GGUF_NAME
from engine.weights.gguf_file import GgufFile
from engine.weights.messages import shown
from kernels.cache_folder import cache_folder

FORMAT_VERSION = 1
"""Changes when the files written here do."""
ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen3moe": "Qwen3MoeForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""How all Llama 3.1 to 3.3 stretch their rotary embedding, but for the factor."""
SPLIT_PATTERNS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""How text is cut into words before they are cut into tokens, by `tokenizer.ggml.pre`."""
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5
"""Kinds of tokens that are not pieces of text."""


def gguf_folder(path: Path) -> Path:
    """A folder with the files that describe the model, and a link to the weights; made once for a file.

    Raises:
        CheckpointError: the file is damaged, or holds no model that is supported.
    """
    path = path.resolve()
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    identity = repr((FORMAT_VERSION, str(path), status.st_size, status.st_mtime_ns))
    parent = cache_folder()
    folder = parent / f"gguf-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        _write_all(GgufFile(path), made)
        (made / GGUF_NAME).symlink_to(path)
        try:
            os.rename(made, folder)
        except OSError:
            if not folder.is_dir():  # another process was faster
                raise
            shutil.rmtree(made)
    return folder


def _write_all(file: GgufFile, folder: Path) -> None:
    metadata = _Metadata(file)
    architecture = metadata.get("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{file.path}: architecture {shown(architecture)} is not supported, expected {', '.join(ARCHITECTURES)}"
        )
    tokens = metadata.get("tokenizer.ggml.tokens", list)
    eos = metadata.find("tokenizer.ggml.eos_token_id", int)
    config = _config(metadata, architecture, len(tokens), is_tied="output.weight" not in file.tensors)
    if "rope_freqs.weight" in file.tensors:
        config["rope_scaling"] = _llama3_scaling(file, config)
    _write(folder, "config.json", config)
    _write(folder, "generation_config.json", {} if eos is None else {"eos_token_id": eos})
    _write(folder, "tokenizer_config.json", _tokenizer_config(metadata, tokens))
    _tokenizer(metadata, tokens).save(str(folder / "tokenizer.json"))


def _config(metadata: "_Metadata", architecture: str, vocab_size: int, is_tied: bool) -> dict[str, Any]:
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


def _tokenizer_config(metadata: "_Metadata", tokens: list[str]) -> dict[str, Any]:
    """tokenizer_config.json."""
    config: dict[str, Any] = {}
    template = metadata.find("tokenizer.chat_template", str)
    if template is not None:
        config["chat_template"] = template
    for name, key in {"eos_token": "eos", "pad_token": "padding", "bos_token": "bos"}.items():
        token_id = metadata.find(f"tokenizer.ggml.{key}_token_id", int)
        if token_id is not None:
            config[name] = _token(metadata, tokens, token_id)
    return config


def _tokenizer(metadata: "_Metadata", tokens: list[str]) -> Tokenizer:
    """tokenizer.json: byte-level BPE, the one kind that these models have."""
    model = metadata.get("tokenizer.ggml.model", str)
    split = metadata.get("tokenizer.ggml.pre", str)
    if model != "gpt2" or split not in SPLIT_PATTERNS:
        raise CheckpointError(
            f"{metadata.path}: tokenizer {shown(model)} with pre-tokenizer {shown(split)} is not supported, expected "
            f"'gpt2' with {' or '.join(map(repr, SPLIT_PATTERNS))}"
        )
    kinds = metadata.get("tokenizer.ggml.token_type", list)
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", list)]
    if len(kinds) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise CheckpointError(f"{metadata.path}: {len(tokens)} tokens and {len(kinds)} token types: damaged")
    vocabulary = {token: index for index, token in enumerate(tokens) if kinds[index] != _UNUSED}
    try:
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama-bpe"))
    except Exception as error:
        raise CheckpointError(f"{metadata.path}: tokenizer: {' '.join(str(error).split())[:300]}") from None
    if split == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERNS[split]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for kind, add in _ADDED.items():
        add(tokenizer, [token for index, token in enumerate(tokens) if kinds[index] == kind])
    adds_bos = metadata.find("tokenizer.ggml.add_bos_token", bool)
    if adds_bos or (adds_bos is None and split == "llama-bpe"):
        bos = metadata.get("tokenizer.ggml.bos_token_id", int)
        text = _token(metadata, tokens, bos)
        tokenizer.post_processor = processors.TemplateProcessing(single=[text, "$A"], special_tokens=[(text, bos)])
    return tokenizer


_ADDED: dict[int, Callable[[Tokenizer, list[str]], object]] = {
    _CONTROL: lambda tokenizer, texts: tokenizer.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in texts]
    ),
    _USER_DEFINED: lambda tokenizer, texts: tokenizer.add_tokens(
        [AddedToken(text, special=False, normalized=False) for text in texts]
    ),
}


def _token(metadata: "_Metadata", tokens: list[str], token_id: int) -> str:
    if not 0 <= token_id < len(tokens):
        raise CheckpointError(f"{metadata.path}: names token {token_id}, expected one of {len(tokens):,}")
    return tokens[token_id]


def _write(folder: Path, name: str, content: dict[str, Any]) -> None:
    (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


class _Metadata:
    """The file's metadata, by key and kind of value."""

    def __init__(self, file: GgufFile) -> None:
        self.path = file.path
        self._values = file.metadata

    def find(self, key: str, kind: type) -> Any:
        """The value, or None if there is none."""
        value = self._values.get(key)
        if value is None or (type(value) is kind):
            return value
        raise CheckpointError(f"{self.path}: {key} is {shown(repr(value))}, expected a {kind.__name__}")

    def get(self, key: str, kind: type) -> Any:
        """The value, which must be there."""
        value = self.find(key, kind)
        if value is None:
            raise CheckpointError(f"{self.path}: has no {key}: not a file with a language model, or damaged")
        return value

"""From the metadata of a GGUF file to tokenizer.json: byte-level BPE as in Qwen and Llama 3, or SentencePiece's as in
Llama 2 and Mistral."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from engine.errors import CheckpointError
from engine.tokenizer_files import is_library_failure, one_line
from engine.weights.gguf_metadata import GgufMetadata
from engine.weights.messages import shown

SPLIT_PATTERNS = {
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+",
}
"""How text is cut into words before they are cut into byte-level tokens, by `tokenizer.ggml.pre`."""
MAX_PIECE_CHARACTERS = 256
"""Of a token of SentencePiece, which is searched for the tokens that it can be made of. Its trainer's default is 16."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
"""Kinds of tokens; 6 are single bytes."""
_MERGES = "tokenizer.ggml.merges"
_SPACE = "▁"
"""What SentencePiece writes for a space."""


def tokenizer_of(metadata: GgufMetadata) -> Tokenizer:
    """The tokenizer that a file describes.

    Raises:
        CheckpointError: it is of an unknown kind, or damaged.
    """
    tokens = metadata.texts("tokenizer.ggml.tokens")
    kinds = metadata.numbers("tokenizer.ggml.token_type")
    if len(kinds) != len(tokens):
        raise CheckpointError(f"{metadata.path}: {len(tokens)} tokens and {len(kinds)} token types: damaged")
    model = metadata.get("tokenizer.ggml.model", str)
    split = metadata.find("tokenizer.ggml.pre", str)
    is_sentencepiece = model == "llama"
    if not is_sentencepiece and (model != "gpt2" or split not in SPLIT_PATTERNS):
        raise CheckpointError(
            f"{metadata.path}: tokenizer {shown(model)} with pre-tokenizer {shown(str(split))} is not supported, "
            f"expected 'llama', or 'gpt2' with {' or '.join(map(repr, SPLIT_PATTERNS))}"
        )
    try:
        made = _sentencepiece(metadata, tokens, kinds) if is_sentencepiece else _byte_level(metadata, tokens, kinds)
        for kind, add in _ADDED.items():
            add(made, [tokens[index] for index in np.flatnonzero(kinds == kind)])
        _add_ends(metadata, tokens, made, adds_bos=is_sentencepiece or split == "llama-bpe")
    except CheckpointError:
        raise
    except BaseException as error:
        if not is_library_failure(error):
            raise
        raise CheckpointError(f"{metadata.path}: tokenizer: {one_line(error)}") from None
    return made


def special_tokens(metadata: GgufMetadata) -> dict[str, str]:
    """The texts of the tokens that the file names, by their names in tokenizer_config.json."""
    tokens = metadata.texts("tokenizer.ggml.tokens")
    found = {}
    for name, key in {"eos_token": "eos", "pad_token": "padding", "bos_token": "bos", "unk_token": "unknown"}.items():
        text = _named_token(metadata, tokens, key)
        if text is not None:
            found[name] = text
    return found


def _byte_level(metadata: GgufMetadata, tokens: list[str], kinds: np.ndarray) -> Tokenizer:
    """Bytes, spelled as characters, are merged in the order of the file's merges."""
    split = metadata.get("tokenizer.ggml.pre", str)
    merges = [(left, right) for left, _, right in (text.partition(" ") for text in metadata.texts(_MERGES))]
    vocabulary = _vocabulary(tokens, kinds)
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=split == "llama-bpe"))
    if split == "qwen2":
        made.normalizer = normalizers.NFC()
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERNS[split]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    made.decoder = decoders.ByteLevel()
    return made


def _sentencepiece(metadata: GgufMetadata, tokens: list[str], kinds: np.ndarray) -> Tokenizer:
    """Characters are merged in the order of the scores of what they become; bytes stand for those without a token."""
    scores = metadata.numbers("tokenizer.ggml.scores").astype(np.float64)
    if len(scores) != len(tokens) or not np.isfinite(scores).all():
        raise CheckpointError(
            f"{metadata.path}: {len(tokens)} tokens and {len(scores)} scores, expected a finite one for each: damaged"
        )
    has_prefix = metadata.find("tokenizer.ggml.add_space_prefix", bool) is not False
    made = Tokenizer(
        models.BPE(
            vocab=_vocabulary(tokens, kinds),
            merges=list(_merges(metadata, tokens, kinds, scores)),
            unk_token=_named_token(metadata, tokens, "unknown"),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaces: list[Any] = [normalizers.Prepend(_SPACE)] if has_prefix else []
    made.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", _SPACE)])
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if has_prefix else steps)
    return made


def _merges(
    metadata: GgufMetadata, tokens: list[str], kinds: np.ndarray, scores: np.ndarray
) -> Iterator[tuple[str, str]]:
    """Each pair of tokens that makes a third one, the pairs of better ones first."""
    ids = {tokens[index]: int(index) for index in np.flatnonzero(kinds == _NORMAL)}
    for token, index in sorted(ids.items(), key=lambda item: (-scores[item[1]], item[1])):
        if len(token) > MAX_PIECE_CHARACTERS:
            raise CheckpointError(
                f"{metadata.path}: token {index} has {len(token):,} characters, expected at most {MAX_PIECE_CHARACTERS}"
            )
        pairs = ((token[:place], token[place:]) for place in range(1, len(token)))
        known = [(ids[left], ids[right], left, right) for left, right in pairs if left in ids and right in ids]
        yield from ((left, right) for _, _, left, right in sorted(known))


def _vocabulary(tokens: list[str], kinds: np.ndarray) -> dict[str, int]:
    return {tokens[index]: int(index) for index in np.flatnonzero(kinds != _UNUSED)}


def _add_ends(metadata: GgufMetadata, tokens: list[str], made: Tokenizer, adds_bos: bool) -> None:
    """What is put around a text: a beginning by default if `adds_bos`, an end only where the file says so."""
    pieces, special = ["$A"], []
    for name, place, default in (("bos", 0, adds_bos), ("eos", 2, False)):
        says = metadata.find(f"tokenizer.ggml.add_{name}_token", bool)
        if says or (says is None and default):
            token_id = metadata.get(f"tokenizer.ggml.{name}_token_id", int)
            text = _token(metadata, tokens, token_id)
            pieces.insert(place, text)
            special.append((text, token_id))
    if special:
        made.post_processor = processors.TemplateProcessing(single=pieces, special_tokens=special)


_ADDED: dict[int, Callable[[Tokenizer, list[str]], object]] = {
    _UNKNOWN: lambda made, texts: made.add_special_tokens(_added(texts, special=True)),
    _CONTROL: lambda made, texts: made.add_special_tokens(_added(texts, special=True)),
    _USER_DEFINED: lambda made, texts: made.add_tokens(_added(texts, special=False)),
}


def _added(texts: list[str], special: bool) -> list[AddedToken]:
    return [AddedToken(text, special=special, normalized=False) for text in texts]


def _named_token(metadata: GgufMetadata, tokens: list[str], name: str) -> str | None:
    """The text of the token that is the file's `eos`, or the like."""
    token_id = metadata.find(f"tokenizer.ggml.{name}_token_id", int)
    return None if token_id is None else _token(metadata, tokens, token_id)


def _token(metadata: GgufMetadata, tokens: list[str], token_id: int) -> str:
    if not 0 <= token_id < len(tokens):
        raise CheckpointError(f"{metadata.path}: names token {token_id}, expected one of {len(tokens):,}")
    return tokens[token_id]

"""Tokenizers of SentencePiece in GGUF files, and metadata that would cost too much or means nothing."""

from itertools import pairwise

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, trainers
from transformers import LlamaTokenizer
from transformers.convert_slow_tokenizer import generate_merges

from engine import CheckpointError
from engine.tokenizer import Tokenizer
from engine.weights import gguf_checkpoint
from engine.weights.gguf_checkpoint import GgufCheckpoint
from engine.weights.gguf_file import MAX_HEADER_BYTES, GgufFile
from engine.weights.gguf_folder import gguf_folder
from engine.weights.gguf_metadata import GgufMetadata
from engine.weights.gguf_tokenizer import tokenizer_of

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
PROSE = "the engine reads a file, and then the engine writes another file: there are 12 of them. naïve 世界 " * 3


def make_pieces():
    """Tokens, scores and kinds as a trainer of SentencePiece leaves them: the earlier, the better."""
    trained = Backend(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator([PROSE], trainers.BpeTrainer(vocab_size=140, show_progress=False))
    vocabulary = trained.get_vocab()
    by_age = sorted((text for text in vocabulary if not {"世", "界"} & {*text}), key=lambda text: vocabulary[text])
    pieces = sorted(by_age, key=lambda text: len(text) == 1)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<tool>", "[INST]", *pieces, "spare"]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, USER_DEFINED, CONTROL, *[NORMAL] * len(pieces), UNUSED]
    return tokens, [0.0] * 261 + [-float(index) for index in range(len(pieces) + 1)], kinds


TOKENS, SCORES, KINDS = make_pieces()
IDS = {token: index for index, token in enumerate(TOKENS) if KINDS[index] == NORMAL}


def write(path, **changes):
    """A file that says all of a Llama 2, but has no weights to speak of."""
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_context_length, 512), (writer.add_embedding_length, 64), (writer.add_block_count, 1),
        (writer.add_feed_forward_length, 96), (writer.add_head_count, 4), (writer.add_layer_norm_rms_eps, 1e-6),
    ):  # fmt: skip
        add(value)
    writer.add_tokenizer_model(changes.get("model", "llama"))
    writer.add_tokenizer_pre(changes.get("pre", "default"))
    writer.add_token_list(changes.get("tokens", TOKENS))
    writer.add_token_types(changes.get("kinds", KINDS))
    if "scores" not in changes or changes["scores"]:
        writer.add_token_scores(changes.get("scores", SCORES))
    if "merges" in changes:
        writer.add_array("tokenizer.ggml.merges", changes["merges"])
    writer.add_bos_token_id(changes.get("bos", 1))
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    for key in ("add_space_prefix", "add_eos_token"):
        if key in changes:
            writer.add_bool(f"tokenizer.ggml.{key}", changes[key])
    writer.add_tensor("output_norm.weight", np.zeros(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path):
    return tokenizer_of(GgufMetadata(GgufFile(path)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return read(write(tmp_path_factory.mktemp("llama") / "model.gguf"))


def by_definition(text):
    """Of neighbours that make a token, the best pair is merged, the first of several; and so on until there is none."""
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        scored = [(SCORES[IDS[a + b]], -place) for place, (a, b) in enumerate(pairwise(parts)) if a + b in IDS]
        if not scored:
            return [
                token_id
                for part in parts
                for token_id in ([IDS[part]] if part in IDS else [3 + byte for byte in part.encode()])
            ]
        place = -max(scored)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


WORDS = st.sampled_from([*PROSE.split(), " ", "  ", "th", "e", "\n", "世", "😀", "▁", "é", "spare"])


@settings(max_examples=50)
@given(st.lists(WORDS, min_size=1, max_size=8).map("".join))
def test_pieces_are_merged_by_their_scores(llama, text):
    ids = by_definition(text)
    assert llama.encode(text, add_special_tokens=False).ids == ids
    assert llama.encode(text).ids == [1, *ids]
    assert llama.decode(ids) == text.replace("▁", " ")


def test_it_is_what_transformers_makes_of_the_same_pieces(llama):
    """Texts that begin with a space get another one here, as SentencePiece gives them, and none there."""
    vocabulary = {token: index for index, token in enumerate(TOKENS)}
    scores = [(token, SCORES[index]) for token, index in IDS.items()]
    other = LlamaTokenizer(vocab=vocabulary, merges=generate_merges(IDS, scores), legacy=True)
    for text in ("the engine", "then  there are\n\n12", "naïve 世界 😀", "a", "written there, then"):
        ids = llama.encode(text, add_special_tokens=False).ids
        assert ids == other(text, add_special_tokens=False)["input_ids"]
        assert llama.decode(ids) == other.decode(ids) == text


def test_the_engine_reads_it_from_the_file_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.weights.gguf_folder.cache_folder", lambda: tmp_path)
    tokenizer = Tokenizer.from_dir(gguf_folder(write(tmp_path / "a.gguf")))
    ids = tokenizer.encode("[INST] the engine<tool>世 spare", add_special_tokens=True)
    assert ids[:2] == [1, TOKENS.index("[INST]")] and TOKENS.index("<tool>") in ids
    assert TOKENS.index("spare") not in ids
    assert b"".join(map(tokenizer.token_bytes, ids)) == "<s>[INST]  the engine<tool> 世 spare".encode()
    other = Tokenizer.from_dir(gguf_folder(write(tmp_path / "b.gguf", add_space_prefix=False, add_eos_token=True)))
    ids = other.encode(" the", add_special_tokens=True)
    assert ids == [1, *by_definition("the"), 2] and other.decode(ids) == " the"


BYTES = [chr(0x21 + index) for index in range(20)]
CYCLE = {"model": "gpt2", "pre": "qwen2", "tokens": [*BYTES, "!!", ""], "kinds": [NORMAL] * 22, "scores": []}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": SCORES[1:]}, "scores, expected a finite one for each"),
        ({"scores": [*SCORES[1:], float("nan")]}, "scores, expected a finite one for each"),
        ({"scores": []}, "has no tokenizer.ggml.scores"),
        ({"kinds": KINDS[1:]}, "token types: damaged"),
        ({"tokens": [*TOKENS[:-2], "x" * 10**6, "y"]}, "has 1,000,000 characters, expected at most 256"),
        ({"tokens": [3] * len(TOKENS)}, "tokenizer.ggml.tokens is .*, expected a list"),
        ({"tokens": [True] * len(TOKENS)}, "tokenizer.ggml.tokens is .*, expected texts"),
        ({"bos": 10**6}, "names token 1000000"),
        (CYCLE | {"merges": [True, False]}, "tokenizer.ggml.merges is .*, expected texts"),
        (CYCLE | {"merges": ["! !", "!! !"]}, "tokenizer: .*"),
        (CYCLE | {"merges": ["none"]}, "tokenizer: .*"),
    ],
)
def test_what_a_file_says_amiss_is_named(tmp_path, monkeypatch, changes, message):
    monkeypatch.setattr("engine.weights.gguf_folder.cache_folder", lambda: tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        gguf_folder(write(tmp_path / "model.gguf", **changes))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_merges_that_lead_back_to_themselves_end(tmp_path):
    """Tokens without a character, and the same one many times."""
    made = read(write(tmp_path / "model.gguf", **CYCLE, merges=["! !", *[" !!", "!! ", " "] * 2]))
    assert made.encode("!!!!" * 50).ids == [20] * 100


def number(value, size=8):
    return value.to_bytes(size, "little")


HUGE = 2**34
CLAIMS = {
    "tensors": number(HUGE) + number(0),
    "many tensors": number(2**20) + number(0),
    "entries": number(0) + number(HUGE),
    "key": number(0) + number(1) + number(HUGE),
    "text": number(0) + number(1) + number(1) + b"k" + number(8, 4) + number(HUGE),
    "bytes": number(0) + number(1) + number(1) + b"k" + number(9, 4) + number(0, 4) + number(HUGE),
    "texts": number(0) + number(1) + number(1) + b"k" + number(9, 4) + number(8, 4) + number(HUGE),
    "truths": number(0) + number(1) + number(1) + b"k" + number(9, 4) + number(7, 4) + number(HUGE),
    "lists": number(0) + number(1) + number(1) + b"k" + number(9, 4) + number(9, 4) + number(HUGE),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_large_file_does_not_make_large_claims_good(tmp_path, claim):
    """A file, mostly a hole, that could hold what its header claims."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + number(3, 4) + CLAIMS[claim])
    with path.open("r+b") as file:
        file.truncate(8 * HUGE)
    with pytest.raises(CheckpointError, match=rf"claims|{MAX_HEADER_BYTES:,}|value type 9"):
        GgufFile(path)


def test_experts_are_counted_one_by_one(tmp_path, monkeypatch):
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "qwen3moe")
    for layer in range(3):
        writer.add_tensor(f"blk.{layer}.ffn_up_exps.weight", np.zeros((50, 1, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    monkeypatch.setattr(gguf_checkpoint, "MAX_TENSORS", 100)
    with pytest.raises(CheckpointError, match="more than 100 tensors"):
        GgufCheckpoint(tmp_path / "model.gguf", np.float32)

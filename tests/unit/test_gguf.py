"""GGUF files, written with the gguf package from the demo model, and damaged ones."""

import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend

from engine import LLM, CheckpointError, SamplingParams
from engine.weights.gguf_checkpoint import GgufCheckpoint
from engine.weights.gguf_file import GgufFile
from engine.weights.gguf_folder import gguf_folder
from engine.weights.hub import resolve_model
from engine.weights.open_checkpoint import open_checkpoint
from kernels.cpu_build import load_library
from loadtest.demo_gguf import DEMO, NAMES, write

F32, F16, Q8_0, Q4_0 = (gguf.GGMLQuantizationType[name] for name in ("F32", "F16", "Q8_0", "Q4_0"))
ASKED = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gguf")
    return {kind.name: write(folder / f"{kind.name}.gguf", kind) for kind in (F32, F16, Q8_0, Q4_0)}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The same as one of `files`, in three."""
    folder = tmp_path_factory.mktemp("parts")
    write(folder / "demo-Q8_0.gguf", Q8_0, tensors_in_part=25)
    return sorted(folder.iterdir())


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    load_library()  # compiled where it always is
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(Path, "home", lambda: home)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_it_answers_as_the_checkpoint_it_was_made_from(files, kind):
    fields = {"dtype": "float32", "kv_cache_memory": 2**22, "max_model_len": 256}
    [expected] = LLM("demo", **fields).generate([ASKED], GREEDY)
    [answer] = LLM(str(files[kind]), **fields).generate([ASKED], GREEDY)
    assert "42" in expected.text
    assert (answer.text, answer.finish_reason) == (expected.text, expected.finish_reason)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0", "Q4_0"])
def test_every_tensor_is_what_the_library_says(files, kind):
    """Our reader and our names against those of the package."""
    checkpoint = GgufCheckpoint(files[kind], torch.float32)
    reader = gguf.GGUFReader(files[kind])
    expected = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    assert len(checkpoint.tensors) == len(expected) == len(load_file(DEMO / "model.safetensors"))
    for name, info in checkpoint.tensors.items():
        values = checkpoint.read(name)
        wanted = expected[NAMES.get_name(name, try_suffixes=(".weight",))]
        assert values.shape == info.shape and values.dtype == info.dtype
        assert np.array_equal(values.float().numpy(), wanted.reshape(values.shape))


TEXTS = ["What is 17 + 25?", "  two  spaces\n\nand lines ", "naïve 世界 😀", ASKED, "<think>x</think> <tool_call>"]


@pytest.mark.parametrize("text", TEXTS)
def test_its_tokenizer_is_that_of_the_checkpoint(files, text):
    made = Backend.from_file(str(gguf_folder(files["F32"]) / "tokenizer.json"))
    original = Backend.from_file(str(DEMO / "tokenizer.json"))
    ids = original.encode(text).ids
    assert made.encode(text).ids == ids
    for skip in (True, False):
        assert made.decode(ids, skip_special_tokens=skip) == original.decode(ids, skip_special_tokens=skip)


def test_the_folder_is_made_once_and_anew_when_the_file_changes(files, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(files["Q8_0"].read_bytes())
    folder = gguf_folder(path)
    assert gguf_folder(path) == folder == resolve_model(str(path)) == resolve_model(str(tmp_path))
    path.write_bytes(files["Q4_0"].read_bytes())
    assert gguf_folder(path) != folder
    (tmp_path / "other.gguf").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"has 2 GGUF files.*model\.gguf, other\.gguf"):
        resolve_model(str(tmp_path))


def test_what_is_not_supported_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="architecture 'mamba' is not supported, expected qwen3"):
        gguf_folder(write(tmp_path / "a.gguf", F16, architecture="mamba"))
    with pytest.raises(
        CheckpointError, match="pre-tokenizer 'chameleon' is not supported, expected 'llama', or 'gpt2' with 'qwen2'"
    ):
        gguf_folder(write(tmp_path / "b.gguf", F16, pre="chameleon"))
    with pytest.raises(CheckpointError, match="not an existing directory"):
        resolve_model(str(tmp_path / "none.gguf"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "too few"),
        (b"GGML" + bytes(40), "begins with b'GGML', expected b'GGUF'"),
        (b"GGUF" + (9).to_bytes(4, "little") + bytes(40), "version 9"),
        (b"GGUF" + (3).to_bytes(4, "little") + (2**60).to_bytes(8, "little") + bytes(40), "claims .* tensors"),
    ],
)
def test_what_is_no_gguf_file_is_said_so(tmp_path, content, message):
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        GgufFile(path)


def test_a_truncated_file_is_found_before_anything_is_loaded(files, tmp_path):
    whole = files["Q8_0"].read_bytes()
    path = tmp_path / "short.gguf"
    path.write_bytes(whole[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        GgufCheckpoint(path, torch.float32)


def test_parts_are_read_as_one(files, parts):
    """Whichever is given, also by a link with another name, or the folder that they are in."""
    assert [path.name for path in parts] == [f"demo-Q8_0-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
    whole = GgufCheckpoint(files["Q8_0"], torch.float32)
    for path in (parts[0], parts[2]):
        checkpoint = GgufCheckpoint(path, torch.float32)
        assert set(checkpoint.tensors) == set(whole.tensors)
        assert {info.file for info in checkpoint.tensors.values()} == {part.name for part in parts}
    assert all(torch.equal(checkpoint.read(name), whole.read(name)) for name in whole.tensors)
    folder = gguf_folder(parts[1])
    link = Path.home() / "mine.gguf"
    link.symlink_to(parts[2])
    assert folder == gguf_folder(link) == resolve_model(str(parts[0])) == resolve_model(str(parts[0].parent))
    assert (folder / "config.json").read_text() == (gguf_folder(files["Q8_0"]) / "config.json").read_text()
    loaded = open_checkpoint(folder, torch.float32)
    assert torch.equal(loaded.read("model.norm.weight"), whole.read("model.norm.weight"))


def test_parts_that_are_no_whole_are_refused(files, parts, tmp_path):
    first, second, third = (tmp_path / part.name for part in parts)
    for copy, part in zip((first, second, third), parts, strict=True):
        shutil.copy(part, copy)

    def error(path):
        with pytest.raises(CheckpointError) as caught:
            gguf_folder(path)
        return str(caught.value)

    lone = tmp_path / "lone.gguf"
    second.rename(lone)
    assert "demo-Q8_0-00002-of-00003.gguf: is missing, expected beside" in error(third)
    assert "lone.gguf: split.no is '1', expected 0 by its name" in error(lone)
    shutil.copy(third, second)
    assert "00002-of-00003.gguf: split.no is '2', expected 1 by its name" in error(first)
    shutil.copy(files["Q8_0"], second)
    assert "00002-of-00003.gguf: split.no is 'None', expected 1" in error(first)
    lone.rename(second)
    content = third.read_bytes()
    third.write_bytes(content.replace(b"split.count", b"split.cOunt"))
    assert "00003-of-00003.gguf: split.count is 'None', expected 3" in error(first)
    own = next(name for name in GgufFile(third).tensors if name.startswith("blk.4."))
    third.write_bytes(content.replace(own.encode(), own.replace("4", "0").encode()))
    assert f"has tensor '{own.replace('4', '0')}', as demo-Q8_0-00001-of-00003.gguf has" in error(second)
    head = first.read_bytes()
    place = head.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    first.write_bytes(head[:place] + (7).to_bytes(4, "little") + head[place + 4 :])
    third.write_bytes(content)
    assert "split.tensors.count is '7', its 3 parts have 57 tensors" in error(first)
    assert "is part 4 of 3 by its name" in error(third.rename(tmp_path / "demo-Q8_0-00004-of-00003.gguf"))


@settings(max_examples=40)
@given(data=st.data())
def test_damage_in_the_header_is_an_error_or_harmless(files, parts, tmp_path_factory, data):
    """No other exception, no hang, no allocation beyond the file's size; in any part of a file, too."""
    folder = tmp_path_factory.mktemp("damaged")
    original = data.draw(st.sampled_from([files["Q8_0"], *parts]))
    damaged = bytearray(original.read_bytes())
    head = min(tensor.offset for tensor in GgufFile(original).tensors.values())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, min(2000, head - 1)) | st.integers(max(0, head - 4000), head - 1))
        damaged[place] = data.draw(st.integers(0, 255))
    path = folder / original.name
    path.write_bytes(damaged)
    for part in parts if original in parts else ():
        if part != original:
            (folder / part.name).symlink_to(part)
    try:
        gguf_folder(path)
        checkpoint = GgufCheckpoint(path, torch.bfloat16)
        for name in list(checkpoint.tensors)[:3]:
            checkpoint.read(name)
    except CheckpointError as error:
        assert "\n" not in str(error)

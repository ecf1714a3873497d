"""Checkpoints that torch.save wrote."""

import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from engine import LLM, CheckpointError, SamplingParams
from engine.weights.torch_checkpoint import TorchCheckpoint

DEMO = Path(__file__).parents[2] / "engine" / "weights" / "demo"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((DEMO / name).read_bytes())
    return tmp_path


def save_shards(folder: Path) -> dict[str, torch.Tensor]:
    """Two files and their index, as transformers used to write them."""
    tensors = load_file(DEMO / "model.safetensors")
    names = list(tensors)
    shard_of = {name: f"pytorch_model-0000{1 + (index % 2)}-of-00002.bin" for index, name in enumerate(names)}
    for file in set(shard_of.values()):
        torch.save({name: tensors[name] for name in names if shard_of[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shard_of}))
    return tensors


@pytest.mark.parametrize("sharded", [False, True])
def test_it_is_read_as_the_same_tensors(folder, sharded):
    tensors = save_shards(folder) if sharded else load_file(DEMO / "model.safetensors")
    if not sharded:
        torch.save(tensors, folder / "pytorch_model.bin")
    checkpoint = TorchCheckpoint(folder)
    assert checkpoint.tensors.keys() == tensors.keys()
    for name, expected in tensors.items():
        assert torch.equal(checkpoint.read(name), expected)
    [answer] = LLM(str(folder), kv_cache_memory=2**22, max_model_len=64).generate(
        ["<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"], SamplingParams(temperature=0, max_tokens=8)
    )
    assert answer.token_ids


class _Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"a": _Harmful()}), "refused, as it holds more than tensors|damaged"),
        (b"nothing of the kind", "damaged, or not written by torch.save|refused"),
        (b"", "damaged"),
    ],
)
def test_nothing_in_a_file_is_executed(folder, content, message, capsys):
    (folder / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        TorchCheckpoint(folder)
    assert "\n" not in str(caught.value) and "executed" not in capsys.readouterr().out


def test_code_in_a_well_formed_file_is_refused(folder, capsys):
    torch.save({"a": _Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="refused, as it holds more than tensors"):
        TorchCheckpoint(folder)
    assert "executed" not in capsys.readouterr().out


def test_what_is_no_tensor_is_named(folder):
    torch.save({"model.norm.weight": [1, 2]}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"'model.norm.weight' is a list, expected a tensor"):
        TorchCheckpoint(folder)
    torch.save([1], folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="holds a list, expected named tensors"):
        TorchCheckpoint(folder)


def test_a_missing_shard_is_named(folder):
    save_shards(folder)
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-of-00002\.bin: is not there"):
        TorchCheckpoint(folder)


def test_a_truncated_file_is_an_error(folder):
    torch.save(load_file(DEMO / "model.safetensors"), folder / "pytorch_model.bin")
    whole = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        TorchCheckpoint(folder)

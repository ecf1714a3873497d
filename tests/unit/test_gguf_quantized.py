"""Which weights of a GGUF file stay quantized, and what that takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from engine import LLM, CheckpointError
from engine.config import EngineConfig
from engine.layers.linear import Linear
from engine.layers.quantized_linear import BlockLinear, Q4Linear, Q8Linear
from engine.model_config import ModelConfig
from engine.parallel.group import TensorParallel
from engine.weights.gguf_checkpoint import GgufCheckpoint
from engine.weights.gguf_folder import gguf_folder
from engine.weights.load_model import load_model
from kernels.cpu_build import load_library
from tests.unit.test_gguf_families import KINDS, write

CPU = torch.device("cpu")
LAYER = "model.layers.0."


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path_factory):
    load_library()
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setattr(Path, "home", lambda: home)


class Rank(TensorParallel):
    """One of several, for what is loaded: it has nobody to talk to."""

    def __init__(self, rank, size):
        self.rank, self.size = rank, size


def load(path, group=None, **fields):
    folder = gguf_folder(path)
    model_config = ModelConfig.from_dir(folder)
    config = EngineConfig(show_progress=False, **fields)
    return load_model(config, model_config, folder, CPU, torch.float32, None, group or TensorParallel())


def layers_of(model):
    return {
        name: type(layer) for name, layer in model.get_submodule(LAYER[:-1]).named_modules()
        if isinstance(layer, (Linear, BlockLinear))
    }  # fmt: skip


def test_each_layer_by_its_own_type(tmp_path):
    """What is computed at once and lies in several types is dequantized; so is the rest."""
    kinds = {"k_proj": KINDS["Q8_0"], "o_proj": KINDS["Q8_0"], "down_proj": KINDS["F16"]}
    path, _ = write(tmp_path, "qwen2", KINDS["Q4_0"], kinds=kinds)
    model = load(path)
    assert layers_of(model) == {
        "self_attn.qkv_proj": Linear, "self_attn.o_proj": Q8Linear,
        "mlp.gate_up_proj": Q4Linear, "mlp.down_proj": Linear,
    }  # fmt: skip
    assert model.model.embed_tokens.weight.dtype == model.lm_head.weight.dtype == torch.float32
    wide = GgufCheckpoint(path, torch.float32)
    q_proj = wide.read(f"{LAYER}self_attn.q_proj.weight")
    assert torch.equal(model.model.layers[0].self_attn.qkv_proj.weight[: len(q_proj)], q_proj)


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0"])
def test_ranks_hold_whole_blocks_or_dequantized_weights(tmp_path, kind):
    """The inner width, 96, is three blocks: two ranks cannot have half of them each. Attention's width is two."""
    path, _ = write(tmp_path, "llama", KINDS[kind])
    whole = load(path).model.layers[0]
    for rank in range(2):
        model = load(path, Rank(rank, 2))
        layers = layers_of(model)
        assert layers.pop("mlp.down_proj") is Linear
        assert set(layers.values()) == {Q8Linear if kind == "Q8_0" else Q4Linear}
        mine = model.model.layers[0]
        columns = whole.self_attn.o_proj.weight.chunk(2, dim=1)[rank]
        assert torch.equal(mine.self_attn.o_proj.weight, columns)
        assert torch.equal(mine.self_attn.o_proj.scale, whole.self_attn.o_proj.scale[rank : rank + 1])
        gate, up = whole.mlp.gate_up_proj.weight.chunk(2)
        assert torch.equal(mine.mlp.gate_up_proj.weight, torch.cat((gate.chunk(2)[rank], up.chunk(2)[rank])))


def test_rounding_while_loading_replaces_blocks(tmp_path):
    path, _ = write(tmp_path, "qwen2", KINDS["Q4_0"])
    layer = load(path, quantization="int8").model.layers[0].mlp.down_proj
    assert layer.weight.dtype == torch.int8 and "weight_scale" in dict(layer.named_parameters())


def test_a_scale_that_is_not_a_number_is_named(tmp_path):
    path, _ = write(tmp_path, "qwen2", KINDS["Q8_0"])
    offset = GgufCheckpoint(path, torch.float32)._found[f"{LAYER}mlp.down_proj.weight"].tensor.offset
    with path.open("r+b") as file:
        file.seek(offset + 34)
        file.write(np.float16("nan").tobytes())
    with pytest.raises(CheckpointError, match=r"model\.gguf: 'model.layers.0.mlp.down_proj'.*scale.* not finite"):
        LLM(str(path), dtype="float32", kv_cache_memory=2**22, show_progress=False, device="cpu")


MEASURE = """
import json, psutil, torch
from pathlib import Path
from engine.config import EngineConfig
from engine.model_config import ModelConfig
from engine.parallel.group import TensorParallel
from engine.weights.load_model import load_model

def load(folder):
    config = ModelConfig.from_dir(Path(folder))
    settings = EngineConfig(show_progress=False)
    return load_model(settings, config, Path(folder), torch.device("cpu"), torch.bfloat16, None, TensorParallel())

folders = {folders!r}
kept = [load(folder) for folder in folders]  # libraries set themselves up; nothing is freed that others could reuse
for folder in folders:
    before = psutil.Process().memory_info().rss
    kept.append(load(folder))
    resident = psutil.Process().memory_info().rss - before
    print(json.dumps([sum(parameter.nbytes for parameter in kept[-1].parameters()), resident]))
"""


def test_resident_memory_is_the_blocks(tmp_path):
    """Within 5 % of the arithmetic: 34 or 18 bytes for 32 weights, of linear layers and of experts."""
    dense = {"hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 2}
    experts = {"hidden_size": 512, "moe_intermediate_size": 1024, "num_experts": 8, "num_hidden_layers": 2}
    cases = (("qwen2", "Q8_0", dense), ("qwen3moe", "Q4_0", experts))
    paths = [write(tmp_path / f"{family} {kind}", family, KINDS[kind], sizes=sizes)[0] for family, kind, sizes in cases]
    folders = [str(gguf_folder(path)) for path in paths]
    result = subprocess.run(
        [sys.executable, "-c", MEASURE.format(folders=folders)],
        capture_output=True, text=True, check=False, timeout=120,
        env=os.environ | {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    vocab_size = ModelConfig.from_dir(Path(folders[0])).vocab_size
    linear = 2 * (1024 * (1024 + 512 + 512) + 1024 * 1024 + 3 * 1024 * 2048)
    unquantized = 2 * (2 * vocab_size * 1024 + 5 * 1024 + 2 * 2048)
    expected = [linear * 34 // 32 + unquantized]
    # Four heads of 32, two of keys and values, 8 experts of 1024; tied embeddings, routers, norms.
    linear = 2 * (512 * (128 + 64 + 64) + 128 * 512 + 8 * 3 * 512 * 1024)
    unquantized = 2 * (vocab_size * 512 + 2 * 8 * 512 + 5 * 512 + 2 * 2 * 32)
    expected.append(linear * 18 // 32 + unquantized)
    parameters, resident = zip(*map(json.loads, result.stdout.splitlines()), strict=True)
    print(f"{[wanted / 2**20 for wanted in expected]} MiB expected, {[found / 2**20 for found in resident]} resident")
    assert list(parameters) == expected
    # Of both: half a megabyte that an allocator keeps would be too much of one.
    assert sum(resident) == pytest.approx(sum(expected), rel=0.05)

"""Checkpoints into models: where tensors go, what is refused, and how much memory it takes."""

import json
import logging
import os
import struct
import sys
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from engine.errors import CheckpointError, ConfigError
from engine.weights.checkpoint import TensorInfo
from engine.weights.hub import resolve_model
from engine.weights.loader import load_weights
from engine.weights.safetensors_checkpoint import SafetensorsCheckpoint

CPU = torch.device("cpu")
HIDDEN, INNER, VOCAB = 8, 12, 16
Q_ROWS, KV_ROWS = 8, 4


class Linear(torch.nn.Module):
    def __init__(self, in_features, output_sizes, bias=False, sized=True):
        super().__init__()
        rows = sum(output_sizes)
        self.weight = torch.nn.Parameter(torch.empty(rows, in_features))
        if bias:
            self.bias = torch.nn.Parameter(torch.empty(rows))
        if sized:
            self.output_sizes = tuple(output_sizes)


class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(HIDDEN))


class Layer(torch.nn.Module):
    def __init__(self, bias, sized):
        super().__init__()
        self.self_attn = torch.nn.Module()
        self.self_attn.qkv_proj = Linear(HIDDEN, (Q_ROWS, KV_ROWS, KV_ROWS), bias, sized)
        self.self_attn.o_proj = Linear(Q_ROWS, (HIDDEN,))
        self.mlp = torch.nn.Module()
        self.mlp.gate_up_proj = Linear(HIDDEN, (INNER, INNER), sized=sized)
        self.mlp.down_proj = Linear(INNER, (HIDDEN,))
        self.input_layernorm = Norm()


class TinyModel(torch.nn.Module):
    packed_parameters: ClassVar = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    ignored_tensors: ClassVar = ("rotary_emb.inv_freq",)

    def __init__(self, num_layers=2, tied=True, bias=False, sized=True):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.embed_tokens = Linear(HIDDEN, (VOCAB,))
        self.model.layers = torch.nn.ModuleList(Layer(bias, sized) for _ in range(num_layers))
        self.model.norm = Norm()
        self.model.register_buffer("positions", torch.arange(3, device="cpu"))
        self.tied_parameters = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
        if not tied:
            self.lm_head = Linear(HIDDEN, (VOCAB,))


def on_meta(**options):
    with torch.device("meta"):
        return TinyModel(**options)


def checkpoint_tensors(num_layers=2, tied=True, bias=False, dtype=torch.float32):
    """What Hugging Face would save for `TinyModel`: unpacked names."""
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for index in range(num_layers):
        layer = f"model.layers.{index}."
        for name, rows in (("q", Q_ROWS), ("k", KV_ROWS), ("v", KV_ROWS)):
            shapes[f"{layer}self_attn.{name}_proj.weight"] = (rows, HIDDEN)
            if bias:
                shapes[f"{layer}self_attn.{name}_proj.bias"] = (rows,)
        shapes[f"{layer}self_attn.o_proj.weight"] = (HIDDEN, Q_ROWS)
        shapes[f"{layer}mlp.gate_proj.weight"] = shapes[f"{layer}mlp.up_proj.weight"] = (INNER, HIDDEN)
        shapes[f"{layer}mlp.down_proj.weight"] = (HIDDEN, INNER)
        shapes[f"{layer}input_layernorm.weight"] = (HIDDEN,)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def save_sharded(directory, tensors, num_shards):
    names = sorted(tensors)
    weight_map = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        part = names[shard::num_shards]
        save_file({name: tensors[name] for name in part}, directory / file)
        weight_map.update(dict.fromkeys(part, file))
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(directory, dtype=torch.float32, **options):
    model = on_meta(**options)
    load_weights(model, SafetensorsCheckpoint(directory), CPU, dtype, progress=False)
    return model


def assert_loaded(model, tensors, dtype=torch.float32):
    """Every parameter holds the rows of its parts in order, rounded to `dtype`."""
    for name, parameter in model.named_parameters():
        path, _, attribute = name.rpartition(".")
        parent, _, leaf = path.rpartition(".")
        parts = TinyModel.packed_parameters.get(leaf)
        names = [f"{parent}.{part}.{attribute}" for part in parts] if parts else [name]
        expected = torch.cat([tensors[part] for part in names]).to(dtype)
        assert parameter.dtype == dtype and not parameter.requires_grad and parameter.device == CPU
        assert torch.equal(parameter, expected), name


def error_of(action, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    return message


# ---- loading ----


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sized", [False, True])
@pytest.mark.parametrize("num_shards", [1, 3])
def test_every_parameter_is_filled(tmp_path, bias, tied, sized, num_shards):
    tensors = checkpoint_tensors(tied=tied, bias=bias)
    if num_shards == 1:
        save_file(tensors, tmp_path / "model.safetensors")
    else:
        save_sharded(tmp_path, tensors, num_shards)
    model = load(tmp_path, tied=tied, bias=bias, sized=sized)
    assert_loaded(model, tensors)
    assert torch.equal(model.model.positions, torch.arange(3))


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16)],
)
def test_values_are_cast(tmp_path, stored, dtype):
    tensors = checkpoint_tensors(dtype=stored)
    save_file(tensors, tmp_path / "model.safetensors")
    assert_loaded(load(tmp_path, dtype), tensors, dtype)


def test_redundant_lm_head_of_a_tied_model_is_accepted_and_not_read(tmp_path):
    tensors = checkpoint_tensors()
    save_file(tensors | {"lm_head.weight": torch.zeros(VOCAB, HIDDEN)}, tmp_path / "model.safetensors")
    assert_loaded(load(tmp_path), tensors)
    save_file(tensors | {"lm_head.weight": torch.zeros(VOCAB + 1, HIDDEN)}, tmp_path / "model.safetensors")
    message = error_of(lambda: load(tmp_path))
    assert "'lm_head.weight'" in message and "[17, 8]" in message and "[16, 8]" in message


def test_lm_head_stands_in_for_missing_tied_embedding(tmp_path):
    tensors = checkpoint_tensors()
    renamed = dict(tensors)
    renamed["lm_head.weight"] = renamed.pop("model.embed_tokens.weight")
    save_file(renamed, tmp_path / "model.safetensors")
    assert_loaded(load(tmp_path), tensors)


@pytest.mark.parametrize("tied", [False, True])
def test_base_model_names_without_prefix(tmp_path, tied):
    tensors = checkpoint_tensors(tied=tied)
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, tmp_path / "model.safetensors")
    assert_loaded(load(tmp_path, tied=tied), tensors)


def test_prefix_must_be_missing_everywhere(tmp_path):
    tensors = checkpoint_tensors()
    tensors["norm.weight"] = tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    message = error_of(lambda: load(tmp_path))
    assert "'model.norm.weight' is missing in model.safetensors" in message and "1 more" in message


def test_already_packed_and_ignored_tensors_are_accepted(tmp_path):
    tensors = checkpoint_tensors(num_layers=1)
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    packed = {name: tensor for name, tensor in tensors.items() if name not in names}
    packed["model.layers.0.self_attn.qkv_proj.weight"] = torch.cat([tensors[name] for name in names])
    packed["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3, dtype=torch.int64)
    save_file(packed, tmp_path / "model.safetensors")
    assert_loaded(load(tmp_path, num_layers=1), tensors)
    save_file(packed | {names[1]: tensors[names[1]]}, tmp_path / "model.safetensors")
    assert f"'{names[1]}' has no place in the model" in error_of(lambda: load(tmp_path, num_layers=1))


def test_a_log_line_and_no_progress_bar_for_a_fast_load(tmp_path, capfd, caplog):
    save_file(checkpoint_tensors(), tmp_path / "model.safetensors")
    with caplog.at_level(logging.INFO, "engine.weights.loader"):
        load_weights(on_meta(), SafetensorsCheckpoint(tmp_path), CPU, torch.float32)
    assert [record.message.split(" in ")[0] for record in caplog.records] == ["loaded 0.00 GB of weights"]
    assert "loading weights" not in capfd.readouterr().err


class InMemory:
    """Another checkpoint format, as the loader sees one; remembers what was read."""

    def __init__(self, tensors, infos=None):
        self._tensors = tensors
        self.tensors = infos or {name: TensorInfo("memory", tuple(t.shape), t.dtype) for name, t in tensors.items()}
        self.names_read = []

    def read(self, name):
        self.names_read.append(name)
        return self._tensors[name]


def test_after_loading_is_called_as_soon_as_a_module_is_complete():
    events = []

    class Repacked(Linear):
        def after_loading(self):
            others = [name for name, parameter in model.named_parameters() if not parameter.is_meta]
            events.append((self.output_sizes, others))
            self.packed_weight = self.weight.detach().clone()
            del self.weight

    class Model(torch.nn.Module):
        packed_parameters: ClassVar = {"first": ("a", "b")}

        def __init__(self):
            super().__init__()
            self.first = Repacked(2, (1, 2), bias=True)
            self.second = Repacked(2, (5,))
            self.unhooked = Linear(2, (3,))

        def after_loading(self):
            events.append("model")

    with torch.device("meta"):
        model = Model()
    tensors = {
        "a.weight": torch.ones(1, 2),
        "a.bias": torch.ones(1),
        "b.bias": torch.ones(2),
        "b.weight": torch.full((2, 2), 2.0),
        "second.weight": torch.ones(5, 2),
        "unhooked.weight": torch.ones(3, 2),
    }
    load_weights(model, InMemory(tensors), CPU, torch.float32, progress=False)
    assert events == [((1, 2), ["first.weight", "first.bias"]), ((5,), ["first.bias", "second.weight"]), "model"]
    assert model.first.packed_weight.tolist() == [[1, 1], [2, 2], [2, 2]]


# ---- what does not fit the model ----


@pytest.mark.parametrize(
    ("name", "tensor", "expected"),
    [
        ("model.norm.weight", None, ["'model.norm.weight' is missing in model.safetensors", "[8]"]),
        ("model.layers.1.self_attn.k_proj.weight", None, ["1.self_attn.k_proj.weight' is missing", "[4, 8]"]),
        ("model.layers.2.mlp.up_proj.weight", torch.ones(12, 8), ["'model.layers.2.mlp.up_proj.weight' has no place"]),
        (
            "model.layers.0.self_attn.k_proj.bias",
            torch.ones(4),
            ["'model.layers.0.self_attn.k_proj.bias' has no place"],
        ),
        ("model.norm.weight", torch.ones(9), ["'model.norm.weight'", "[9]", "expected [8]"]),
        ("model.layers.0.self_attn.v_proj.weight", torch.ones(5, 8), ["v_proj.weight'", "[5, 8]", "expected [4, 8]"]),
        ("model.layers.0.mlp.down_proj.weight", torch.ones(96), ["down_proj.weight'", "[96]", "expected [8, 12]"]),
        (
            "model.layers.0.mlp.down_proj.weight",
            torch.ones(8, 12, dtype=torch.int32),
            ["model.safetensors: tensor 'model.layers.0.mlp.down_proj.weight'", "int32", "float32", "quantized"],
        ),
        (
            "model.layers.0.mlp.down_proj.weight",
            torch.ones(8, 12).to(torch.float8_e4m3fn),
            ["down_proj.weight'", "float8_e4m3fn", "quantized"],
        ),
        ("lm_head.weight\nwith a very long name" + "x" * 10_000, torch.ones(1), ["\\nwith", "has no place"]),
    ],
)
def test_mismatch_is_named_before_anything_is_allocated(tmp_path, name, tensor, expected):
    tensors = checkpoint_tensors()
    tensors.pop(name, None)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, tmp_path / "model.safetensors")
    model = on_meta()
    checkpoint = SafetensorsCheckpoint(tmp_path)
    message = error_of(lambda: load_weights(model, checkpoint, CPU, torch.float32))
    assert all(text in message for text in expected) and "more such errors" not in message
    assert all(parameter.is_meta for parameter in model.parameters())


def test_packed_parts_without_declared_sizes_must_add_up(tmp_path):
    tensors = checkpoint_tensors(num_layers=1)
    tensors["model.layers.0.self_attn.v_proj.weight"] = torch.ones(5, HIDDEN)
    save_file(tensors, tmp_path / "model.safetensors")
    message = error_of(lambda: load(tmp_path, num_layers=1, sized=False))
    assert "8 + 4 + 5 = 17 rows, expected 16 for 'model.layers.0.self_attn.qkv_proj.weight'" in message
    tensors["model.layers.0.self_attn.v_proj.weight"] = torch.ones(4, HIDDEN + 1)
    save_file(tensors, tmp_path / "model.safetensors")
    message = error_of(lambda: load(tmp_path, num_layers=1, sized=False))
    assert "v_proj.weight' has shape [4, 9], expected [any, 8]" in message


def test_first_of_many_problems_is_named_and_the_rest_counted(tmp_path):
    save_sharded(tmp_path, checkpoint_tensors(num_layers=1), 2)
    message = error_of(lambda: load(tmp_path, num_layers=2))
    assert "'model.layers.1.self_attn.q_proj.weight' is missing in" in message
    assert "and 1 more files" in message and "(7 more such errors)" in message


def test_weights_beyond_free_memory_are_refused():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.huge = Linear(2**20, (2**24,))

    with torch.device("meta"):
        model = Model()
    checkpoint = InMemory({}, {"huge.weight": TensorInfo("memory", (2**24, 2**20), torch.bfloat16)})
    message = error_of(lambda: load_weights(model, checkpoint, CPU, torch.bfloat16), ConfigError)
    assert "35,184.4 GB of host memory as bfloat16" in message
    assert checkpoint.names_read == []


# ---- damaged files ----


def write_safetensors(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype="F32", shape=(2, 2), offsets=(0, 16)):
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "length", "expected"),
    [
        ({"a": entry()}, b"\0" * 12, None, ["'a' ends at byte 16", "only 12 bytes", "truncated"]),
        ({"a": entry()}, b"\0" * 20, None, ["20 bytes of data", "need 16"]),
        ({"a": entry(), "b": entry(offsets=(8, 24))}, b"\0" * 24, None, ["'b' starts at byte 8", "expected 16"]),
        ({"a": entry(), "b": entry(offsets=(20, 36))}, b"\0" * 36, None, ["'b' starts at byte 20", "expected 16"]),
        ({"a": entry(shape=(3, 3))}, b"\0" * 16, None, ["'a' has 16 bytes, expected 36 for float32 [3, 3]"]),
        ({"a": entry(offsets=(16, 0))}, b"\0" * 16, None, ["'a' has -16 bytes, expected 16"]),
        ({"a": entry(shape=(-2, -2))}, b"\0" * 16, None, ["'a' has no usable shape"]),
        ({"a": entry(shape=(2**62, 2**62))}, b"\0" * 16, None, ["'a' has no usable shape"]),
        ({"a": entry(shape="22")}, b"\0" * 16, None, ["'a' has no usable shape"]),
        ({"a": entry(shape=(True, 4))}, b"\0" * 16, None, ["'a' has no usable shape"]),
        ({"a": entry(offsets=(0, 16, 16))}, b"\0" * 16, None, ["'a' has no usable data_offsets"]),
        ({"a": entry("Q8")}, b"\0" * 16, None, ["'a' has dtype 'Q8'", "BF16"]),
        ({"a\nb": entry(["F32"])}, b"\0" * 16, None, ["'a\\nb' has dtype a JSON list"]),
        ({"a": []}, b"", None, ["'a' has dtype a JSON NoneType"]),
        ([], b"", None, ["header is a JSON list"]),
        (b"{", b"", None, ["header is not valid JSON"]),
        (b'{"\xff":1}', b"", None, ["header is not valid JSON"]),
        (b"[" * 100_000, b"", None, ["header is not valid JSON"]),
        (b'{"a":' + b"9" * 5000 + b"}", b"", None, ["header is not valid JSON"]),
        (b"{}", b"", 3, ["has 10 bytes", "header alone should have 3"]),
        (b"{}", b"", 2**63, ["has 10 bytes", "header alone should have 9,223,372,036,854,775,808"]),
        (b" " * (33 * 2**20), b"", None, ["header of 34,603,008 bytes", "at most 33,554,432"]),
    ],
)
def test_damaged_file(tmp_path, header, data, length, expected):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, header, data, length)
    message = error_of(lambda: SafetensorsCheckpoint(tmp_path))
    assert message.startswith(str(path)) and all(text in message for text in expected)


@pytest.mark.parametrize("num_bytes", [0, 7])
def test_file_shorter_than_the_header_length(tmp_path, num_bytes):
    (tmp_path / "model.safetensors").write_bytes(b"\0" * num_bytes)
    assert f"has {num_bytes} bytes: truncated" in error_of(lambda: SafetensorsCheckpoint(tmp_path))


def test_header_gives_shapes_and_dtypes_by_rising_offset(tmp_path):
    header = {"b": entry("BF16", (2,), (8, 12)), "a": entry("U8", (3, 0), (0, 0)), "c": entry("F64", (), (0, 8))}
    write_safetensors(tmp_path / "model.safetensors", header | {"__metadata__": {"format": "pt"}}, b"\0" * 12)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert list(checkpoint.tensors.items()) == [
        ("a", TensorInfo("model.safetensors", (3, 0), torch.uint8)),
        ("c", TensorInfo("model.safetensors", (), torch.float64)),
        ("b", TensorInfo("model.safetensors", (2,), torch.bfloat16)),
    ]
    assert checkpoint.num_bytes == 12
    assert [tuple(checkpoint.read(name).shape) for name in "bca"] == [(2,), (), (3, 0)]


def test_offsets_beyond_four_gigabytes(tmp_path):
    size = 5 * 2**30
    header = {"a": entry("U8", (size,), (0, size)), "b": entry("F32", (2, 2), (size, size + 16))}
    path = tmp_path / "model.safetensors"
    write_safetensors(path, header)
    os.truncate(path, path.stat().st_size + size + 16)  # a sparse file
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert checkpoint.num_bytes == size + 16
    assert torch.equal(checkpoint.read("b"), torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (b"{", ["not valid JSON"]),
        ([], ["`weight_map`"]),
        ({"weight_map": {}}, ["`weight_map`"]),
        ({"weight_map": ["a"]}, ["`weight_map`"]),
        ({"weight_map": {"a": "../../etc/passwd"}}, ["'a'", "'../../etc/passwd'", "same directory"]),
        ({"weight_map": {"a": "../x.safetensors"}}, ["'../x.safetensors'", "same directory"]),
        ({"weight_map": {"a": "/x.safetensors"}}, ["'/x.safetensors'", "same directory"]),
        ({"weight_map": {"a": "sub\\x.safetensors"}}, ["same directory"]),
        ({"weight_map": {"a": "x\n.safetensors"}}, ["'x\\n.safetensors'", "same directory"]),
        ({"weight_map": {"a": 3}}, ["a JSON int", "same directory"]),
        ({"weight_map": {"a": "there.safetensors", "b": "gone.safetensors"}}, ["'gone.safetensors'", "not there"]),
        ({"weight_map": {"a": "x" * 300 + ".safetensors"}}, ["not there"]),
        ({"weight_map": {"a": "there.safetensors", "b": "there.safetensors"}}, ["'b' in there.safetensors"]),
        (b" " * (33 * 2**20), ["34,603,008 bytes", "at most 33,554,432"]),
    ],
)
def test_damaged_index(tmp_path, index, expected):
    save_file({"a": torch.ones(2)}, tmp_path / "there.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(index if isinstance(index, bytes) else json.dumps(index).encode())
    message = error_of(lambda: SafetensorsCheckpoint(tmp_path))
    assert message.startswith(str(path)) and all(text in message for text in expected)


def test_tensors_that_the_index_does_not_name_are_left_out(tmp_path):
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "x.safetensors")
    save_file({"a": torch.zeros(2), "c": torch.ones(2)}, tmp_path / "y.safetensors")
    weight_map = {"a": "y.safetensors", "b": "x.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = SafetensorsCheckpoint(tmp_path)
    assert {name: info.file for name, info in checkpoint.tensors.items()} == weight_map
    assert checkpoint.read("a").tolist() == [0, 0]


def test_directory_without_safetensors(tmp_path):
    assert "found no files" in error_of(lambda: SafetensorsCheckpoint(tmp_path))
    assert "cannot be read" in error_of(lambda: SafetensorsCheckpoint(tmp_path / "missing"))
    os.mkfifo(tmp_path / "model.safetensors")
    (tmp_path / "pytorch_model.bin").touch()
    message = error_of(lambda: SafetensorsCheckpoint(tmp_path))
    assert "expected model.safetensors or model.safetensors.index.json" in message and "'pytorch_model.bin'" in message


def test_file_changed_or_removed_after_opening(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2)}, path)
    checkpoint = SafetensorsCheckpoint(tmp_path)
    save_file({"a": torch.ones(2, dtype=torch.float16)}, path)
    assert "'a' is now float16 [2], but was float32 [2]" in error_of(lambda: checkpoint.read("a"))
    path.write_bytes(b"x" * 20)
    assert f"{path}: no tensor 'a'" in error_of(lambda: checkpoint.read("a"))
    path.unlink()
    assert f"{path}: no tensor 'a'" in error_of(lambda: checkpoint.read("a"))


@pytest.fixture(scope="module")
def sound_files(tmp_path_factory):
    """A small two-shard checkpoint as bytes, and a folder for damaged copies."""
    folder = tmp_path_factory.mktemp("sound")
    save_sharded(folder, checkpoint_tensors(num_layers=1), 2)
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}, tmp_path_factory.mktemp("damaged")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_random_damage_loads_or_is_a_checkpoint_error(sound_files, data):
    files, folder = sound_files
    victim = data.draw(st.sampled_from(sorted(files)))
    content = bytearray(files[victim])
    # Half of the hits in the first kilobyte, where the header is.
    position = st.one_of(st.integers(0, min(len(content), 1000) - 1), st.integers(0, len(content) - 1))
    for at, value in data.draw(st.lists(st.tuples(position, st.integers(0, 255)), max_size=3)):
        content[at] = value
    if data.draw(st.booleans()):
        content = content[: data.draw(position)]
    for name, sound in files.items():
        (folder / name).write_bytes(content if name == victim else sound)
    model = on_meta(num_layers=1)
    try:
        load_weights(model, SafetensorsCheckpoint(folder), CPU, torch.float32, progress=False)
    except CheckpointError as error:
        assert "\n" not in str(error)
    else:
        assert not any(parameter.is_meta for parameter in model.parameters())


# ---- memory ----


def test_a_file_is_unmapped_after_its_last_tensor(tmp_path):
    tensors = checkpoint_tensors()
    save_sharded(tmp_path, tensors, 2)
    checkpoint = SafetensorsCheckpoint(tmp_path)

    def mapped():
        return {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines()
                if str(tmp_path) in line}  # fmt: skip

    for name, info in checkpoint.tensors.items():
        tensor = checkpoint.read(name)
        assert torch.equal(tensor, tensors[name])
        assert mapped() == {info.file}
    del tensor
    assert mapped() == set()


# ---- hub ----


def test_demo_and_local_directories(tmp_path, monkeypatch):
    assert resolve_model("demo") == Path(sys.modules["engine.weights.hub"].__file__).parent / "demo"
    assert resolve_model(str(tmp_path)) == tmp_path
    (tmp_path / "Qwen" / "Qwen3-0.6B").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_model("Qwen/Qwen3-0.6B") == Path("Qwen/Qwen3-0.6B")
    assert resolve_model("~/Qwen") == tmp_path / "Qwen"
    assert "no revision 'v2'" in error_of(lambda: resolve_model("~/Qwen", "v2"))

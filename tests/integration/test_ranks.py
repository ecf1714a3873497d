"""Models divided among ranks against the same models whole: logits, tokens, what is read, and what goes wrong."""

import gc
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config, Qwen3MoeConfig

import engine.llm
import engine.parallel.follower
import engine.parallel.workers
import engine.runner
from engine import LLM, CheckpointError, ConfigError, RequestError, SamplingParams
from engine.errors import EngineDeadError
from engine.grammar import json_schema_grammar
from engine.layers.quantized_linear import QuantizedLinear
from engine.llm import Completion
from engine.llm_engine import LLMEngine
from engine.parallel import processes
from engine.parallel.group import RankGroup, TensorParallel
from engine.parallel.orders import connect
from engine.parallel.share import Share
from engine.runner import ModelRunner
from engine.weights import loader
from engine.weights.hub import resolve_model
from engine.weights.load_model import load_model
from kernels.cpu_build import load_library
from tests.adapters import make_adapter
from tests.parallel_ranks import RankThread, start_thread
from tests.quantized_checkpoints import make_quantized
from tests.tiny_models import make_tiny_model, make_tiny_qwen3
from tests.unit.test_gguf import write

FIELDS = {
    "kv_cache_memory": 2**21,
    "block_size": 4,
    "max_num_seqs": 8,
    "show_progress": False,
    "device": "cpu",
    "dtype": "float32",
    "num_threads": 1,
}
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8, "num_hidden_layers": 2}
EXPERTS = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
MODELS = {
    "Qwen3, tied, odd vocabulary": (Qwen3Config, {"head_dim": 16, "vocab_size": 517}),
    "Qwen3, untied, biases": (Qwen3Config, {"head_dim": 16, "tie_word_embeddings": False, "attention_bias": True}),
    "Qwen3, as many KV heads as others": (Qwen3Config, {"head_dim": 16, "num_key_value_heads": 8}),
    "Qwen3, one KV head": (Qwen3Config, {"head_dim": 16, "num_key_value_heads": 1}),
    "Qwen3 MoE": (Qwen3MoeConfig, EXPERTS),
    "Qwen3 MoE, some layers dense": (Qwen3MoeConfig, EXPERTS | {"decoder_sparse_step": 2}),
    "Qwen2": (Qwen2Config, {"tie_word_embeddings": False}),
    "Llama, all biases": (LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
}
FP8_ATOL = 0.15
"""Of logits, where layers round their inputs to FP8. Sums taken in another order differ by a millionth, and where that
carries one input past the middle between two FP8 numbers, it becomes a sixteenth of that input."""
IN_FOUR = ("Qwen3, tied, odd vocabulary", "Qwen3, one KV head", "Qwen3 MoE")
PROMPTS = [[5, 6, 7], list(range(20, 90)), [3]]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, prompt_logprobs=1)
GRAMMAR = json_schema_grammar({"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 3})
VARIED = [
    SamplingParams(temperature=0.8, top_k=40, top_p=0.9, seed=1, max_tokens=12, ignore_eos=True),
    SamplingParams(temperature=1.1, presence_penalty=0.5, logprobs=2, seed=2, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.7, seed=3, max_tokens=16, grammar=GRAMMAR),
]


@pytest.fixture(autouse=True)
def as_threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are threads, except where a test is about processes."""
    if "processes" not in request.node.name:
        monkeypatch.setattr(engine.llm, "LLMEngine", partial(LLMEngine, start_rank=start_thread))


@contextmanager
def divided(path: Path, size: int, **config: object) -> Iterator[LLM]:
    llm = LLM(str(path), tensor_parallel_size=size, **(FIELDS | config))
    yield llm
    llm.engine.close()


def whole(path: Path, size: int, **config: object) -> LLM:
    """What one rank computes if sums over the inputs of quantized layers are those of `size` ranks.

    Where ranks round their parts of such a sum each for itself (int8 and FP8 have a scale for all inputs that a rank
    has), these are other numbers than one rank's, not worse ones. All else is to be equal but for the order of sums.
    """
    llm = LLM(str(path), **(FIELDS | config))
    for layer, parts in quantized_layers(llm, path, size):
        if parts[0].inputs.size < layer.inputs.size:
            layer.forward = partial(add_up, parts)
    return llm


def quantized_layers(llm: LLM, path: Path, size: int) -> Iterator[tuple[QuantizedLinear, list[QuantizedLinear]]]:
    """Each one of a model on one rank, and the same of each of several ranks."""
    runner, config = llm.engine.runner, llm.engine.config
    layers = {name: each for name, each in runner.model.named_modules() if isinstance(each, QuantizedLinear)}
    if not layers:
        return
    own = [config, llm.engine.model_config, resolve_model(str(path)), runner.device, runner.dtype, runner.backend]
    models = [load_model(*own, ranks(rank, size)) for rank in range(size)]
    for name, layer in layers.items():
        yield layer, [model.get_submodule(name.removesuffix(".base")) for model in models]


def add_up(parts: list[QuantizedLinear], x: torch.Tensor) -> torch.Tensor:
    return sum(part(x[:, part.inputs.span()].contiguous()) for part in parts)


def assert_parts_are_those_of_the_whole(path: Path, size: int, splits_scales: bool, **config: object) -> None:
    """Layer by layer for equal inputs, as the same values are quantized: only sums may be taken in another order.

    Args:
        splits_scales: whether a scale of one rank is for inputs of several, so that ranks' own are finer.
    """
    torch.manual_seed(0)
    for layer, parts in quantized_layers(LLM(str(path), **(FIELDS | config)), path, size):
        x = torch.randn(5, layer.inputs.size)
        y = layer(x)
        if parts[0].inputs.size == layer.inputs.size:
            for part in parts:
                outputs = y.split(layer.output_sizes, 1), part(x).split(part.output_sizes, 1), part.outputs
                for each, own, share in zip(*outputs, strict=True):
                    torch.testing.assert_close(own, each[:, share.span()], atol=1e-5, rtol=1e-5)
        elif not splits_scales:
            torch.testing.assert_close(add_up(parts, x), y, atol=1e-5, rtol=1e-5)
        else:  # further from each other than the sums' order would tell, and by no more than rounding
            assert 1e-4 < ((add_up(parts, x) - y).norm() / y.norm()).item() < 0.05


def run(llm: LLM, params: SamplingParams | list[SamplingParams] = GREEDY) -> list[list[int]]:
    return [completion.token_ids for completion in llm.generate(PROMPTS, params)]


def assert_equals_whole(path: Path, sizes: tuple[int, ...], atol: float = 1e-4, **config: object) -> None:
    """Logits to a tolerance, and where that is small, greedy tokens."""
    for size in sizes:
        one = whole(path, size, **config)
        logits, tokens = one.logits(PROMPTS[1]), run(one)
        with divided(path, size, **config) as llm:
            torch.testing.assert_close(llm.logits(PROMPTS[1]), logits, atol=atol, rtol=1e-4)
            if atol < 1e-3:
                assert run(llm) == tokens


@pytest.mark.parametrize("name", MODELS)
def test_ranks_compute_what_one_does(tmp_path, name):
    """Four ranks share rows of padding, heads of keys, and experts in other ways than two."""
    config_class, overrides = MODELS[name]
    make_tiny_model(tmp_path, config_class, **(SIZES | overrides))
    assert_equals_whole(tmp_path, (4,) if name in IN_FOUR else (2,))


@pytest.mark.parametrize("name", ["fp8 blocks", "awq", "gptq", "compressed-tensors fp8, a scale a tensor"])
def test_quantized_checkpoints_are_divided_along_their_groups(tmp_path, name):
    make_quantized(tmp_path, name, intermediate_size=512, head_dim=128, initializer_range=0.02)
    size = 4 if name == "awq" else 2
    # FP8 has a scale for all of a token's inputs, unless weights are in blocks: ranks have one for their own.
    assert_parts_are_those_of_the_whole(tmp_path, size, splits_scales="compressed" in name)
    assert_equals_whole(tmp_path, (size,), atol=FP8_ATOL if "fp8" in name else 1e-4)


@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
def test_rounding_while_loading(tmp_path, scheme):
    wide = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 32, "initializer_range": 0.05}
    make_tiny_qwen3(tmp_path, **(SIZES | wide))
    # int4 rounds groups of inputs, which ranks have whole. The others have a scale for all inputs that a rank has.
    assert_parts_are_those_of_the_whole(tmp_path, 2, splits_scales=scheme != "int4", quantization=scheme)
    assert_equals_whole(tmp_path, (2,), atol=FP8_ATOL if scheme == "fp8" else 1e-4, quantization=scheme)


@pytest.mark.parametrize("kind", ["bin", "gguf"])
def test_other_files(tmp_path, kind, monkeypatch):
    load_library()  # compiled where it always is; the folder made of the file is not kept there
    monkeypatch.setattr(Path, "home", lambda: tmp_path / "home")
    path = tmp_path / "model.gguf"
    if kind == "gguf":
        write(path, gguf.GGMLQuantizationType.Q8_0)
    else:
        path = tmp_path
        make_tiny_qwen3(path, **SIZES)
        torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
        (path / "model.safetensors").unlink()
    assert_equals_whole(path, (2,))


def test_quantized_experts(tmp_path):
    experts = EXPERTS | {"moe_intermediate_size": 256, "hidden_size": 128, "head_dim": 32, "initializer_range": 0.05}
    make_tiny_model(tmp_path, Qwen3MoeConfig, **(SIZES | experts))
    assert_equals_whole(tmp_path, (2,), quantization="int4")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_tiny_qwen3(path, **SIZES)
    return path


@pytest.mark.parametrize(
    "config",
    [{}, {"overlap_steps": True}, {"num_speculative_tokens": 3}, {"max_num_batched_tokens": 16, "max_num_seqs": 2}],
    ids=["plain", "overlapped", "speculating", "chunked"],
)
def test_ranks_draw_what_one_does(tiny, config):
    """Sampled tokens, edited logits, a grammar, log-probabilities."""
    expected = LLM(str(tiny), **(FIELDS | config)).generate(PROMPTS, VARIED)
    with divided(tiny, 2, **config) as llm:
        found = llm.generate(PROMPTS, VARIED)
    for one, other in zip(expected, found, strict=True):
        assert other.token_ids == one.token_ids
        for entry, own in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert own.logprob == pytest.approx(entry.logprob, abs=1e-4)


def test_padded_decode_steps_that_draw_inside_as_graphs_do(tiny, adapters, monkeypatch):
    """CUDA graphs are for GPUs; all else about them runs here."""
    config = {"max_loras": 2, "lora_folder": str(adapters)}
    one = LLM(str(tiny), **(FIELDS | config))
    expected = run(one, VARIED), run(one), [completion.token_ids for completion in adapted(one)]
    load = ModelRunner.__init__

    def load_with_graphs(self, config, *rest, **named) -> None:
        load(self, config, *rest, **named)
        self.use_decode_graphs(config, capture=False)

    monkeypatch.setattr(ModelRunner, "__init__", load_with_graphs)
    with divided(tiny, 2, **config) as llm:
        assert (run(llm, VARIED), run(llm), [completion.token_ids for completion in adapted(llm)]) == expected


@pytest.fixture(scope="module")
def adapters(tiny: Path) -> Path:
    """Three adapters of the tiny model, and a damaged one."""
    reference = AutoModelForCausalLM.from_pretrained(tiny)
    folder = tiny.parent / "adapters"
    make_adapter(folder / "all", reference, seed=1)
    make_adapter(folder / "wide", reference, seed=2, rank=16, use_rslora=True)
    make_adapter(folder / "some", reference, seed=3, rank=3, targets=("k_proj", "o_proj", "up_proj"))
    make_adapter(folder / "damaged", reference)
    file = folder / "damaged" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    return folder


ADAPTED = ("", "all", "wide", "some", "", "all")
"""Of the prompts of `adapted`: two at once where there are two places, and the one in use for longest makes way."""


def adapted(llm: LLM) -> list[Completion]:
    return llm.generate([*PROMPTS, *PROMPTS], GREEDY, adapter=ADAPTED)


@pytest.mark.parametrize(
    ("size", "config"),
    [(2, {}), (4, {}), (2, {"max_loras": 1, "overlap_steps": True}), (2, {"quantization": "int8"})],
    ids=str,
)
def test_adapters_are_divided_as_their_layers_are(tiny, adapters, size, config):
    """Base and adapters in one batch, more adapters than places: tokens and log-probabilities of one rank."""
    config = {"max_loras": 2, "lora_folder": str(adapters)} | config
    expected = adapted(whole(tiny, size, **config))
    assert len({str(completion.token_ids) for completion in expected}) == len(ADAPTED)
    with divided(tiny, size, **config) as llm:
        found = adapted(llm)
        with pytest.raises(RequestError, match=r"^adapter 'damaged' cannot be used: .*truncated"):
            llm.generate(PROMPTS, GREEDY, adapter=["", "damaged", "all"])
        again = adapted(llm)
    for completion, *others in zip(expected, found, again, strict=True):
        for other in others:
            assert other.token_ids == completion.token_ids
            for entry, own in zip(completion.prompt_logprobs, other.prompt_logprobs, strict=True):
                assert own.logprob == pytest.approx(entry.logprob, abs=1e-4)


def test_ranks_need_no_files_of_adapters(tiny, adapters, tmp_path):
    """The first one has read them: whatever becomes of the files, no two ranks have different contents."""
    shutil.copytree(adapters / "all", tmp_path / "a")
    config = {"max_loras": 1, "lora_folder": str(adapters)}
    expected = LLM(str(tiny), **(FIELDS | config)).generate(PROMPTS, GREEDY, adapter=["all", "some", "all"])
    with divided(tiny, 2, **config) as llm:
        llm.load_adapter("a", tmp_path / "a")
        shutil.rmtree(tmp_path / "a")
        found = llm.generate(PROMPTS, GREEDY, adapter=["a", "some", "a"])
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]


def test_random_weights_are_those_of_one_rank(tiny):
    assert_equals_whole(tiny, (2,), load_format="dummy")


def test_a_request_whose_logits_are_no_numbers_ends_alone(tmp_path):
    make_tiny_qwen3(tmp_path, **SIZES, tie_word_embeddings=False)
    with divided(tmp_path, 2) as llm:
        table = llm.engine.runner.model.model.embed_tokens.weight
        expected = run(llm)
        row = table[200].clone()
        table[200] = torch.nan
        bad, good = llm.generate([[200] * 9, PROMPTS[0]], GREEDY)
        table[200] = row
        assert "not finite" in bad.error
        assert good.token_ids == expected[0]
        assert run(llm) == expected


def test_a_rank_with_less_memory_decides_how_many_blocks_there_are(tiny, monkeypatch):
    budgets = iter((2**21, 2**20))
    monkeypatch.setattr(engine.runner, "kv_cache_bytes", lambda config, device: next(budgets))
    with divided(tiny, 2) as llm:
        # Two layers, keys and values, one KV head of 16 numbers of 4 bytes, blocks of 4 tokens.
        assert llm.engine.runner.num_blocks == 2**20 // (2 * 2 * 16 * 4 * 4)


def test_a_rank_reads_only_its_part(tmp_path, monkeypatch):
    """Slices of the mapped file are copied: the weights of all ranks together, and what each has whole, once each."""
    make_tiny_qwen3(tmp_path, **SIZES)
    copied: list[int] = []
    copy = loader._copy

    def count(tensor, parameter, copies) -> None:
        copied.append(sum(tensor[source].nbytes for source, _ in copies))
        copy(tensor, parameter, copies)

    monkeypatch.setattr(loader, "_copy", count)
    LLM(str(tmp_path), **FIELDS)
    whole, norms = sum(copied), sum(size for size in copied if size <= SIZES["hidden_size"] * 4)
    copied.clear()
    with divided(tmp_path, 2):
        assert sum(copied) == whole + norms


@pytest.mark.parametrize(
    ("count", "size", "shares"),
    [
        (8, 4, [(0, 2), (2, 2), (4, 2), (6, 2)]),
        (4, 4, [(0, 1), (1, 1), (2, 1), (3, 1)]),
        (2, 4, [(0, 1), (0, 1), (1, 1), (1, 1)]),
        (1, 2, [(0, 1), (0, 1)]),
    ],
)
def test_few_heads_are_held_by_several_ranks(count, size, shares):
    assert [ranks(rank, size).share_or_copy(count) for rank in range(size)] == [
        Share(count, start, part) for start, part in shares
    ]


def test_the_last_rows_of_a_vocabulary_may_be_padding():
    found = [ranks(rank, 4).share_padded(517).span() for rank in range(4)]
    assert [span.stop - span.start for span in found] == [130, 130, 130, 127]
    assert [ranks(rank, 4).share_padded(2).span() for rank in range(4)] == [
        slice(0, 1), slice(1, 2), slice(2, 2), slice(2, 2),
    ]  # fmt: skip


def ranks(rank: int, size: int) -> TensorParallel:
    group = TensorParallel()
    group.rank, group.size = rank, size
    return group


@pytest.mark.parametrize(
    ("overrides", "size", "message"),
    [
        ({}, 3, "num_attention_heads is 8, which 3 ranks cannot divide: expected one of 1, 2, 4, 8$"),
        ({"num_attention_heads": 6, "num_key_value_heads": 3}, 2, "num_key_value_heads is 3, .* one of 1, 3, 6$"),
        ({"intermediate_size": 99}, 2, "intermediate_size is 99, which 2 ranks cannot divide: expected one of 1$"),
    ],
)
def test_sizes_that_do_not_divide_the_model(tmp_path, overrides, size, message):
    make_tiny_qwen3(tmp_path, **(SIZES | overrides))
    with pytest.raises(ConfigError, match=message):
        LLM(str(tmp_path), tensor_parallel_size=size, **FIELDS)


@pytest.mark.parametrize(
    ("name", "sizes", "layer"),
    [
        ("gptq", {"intermediate_size": 384, "num_key_value_heads": 4}, "down_proj"),
        ("awq", {"intermediate_size": 384}, "down_proj"),
        ("fp8 blocks", {"intermediate_size": 384, "head_dim": 128}, "gate_up_proj"),
        ("fp8 blocks", {"intermediate_size": 512}, "qkv_proj"),
        ("int4", {"hidden_size": 128, "intermediate_size": 384, "head_dim": 64}, "down_proj"),
    ],
)
def test_groups_that_ranks_cannot_divide(tmp_path, name, sizes, layer):
    """Half of an inner width of 384, or a single KV head of 64, ends within 128 inputs or outputs with one scale."""
    config = {"quantization": name} if name == "int4" else {}
    if config:
        make_tiny_qwen3(tmp_path, **(SIZES | sizes))
    else:
        make_quantized(tmp_path, name, **sizes)
    with pytest.raises(ConfigError, match=rf"{layer} cannot be quantized .* expected .*multiple.* of 128.*: lower"):
        LLM(str(tmp_path), tensor_parallel_size=2, **(FIELDS | config))


def test_more_ranks_than_gpus(tmp_path):
    with pytest.raises(ConfigError, match="tensor_parallel_size is 2, but torch finds 0 CUDA devices"):
        processes.start_process(1, 2, tmp_path, torch.device("cuda"))


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (engine.parallel.follower, "take_device"),
        (engine.parallel.follower.Follower, "__init__"),
        (engine.parallel.follower.Follower, "_warm_up"),
    ],
    ids=["device", "load", "warm-up"],
)
def test_a_rank_that_fails_at_the_start_tells_why(tiny, monkeypatch, place, name):
    """Wherever that is, and whatever the first rank waits for by then."""

    def fail(*arguments) -> None:
        raise CheckpointError("the disk of rank 1 is on fire")

    monkeypatch.setattr(place, name, fail)
    with pytest.raises(CheckpointError, match=r"^rank 1 of 2 failed: the disk of rank 1 is on fire$"):
        LLM(str(tiny), tensor_parallel_size=2, **FIELDS)


def test_a_rank_that_ends_before_it_says_which_it_is(tiny, monkeypatch):
    class Ended(RankThread):
        @staticmethod
        def _run(rank, folder) -> None:
            connect(folder).close()

    def start(rank, size, folder, device) -> Ended:
        return Ended(rank, folder)

    monkeypatch.setattr(engine.llm, "LLMEngine", partial(LLMEngine, start_rank=start))
    with pytest.raises(EngineDeadError, match=r"^rank 1 of 2 failed: its thread ended$"):
        LLM(str(tiny), tensor_parallel_size=2, **FIELDS)


def test_ranks_look_for_each_other_when_all_are_ready(tiny, monkeypatch):
    """For that they have little time, however long one of them takes to get there."""
    found: list[str] = []

    def take_slowly(*arguments) -> None:
        time.sleep(0.3)
        found.append("the other is ready")

    def join(*arguments) -> RankGroup:
        found.append("the first joins")
        return RankGroup(*arguments)

    monkeypatch.setattr(engine.parallel.follower, "take_device", take_slowly)
    monkeypatch.setattr(engine.parallel.workers, "RankGroup", join)
    with divided(tiny, 2):
        assert found == ["the other is ready", "the first joins"]


def test_a_folder_whose_name_is_too_long_for_a_socket(tiny, tmp_path, monkeypatch):
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(ConfigError, match="expected at most 107 bytes: set TMPDIR to a folder with a shorter name"):
        LLM(str(tiny), tensor_parallel_size=2, **FIELDS)
    assert not list(folder.iterdir())


def test_a_rank_that_fails_in_a_step_ends_the_engine(tiny, monkeypatch):
    with divided(tiny, 2) as llm:
        monkeypatch.setattr(engine.parallel.follower.Follower, "obey", lambda self, order: 1 / 0)
        with pytest.raises(EngineDeadError, match=r"^rank 1 of 2 failed: ZeroDivisionError: division by zero$"):
            run(llm)
        with pytest.raises(EngineDeadError, match="rank 1 of 2 failed"):
            llm.engine.check_health()


def test_a_damaged_checkpoint_is_told_once(tmp_path):
    make_tiny_qwen3(tmp_path, **SIZES)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LLM(str(tmp_path), tensor_parallel_size=2, **FIELDS)


def test_processes_compute_what_one_does_and_their_death_ends_the_engine(tiny):
    expected = run(LLM(str(tiny), **FIELDS), VARIED)
    llm = LLM(str(tiny), tensor_parallel_size=2, **FIELDS)
    assert run(llm, VARIED) == expected
    [process] = llm.engine.runner._workers._state.ranks.values()
    os.kill(process.pid, signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(EngineDeadError, match=r"^rank 1 of 2 failed: its process was killed by signal 9 \(SIGKILL\)$"):
        run(llm)
    assert time.monotonic() - start < 60
    folder = llm.engine.runner._workers._state.folder
    del llm
    gc.collect()
    assert not folder.exists()

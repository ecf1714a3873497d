"""LoRA adapters: parity with merged weights, mixed batches, places on the device, what is refused."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import LLM, CheckpointError, ConfigError, EngineConfig, RequestError, SamplingParams
from engine.errors import QueueFullError
from engine.lora import adapter, registry
from engine.lora.device import DeviceAdapters
from engine.lora.handle import AdapterHandle, AdapterPlaces
from engine.request import EngineRequest, FinishReason, prefix_salt
from tests.adapters import CONFIG, make_adapter, merge, write_adapter
from tests.tiny_models import make_tiny_model, make_tiny_qwen3, reference_greedy

FIELDS = {
    "kv_cache_memory": 2**22, "block_size": 4, "max_num_seqs": 8, "show_progress": False, "device": "cpu",
    "dtype": "float32", "max_loras": 2,
}  # fmt: skip
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[5, 6, 7], list(range(20, 50)), [11] * 9]


class Models:
    """A tiny model with adapters in a folder, and what transformers says with each merged."""

    def __init__(self, path):
        self.path, self.folder = path / "model", path / "adapters"
        reference = make_tiny_qwen3(self.path)
        made = {
            "one": make_adapter(self.folder / "one", reference, seed=1),
            "two": make_adapter(self.folder / "two", reference, seed=2, rank=8, use_rslora=True),
            "attention": make_adapter(self.folder / "attention", reference, seed=3, targets=("q_proj", "v_proj")),
        }
        self.expected = {"": [reference_greedy(reference, prompt, 12) for prompt in PROMPTS]}
        for name, changes in made.items():
            merge(reference, changes)
            self.expected[name] = [reference_greedy(reference, prompt, 12) for prompt in PROMPTS]
            merge(reference, changes, -1)

    def llm(self, **config):
        return LLM(str(self.path), **(FIELDS | {"lora_folder": str(self.folder)} | config))

    def check(self, llm, name, completions):
        limit = llm.engine.vocab_size
        for expected, completion in zip(self.expected[name], completions, strict=True):
            cut = next((index for index, token_id in enumerate(expected) if token_id >= limit), len(expected))
            assert completion.token_ids[:cut] == expected[:cut], name


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("lora"))


@pytest.mark.parametrize("config", [{}, {"max_num_batched_tokens": 7}, {"num_speculative_tokens": 3}], ids=str)
def test_adapters_in_one_batch_equal_merged_weights(models, config):
    """Four outputs of each prompt with two places for three adapters: some wait for a place."""
    llm = models.llm(**config)
    names = ["", "one", "two", "attention"]
    completions = llm.generate(PROMPTS * 4, GREEDY, adapter=[name for name in names for _ in PROMPTS])
    for index, name in enumerate(names):
        models.check(llm, name, completions[3 * index : 3 * index + 3])
    assert len({str(models.expected[name]) for name in names}) == 4


def test_prefixes_are_not_shared_between_adapters(models):
    llm = models.llm()
    for name in ("", "one", "two", "one", ""):
        models.check(llm, name, llm.generate(PROMPTS, GREEDY, adapter=name))
    assert llm.generate(PROMPTS, GREEDY, adapter="one")[1].num_cached_tokens > 0


def test_salts_of_clients_never_meet_those_of_adapters():
    pairs = [("", ""), ("", "a"), ("a", ""), ("x", "a"), ("\0a\0x", ""), ("\0a\0", ""), ("\0\0", ""), ("\0", "a")]
    assert len({prefix_salt(*pair) for pair in pairs}) == len(pairs)
    assert prefix_salt("tenant", "") == "tenant"


def test_decode_steps_of_fixed_size_give_the_same(models):
    """As CUDA graphs run them: padded, and adapters known to the device alone."""
    llm = models.llm()
    llm.engine.runner.use_decode_graphs(llm.engine.config, capture=False)
    completions = llm.generate(PROMPTS * 3, GREEDY, adapter=[name for name in ("", "one", "two") for _ in PROMPTS])
    for index, name in enumerate(("", "one", "two")):
        models.check(llm, name, completions[3 * index : 3 * index + 3])


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_on_a_quantized_base(tmp_path, quantization):
    """With and without the adapter differ as little from float32 as the base alone does."""
    reference = make_tiny_qwen3(tmp_path / "model", hidden_size=128, intermediate_size=128, num_attention_heads=8)
    changes = make_adapter(tmp_path / "adapter", reference)
    config = {"quantization": quantization, "adapters": {"a": str(tmp_path / "adapter")}}
    llm = LLM(str(tmp_path / "model"), **(FIELDS | config))
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    prompt = list(range(20, 60))

    def error(adapter):
        logprobs = reference(torch.tensor([prompt])).logits[0].float()[:, : llm.engine.vocab_size].log_softmax(-1)
        completion = llm.generate([prompt], params, adapter=adapter)[0]
        found = torch.tensor([entry.logprob for entry in completion.prompt_logprobs])
        return (found - logprobs[range(39), prompt[1:]]).abs().mean()

    plain = error("")
    merge(reference, changes)
    assert error("a") < min(1.5 * plain + 0.05, error(""))


def test_loaded_and_unloaded_on_purpose(models):
    llm = models.llm(lora_folder=None)
    with pytest.raises(RequestError, match="adapter 'mine' does not exist"):
        llm.generate(PROMPTS, GREEDY, adapter="mine")
    llm.load_adapter("mine", models.folder / "one")
    assert llm.engine.adapter_names() == ["mine"]
    models.check(llm, "one", llm.generate(PROMPTS, GREEDY, adapter="mine"))
    with pytest.raises(RequestError, match="'mine' is loaded already"):
        llm.load_adapter("mine", models.folder / "two")
    llm.unload_adapter("mine")
    with pytest.raises(RequestError, match="'mine' is not loaded"):
        llm.unload_adapter("mine")
    llm.load_adapter("mine", models.folder / "two")  # cached keys and values of the old one are not used
    models.check(llm, "two", llm.generate(PROMPTS, GREEDY, adapter="mine"))


def test_no_unloading_while_requests_use_it(models):
    llm = models.llm(lora_folder=None, adapters={"one": str(models.folder / "one")})
    stream = llm.stream([5, 6, 7], GREEDY, adapter="one")
    next(stream)
    with pytest.raises(RequestError, match="'one' is in use by 1 requests"):
        llm.unload_adapter("one")
    stream.close()
    llm.unload_adapter("one")
    models.check(llm, "", llm.generate(PROMPTS, GREEDY))


@pytest.mark.parametrize("is_named", [False, True])
def test_an_adapter_that_changes_on_disk_is_read_anew(models, tmp_path, monkeypatch, is_named):
    """Each request has all of the old or all of the new, and the keys and values that belong to it."""
    folder, reference = tmp_path / "a", make_tiny_qwen3(tmp_path / "model")
    make_adapter(folder, reference, seed=5)
    named = {"lora_folder": None, "adapters": {"a": str(folder)}}
    llm = models.llm(**(named if is_named else {"lora_folder": str(tmp_path)}))

    def answer():
        return llm.generate([PROMPTS[1]], GREEDY, adapter="a")[0]

    first = answer().token_ids
    llm.engine.add_request(EngineRequest(request_id="old", prompt_token_ids=PROMPTS[1], params=GREEDY, adapter="a"))
    found = {"old": [], "new": []}
    while not found["old"]:
        take_step(llm, found)
    changes = make_adapter(folder, reference, seed=6, rank=8)
    monkeypatch.setattr(registry, "SETTLE_S", 1e6)  # as if it had been written just now
    assert llm.engine.find_adapter("a").version == 0
    monkeypatch.setattr(registry, "SETTLE_S", 0)
    llm.engine.add_request(EngineRequest(request_id="new", prompt_token_ids=PROMPTS[1], params=GREEDY, adapter="a"))
    while llm.engine.has_work:
        take_step(llm, found)
    merge(reference, changes)
    expected = reference_greedy(reference, PROMPTS[1], 12)
    cut = next((index for index, token in enumerate(expected) if token >= llm.engine.vocab_size), 12)
    assert found["old"] == first and found["new"][:cut] == expected[:cut] != first[:cut]
    again = answer()
    assert again.token_ids == found["new"] and again.num_cached_tokens > 0
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(RequestError, match=r"adapter 'a' cannot be used: .*safetensors: cannot be read"):
        answer()


def take_step(llm, found):
    for output in llm.engine.step():
        found[output.request_id] += output.token_ids
        assert output.request_id == "old" or not output.num_cached_tokens


def test_a_link_that_is_turned_to_another_adapter(models, tmp_path):
    """Known at once, by its name alone: the files are as long and as old."""
    for name in ("one", "two"):
        shutil.copytree(models.folder / "one", tmp_path / name)
    tensors = load_file(tmp_path / "two" / "adapter_model.safetensors")
    save_file({name: -tensor for name, tensor in tensors.items()}, tmp_path / "two" / "adapter_model.safetensors")
    for file in tmp_path.glob("*/*"):
        os.utime(file, (0, 0))
    link = tmp_path / "link"
    link.symlink_to("one")
    llm = models.llm(lora_folder=str(tmp_path))
    models.check(llm, "one", llm.generate(PROMPTS, GREEDY, adapter="link"))
    (tmp_path / "next").symlink_to("two")
    (tmp_path / "next").rename(link)
    expected = llm.generate(PROMPTS, GREEDY, adapter="two")
    found = llm.generate(PROMPTS, GREEDY, adapter="link")
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert not any(each.num_cached_tokens for each in found)


def test_a_step_without_memory_for_an_adapter(models, monkeypatch):
    """Its largest request ends, and the next one with that adapter finds it whole."""
    llm = models.llm()
    share_out = DeviceAdapters._share_out
    calls = iter(range(1000))

    def fail_once(*arguments):
        if next(calls) == 5:
            raise torch.OutOfMemoryError("no memory left")
        return share_out(*arguments)

    monkeypatch.setattr(DeviceAdapters, "_share_out", fail_once)
    completions = llm.generate(PROMPTS, GREEDY, adapter="one")
    assert "out of memory" in completions[1].error
    found = llm.generate(PROMPTS, GREEDY, adapter="one")
    models.check(llm, "one", found)
    assert completions[0].token_ids == found[0].token_ids


def test_preempted_requests_find_their_adapter_again(models):
    llm = models.llm(kv_cache_memory=32 * 1152 * 2, max_model_len=64, max_num_batched_tokens=16)
    llm.engine._scheduler._expected_output = 0
    names = [name for name in ("one", "two", "attention") for _ in PROMPTS]
    completions = llm.generate(PROMPTS * 3, GREEDY, adapter=names)
    assert llm.engine.stats().num_preemptions > 0
    for index, name in enumerate(("one", "two", "attention")):
        models.check(llm, name, completions[3 * index : 3 * index + 3])


def test_memory_for_adapters_is_bounded(models, tmp_path):
    reference = make_tiny_qwen3(tmp_path / "model")
    for index in range(6):
        make_adapter(tmp_path / "adapters" / f"a{index}", reference, seed=index)
    llm = LLM(str(tmp_path / "model"), **(FIELDS | {"lora_folder": str(tmp_path / "adapters"), "max_loras": 1}))
    for index in range(4):
        llm.engine.add_request(
            EngineRequest(request_id=str(index), prompt_token_ids=[5], params=GREEDY, adapter=f"a{index}")
        )
    with pytest.raises(QueueFullError, match="4 adapters are in use"):
        llm.engine.find_adapter("a4")
    finished = []
    while llm.engine.has_work:
        assert llm.engine.stats().num_running <= 1
        finished += [output for output in llm.engine.step() if output.finish_reason]
    assert [output.finish_reason for output in finished] == [FinishReason.LENGTH] * 4
    assert llm.engine.find_adapter("a4").name == "a4"


@pytest.mark.parametrize("name", ["../one", "/etc", "", ".", "..", "a/b", "a" * 65, "none"])
def test_names_do_not_lead_out_of_the_folder(models, name):
    llm = models.llm()
    if name:
        with pytest.raises(RequestError, match="does not exist") as caught:
            llm.generate(PROMPTS, GREEDY, adapter=name)
        assert caught.value.param == "adapter"
    expected = "cannot be read" if name == "none" else "expected a name as in"
    with pytest.raises((CheckpointError, RequestError), match=expected):
        llm.load_adapter(name, models.folder / "nowhere")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "use_dora is 'True', which is not supported"),
        ({"bias": "lora_only"}, "bias is 'lora_only', which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is .*lm_head.*, which is not supported"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is .* not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which is not supported"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3', expected 'LORA'"),
        ({"r": 17}, r"r is 17, expected at most max_lora_rank \(16\)"),
        ({"r": 0}, "r: Input should be greater than or equal to 1"),
        ({"r": 3}, r"is torch.float32 \[4, 80\], expected floats of 16 bits or more, \[3, 80\]"),
        ({"lora_alpha": float("inf")}, "lora_alpha: "),
    ],
    ids=str,
)
def test_what_is_not_supported_is_named(models, tmp_path, config, message):
    tensors = load_file(models.folder / "one" / "adapter_model.safetensors")
    values = CONFIG | {"r": 4, "lora_alpha": 8} | config
    write_adapter(tmp_path / "bad", values, tensors)
    llm = models.llm(lora_folder=str(tmp_path))
    with pytest.raises(CheckpointError, match=message):
        llm.load_adapter("bad", tmp_path / "bad")
    with pytest.raises(RequestError, match="adapter 'bad' cannot be used"):
        llm.generate(PROMPTS, GREEDY, adapter="bad")
    models.check(llm, "", llm.generate(PROMPTS, GREEDY))


def test_damaged_files_are_clear_errors(models, tmp_path):
    llm = models.llm()
    tensors = load_file(models.folder / "one" / "adapter_model.safetensors")
    name, a = next((name, tensor) for name, tensor in tensors.items() if "lora_A" in name)
    values = CONFIG | {"r": 4, "lora_alpha": 8}

    def refused(message, config=values, changed=tensors):
        write_adapter(tmp_path, config, changed)
        with pytest.raises(CheckpointError, match=message):
            llm.load_adapter("bad", tmp_path)

    refused("has only lora_B, expected lora_A and lora_B", changed={k: v for k, v in tensors.items() if k != name})
    refused("has values that are no finite numbers", changed=tensors | {name: a * torch.nan})
    refused("changes 'model.layers.9.self_attn.q_proj', expected a linear layer", changed={
        "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": a,
    })  # fmt: skip
    refused("tensor 'lm_head.weight' is not supported", changed={"lm_head.weight": a})
    refused("has no tensors", changed={})
    write_adapter(tmp_path, values, tensors)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match="not a JSON object"):
        llm.load_adapter("bad", tmp_path)
    (tmp_path / "adapter_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="Input should be"):
        llm.load_adapter("bad", tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\xff" * 99)
    with pytest.raises(CheckpointError, match="truncated or not a safetensors file"):
        llm.load_adapter("bad", tmp_path)


def test_a_file_that_is_shortened_while_it_is_read(models, tmp_path, monkeypatch):
    llm, check = models.llm(lora_folder=str(tmp_path)), adapter._tensor_names
    for num_bytes in (0, 5000):
        folder = tmp_path / f"a{num_bytes}"
        shutil.copytree(models.folder / "one", folder)

        def check_and_shorten(*arguments, file=folder / "adapter_model.safetensors", num_bytes=num_bytes):
            found = check(*arguments)
            os.truncate(file, num_bytes)
            return found

        monkeypatch.setattr(adapter, "_tensor_names", check_and_shorten)
        with pytest.raises(RequestError, match=rf"adapter 'a{num_bytes}' cannot .*safetensors: cannot be read"):
            llm.engine.find_adapter(folder.name)


def test_an_engine_without_room_refuses_adapters(models):
    llm = models.llm(lora_folder=None, max_loras=0)
    assert not any("lora" in name for name, _ in llm.engine.runner.model.named_parameters())
    with pytest.raises(RequestError, match="no room for adapters, expected max_loras of at least 1"):
        llm.generate(PROMPTS, GREEDY, adapter="one")
    with pytest.raises(ValueError, match="max_loras is 0 though there are adapters"):
        EngineConfig(lora_folder="x")
    with pytest.raises(ConfigError, match="lora_folder is 'x', expected a folder"):
        models.llm(lora_folder="x")


def test_places():
    places, one, two, three = AdapterPlaces(2), *(AdapterHandle(name, 0) for name in ("one", "two", "three"))
    first, second = places.pin(one), places.pin(two)
    assert {first, second} == {1, 2} and places.pin(one) == first and places.pin(three) == 0
    places.unpin(one)
    assert places.pin(three) == 0
    places.unpin(one)
    places.unpin(two)
    assert places.pin(two) == second and places.pin(three) == first and places.pin(one) == 0
    places.unpin(three)
    places.drop(three)
    places.drop(two)
    assert places.pin(one) == first


def test_other_families(tmp_path):
    """Experts have no adapters; the attention around them has."""
    from transformers import Qwen3MoeConfig

    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    reference = make_tiny_model(tmp_path / "model", Qwen3MoeConfig, **sizes)
    changes = make_adapter(tmp_path / "adapter", reference, targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    llm = LLM(str(tmp_path / "model"), **(FIELDS | {"adapters": {"a": str(tmp_path / "adapter")}}))
    merge(reference, changes)
    expected = reference_greedy(reference, PROMPTS[1], 12)
    found = llm.generate([PROMPTS[1]], GREEDY, adapter="a")[0].token_ids
    cut = next((index for index, token in enumerate(expected) if token >= llm.engine.vocab_size), 12)
    assert found[:cut] == expected[:cut]

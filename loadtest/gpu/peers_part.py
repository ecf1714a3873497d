"""Other engines on the same card, weights' shape and workload, as far as they can be imported."""

import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from loadtest.gpu.engine_part import Workload
from loadtest.gpu.models import QWEN3_0_6B, Shape, write_folder
from loadtest.gpu.results import Group, Record, Row, attempt

Generate = Callable[[list[list[int]], list[int]], object]
"""Completes prompts with so many tokens each, and returns when all are done."""
TEMPERATURE = 0.6


def groups() -> dict[str, Group]:
    """A group for each peer."""
    return {name: partial(measure, name, QWEN3_0_6B, "cuda", (1, 32, 128), Workload()) for name in PEERS}


def measure(
    name: str,
    shape: Shape,
    device: str,
    streams: tuple[int, ...],
    workload: Workload,
    surroundings: dict[str, Any],
    record: Record,
) -> None:
    """Rows of one peer. One that is not there or fails says so: that is no error of ours."""
    del surroundings
    package = name.split(maxsplit=1)[0]
    if find_spec(package) is None:
        record({"peer": name, "skipped": f"{package} is not installed"})
        return
    with tempfile.TemporaryDirectory() as folder, PEERS[name](write_folder(shape, Path(folder)), device) as generate:
        generate([[1, 2, 3]], [4])
        for what, prompts, counts in _workloads(shape, streams, workload):
            attempt(record, {"peer": name, "what": what}, partial(_timed, name, what, generate, prompts, counts))


def _workloads(
    shape: Shape, streams: tuple[int, ...], workload: Workload
) -> Iterator[tuple[str, list[list[int]], list[int]]]:
    """Streams of equal length, prompts included, and nano-vllm's workload: names, prompts, how many tokens each."""
    for count in streams:
        generator = random.Random(count)
        prompts = [[generator.randrange(shape.vocab) for _ in range(workload.context)] for _ in range(count)]
        end = workload.context + workload.num_decoded
        what = f"decode, {count} streams, context {workload.context}-{end}, prefill included"
        yield what, prompts, [workload.num_decoded] * count
    yield "nano-vllm's workload", *workload.nano(shape.vocab)


def _timed(name: str, what: str, generate: Generate, prompts: list[list[int]], counts: list[int]) -> Row:
    start = time.perf_counter()
    generate(prompts, counts)
    seconds = time.perf_counter() - start
    print(f"{name:32} {what:64} {sum(counts) / seconds:12,.0f} tok/s", flush=True)
    return {"tokens_per_s": sum(counts) / seconds, "seconds": seconds}


def _random_model(path: Path, device: str) -> PreTrainedModel:
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16).eval()


@contextmanager
def _transformers(path: Path, device: str) -> Iterator[Generate]:
    """`generate` on prompts of one length: a batch runs until its longest output is done, what is too much is waste."""
    model = _random_model(path, device)

    @torch.inference_mode()
    def generate(prompts: list[list[int]], counts: list[int]) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        model.generate(ids, attention_mask=mask, generation_config=_generation_config(max(counts)))
        if device == "cuda":
            torch.cuda.synchronize()

    yield generate


@contextmanager
def _transformers_continuous(path: Path, device: str) -> Iterator[Generate]:
    """transformers' continuous batching, what `generate_batch` runs on, with a length for each request."""
    model = _random_model(path, device)
    with model.continuous_batching_context_manager(generation_config=_generation_config(1024)) as manager:

        def generate(prompts: list[list[int]], counts: list[int]) -> None:
            for prompt, count in zip(prompts, counts, strict=True):
                manager.add_request(prompt, max_new_tokens=count)
            num_finished = 0
            while num_finished < len(prompts):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("transformers' generation thread ended")
                if result is not None and result.error is not None:
                    raise RuntimeError(result.error)
                num_finished += result is not None and result.is_finished()

        yield generate


def _generation_config(num_tokens: int) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=num_tokens,
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        eos_token_id=-1,
        pad_token_id=0,
    )


@contextmanager
def _vllm(path: Path, device: str) -> Iterator[Generate]:
    del device
    from vllm import LLM, SamplingParams

    llm = LLM(str(path), load_format="dummy", max_model_len=4096, skip_tokenizer_init=True)

    def generate(prompts: list[list[int]], counts: list[int]) -> None:
        params = [
            SamplingParams(temperature=TEMPERATURE, max_tokens=count, ignore_eos=True, detokenize=False)
            for count in counts
        ]
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params)

    yield generate


@contextmanager
def _nano_vllm(path: Path, device: str) -> Iterator[Generate]:
    """Its weights stay as memory is given to it: there is no checkpoint, and it has no random ones."""
    del device
    from nanovllm import LLM, SamplingParams

    llm = LLM(str(path), max_model_len=4096)

    def generate(prompts: list[list[int]], counts: list[int]) -> None:
        params = [SamplingParams(temperature=TEMPERATURE, max_tokens=count, ignore_eos=True) for count in counts]
        llm.generate(prompts, params, use_tqdm=False)

    try:
        yield generate
    finally:
        llm.exit()


@contextmanager
def _sglang(path: Path, device: str) -> Iterator[Generate]:
    del device
    import sglang

    engine = sglang.Engine(
        model_path=str(path), load_format="dummy", context_length=4096, skip_tokenizer_init=True, log_level="error"
    )

    def generate(prompts: list[list[int]], counts: list[int]) -> None:
        params = [{"temperature": TEMPERATURE, "max_new_tokens": count, "ignore_eos": True} for count in counts]
        engine.generate(input_ids=prompts, sampling_params=params)

    try:
        yield generate
    finally:
        engine.shutdown()


PEERS: dict[str, Callable[[Path, str], AbstractContextManager[Generate]]] = {
    "transformers generate": _transformers,
    "transformers continuous batching": _transformers_continuous,
    "vllm": _vllm,
    "sglang": _sglang,
    "nanovllm": _nano_vllm,
}

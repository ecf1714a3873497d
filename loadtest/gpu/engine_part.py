"""The engine with random weights: latency, throughput, prefill, and what graphs, overlapped steps and FP8 are worth."""

import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch.profiler import ProfilerActivity, profile

from engine import LLM, EngineRequest, SamplingParams
from loadtest.gpu.models import QWEN3_0_6B, QWEN3_8B, Shape, make_llm
from loadtest.gpu.results import Group, Record, Row, attempt

FP8 = "FP8 weights and KV cache"
VARIANTS: dict[str, dict[str, Any]] = {
    "no overlap": {"overlap_steps": False},
    "no graphs": {"enforce_eager": True},
    "neither": {"enforce_eager": True, "overlap_steps": False},
    "FP8 KV cache": {"kv_cache_dtype": "fp8"},
    "FP8 weights": {"quantization": "fp8"},
    FP8: {"quantization": "fp8", "kv_cache_dtype": "fp8"},
}


@dataclass(frozen=True)
class Workload:
    """How much to measure; the default is what results are compared by."""

    context: int = 512
    num_decoded: int = 256
    num_sequences: int = 256
    longest: int = 1024
    """Most tokens in and out of nano-vllm's workload; the fewest are 100, or as many."""
    prompts: tuple[int, ...] = (1024, 8192)

    def nano(self, vocab_size: int) -> tuple[list[list[int]], list[int]]:
        """nano-vllm's bench.py, seed 0: prompts, and how many tokens each shall give (133,966 in all by default)."""
        last, shortest = min(10_000, vocab_size - 1), min(100, self.longest)
        random.seed(0)
        prompts = [
            [random.randint(0, last) for _ in range(random.randint(shortest, self.longest))]
            for _ in range(self.num_sequences)
        ]
        return prompts, [random.randint(shortest, self.longest) for _ in range(self.num_sequences)]


def groups() -> dict[str, Group]:
    """One engine each: plain ones, where their time goes, then what graphs, overlapped steps and FP8 are worth."""
    long = {"max_model_len": 16_384}
    found: dict[str, Group] = {
        QWEN3_0_6B.name: partial(measure_variant, QWEN3_0_6B, "", (1, 8, 32, 128, 256), config=long),
        QWEN3_8B.name: partial(measure_variant, QWEN3_8B, "", (1, 32, 128), config=long),
    }
    for shape in (QWEN3_0_6B, QWEN3_8B):
        found[f"{shape.name}, kernels of a step"] = partial(profile_steps, shape, (1, 128))
    variants = [(QWEN3_0_6B, variant, (1, 128, 256)) for variant in VARIANTS] + [(QWEN3_8B, FP8, (1, 32, 128))]
    for shape, variant, streams in variants:
        measure = partial(measure_variant, shape, variant, streams, config=VARIANTS[variant])
        found[f"{shape.name}, {variant}"] = measure
    return found


def measure_variant(
    shape: Shape,
    variant: str,
    streams: tuple[int, ...],
    surroundings: dict[str, Any],
    record: Record,
    workload: Workload | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Rows of one model under one configuration."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        llm = make_llm(shape, Path(folder), **({"max_model_len": 4096} | (config or {})))
        what = {"model": shape.name, "variant": variant}
        record(what | {"what": "start, kernels compiled where they are new", "seconds": time.perf_counter() - start})
        for name, measure in Measure(llm, shape, surroundings).all(streams, workload or Workload()).items():
            attempt(record, what | {"what": name}, partial(_shown, shape.name, name, measure))


def _shown(model: str, what: str, measure: Callable[[], Row]) -> Row:
    """What is measured, printed too."""
    row = measure()
    tokens_per_s, limit = row["tokens_per_s"], row["limit_tokens_per_s"]
    print(f"{model:12} {what:40} {tokens_per_s:12,.0f} tok/s  {row['share']:6.1%} of {limit:,.0f}", flush=True)
    return row


class Measure:
    """Measurements of one engine, each beside the least time that the same work takes at the measured ceilings."""

    def __init__(self, llm: LLM, shape: Shape, surroundings: dict[str, Any]) -> None:
        self.llm = llm
        self.shape = shape
        self.rate = surroundings["matmul_flop_per_s"]
        config = llm.engine.config
        self.floor_s = partial(
            shape.decode_floor_s,
            bytes_per_s=surroundings["copy_bytes_per_s"],
            flop_per_s=self.rate,
            fp8_weights=config.quantization == "fp8",
            fp8_cache=config.kv_cache_dtype == "fp8",
        )

    def all(self, streams: tuple[int, ...], workload: Workload) -> dict[str, Callable[[], Row]]:
        """Decode at several numbers of streams, nano-vllm's workload, and prefill, by name."""
        span = f"context {workload.context}-{workload.context + workload.num_decoded}"
        found: dict[str, Callable[[], Row]] = {
            f"decode, {count} streams, {span}": partial(self.decode, count, workload) for count in streams
        }
        found["nano-vllm's workload"] = partial(self.nano_workload, workload)
        lengths = [length for length in workload.prompts if length < self.llm.engine.max_model_len]
        return found | {f"prefill, {length} tokens": partial(self.prefill, length) for length in lengths}

    def decode(self, count: int, workload: Workload) -> Row:
        """Steps of one token for each of `count` streams."""
        step_s = decode_step_s(self.llm, count, workload.context, workload.num_decoded)
        return _row(count, step_s, self.floor_s(count, workload.context + workload.num_decoded / 2))

    def prefill(self, length: int) -> Row:
        """A prompt alone, to its first token."""
        return _row(length, prefill_s(self.llm, length), self.shape.prefill_floor_s(length, self.rate))

    def nano_workload(self, workload: Workload) -> Row:
        """nano-vllm's bench.py."""
        prompts, counts = workload.nano(self.llm.engine.vocab_size)
        params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=count) for count in counts]
        self.llm.generate([[1, 2, 3]], SamplingParams(max_tokens=4, ignore_eos=True))
        start = time.perf_counter()
        completions = self.llm.generate(prompts, params)
        seconds = time.perf_counter() - start
        num_tokens = sum(len(completion.token_ids) for completion in completions)
        if num_tokens != sum(counts):
            raise AssertionError(f"{num_tokens:,} tokens came out, expected {sum(counts):,}")
        floor = sum(self.shape.prefill_floor_s(len(prompt), self.rate) for prompt in prompts)
        for position in range(1, max(counts)):
            running = [len(own) + position for own, count in zip(prompts, counts, strict=True) if count > position]
            if running:
                floor += self.floor_s(len(running), sum(running) / len(running))
        return _row(num_tokens, seconds, floor)


def _row(num_tokens: int, seconds: float, floor_s: float) -> Row:
    return {
        "tokens_per_s": num_tokens / seconds,
        "limit_tokens_per_s": num_tokens / floor_s,
        "share": floor_s / seconds,
        "seconds": seconds,
    }


def profile_steps(
    shape: Shape,
    streams: tuple[int, ...],
    surroundings: dict[str, Any],
    record: Record,
    workload: Workload | None = None,
    config: dict[str, Any] | None = None,
) -> None:
    """Where the time of a decode step goes, kernel by kernel; the profiler adds some of its own."""
    del surroundings
    context = (workload or Workload()).context
    with tempfile.TemporaryDirectory() as folder:
        llm = make_llm(shape, Path(folder), **({"max_model_len": 4096} | (config or {})))
        for count in streams:
            what = {"model": shape.name, "what": f"kernels of a step, {count} streams, context {context}"}
            attempt(record, what, partial(_kernels_of_a_step, llm, count, context))


def _kernels_of_a_step(llm: LLM, count: int, context: int) -> Row:
    on_cuda = llm.engine.runner.device.type == "cuda"
    num_steps = 16
    add_streams(llm, count, context, 3 * num_steps)
    while len(llm.engine.step()) < count:
        pass  # prompts
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as profiler:
        start = time.perf_counter()
        for _ in range(num_steps):
            llm.engine.step()
        seconds = (time.perf_counter() - start) / num_steps
    while llm.engine.has_work:
        llm.engine.step()
    kernels = [
        {
            "name": event.key[:120],
            "launches": event.count / num_steps,
            "seconds": (event.self_device_time_total if on_cuda else event.self_cpu_time_total) / 1e6 / num_steps,
        }
        for event in profiler.key_averages()
    ]
    kernels = sorted((own for own in kernels if own["seconds"]), key=lambda own: -own["seconds"])
    busy = sum(own["seconds"] for own in kernels)
    for own in kernels[:12]:
        print(f"{own['seconds'] * 1e6:9.1f} µs in {own['launches']:6.1f} launches of {own['name'][:80]}", flush=True)
    return {"seconds": seconds, "busy_s": busy, "kernels": kernels}


def add_streams(llm: LLM, count: int, context: int, num_tokens: int) -> None:
    """Queue `count` requests with random prompts of one length."""
    generator = random.Random(count)
    for index in range(count):
        prompt = [generator.randrange(llm.engine.vocab_size) for _ in range(context)]
        params = SamplingParams(temperature=0.6, max_tokens=num_tokens, ignore_eos=True, seed=index)
        llm.engine.add_request(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params))


def decode_step_s(llm: LLM, count: int, context: int, num_tokens: int) -> float:
    """Median seconds a decode step with this many streams."""
    add_streams(llm, count, context, num_tokens)
    marks: list[float] = []
    while llm.engine.has_work:
        outputs = llm.engine.step()
        if len(outputs) == count:
            marks.append(time.perf_counter())
    steps = sorted(end - start for start, end in pairwise(marks[8:]))
    return steps[len(steps) // 2]


def prefill_s(llm: LLM, length: int) -> float:
    """Median seconds from a prompt to its first token."""
    times = []
    for seed in range(5):
        generator = random.Random(length + seed)  # no prompt begins as another does: none is in the prefix cache
        prompt = [generator.randrange(llm.engine.vocab_size) for _ in range(length)]
        params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        start = time.perf_counter()
        llm.generate([prompt], params)
        times.append(time.perf_counter() - start)
    return sorted(times)[2]

"""The engine with random weights: latency, throughput, prefill, and what graphs, overlapped steps and FP8 are worth."""

import random
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from engine import LLM, EngineRequest, SamplingParams
from loadtest.gpu.models import QWEN3_0_6B, QWEN3_8B, Shape, close, make_llm

Row = dict[str, Any]
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


def run(surroundings: dict[str, Any]) -> dict[str, Any]:
    """All measurements on a GPU."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for shape, streams in ((QWEN3_0_6B, (1, 8, 32, 128, 256)), (QWEN3_8B, (1, 32, 128))):
            rows += measure_variant(shape, folder, "", streams, surroundings, max_model_len=16_384)
        for variant, config in VARIANTS.items():
            rows += measure_variant(QWEN3_0_6B, folder, variant, (1, 128, 256), surroundings, **config)
        rows += measure_variant(QWEN3_8B, folder, FP8, (1, 32, 128), surroundings, **VARIANTS[FP8])
    return {"rows": rows}


def measure_variant(
    shape: Shape,
    folder: Path,
    variant: str,
    streams: tuple[int, ...],
    surroundings: dict[str, Any],
    workload: Workload | None = None,
    **config: Any,
) -> list[Row]:
    """Rows of one model under one configuration."""
    llm = make_llm(shape, folder / shape.name, **({"max_model_len": 4096} | config))
    rows = [
        row | {"variant": variant} for row in Measure(llm, shape, surroundings).rows(streams, workload or Workload())
    ]
    close(llm)
    return rows


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

    def rows(self, streams: tuple[int, ...], workload: Workload) -> list[Row]:
        """Decode at several numbers of streams, nano-vllm's workload, and prefill."""
        context, length = workload.context, workload.num_decoded
        rows = []
        for count in streams:
            step_s = decode_step_s(self.llm, count, context, length)
            floor = self.floor_s(count, context + length / 2)
            what = f"decode, {count} streams, context {context}-{context + length}"
            rows.append(self._row(what, count / step_s, count / floor, step_s))
        num_tokens, seconds, floor = self.nano_workload(workload)
        rows.append(self._row("nano-vllm's workload", num_tokens / seconds, num_tokens / floor, seconds))
        for length in workload.prompts:
            if length < self.llm.engine.max_model_len:
                seconds = prefill_s(self.llm, length)
                floor = self.shape.prefill_floor_s(length, self.rate)
                rows.append(self._row(f"prefill, {length} tokens", length / seconds, length / floor, seconds))
        return rows

    def nano_workload(self, workload: Workload) -> tuple[int, float, float]:
        """nano-vllm's bench.py. Returns tokens, seconds, and how many seconds they take at least."""
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
        return num_tokens, seconds, floor

    def _row(self, what: str, tokens_per_s: float, limit: float, seconds: float) -> Row:
        share = tokens_per_s / limit
        print(f"{self.shape.name:12} {what:40} {tokens_per_s:12,.0f} tok/s  {share:6.1%} of {limit:,.0f}", flush=True)
        return {
            "model": self.shape.name,
            "what": what,
            "tokens_per_s": tokens_per_s,
            "limit_tokens_per_s": limit,
            "share": share,
            "seconds": seconds,
        }


def decode_step_s(llm: LLM, count: int, context: int, num_tokens: int) -> float:
    """Median seconds a decode step with this many streams."""
    generator = random.Random(count)
    for index in range(count):
        prompt = [generator.randrange(llm.engine.vocab_size) for _ in range(context)]
        params = SamplingParams(temperature=0.6, max_tokens=num_tokens, ignore_eos=True, seed=index)
        llm.engine.add_request(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params))
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

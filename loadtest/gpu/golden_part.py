"""The same tokens however they are computed, and those of transformers: with CUDA graphs and without, overlapped, in
chunks, alone and in a batch.

Greedy tokens are judged one by one: transformers, in float32 and with our own tokens before each, may like another
token better by no more than a margin. So a near-tie that falls the other way is no error, and does not make one of all
that follows it. How many requests have the very tokens of eager steps is reported.
"""

import random
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from engine import LLM, SamplingParams
from loadtest.gpu.layer_cases import has_fp8
from loadtest.gpu.models import close, copy_tokenizer
from loadtest.gpu.results import Group, Record, Row, attempt

Tokens = list[list[int]]
VOCAB = 1126  # of the tokenizer that comes along
MARGINS = {"float32": 1e-3, "bfloat16": 0.2, "bfloat16, FP8 KV cache": 0.5}
"""How much less likely than the likeliest a greedy token may be, in standard deviations of the logits."""
WAYS: dict[str, dict[str, Any]] = {
    "eager": {"enforce_eager": True, "overlap_steps": False},
    "eager, overlapped": {"enforce_eager": True, "overlap_steps": True},
    "graphs": {"overlap_steps": False},
    "graphs, overlapped": {"overlap_steps": True},
    "chunks of 64": {"max_num_batched_tokens": 64},
    "one at a time": {"max_num_seqs": 1},
}
LEAST_EQUAL = 0.9
"""Share of requests with sampled tokens that must be equal in all ways; the others met a tie."""


@dataclass(frozen=True)
class Size:
    """How much is compared, and where."""

    device: str = "cuda"
    num_prompts: int = 16
    num_tokens: int = 48

    def prompts(self) -> Tokens:
        generator = random.Random(1)
        lengths = (generator.randrange(1, 300) for _ in range(self.num_prompts))
        return [[generator.randrange(VOCAB) for _ in range(length)] for length in lengths]


def groups(size: Size | None = None) -> dict[str, Group]:
    """Greedy tokens in each dtype, and sampled ones."""
    comparisons = {"greedy, float32": compare_float32, "greedy, bfloat16": compare_bfloat16, "sampled": compare_sampled}
    return {name: partial(_with_checkpoint, compare, size or Size()) for name, compare in comparisons.items()}


def _with_checkpoint(
    compare: Callable[[Path, Size, Record], None], size: Size, surroundings: dict[str, Any], record: Record
) -> None:
    del surroundings

    def record_and_print(row: Row) -> None:
        print(", ".join(f"{key}: {value}" for key, value in row.items() if key != "traceback"), flush=True)
        record(row)

    with tempfile.TemporaryDirectory() as name:
        compare(write_checkpoint(Path(name)), size, record_and_print)


def compare_float32(folder: Path, size: Size, record: Record) -> None:
    """Every way against transformers, and against eager steps."""
    reference, prompts, greedy = _reference(folder, size), size.prompts(), _greedy(size)
    eager: Tokens = []

    def measure(way: str) -> Row:
        tokens = _generate(folder, prompts, greedy, size.device, dtype="float32", **WAYS[way])
        eager[:] = eager or tokens  # the first of the ways
        gap = check(reference, prompts, tokens, MARGINS["float32"], way)
        return {"largest gap": gap, "margin": MARGINS["float32"], "requests equal to eager": _num_equal(tokens, eager)}

    for way in WAYS:
        attempt(record, {"way": f"float32, {way}", "requests": len(prompts)}, partial(measure, way))


def compare_bfloat16(folder: Path, size: Size, record: Record) -> None:
    """With a KV cache of bfloat16 and, where the GPU has it, of FP8."""
    reference, prompts, greedy = _reference(folder, size), size.prompts(), _greedy(size)

    def measure(way: str, config: dict[str, Any]) -> Row:
        tokens = _generate(folder, prompts, greedy, size.device, dtype="bfloat16", **config)
        return {"largest gap": check(reference, prompts, tokens, MARGINS[way], way), "margin": MARGINS[way]}

    ways: tuple[dict[str, Any], ...] = ({}, {"kv_cache_dtype": "fp8"})
    for way, config in zip(("bfloat16", "bfloat16, FP8 KV cache")[: 1 + has_fp8(size.device)], ways, strict=False):
        attempt(record, {"way": way, "requests": len(prompts)}, partial(measure, way, config))


def _reference(folder: Path, size: Size) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(size.device).eval()


def _greedy(size: Size) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=size.num_tokens, ignore_eos=True)


def write_checkpoint(folder: Path) -> Path:
    """A small random Qwen3, made by transformers, with weights that bfloat16 holds exactly."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=True,
        attention_bias=False,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return copy_tokenizer(folder)


@torch.inference_mode()
def check(reference: PreTrainedModel, prompts: Tokens, outputs: Tokens, margin: float, way: str) -> float:
    """The largest gap between the reference's likeliest token and ours, in standard deviations of its logits.

    Raises:
        AssertionError: it is more than the margin.
    """
    largest = 0.0
    for index, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        ids = torch.tensor([prompt + output], device=reference.device)
        logits = reference(ids).logits[0, len(prompt) - 1 : -1].float()
        ours = logits.gather(1, ids[0, len(prompt) :, None]).squeeze(1)
        gaps = (logits.amax(1) - ours) / logits.std(1)
        largest = max(largest, gaps.max().item())
        if not largest <= margin:
            position = int(gaps.argmax())
            raise AssertionError(
                f"{way}: token {position} of request {index} is {output[position]}, which transformers finds "
                f"{largest:.3g} standard deviations less likely than {int(logits[position].argmax())}; expected at "
                f"most {margin}"
            )
    return largest


def compare_sampled(folder: Path, size: Size, record: Record) -> None:
    """How many requests of mixed parameters get the tokens that eager steps give them, in each way."""
    prompts = size.prompts()
    varied: list[dict[str, Any]] = [
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 50},
        {"temperature": 0.9, "min_p": 0.02},
        {"temperature": 1.0},
        {"temperature": 0.8, "repetition_penalty": 1.1},
        {"temperature": 0.8, "top_k": 600, "logprobs": 2},
    ]
    for what, kinds in (("plain", varied[:4]), ("some edited", varied)):
        params = [
            SamplingParams(seed=index, max_tokens=size.num_tokens, ignore_eos=True, **kinds[index % len(kinds)])
            for index in range(len(prompts))
        ]
        eager: Tokens = []
        for way in WAYS:
            measure = partial(_equal_to_eager, folder, prompts, params, size.device, way, eager)
            attempt(record, {"way": f"sampled, {what}, {way}", "requests": len(prompts)}, measure)


def _equal_to_eager(
    folder: Path, prompts: Tokens, params: list[SamplingParams], device: str, way: str, eager: Tokens
) -> Row:
    """How many requests equal those in `eager`, where the first way's are put.

    Raises:
        AssertionError: fewer than LEAST_EQUAL of them.
    """
    tokens = _generate(folder, prompts, params, device, dtype="float32", **WAYS[way])
    eager[:] = eager or tokens
    num_equal = _num_equal(tokens, eager)
    if num_equal < LEAST_EQUAL * len(prompts):
        raise AssertionError(f"{num_equal} of {len(prompts)} requests have the tokens of eager steps")
    return {"requests equal to eager": num_equal}


def _generate(
    folder: Path, prompts: Tokens, params: SamplingParams | Sequence[SamplingParams], device: str, **config: Any
) -> Tokens:
    llm = LLM(
        str(folder),
        device=device,
        max_model_len=512,
        kv_cache_memory="64MiB",
        show_progress=False,
        **({"max_num_seqs": 16} | config),
    )
    tokens = [completion.token_ids for completion in llm.generate(prompts, params)]
    close(llm)
    return tokens


def _num_equal(some: Tokens, others: Tokens) -> int:
    return sum(a == b for a, b in zip(some, others, strict=True))

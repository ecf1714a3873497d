"""The same tokens however they are computed, and those of transformers: with CUDA graphs and without, overlapped, in
chunks, alone and in a batch.

Greedy tokens are judged one by one: transformers, in float32 and with our own tokens before each, may like another
token better by no more than a margin. So a near-tie that falls the other way is no error, and does not make one of all
that follows it. How many requests have the very tokens of eager steps is reported.
"""

import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from engine import LLM, SamplingParams
from loadtest.gpu.models import close, copy_tokenizer

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


def run(surroundings: dict[str, Any], device: str = "cuda", num_prompts: int = 16, num_tokens: int = 48) -> dict:
    """All comparisons; raises on a wrong token."""
    del surroundings
    generator = random.Random(1)
    prompts = [[generator.randrange(VOCAB) for _ in range(generator.randrange(1, 300))] for _ in range(num_prompts)]
    greedy = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = write_checkpoint(Path(name))
        reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
        outputs = {way: _generate(folder, prompts, greedy, device, dtype="float32", **WAYS[way]) for way in WAYS}
        for way, tokens in outputs.items():
            found[f"float32, {way}"] = {
                "largest gap": check(reference, prompts, tokens, MARGINS["float32"], way),
                "requests equal to eager": _num_equal(tokens, outputs["eager"]),
            }
        for way, config in (("bfloat16", {}), ("bfloat16, FP8 KV cache", {"kv_cache_dtype": "fp8"})):
            tokens = _generate(folder, prompts, greedy, device, dtype="bfloat16", **config)
            found[way] = {"largest gap": check(reference, prompts, tokens, MARGINS[way], way)}
        found["sampled"] = compare_sampled(folder, prompts, num_tokens, device)
    for comparison, result in found.items():
        print(f"{comparison:32} {result}", flush=True)
    return {"margins": MARGINS, "num_prompts": num_prompts, "golden": found}


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


def compare_sampled(folder: Path, prompts: Tokens, num_tokens: int, device: str) -> dict[str, int]:
    """How many requests of mixed parameters get the tokens that eager steps give them, in each way.

    Raises:
        AssertionError: fewer than LEAST_EQUAL of them.
    """
    varied: list[dict[str, Any]] = [
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.0, "top_k": 50},
        {"temperature": 0.9, "min_p": 0.02},
        {"temperature": 1.0},
        {"temperature": 0.8, "repetition_penalty": 1.1},
        {"temperature": 0.8, "top_k": 600, "logprobs": 2},
    ]
    found = {}
    for what, kinds in (("plain", varied[:4]), ("some edited", varied)):
        params = [
            SamplingParams(seed=index, max_tokens=num_tokens, ignore_eos=True, **kinds[index % len(kinds)])
            for index in range(len(prompts))
        ]
        outputs = {way: _generate(folder, prompts, params, device, dtype="float32", **WAYS[way]) for way in WAYS}
        for way, tokens in outputs.items():
            num_equal = found[f"{what}, {way}"] = _num_equal(tokens, outputs["eager"])
            if num_equal < LEAST_EQUAL * len(prompts):
                raise AssertionError(f"{num_equal} of {len(prompts)} sampled requests ({what}) equal eager in: {way}")
    return found


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

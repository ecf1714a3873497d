"""What evaluation harnesses do with /v1/completions: ids in, the log-probability of every token out.

The requests, and how the answers are read, are those of lm-eval's `local-completions` (0.4.13).
"""

import json
import random
from collections.abc import AsyncIterator
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.prompt_spans import PROMPT_LOGIT_ROWS
from engine.tokenizer import Tokenizer
from serve_app.config import Limits
from serve_app.http import parse_body
from serve_app.openai.completion_protocol import CompletionBody
from serve_app.openai.completions import Completions
from serve_app.openai.endpoint import ServedModel
from serve_app.openai.generation import Generation
from serve_app.openai.sampling import GenerationDefaults
from serve_app.wire import ModelInfo
from tests.tiny_models import make_tiny_qwen3, reference_greedy, reference_logprobs
from tests.tiny_tokenizer import NUM_TOKENS
from tests.unit.test_openai_generation import LocalClient

CONTEXT = 480
CHUNK = 300
"""Tokens in a step: the long prompt takes two, and one of them more logits than may exist at one time."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    path = tmp_path_factory.mktemp("loglikelihood")
    return path, make_tiny_qwen3(path, vocab_size=NUM_TOKENS)


@pytest.fixture
async def engine(checkpoint: tuple[Path, Any]) -> AsyncIterator[AsyncEngine]:
    made = AsyncEngine(
        EngineConfig(
            model=str(checkpoint[0]),
            dtype="float32",
            device="cpu",
            kv_cache_memory=16 * 2**20,
            max_model_len=CONTEXT,
            max_num_seqs=4,
            max_num_batched_tokens=CHUNK,
            num_threads=1,
            show_progress=False,
        )
    )
    yield made
    await made.stop()


async def complete(engine: AsyncEngine, path: Path, payload: dict[str, Any]) -> dict[str, Any]:
    tokenizer = Tokenizer.from_dir(path)
    info = ModelInfo(engine.max_model_len, engine.vocab_size, tuple(engine.eos_token_ids), "fp", {})
    model = ServedModel("tiny", 0, tokenizer, GenerationDefaults(), Limits(), info)
    endpoint = Completions(parse_body(json.dumps(payload).encode(), CompletionBody), model)
    client: Any = LocalClient(engine)
    generation = Generation(client, tokenizer, endpoint.requests, endpoint.text_options, endpoint.prompt_tokens)
    deltas = [delta async for delta in generation.deltas()]
    return json.loads(json.dumps(endpoint.whole(deltas, generation.usage), allow_nan=False))


def request(prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": prompts,
        "temperature": 0,
        "max_tokens": max_tokens,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }


def parse_logprobs(answer: dict[str, Any], context_lens: list[int], end: int | None) -> list[tuple[float, bool]]:
    """Sum of the log-probabilities after the context, and whether each of these tokens was the likeliest."""
    found = []
    for choice, context_len in zip(sorted(answer["choices"], key=itemgetter("index")), context_lens, strict=True):
        scores = choice["logprobs"]["token_logprobs"][context_len:end]
        top = choice["logprobs"]["top_logprobs"][context_len:end]
        found.append((sum(scores), all(score == max(each.values()) for score, each in zip(scores, top, strict=True))))
    return found


def make_prompts(reference: Any) -> list[list[int]]:
    """Random ids, the last few of which are what the model itself would have said."""
    generator = random.Random(3)
    starts = [[generator.randrange(NUM_TOKENS) for _ in range(length)] for length in (CONTEXT - 6, 40, 1)]
    return [[*start, *reference_greedy(reference, start, 5)] for start in starts]


def check_choice(choice: dict[str, Any], prompt: list[int], expected: torch.Tensor, max_tokens: int) -> None:
    """Compare an echoed choice with what transformers says, float32 [tokens, vocabulary]."""
    names, scores, top = (choice["logprobs"][name] for name in ("tokens", "token_logprobs", "top_logprobs"))
    assert len(scores) == len(top) == len(names) == len(prompt) + max_tokens
    assert scores[0] is None and top[0] is None
    for name, score, likeliest in zip(names[1:], scores[1:], top[1:], strict=True):
        assert likeliest[name] == score and len(likeliest) <= 2
    of_prompt = slice(1, len(prompt))
    targets, best = torch.tensor(prompt[of_prompt]), expected[:-1].max(1)
    wanted = expected[:-1].gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(scores[of_prompt]), wanted, atol=1e-3, rtol=0)
    found = [max(likeliest.values()) for likeliest in top[of_prompt]]
    torch.testing.assert_close(torch.tensor(found), best.values, atol=1e-3, rtol=0)
    is_best = [score == largest for score, largest in zip(scores[of_prompt], found, strict=True)]
    assert is_best == (best.indices == targets).tolist()


@pytest.mark.parametrize("max_tokens", [1, 0])
async def test_log_likelihoods_are_those_of_transformers(
    engine: AsyncEngine, checkpoint: tuple[Path, Any], max_tokens: int
):
    path, reference = checkpoint
    prompts = make_prompts(reference)
    answer = await complete(engine, path, request(prompts, max_tokens))
    assert answer["usage"]["completion_tokens"] == max_tokens * len(prompts)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        check_choice(choice, prompt, reference_logprobs(reference, prompt), max_tokens)

    contexts = [len(prompt) - 4 if len(prompt) > 6 else 1 for prompt in prompts]
    found = parse_logprobs(answer, contexts, -1 if max_tokens else None)
    for (total, is_greedy), prompt, context in zip(found, prompts, contexts, strict=True):
        expected = reference_logprobs(reference, prompt)
        wanted = sum(float(expected[place - 1, prompt[place]]) for place in range(context, len(prompt)))
        assert total == pytest.approx(wanted, abs=1e-3) and is_greedy


async def test_logits_of_a_long_prompt_never_exist_all_at_once(
    engine: AsyncEngine, checkpoint: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
):
    path, reference = checkpoint
    model, rows = engine._engine.runner.model, []
    compute = model.compute_logits

    def record(hidden: torch.Tensor) -> torch.Tensor:
        rows.append(len(hidden))
        return compute(hidden)

    monkeypatch.setattr(model, "compute_logits", record)
    await complete(engine, path, request(make_prompts(reference)[:1], 1))
    assert sum(rows) >= CONTEXT - 2 and max(rows) == PROMPT_LOGIT_ROWS < CHUNK

"""Beam search: what transformers finds, and what cannot be asked for beside it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import torch
from transformers import PreTrainedModel

from engine.async_engine import AsyncEngine
from engine.config import EngineConfig
from engine.tokenizer import Tokenizer
from serve_app.config import Limits
from serve_app.openai.completion_protocol import CompletionBody
from serve_app.openai.completions import Completions
from serve_app.openai.endpoint import ServedModel
from serve_app.openai.generation import Generation
from serve_app.openai.sampling import GenerationDefaults
from serve_app.wire import ModelInfo
from tests.tiny_models import make_tiny_qwen3
from tests.tiny_tokenizer import NUM_TOKENS
from tests.unit.test_openai_completions import refusal
from tests.unit.test_openai_generation import LocalClient, until_free

PROMPT = [37, 5, 90, 12]
NUM_BEAMS = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    path = tmp_path_factory.mktemp("beams")
    return path, make_tiny_qwen3(path, vocab_size=NUM_TOKENS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(checkpoint: tuple[Path, PreTrainedModel]) -> AsyncIterator[AsyncEngine]:
    config = EngineConfig(
        model=str(checkpoint[0]), dtype="float32", device="cpu", kv_cache_memory=16 * 2**20, max_model_len=64,
        max_num_seqs=4, num_threads=1, show_progress=False,
    )  # fmt: skip
    made = AsyncEngine(config)
    yield made
    await made.stop()


def search(engine: AsyncEngine, path: Path, end: int, **fields: Any) -> tuple[Completions, Generation]:
    tokenizer = Tokenizer.from_dir(path)
    info = ModelInfo(64, NUM_TOKENS, (end,), "fp_0", {})
    body = {"model": "tiny", "prompt": PROMPT, "use_beam_search": True, "n": NUM_BEAMS, "return_token_ids": True}
    model = ServedModel("tiny", 0, tokenizer, GenerationDefaults(temperature=0.7, top_k=20), Limits(), info)
    made = Completions(CompletionBody.model_validate(body | fields), model)
    client: Any = LocalClient(engine)
    return made, Generation(client, tokenizer, made.requests, made.text_options, made.prompt_tokens)


def expected(model: PreTrainedModel, end: int | None, num_tokens: int, penalty: float) -> list[tuple[list[int], str]]:
    """The same search, written down plainly over the model's own log-probabilities."""

    def score(ids: list[int], logprob: float) -> float:
        return logprob / max(len(ids) - (ids[-1] == end), 1) ** penalty

    beams: list[tuple[list[int], float]] = [([], 0.0)]
    ended: list[tuple[list[int], float]] = []
    for _ in range(num_tokens):
        longer = []
        for ids, logprob in beams:
            with torch.no_grad():
                logits = model(torch.tensor([PROMPT + ids])).logits[0, -1]
            top = torch.log_softmax(logits.float(), -1).topk(2 * NUM_BEAMS)
            longer += [([*ids, int(token)], logprob + float(value)) for value, token in zip(*top, strict=True)]
        ended += [beam for beam in longer if beam[0][-1] == end]
        beams = sorted((beam for beam in longer if beam[0][-1] != end), key=lambda beam: -beam[1])[:NUM_BEAMS]
    best = sorted([*ended, *beams], key=lambda beam: -score(*beam))[:NUM_BEAMS]
    return [(ids, "stop" if ids[-1] == end else "length") for ids, _ in best]


async def answer(engine: AsyncEngine, path: Path, end: int, **fields: Any) -> tuple[list[tuple[list[int], str]], Any]:
    made, generation = search(engine, path, end, **fields)
    async with aclosing(generation.deltas()) as deltas:
        whole = made.whole([delta async for delta in deltas], generation.usage)
    return [(choice["token_ids"], choice["finish_reason"]) for choice in whole["choices"]], whole["usage"]


@pytest.mark.asyncio(loop_scope="module")
async def test_transformers_finds_the_same(engine: AsyncEngine, checkpoint: tuple[Path, PreTrainedModel]):
    path, model = checkpoint
    found, usage = await answer(engine, path, 1, max_tokens=6, ignore_eos=True)
    theirs = model.generate(
        torch.tensor([PROMPT]), num_beams=NUM_BEAMS, num_return_sequences=NUM_BEAMS, do_sample=False, max_new_tokens=6,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    assert [ids for ids, _ in found] == theirs[:, len(PROMPT) :].tolist()
    assert {reason for _, reason in found} == {"length"} and usage["completion_tokens"] == 6 * NUM_BEAMS


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("penalty", [-1.0, 2.0])
async def test_beams_that_end_are_scored_by_their_length(
    engine: AsyncEngine, checkpoint: tuple[Path, PreTrainedModel], penalty: float
):
    path, model = checkpoint
    likely = expected(model, None, 4, 1.0)[0][0][2]
    found, _ = await answer(engine, path, likely, max_tokens=6, length_penalty=penalty)
    assert found == expected(model, likely, 6, penalty)
    assert penalty > 0 or "stop" in {reason for _, reason in found}


@pytest.mark.asyncio(loop_scope="module")
async def test_leaving_early_aborts_every_beam(engine: AsyncEngine, checkpoint: tuple[Path, PreTrainedModel]):
    _, generation = search(engine, checkpoint[0], 1, ignore_eos=True)
    async with aclosing(generation.deltas()) as deltas:
        for _ in range(NUM_BEAMS):
            await anext(deltas)
        step = asyncio.ensure_future(anext(deltas))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not step.done()
        step.cancel()
        await asyncio.gather(step, return_exceptions=True)
    await until_free(engine)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"stop": "x"}, "stop"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_p": 0.5}, "top_p"),
        ({"guided_regex": "x"}, "guided_regex"),
        ({"best_of": 3}, "best_of"),
        ({"echo": True}, "echo"),
        ({"temperature": 0.5}, "temperature"),
        ({"n": 11}, "n"),
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"use_beam_search": False, "length_penalty": 2.0}, "length_penalty"),
        ({"length_penalty": 11}, "length_penalty"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it_is_named(fields: dict[str, Any], param: str):
    assert refusal(**{"use_beam_search": True} | fields).param == param

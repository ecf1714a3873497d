"""Endpoints with a model whose output is known beforehand."""

import asyncio
import json
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from serve_app.openai.endpoint import Endpoint
from serve_app.openai.generation import Generation
from tests.unit.test_openai_completions import END, TOKENIZER, ScriptedClient, script


def _generation(endpoint: Endpoint, text: str, cuts: Sequence[int], is_cut_off: bool) -> Generation:
    token_ids = TOKENIZER.encode(text)
    made = (token_ids or TOKENIZER.encode(".")) if is_cut_off else [*token_ids, END]
    outputs = {request.request_id.split("-", 2)[2]: script(request, made, list(cuts)) for request in endpoint.requests}
    client: Any = ScriptedClient(outputs)
    return Generation(client, TOKENIZER, endpoint.requests, endpoint.text_options, endpoint.prompt_tokens)


def whole(endpoint: Endpoint, text: str, is_cut_off: bool = False) -> dict[str, Any]:
    """The response that is not streamed, of a model that writes this text."""

    async def answer() -> dict[str, Any]:
        generation = _generation(endpoint, text, (), is_cut_off)
        async with aclosing(generation.deltas()) as deltas:
            return endpoint.whole([delta async for delta in deltas], generation.usage)

    return json.loads(json.dumps(asyncio.run(answer())))


def events(
    endpoint: Endpoint, text: str, cuts: Sequence[int] = (), is_cut_off: bool = False
) -> list[tuple[str, dict[str, Any]]]:
    """The names and bodies of a stream's events; every event must have a name."""

    async def answer() -> bytes:
        generation = _generation(endpoint, text, cuts, is_cut_off)
        async with aclosing(generation.deltas()) as deltas:
            parts = [endpoint.events(delta) async for delta in deltas]
        return b"".join([*parts, endpoint.last_events(generation.usage)])

    return named_events(asyncio.run(answer()))


def named_events(stream: bytes) -> list[tuple[str, dict[str, Any]]]:
    """Events from the bytes of a stream."""
    found = []
    for event in stream.decode().removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        assert name.startswith("event: ") and data.startswith("data: ")
        found.append((name.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found

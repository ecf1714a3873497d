"""Requests of every kind, each of which knows what a right answer is."""

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import httpx

PROMPTS = [f"What is {a} + {b}?" for a in (3, 17, 42, 68) for b in (4, 25, 31)]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
}
TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
REFUSALS = (429, 503)
MOST_WAIT_S = 5.0


class Wrong(Exception):
    """An answer is not what it must be."""


class Traffic:
    """Clients that send one request after the other until told to end.

    Args:
        client: with the service's URL.
        seed: of all choices.

    Attributes:
        counts: requests by kind and by what came of them.
        problems: what was lost or wrong, the first hundred.
    """

    def __init__(self, client: httpx.AsyncClient, seed: int) -> None:
        self._client = client
        self._choose = random.Random(seed)
        self._texts: dict[str, str] = {}
        self.counts: Counter[str] = Counter()
        self.problems: list[str] = []
        self.is_over = False

    async def learn(self) -> None:
        """Take the answers of an undisturbed service for the right ones."""
        for prompt in PROMPTS:
            self._texts[prompt] = await self._streamed(prompt)

    async def run(self, num_clients: int) -> None:
        """Until `is_over`, and to the end of what is under way then."""
        await asyncio.gather(*(self._one_client() for _ in range(num_clients)))

    async def _one_client(self) -> None:
        kinds: Mapping[str, Callable[[], Awaitable[None]]] = {
            "stream": self._stream,
            "sampled, two choices": self._choices,
            "structured": self._structured,
            "forced tool": self._tool,
            "left early": self._leave,
            "bad request": self._bad,
        }
        while not self.is_over:
            [kind] = self._choose.choices(list(kinds), weights=[8, 2, 2, 1, 2, 1])
            try:
                await kinds[kind]()
                self.counts[f"{kind}: right"] += 1
            except (Wrong, httpx.HTTPError, json.JSONDecodeError, LookupError) as error:
                self.counts[f"{kind}: LOST OR WRONG"] += 1
                self.problems += [f"{kind}: {type(error).__name__}: {error}"][: 100 - len(self.problems)]
            await asyncio.sleep(self._choose.expovariate(10))

    async def _stream(self) -> None:
        prompt = self._choose.choice(PROMPTS)
        text = await self._streamed(prompt)
        if text != self._texts[prompt]:
            raise Wrong(f"{prompt!r} was answered {text!r}, expected {self._texts[prompt]!r}")

    async def _streamed(self, prompt: str) -> str:
        body = _chat(prompt, temperature=0, max_tokens=400, stream=True)
        while True:
            async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
                if await self._was_refused(response):
                    continue
                parts, end = [], ""
                async for line in response.aiter_lines():
                    if line.startswith("data: {"):
                        chunk = json.loads(line[6:])
                        if "error" in chunk:
                            raise Wrong(f"an error in the stream: {chunk['error']}")
                        delta = chunk["choices"][0]["delta"]
                        parts.append((delta.get("reasoning_content") or "") + (delta.get("content") or ""))
                    end = line or end
                if end != "data: [DONE]":
                    raise Wrong(f"a stream ended with {end!r}")
                return "".join(parts)

    async def _choices(self) -> None:
        prompt = self._choose.choice(PROMPTS)
        answer = await self._whole(_chat(prompt, n=2, temperature=1.0, max_tokens=40, ignore_eos=True))
        if [each["finish_reason"] for each in answer["choices"]] != ["length"] * 2:
            raise Wrong(f"two choices of 40 tokens ended as {answer['choices']}")
        if answer["usage"]["completion_tokens"] != 80:
            raise Wrong(f"usage is {answer['usage']}, expected 80 tokens")

    async def _structured(self) -> None:
        form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
        body = _chat("Is it warm in Rome?", response_format=form, max_tokens=200)
        body["chat_template_kwargs"] = {"enable_thinking": False}
        content = json.loads((await self._whole(body))["choices"][0]["message"]["content"])
        if content["city"] not in ("Oslo", "Rome") or not isinstance(content["warm"], bool):
            raise Wrong(f"{content} is not what the schema describes")

    async def _tool(self) -> None:
        body = _chat("Weather in Oslo?", tools=[TOOL], tool_choice="required", max_tokens=300)
        body["chat_template_kwargs"] = {"enable_thinking": False}
        choice = (await self._whole(body))["choices"][0]
        if choice["finish_reason"] == "length":
            return  # a string can be as long as the model likes
        calls = choice["message"]["tool_calls"]
        if not isinstance(json.loads(calls[0]["function"]["arguments"])["city"], str):
            raise Wrong(f"the call is {calls}")

    async def _leave(self) -> None:
        body = _chat(self._choose.choice(PROMPTS), max_tokens=800, ignore_eos=True, stream=True)
        async with self._client.stream("POST", "/v1/chat/completions", json=body) as response:
            num_chunks = self._choose.randrange(1, 30)
            async for _ in response.aiter_lines():
                num_chunks -= 1
                if not num_chunks:
                    return

    async def _bad(self) -> None:
        response = await self._client.post("/v1/chat/completions", json=_chat("Hello", temperature="warm"))
        if response.status_code != 400 or response.json()["error"]["param"] != "temperature":
            raise Wrong(f"a temperature that is no number got {response.status_code}: {response.text[:200]}")

    async def _whole(self, body: dict[str, Any]) -> dict[str, Any]:
        while True:
            response = await self._client.post("/v1/chat/completions", json=body)
            if not await self._was_refused(response):
                return response.json()

    async def _was_refused(self, response: httpx.Response) -> bool:
        """Whether to send it again, after as long as the service asks for. Anything else that is not 200 is wrong."""
        if response.status_code == 200:
            return False
        if response.status_code not in REFUSALS or "retry-after" not in response.headers:
            await response.aread()
            raise Wrong(f"status {response.status_code}: {response.text[:200]}")
        self.counts[f"refused with {response.status_code}, sent again"] += 1
        await asyncio.sleep(min(float(response.headers["retry-after"]), MOST_WAIT_S))
        return True


def _chat(prompt: str, **fields: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": prompt}]} | fields

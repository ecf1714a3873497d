"""Token ids from the engine → text for clients: detokenization, stop strings, log-probabilities, usage."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

from engine.detokenizer import Detokenizer, StopStrings
from engine.request import EngineRequest, FinishReason, RequestOutput, RequestTimings, TokenLogprobs
from engine.tokenizer import Tokenizer
from serve_app.engine_client import EngineClient
from serve_app.openai.beam_search import BeamOptions, beam_search
from serve_app.openai.errors import bad_request, internal_error, unavailable
from serve_app.openai.parsing.events import ParserEvent
from serve_app.openai.parsing.output import OutputParser
from serve_app.openai.stop_patterns import StopExpressions, StopPatterns


@dataclass(slots=True)
class Delta:
    """What is new of one choice."""

    index: int
    text: str = ""
    events: list[ParserEvent] = field(default_factory=list)
    """What a parser, if there is one, finds in the text so far."""
    reasoning_tokens: int = 0
    """How many of `token_ids` are reasoning."""
    token_ids: list[int] = field(default_factory=list)
    """Those that count, in order; the one that ends the output is among them."""
    cached_tokens: int = 0
    """Of the choice's prompt."""
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    timings: RequestTimings | None = None
    """Comes once, with the first token."""


@dataclass(slots=True)
class Usage:
    """Tokens of a whole HTTP request, counted as its choices go on. Each prompt counts once, however many choices."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0

    def add(self, delta: Delta) -> None:
        """Count what is new of a choice, where only that choice is counted."""
        self.completion_tokens += len(delta.token_ids)
        self.reasoning_tokens += delta.reasoning_tokens
        self.cached_tokens = delta.cached_tokens

    def body(self) -> dict[str, object]:
        """OpenAI's usage object."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How token ids become text."""

    skip_special_tokens: bool = True
    include_stop: bool = False
    """Whether a stop string is part of the text that it ends."""
    stop_expressions: StopExpressions | None = None
    """What ends the text where stop strings alone do not say; these are part of it then."""
    is_silent: bool = False
    """Whether nothing is wanted of the output: the request is for its prompt's log-probabilities."""
    beams: BeamOptions | None = None
    """The choices, which are of one prompt, are the likeliest that a beam search finds; None: they are sampled."""
    choices_per_prompt: int = 1
    make_parser: Callable[[], OutputParser] | None = None
    """Makes the parser of one choice."""
    most_calls: int | None = None
    """The output ends with its so manieth tool call."""


class _Reader:
    """Reads one choice. Its result does not depend on how the engine's outputs were cut into messages."""

    def __init__(self, index: int, request: EngineRequest, tokenizer: Tokenizer, options: TextOptions) -> None:
        self._index = index
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=options.skip_special_tokens)
        self._stop: StopStrings | StopPatterns
        if options.stop_expressions is not None:
            self._stop = StopPatterns(options.stop_expressions, options.include_stop)
        else:
            self._stop = StopStrings(request.params.stop, options.include_stop)
        self._min_tokens = request.params.min_tokens
        """Among so many of the first tokens no text ends the output."""
        self._num_tokens = 0
        self._parser = options.make_parser() if options.make_parser is not None else None
        self._most_calls = options.most_calls
        has_stop = bool(request.params.stop) or options.stop_expressions is not None
        self._goes_by_tokens = has_stop or self._parser is not None
        self._is_silent = options.is_silent
        self._counts_prompt = index % options.choices_per_prompt == 0

    def read(self, output: RequestOutput, usage: Usage) -> Delta:
        if output.finish_reason is FinishReason.ERROR:
            if output.error_param is not None:
                raise bad_request(f"the output has to end: {output.error}", code=f"{output.error_param}_failed")
            raise internal_error()
        if output.finish_reason is FinishReason.ABORT:
            raise unavailable("the request was aborted by the server; try again")
        if self._counts_prompt:
            usage.cached_tokens += output.num_cached_tokens
            self._counts_prompt = False
        if self._is_silent:
            return Delta(
                self._index,
                cached_tokens=output.num_cached_tokens,
                prompt_logprobs=output.prompt_logprobs,
                finish_reason="length",
                timings=output.timings,
            )
        delta = Delta(
            self._index,
            cached_tokens=output.num_cached_tokens,
            prompt_logprobs=output.prompt_logprobs,
            timings=output.timings,
        )
        num_read = self._read_tokens(output, delta)
        delta.token_ids = output.token_ids[:num_read]
        usage.completion_tokens += num_read
        usage.reasoning_tokens += delta.reasoning_tokens
        # The token that ends the output is no part of it, and so has no entry.
        num_shown = len(output.token_ids) - (output.stop_token_id is not None)
        delta.logprobs = (output.logprobs or [])[: min(num_read, num_shown)]
        if delta.finish_reason is None and output.finish_reason is not None:
            self._end(output, delta)
        if self._parser is not None and delta.finish_reason is not None:
            self._end_parsing(self._parser, delta)
        return delta

    def _read_tokens(self, output: RequestOutput, delta: Delta) -> int:
        """Turn tokens into text. Returns how many count: those after the output's end are as if never made."""
        shown = output.token_ids[:-1] if output.stop_token_id is not None else output.token_ids
        if not self._goes_by_tokens:
            delta.text = self._detokenizer.push(shown)
            return len(output.token_ids)
        for count, token_id in enumerate(shown, 1):
            self._num_tokens += 1
            text, matched = self._until_stop(self._detokenizer.push([token_id]))
            delta.text += text
            if self._parser is not None:
                self._parse(self._parser, text, delta)
            if matched is not None:
                delta.finish_reason, delta.stop_reason = "stop", matched
            elif self._parser is not None and self._parser.num_calls == self._most_calls:
                delta.finish_reason = "stop"
            if delta.finish_reason is not None:
                return count
        return len(output.token_ids)

    def _until_stop(self, text: str) -> tuple[str, str | None]:
        """New text as far as it is certain, and what ended it, if anything did."""
        return (text, None) if self._num_tokens <= self._min_tokens else self._stop.push(text)

    def _parse(self, parser: OutputParser, text: str, delta: Delta) -> None:
        """The text of one token. It is reasoning if it is between the tags."""
        was_reasoning = parser.is_reasoning
        delta.events += parser.push(text)
        delta.reasoning_tokens += was_reasoning and parser.is_reasoning

    def _end_parsing(self, parser: OutputParser, delta: Delta) -> None:
        delta.events += parser.flush()
        if delta.finish_reason == "stop" and parser.num_calls:
            delta.finish_reason = "tool_calls"

    def _end(self, output: RequestOutput, delta: Delta) -> None:
        text, matched = self._until_stop(self._detokenizer.flush())
        text = text if matched is not None else text + self._stop.flush()
        delta.text += text
        if self._parser is not None:
            delta.events += self._parser.push(text)
        if matched is not None:
            delta.finish_reason, delta.stop_reason = "stop", matched
        else:
            delta.finish_reason, delta.stop_reason = str(output.finish_reason), output.stop_token_id


class Generation:
    """All choices of one HTTP request, as one stream of deltas.

    Args:
        client: the way to the engine.
        tokenizer: the model's.
        requests: one for each choice, in the order of their indices.
        options: for the text of each.
        prompt_tokens: of all prompts.
    """

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        requests: list[EngineRequest],
        options: TextOptions,
        prompt_tokens: int,
    ) -> None:
        self.usage = Usage(prompt_tokens)
        self._client = client
        self._requests = requests
        self._beams = options.beams
        self._readers = [_Reader(index, request, tokenizer, options) for index, request in enumerate(requests)]

    def deltas(self) -> AsyncGenerator[Delta, None]:
        """Deltas as they come; each choice's last one has a finish reason. Leaving early aborts every choice.

        The first comes when every choice has one, so that a refusal of any is known before.

        Raises:
            ApiError: a choice was refused or failed; the others are aborted.
        """
        if self._beams is not None:
            return self._searched(self._beams)
        return self._choice(0) if len(self._requests) == 1 else self._merged()

    async def _searched(self, options: BeamOptions) -> AsyncGenerator[Delta, None]:
        async with aclosing(beam_search(self._client, self._requests, options)) as outputs:
            async for index, output in outputs:
                yield self._readers[index].read(output, self.usage)

    async def _choice(self, index: int) -> AsyncGenerator[Delta, None]:
        async with aclosing(self._client.generate(self._requests[index])) as outputs:
            async for output in outputs:
                delta = self._readers[index].read(output, self.usage)
                yield delta
                if delta.finish_reason is not None:
                    return

    async def _merged(self) -> AsyncGenerator[Delta, None]:
        """The choices side by side. Each has at most one delta waiting here; more are merged where they are made."""
        streams = [self._choice(index) for index in range(len(self._requests))]
        tasks = {asyncio.ensure_future(anext(stream)): stream for stream in streams}
        wanted = asyncio.FIRST_EXCEPTION
        try:
            while tasks:
                done, _ = await asyncio.wait(tasks, return_when=wanted)
                wanted = asyncio.FIRST_COMPLETED
                for task in done:
                    task.result()
                for task, stream in [(task, tasks[task]) for task in tasks if task in done]:
                    del tasks[task]
                    delta = task.result()
                    if delta.finish_reason is None:
                        tasks[asyncio.ensure_future(anext(stream))] = stream
                    yield delta
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for stream in streams:
                await stream.aclose()

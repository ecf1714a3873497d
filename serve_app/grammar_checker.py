"""GrammarChecker: whether a request's grammar can be used, known before the request is sent to an engine."""

import asyncio
import hashlib
import logging
import os
import sys
from asyncio.subprocess import PIPE, Process
from collections import Counter, OrderedDict

import msgspec

from serve_app.config import Limits
from serve_app.grammar_worker import WorkerSettings, frame
from serve_app.openai.endpoint import Constraint, ServedModel
from serve_app.openai.errors import bad_request, overloaded, unavailable

logger = logging.getLogger("ray.serve")

MAX_REMEMBERED = 4096
"""Grammars whose answer is remembered."""
MAX_WAITING = 32
"""Most grammars that wait for their turn; more are refused."""
MAX_WAITING_OF_KEY = 4
"""Most of these with one API key, so that none takes all turns."""
START_S = 60.0
"""Time for the worker to read a tokenizer on a busy machine."""


class GrammarChecker:
    """Asks a worker process, one grammar at a time. The process starts with the first one, and anew if it is lost.

    Args:
        limits: `grammar_compile_s` is the CPU time that a grammar may take.
    """

    def __init__(self, limits: Limits) -> None:
        self._compile_s = limits.grammar_compile_s
        self._answers: OrderedDict[bytes, str] = OrderedDict()
        self._turn = asyncio.Lock()
        self._waiting: Counter[str] = Counter()
        self._process: Process | None = None

    def configure(self, limits: Limits) -> None:
        """Use other limits from now on."""
        if limits.grammar_compile_s != self._compile_s:
            self._compile_s = limits.grammar_compile_s
            self._answers.clear()
            self._retire()

    async def check(self, constraint: Constraint, model: ServedModel, key_name: str) -> None:
        """Raise unless an engine can use the grammar.

        Args:
            constraint: what to check.
            model: what it is for.
            key_name: of the request's API key; empty where there are none.

        Raises:
            ApiError: 400 that names the field and what is wrong, 429 if too many grammars wait, 503 if there is no
                worker.
        """
        key = hashlib.sha256(constraint.grammar.encode()).digest()
        answer = self._answers.get(key)
        if answer is None:
            answer = await self._ask_in_turn(constraint.grammar, model, key_name)
            self._answers[key] = answer
            if len(self._answers) > MAX_REMEMBERED:
                self._answers.popitem(last=False)
        else:
            self._answers.move_to_end(key)
        if answer:
            raise bad_request(f"{constraint.param} cannot be used: {answer}", constraint.param, "invalid_grammar")

    async def _ask_in_turn(self, grammar: str, model: ServedModel, key_name: str) -> str:
        most_of_key = MAX_WAITING_OF_KEY if key_name else MAX_WAITING
        if self._waiting.total() >= MAX_WAITING or self._waiting[key_name] >= most_of_key:
            raise overloaded("too many new grammars are being compiled; try again later")
        self._waiting[key_name] += 1
        try:
            async with self._turn, asyncio.timeout(START_S + 10 * self._compile_s):
                return await self._ask(grammar, model)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            logger.error("the process that compiles grammars failed: %r", error)
            raise unavailable("grammars cannot be compiled now; try again later") from None
        finally:
            self._waiting -= Counter([key_name])  # forgets names that have none left

    async def _ask(self, grammar: str, model: ServedModel) -> str:
        compile_s = self._compile_s
        process = self._process or await self._start(model)
        # Until the answer is read the process is good for nobody else.
        self._process = None
        try:
            process.stdin.write(frame(msgspec.msgpack.encode(grammar)))  # type: ignore[union-attr]  # a pipe
            answer = await process.stdout.readexactly(4)  # type: ignore[union-attr]
            answer = await process.stdout.readexactly(int.from_bytes(answer, "big"))  # type: ignore[union-attr]
        except BaseException:
            if process.returncode is None:
                process.kill()
            raise
        self._process = process
        if compile_s != self._compile_s:  # it goes by limits of before
            self._retire()
        return msgspec.msgpack.decode(answer, type=str)

    def _retire(self) -> None:
        """End the process; the next grammar starts another."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
        self._process = None

    async def _start(self, model: ServedModel) -> Process:
        settings = WorkerSettings(
            model.tokenizer.to_json(), model.info.vocab_size, model.info.eos_token_ids, self._compile_s
        )
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "serve_app.grammar_worker",
            stdin=PIPE, stdout=PIPE, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        process.stdin.write(frame(msgspec.msgpack.encode(settings)))  # type: ignore[union-attr]
        return process

"""A process that tries grammars out, so that one that takes too long or too much memory hurts nobody.

Every try runs in a fork of this process that is limited in CPU time and memory, and which the kernel ends if it goes
beyond. Messages are msgpack behind four bytes of length: first the settings, then a grammar for each answer.
"""

import faulthandler
import os
import resource
import signal
import sys
from typing import BinaryIO

import msgspec
import psutil

from engine.errors import RequestError
from engine.grammar import GrammarCompiler

MEMORY_BYTES = 2**30
"""What a grammar may take beside the tokenizer."""


class WorkerSettings(msgspec.Struct, frozen=True):
    """What a worker must know."""

    tokenizer_json: str
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    compile_s: float
    """CPU seconds that a grammar may take."""


def frame(payload: bytes) -> bytes:
    """A message as it is sent."""
    return len(payload).to_bytes(4, "big") + payload


def main() -> None:
    """Answer grammars from standard input with what is wrong with them, "" for nothing, until it ends."""
    # Where the parent holds a terminal, its Ctrl-C is not for this process: it ends with its input.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    first = _read(source)
    if first is None:
        return
    settings = msgspec.msgpack.decode(first, type=WorkerSettings)
    compiler = GrammarCompiler(settings.tokenizer_json, settings.vocab_size, settings.eos_token_ids)
    while (message := _read(source)) is not None:
        found = try_grammar(compiler, msgspec.msgpack.decode(message, type=str), settings.compile_s)
        sink.write(frame(msgspec.msgpack.encode(found)))
        sink.flush()


def try_grammar(compiler: GrammarCompiler, grammar: str, compile_s: float) -> str:
    """What is wrong with a grammar; "" for nothing."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _try_in_child(compiler, grammar, compile_s, writer)
    os.close(writer)
    with open(reader, "rb") as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF:
        return f"it takes more than {compile_s:g} s to compile, expected a simpler one"
    if status != 0:
        return "it takes too much memory, or is nested too deeply; expected a simpler one"
    return answer.decode()


def _try_in_child(compiler: GrammarCompiler, grammar: str, compile_s: float, writer: int) -> None:
    """Never returns."""
    exit_code = 1
    try:
        most = psutil.Process().memory_info().vms + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # where a library says that it gives up
        signal.setitimer(signal.ITIMER_PROF, compile_s)
        try:
            compiler.start(grammar)
            answer = ""
        except RequestError as error:
            answer = str(error)
        os.write(writer, answer.encode())
        exit_code = 0
    finally:
        os._exit(exit_code)


def _read(source: BinaryIO) -> bytes | None:
    """The next message; None at the end."""
    header = source.read(4)
    return source.read(int.from_bytes(header, "big")) if len(header) == 4 else None


if __name__ == "__main__":
    main()

"""The command line: `python -m engine generate MODEL PROMPT`, `chat MODEL` and `perplexity MODEL FILE`."""

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import EngineError, RequestError
from engine.request import SamplingParams

if TYPE_CHECKING:  # it brings torch, which a wrong argument need not wait for
    from engine.llm import LLM


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Returns the exit status: 0, or 1 after a one-line error."""
    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO if options.verbose else logging.WARNING, format="%(message)s")
    from engine.llm import LLM

    try:
        llm = LLM(options.model, tensor_parallel_size=options.tensor_parallel_size)
        if options.command == "perplexity":
            _perplexity(llm, options.file)
            return 0
        params = SamplingParams(
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            seed=options.seed,
            max_tokens=options.max_tokens,
        )
        if options.command == "generate":
            _print(llm.stream(options.prompt, params))
        else:
            _chat(llm, params, options)
    except EngineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print()
    return 0


def _perplexity(llm: "LLM", file: Path) -> None:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{file}: cannot be read as text: {error}", "file") from None
    print(f"perplexity {llm.perplexity(text, show_progress=True):.4f}")


def _chat(llm: "LLM", params: SamplingParams, options: argparse.Namespace) -> None:
    """Read lines from stdin and answer each, until its end."""
    messages = [{"role": "system", "content": options.system}] if options.system else []
    while line := _read_line():
        messages.append({"role": "user", "content": line})
        prompt = llm.tokenizer.encode_chat(messages, enable_thinking=not options.no_thinking)
        answer = _print(llm.stream(prompt, params))
        messages.append({"role": "assistant", "content": answer})


def _read_line() -> str:
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""


def _print(pieces: Iterator[str]) -> str:
    text = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        text += piece
    print()
    return text


def _parser() -> argparse.ArgumentParser:
    model = argparse.ArgumentParser(add_help=False)
    model.add_argument("model", help="demo, a checkpoint folder, a .gguf file, or a hub id such as Qwen/Qwen3-0.6B")
    model.add_argument("--verbose", action="store_true", help="log what the engine does")
    model.add_argument(
        "--tensor-parallel-size",
        type=int,
        choices=range(1, 65),
        default=1,
        metavar="N",
        help="GPUs that hold the model together (default: 1)",
    )
    shared = argparse.ArgumentParser(add_help=False, parents=[model])
    shared.add_argument("--max-tokens", type=int, help="most tokens to generate (default: 256, in a chat: no limit)")
    shared.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    shared.add_argument("--top-p", type=float, default=1.0)
    shared.add_argument("--top-k", type=int, default=0)
    shared.add_argument("--seed", type=int)
    parser = argparse.ArgumentParser(prog="python -m engine", description="Run a model in this process.")
    commands = parser.add_subparsers(dest="command", required=True)
    generate = commands.add_parser("generate", parents=[shared], help="continue a text")
    generate.add_argument("prompt")
    generate.set_defaults(max_tokens=256)
    chat = commands.add_parser("chat", parents=[shared], help="hold a conversation, a line at a time")
    chat.add_argument("--system", help="system prompt")
    chat.add_argument("--no-thinking", action="store_true", help="answer without a <think> block")
    perplexity = commands.add_parser("perplexity", parents=[model], help="how well the model expects a text")
    perplexity.add_argument("file", type=Path)
    return parser


if __name__ == "__main__":
    sys.exit(main())

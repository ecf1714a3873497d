"""Public request traces as arrivals: when, how long a prompt, how long an answer, and what prompts have in common.

Azure LLM inference 2023 (CSV: `TIMESTAMP,ContextTokens,GeneratedTokens`) and Mooncake (JSON lines: `timestamp` in ms,
`input_length`, `output_length`, `hash_ids` of blocks of 512 tokens, where equal ids begin equal prompts).
"""

import csv
import random
from collections.abc import Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import msgspec

MOONCAKE_BLOCK_TOKENS = 512
MOONCAKE_GRID_S = 3.0
"""Its conversation trace has times in steps of three seconds."""
BYTE_TOKENS = 256
"""Prompts are made of the ids below this, which byte-level vocabularies have for single bytes."""


class Arrival(msgspec.Struct, frozen=True):
    """A request of a trace.

    Attributes:
        at_s: since the trace's first request.
        block_ids: of the prompt's blocks of `MOONCAKE_BLOCK_TOKENS`, the last of which may be cut; empty: all its own.
    """

    at_s: float
    input_tokens: int
    output_tokens: int
    block_ids: tuple[int, ...] = ()


class Scaling(msgspec.Struct, frozen=True):
    """How a trace is made to fit the service.

    Attributes:
        speed: 2 replays two seconds of the trace within one.
        length: what lengths of prompts and answers are multiplied by.
        most_input_tokens, most_output_tokens: longer ones are cut.
        skip_s, take_s: the part of the trace, in its own seconds.
    """

    speed: float = 1.0
    length: float = 1.0
    most_input_tokens: int = 2**31
    most_output_tokens: int = 2**31
    skip_s: float = 0.0
    take_s: float = float("inf")


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: list[int] = []


def read_trace(path: Path) -> list[Arrival]:
    """Read a trace of either format, by its ending (.csv, .jsonl), in order of time.

    Raises:
        ValueError: the ending is another one, a row is not of the format, or there is none.
    """
    readers = {".csv": _azure, ".jsonl": _mooncake}
    if path.suffix not in readers:
        raise ValueError(f"{path}: expected a name that ends in {' or '.join(readers)}")
    found = sorted(readers[path.suffix](path), key=lambda arrival: arrival.at_s)
    if not found:
        raise ValueError(f"{path} has no requests")
    first = found[0].at_s
    return [msgspec.structs.replace(arrival, at_s=arrival.at_s - first) for arrival in found]


def _azure(path: Path) -> Iterator[Arrival]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                at_s = datetime.fromisoformat(row["TIMESTAMP"]).timestamp()
                yield Arrival(at_s, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
            except (KeyError, TypeError, ValueError) as error:
                expected = "expected TIMESTAMP,ContextTokens,GeneratedTokens"
                raise ValueError(f"{path}:{number}: {error!r} in {row}; {expected}") from None


def _mooncake(path: Path) -> Iterator[Arrival]:
    rows = []
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                rows.append(msgspec.json.decode(line, type=_MooncakeRow))
            except msgspec.DecodeError as error:
                raise ValueError(f"{path}:{number}: {error}") from None
    times = sorted({row.timestamp / 1000 for row in rows})
    on_grid = len(times) > 1 and all(later - earlier >= MOONCAKE_GRID_S for earlier, later in pairwise(times))
    spread = random.Random(0)
    for row in rows:
        at_s = row.timestamp / 1000 + (spread.uniform(0, MOONCAKE_GRID_S) if on_grid else 0.0)
        yield Arrival(at_s, row.input_length, row.output_length, tuple(row.hash_ids))


def scaled(arrivals: list[Arrival], scaling: Scaling) -> list[Arrival]:
    """The part of a trace that is to be replayed, with times from its own start. Lengths are at least 1."""
    return [
        Arrival(
            (arrival.at_s - scaling.skip_s) / scaling.speed,
            min(max(1, round(arrival.input_tokens * scaling.length)), scaling.most_input_tokens),
            min(max(1, round(arrival.output_tokens * scaling.length)), scaling.most_output_tokens),
            arrival.block_ids,
        )
        for arrival in arrivals
        if 0 <= arrival.at_s - scaling.skip_s < scaling.take_s
    ]


def prompt_of(arrival: Arrival, length_scale: float, unique: int) -> list[int]:
    """Token ids of a prompt: equal block ids give equal tokens, the rest is the request's own.

    Args:
        length_scale: of the trace; blocks shrink with it, so that shares of prompts stay what they were.
        unique: a number that no other request of the test has.
    """
    block_tokens = max(1, round(MOONCAKE_BLOCK_TOKENS * length_scale))
    tokens: list[int] = []
    for block in arrival.block_ids:
        tokens += random.Random(block).choices(range(BYTE_TOKENS), k=block_tokens)
    missing = max(0, arrival.input_tokens - len(tokens))
    tokens += random.Random(f"unique {unique}").choices(range(BYTE_TOKENS), k=missing)
    return tokens[: arrival.input_tokens]

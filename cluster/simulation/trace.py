"""Requests to replay: when they come, and how long prompt and output are."""

import csv
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from hashlib import blake2b
from itertools import groupby
from operator import itemgetter
from pathlib import Path

AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
SHIFT_S = 10.0
"""How far apart the copies of a request may be when a trace is multiplied."""
MOONCAKE_BLOCK = 512
STEP_S = 600.0
"""When the load of `step_up` rises."""


@dataclass(frozen=True, order=True, slots=True)
class Arrival:
    """One request of a trace."""

    time_s: float
    """Since the trace began."""
    prompt_tokens: int
    output_tokens: int
    keys: tuple[bytes, ...] = ()
    """Of the prompt's full blocks of MOONCAKE_BLOCK tokens: equal ones stand for equal text from the beginning on."""


def read_azure_trace(path: Path) -> list[Arrival]:
    """Read a file of the Azure LLM inference traces of 2023.

    Raises:
        ValueError: the file is no such trace; the message names the line.
    """
    found: list[Arrival] = []
    start: datetime | None = None
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        if tuple(rows.fieldnames or ()) != AZURE_COLUMNS:
            raise ValueError(f"{path} has the columns {rows.fieldnames}, expected {', '.join(AZURE_COLUMNS)}")
        for row in rows:
            try:
                time = datetime.fromisoformat(row["TIMESTAMP"][:26])  # the last digit is of 100 nanoseconds
                prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
                start = start or time
                found.append(Arrival((time - start).total_seconds(), max(1, prompt), max(1, output)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}, line {rows.line_num}: {error}") from None
    return sorted(found)


def read_mooncake_trace(path: Path) -> list[Arrival]:
    """Read a file of the Mooncake traces (FAST'25). Requests of one timestamp are spread until the next timestamp.

    Raises:
        ValueError: the file is no such trace; the message names the line.
    """
    found: list[tuple[float, Arrival]] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                prompt, output = int(row["input_length"]), max(1, int(row["output_length"]))
                keys = tuple(_key(int(each)) for each in row["hash_ids"][: prompt // MOONCAKE_BLOCK])
                found.append((row["timestamp"] / 1000, Arrival(0.0, max(1, prompt), output, keys)))
            except (ValueError, TypeError, KeyError, OverflowError) as error:
                raise ValueError(f"{path}, line {number}: {type(error).__name__} {error}") from None
    found.sort(key=itemgetter(0))
    groups = [(time_s, [each for _, each in group]) for time_s, group in groupby(found, key=itemgetter(0))]
    ends = [time_s for time_s, _ in groups[1:]] + [groups[-1][0] + 1.0] if groups else []
    return [
        replace(each, time_s=time_s + (end_s - time_s) * index / len(group))
        for (time_s, group), end_s in zip(groups, ends, strict=True)
        for index, each in enumerate(group)
    ]


def _key(number: int) -> bytes:
    return blake2b(number.to_bytes(8, "big"), digest_size=16).digest()


def synthetic_conversations(rate_per_s: float, duration_s: float, seed: int = 0) -> list[Arrival]:
    """Conversations with lengths and reuse like those of Mooncake's conversation trace.

    All share a system prompt of one block. Prompts have 7,000 tokens in the median and 12,000 on average; three in
    eight prompt tokens are those of an earlier turn or the system prompt.

    Args:
        rate_per_s: first turns, which begin conversations of 1.6 turns on average, at Poisson times.
        duration_s: of the trace; later turns are left out.
        seed: of all draws.
    """
    source = random.Random(seed)
    found = []
    start_s = source.expovariate(rate_per_s)
    while start_s < duration_s:
        time_s, prompt = start_s, source.lognormvariate(math.log(5500), 1.15)
        keys = [bytes(16)]
        while time_s < duration_s:
            num_tokens = min(120_000, max(100, round(prompt)))
            while len(keys) < num_tokens // MOONCAKE_BLOCK:
                keys.append(source.randbytes(16))
            output = min(2_000, max(1, round(source.lognormvariate(math.log(300), 0.8))))
            found.append(Arrival(time_s, num_tokens, output, tuple(keys[: num_tokens // MOONCAKE_BLOCK])))
            if source.random() > 0.4:
                break
            time_s += 20 + source.expovariate(1 / 100)
            prompt = num_tokens + output + source.lognormvariate(math.log(900), 1.2)
        start_s += source.expovariate(rate_per_s)
    return sorted(found)


def synthetic_trace(rate_per_s: Callable[[float], float], duration_s: float, seed: int = 0) -> list[Arrival]:
    """Poisson arrivals of a given rate, with lengths distributed like those of the Azure conversation trace.

    Log-normal: prompts of 800 tokens in the median and 4 in 100 over 4096, outputs of 130, at most 1000.
    """
    source = random.Random(seed)
    most_per_s = max(rate_per_s(second) for second in range(math.ceil(duration_s) + 1))
    found = []
    time_s = source.expovariate(most_per_s)
    while time_s < duration_s:
        if source.random() * most_per_s < rate_per_s(time_s):
            prompt = min(14_000, max(1, round(source.lognormvariate(math.log(800), 0.95))))
            output = min(1_000, max(1, round(source.lognormvariate(math.log(130), 0.85))))
            found.append(Arrival(time_s, prompt, output))
        time_s += source.expovariate(most_per_s)
    return found


def hour_of_conversations(time_s: float) -> float:
    """Requests per second like those of the Azure conversation trace: a rise to double and a fall within an hour."""
    return 5.0 + 2.5 * math.sin(2 * math.pi * (time_s / 3600 - 0.15)) - (1.0 if time_s > 2800 else 0.0)


def step_up(time_s: float) -> float:
    """A quiet service that all at once gets five times as many requests, for ten minutes."""
    return 10.0 if STEP_S <= time_s < STEP_S + 600 else 2.0


def multiplied(trace: Sequence[Arrival], factor: int, seed: int = 0) -> list[Arrival]:
    """Each request `factor` times, the copies up to SHIFT_S later: more users with the same habits."""
    source = random.Random(seed)
    copies = [
        Arrival(each.time_s + source.uniform(0, SHIFT_S), each.prompt_tokens, each.output_tokens)
        for each in trace
        for _ in range(factor - 1)
    ]
    return sorted([*trace, *copies])

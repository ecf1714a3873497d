"""StepSenders: a reader of any speed knows in the end what was told, and nothing piles up for one who does not read."""

import asyncio
from contextlib import aclosing
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.async_engine import StepReport
from engine.errors import RequestError
from engine.request import RequestOutput
from engine.stats import EngineStats
from serve_app.step_sender import StepSenders

_VALUES: dict[str, Any] = {field.name: 0 for field in msgspec.structs.fields(EngineStats)}
STATS = EngineStats(**_VALUES)

steps = st.lists(st.tuples(st.sets(st.integers(0, 5)), st.booleans(), st.booleans()), max_size=30)
"""Of each step: the blocks in the cache after it, whether the request gets a token, and whether the reader reads."""


@settings(deadline=None)
@given(steps)
def test_a_reader_of_any_speed_knows_all(trace: list[tuple[set[int], bool, bool]]):
    async def follow() -> None:
        senders = StepSenders(STATS)
        senders.begin("ingress", "r")
        cached: set[bytes] = set()
        known: set[bytes] = set()
        token_ids: list[int] = []
        num_made = 0
        async with aclosing(senders.updates("ingress")) as updates:
            for number, (blocks, makes, reads) in enumerate([(set(), False, True), *trace, (set(), True, True)]):
                now_cached = {b"%d" % block for block in blocks}
                if makes:
                    senders.put("ingress", RequestOutput("r", [num_made]))
                    num_made += 1
                senders.step_done(StepReport(STATS, sorted(now_cached - cached), sorted(cached - now_cached)))
                cached = now_cached
                if reads:
                    update = await anext(updates)
                    assert update.is_snapshot == (number == 0) and not {*update.stored} & {*update.evicted}
                    assert known.isdisjoint(update.stored) and known.issuperset(update.evicted)
                    known = (known - {*update.evicted}) | {*update.stored}
                    token_ids += [token_id for output in update.outputs for token_id in output.token_ids]
                    assert known == cached and token_ids == list(range(num_made))

    asyncio.run(follow())


async def test_a_quiet_replica_still_beats(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serve_app.step_sender.HEARTBEAT_S", 0.01)
    async with aclosing(StepSenders(STATS).updates("ingress")) as updates:
        assert [(await anext(updates)).seq for _ in range(3)] == [0, 1, 2]


def test_an_id_can_be_used_once_at_a_time():
    senders = StepSenders(STATS)
    senders.begin("one", "r")
    senders.begin("other", "r")
    with pytest.raises(RequestError, match="in use"):
        senders.begin("one", "r")
    senders.end("one", "r")
    senders.begin("one", "r")


async def test_what_is_left_of_an_aborted_request_is_not_sent():
    senders = StepSenders(STATS)
    async with aclosing(senders.updates("ingress")) as updates:
        await anext(updates)
        senders.begin("ingress", "r")
        senders.put("ingress", RequestOutput("r", [1]))
        senders.end("ingress", "r")
        senders.step_done(StepReport(STATS, [], []))
        assert (await anext(updates)).outputs == []

"""GET /status: what the fleet tells and what Ray Serve's controller does, put together."""

import asyncio
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from serve_app import status
from serve_app.fleet import ReplicaView
from serve_app.status import Status
from serve_app.steps import ReplicaLoad

DETAILS = {
    "target_num_replicas": 3,
    "deployment_config": {"autoscaling_config": {"min_replicas": 1, "max_replicas": 4}},
    "replicas": [{"replica_id": "a", "state": "RUNNING"}, {"replica_id": "c", "state": "STARTING"}],
}
LOAD = ReplicaLoad(2, 1, 40, 90, 100, 0.01, 500.0)


class Controller:
    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.num_asked = 0

    async def ask(self) -> dict[str, Any]:
        self.num_asked += 1
        if isinstance(self.answer, Exception):
            raise self.answer
        await asyncio.sleep(self.answer if isinstance(self.answer, float) else 0)
        return self.answer


async def no_steps(ingress_id: str) -> AsyncGenerator[bytes, None]:
    yield b""


def view(replica_id: str, load: ReplicaLoad | None, updated_s: float = 0.0) -> ReplicaView:
    return ReplicaView(replica_id, no_steps, load=load, updated_s=updated_s)


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    # Of the module alone: the event loop has the same clock.
    monkeypatch.setattr(status, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


async def test_a_replica_is_shown_that_either_side_knows():
    found = await Status(Controller(DETAILS).ask).of([view("a", LOAD, 99.5), view("b", None)])
    assert (found["target_num_replicas"], found["min_replicas"], found["max_replicas"]) == (3, 1, 4)
    first, second, third = found["replicas"]
    assert (first["replica_id"], first["state"], first["age_s"]) == ("a", "RUNNING", 0.5)
    assert first["load"]["num_free_blocks"] == 90 and first["load"]["prefill_tokens_per_s"] == 500
    assert second == {"replica_id": "b", "state": None, "age_s": None, "load": None}
    assert third == {"replica_id": "c", "state": "STARTING", "age_s": None, "load": None}


async def test_the_controller_is_asked_once_a_second_at_most(clock: list[float]):
    controller = Controller(DETAILS)
    made = Status(controller.ask)
    await asyncio.gather(*(made.of([]) for _ in range(20)))
    clock[0] += 0.9
    await made.of([])
    assert controller.num_asked == 1
    clock[0] += 0.2
    await made.of([])
    assert controller.num_asked == 2


@pytest.mark.parametrize("answer", [RayError("lost"), 60.0, {}])
async def test_without_the_controller_there_is_still_what_the_replicas_tell(
    answer: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(status, "CONTROLLER_S", 0.01)
    found = await Status(Controller(answer).ask).of([view("a", LOAD)])
    assert found["target_num_replicas"] is None and found["max_replicas"] is None
    assert found["replicas"][0]["state"] is None and found["replicas"][0]["load"]["num_running"] == 2

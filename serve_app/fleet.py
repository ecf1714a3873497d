"""Fleet: what one ingress process knows of the replicas of one engine deployment, as their step streams tell it.

The deployment's router (serve_app/router.py) reads it to choose replicas, EngineClient to bring outputs to requests.
Both are in the ingress's process, and all of this belongs to its event loop.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from typing import Protocol

import msgspec

from engine.request import EngineRequest, RequestOutput
from serve_app.steps import HEARTBEAT_S, ReplicaLoad, StepUpdate

logger = logging.getLogger("ray.serve")

SILENT_AFTER_S = 3.0
"""A replica that has told nothing for so long is taken for hung."""
BACK_AFTER_S = 1.0
"""What comes so long after a replica was lost does not come from before."""
REOPEN_DELAY_S = 0.2
"""Between the end of a step stream and the next try to open it."""

OpenSteps = Callable[[str], AsyncGenerator[bytes, None]]
"""Opens the step stream of one certain replica for the ingress of this id. Items are StepUpdates in msgpack; raises
ConnectionError where the replica cannot be reached (any more)."""


class Loss(StrEnum):
    """Why a replica cannot go on with its requests."""

    DIED = "died"
    SILENT = "silent"
    ENGINE_FAULT = "engine_fault"


class Attempt(Protocol):
    """One try to run a request on a replica."""

    request: EngineRequest
    """Its id is the attempt's: another try has another."""
    replica: "ReplicaView | None"
    """Where the router sent it; None until it has chosen."""
    avoid: Mapping[str, float]
    """Replicas that earlier attempts were lost with, and when, by `time.monotonic()`."""

    @property
    def replica_id(self) -> str | None:
        """Of `replica`."""

    @property
    def num_received(self) -> int:
        """Tokens that came from the replica so far: while it is 0, the prompt waits or is being computed."""

    def put(self, output: RequestOutput) -> None:
        """Take what the replica produced since the last time."""

    def put_whole(self, output: RequestOutput) -> None:
        """Take all that the replica produced since it began, parts of which may be known."""

    def accept(self) -> None:
        """The replica has taken it."""

    def lose(self, loss: Loss) -> None:
        """Nothing more will come."""


class FleetObserver(Protocol):
    """For a router that keeps a ledger."""

    def first_token(self, attempt: Attempt, output: RequestOutput) -> None:
        """An attempt's prompt is computed; `output` is its first."""

    def ended(self, attempt: Attempt) -> None:
        """An attempt is over, whatever came of it."""


@dataclass(slots=True, eq=False)
class ReplicaView:
    """What is known of one replica."""

    replica_id: str
    open_steps: OpenSteps
    updated_s: float
    """When it last told anything, or was first heard of; by `time.monotonic()`."""
    load: ReplicaLoad | None = None
    """The latest; None as long as there is no step stream."""
    was_queueing: bool = False
    """Whether requests waited there when it last told: so a replica that is lost is remembered."""
    block_keys: set[bytes] = field(default_factory=set)
    """Keys of the KV blocks that its prefix cache can find, see `engine.block_pool.block_keys`."""
    num_attempts: int = 0
    """How many of this process's attempts it has."""
    is_leaving: bool = False
    """It finishes what it has, and gets nothing new."""
    num_missed: int = 0
    """Heartbeats since it last told anything. Counted here, so that a pause of this process is not held against it."""
    reader: asyncio.Task[None] | None = None
    """Reads its step stream."""

    @property
    def is_silent(self) -> bool:
        """Whether it is taken for hung."""
        return self.num_missed * HEARTBEAT_S >= SILENT_AFTER_S


class Fleet:
    """The replicas of one deployment, and this process's attempts on them.

    Attributes:
        replicas: those that take requests, and those that leave but still have attempts; by replica id.
        attempts: those that have not ended, by the id of their request.
        block_size: tokens of a KV block, as keys of blocks go by it; None until attached, and without prefix caches.
        observer: told of first tokens and ends, if the router wants to know.
    """

    def __init__(self) -> None:
        self.replicas: dict[str, ReplicaView] = {}
        self.attempts: dict[str, Attempt] = {}
        self.block_size: int | None = None
        self.observer: FleetObserver | None = None
        self._ingress_id: str | None = None
        self._decoder = msgspec.msgpack.Decoder(StepUpdate)
        self._watch: asyncio.Task[None] | None = None

    def attach(self, ingress_id: str, block_size: int | None) -> None:
        """For EngineClient: open step streams from now on. Without it, replicas can be called, but are not followed.

        Args:
            ingress_id: of this process; replicas know it by this.
            block_size: tokens of a KV block; None if the replicas have no prefix cache.
        """
        self._ingress_id, self.block_size = ingress_id, block_size
        self._watch = asyncio.get_running_loop().create_task(self._watch_replicas())
        for view in self.replicas.values():
            self._follow(view)

    def close(self) -> None:
        """Close all step streams."""
        for view in list(self.replicas.values()):
            self._drop(view)
        if self._watch is not None:
            self._watch.cancel()

    def begin(self, attempt: Attempt) -> None:
        """For EngineClient: an attempt is about to be sent."""
        self.attempts[attempt.request.request_id] = attempt

    def end(self, attempt: Attempt) -> None:
        """For EngineClient: what still comes for an attempt is of no interest."""
        del self.attempts[attempt.request.request_id]
        if self.observer is not None:
            self.observer.ended(attempt)
        view = self.replicas.get(attempt.replica_id or "")
        if view is not None:
            view.num_attempts -= 1
            self._drop_if_left(view)

    def candidates(self, attempt: Attempt | None = None) -> list[ReplicaView]:
        """For the router: the replicas that may get an attempt, or any other call.

        Those that are known to answer, or else all. An attempt whose request has lost replicas already goes to one that
        answers, and back to a lost one only when that has answered since; there may be none, and it has to wait.
        """
        staying = [view for view in self.replicas.values() if not view.is_leaving]
        answering = [view for view in staying if view.load is not None and not view.is_silent]
        if attempt is None or not attempt.avoid:
            return answering or staying
        lost_s = attempt.avoid
        return [view for view in answering if view.replica_id not in lost_s] or [
            view for view in answering if view.updated_s > lost_s[view.replica_id] + BACK_AFTER_S
        ]

    def assign(self, request_id: str, replica_id: str) -> None:
        """For the router: it sends an attempt to this replica. Ray may ask for another, if the first refuses."""
        attempt, view = self.attempts.get(request_id), self.replicas.get(replica_id)
        if attempt is None or view is None or attempt.replica_id == replica_id:
            return
        before = self.replicas.get(attempt.replica_id or "")
        if before is not None:
            before.num_attempts -= 1
        view.num_attempts += 1
        attempt.replica = view
        if attempt.num_received:  # the first had not refused at all: what comes now would repeat
            attempt.lose(Loss.DIED)

    def accepted(self, request_id: str, replica_id: str) -> None:
        """For the router: this replica has taken an attempt."""
        self.assign(request_id, replica_id)
        attempt = self.attempts.get(request_id)
        if attempt is not None:
            attempt.accept()

    def replicas_changed(self, openers: Mapping[str, OpenSteps]) -> None:
        """For the router: these replicas take requests now, and no others."""
        for replica_id, open_steps in openers.items():
            if replica_id not in self.replicas:
                view = self.replicas[replica_id] = ReplicaView(replica_id, open_steps, updated_s=time.monotonic())
                self._follow(view)
        for view in list(self.replicas.values()):
            view.is_leaving = view.replica_id not in openers
            self._drop_if_left(view)

    def replica_left(self, replica_id: str) -> None:
        """For the router: this replica is dead."""
        view = self.replicas.get(replica_id)
        if view is not None:
            self._drop(view)
            self._lose_attempts(replica_id, Loss.DIED)

    def apply(self, replica_id: str, update: StepUpdate) -> None:
        """Take in what a replica told."""
        view = self.replicas.get(replica_id)
        if view is None:
            return
        view.load, view.updated_s, view.num_missed = update.load, time.monotonic(), 0
        view.was_queueing = update.load.num_waiting > 0
        if update.is_snapshot:
            view.block_keys = set(update.stored)
        else:
            view.block_keys.difference_update(update.evicted)
            view.block_keys.update(update.stored)
        for output in update.outputs:
            attempt = self.attempts.get(output.request_id)
            if attempt is not None and attempt.replica_id == replica_id:
                self._tell_first_token(attempt, output)
                (attempt.put_whole if update.is_snapshot else attempt.put)(output)

    def put_result(self, attempt: Attempt, output: RequestOutput) -> None:
        """For EngineClient: all that an attempt produced, as its call returned it. It may overtake the stream."""
        self._tell_first_token(attempt, output)
        attempt.put_whole(output)

    def _tell_first_token(self, attempt: Attempt, output: RequestOutput) -> None:
        if self.observer is not None and not attempt.num_received and output.token_ids:
            self.observer.first_token(attempt, output)

    def _follow(self, view: ReplicaView) -> None:
        if self._ingress_id is not None:
            view.reader = asyncio.get_running_loop().create_task(self._read_steps(view, self._ingress_id))

    async def _read_steps(self, view: ReplicaView, ingress_id: str) -> None:
        """Keep a replica's stream open. Whatever was missed comes with the snapshot that a new one begins with."""
        while True:
            try:
                async with aclosing(view.open_steps(ingress_id)) as items:
                    expected = 0
                    async for item in items:
                        update = self._decoder.decode(item)
                        if update.seq != expected:
                            logger.error("item %d of a step stream came as item %d", update.seq, expected)
                            break
                        expected += 1
                        self.apply(view.replica_id, update)
            except (ConnectionError, msgspec.DecodeError) as error:
                logger.info("the step stream of %s ended: %s", view.replica_id, error)
            except Exception:  # without a reader the replica would be taken for hung for good
                logger.exception("reading the step stream of %s failed", view.replica_id)
            view.load = None
            await asyncio.sleep(REOPEN_DELAY_S)

    async def _watch_replicas(self) -> None:
        """Count heartbeats that did not come. Requests of a hung replica are given up where another one answers."""
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            views = list(self.replicas.values())
            for view in views:
                view.num_missed += 1
            if any(view.load is not None and not view.is_silent and not view.is_leaving for view in views):
                for view in views:
                    if view.is_silent and view.num_attempts:
                        logger.warning("replica %s has told nothing for %.0f s", view.replica_id, SILENT_AFTER_S)
                        self._lose_attempts(view.replica_id, Loss.SILENT)

    def _lose_attempts(self, replica_id: str, loss: Loss) -> None:
        for attempt in list(self.attempts.values()):
            if attempt.replica_id == replica_id:
                attempt.lose(loss)

    def _drop_if_left(self, view: ReplicaView) -> None:
        """A replica that leaves waits for its streams to be closed, and has its last outputs for us until then."""
        if view.is_leaving and not view.num_attempts:
            self._drop(view)

    def _drop(self, view: ReplicaView) -> None:
        del self.replicas[view.replica_id]
        if view.reader is not None:
            view.reader.cancel()


@cache
def fleet_of(app_name: str, deployment_name: str) -> Fleet:
    """The one Fleet of a deployment in this process. Ray Serve makes the router, so the two can meet only here."""
    return Fleet()

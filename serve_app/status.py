"""What GET /status tells: the fleet as one ingress process sees it, and what the autoscaler wants."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

import msgspec
from ray.exceptions import RayError

from serve_app.fleet import ReplicaView

CONTROLLER_S = 1.0
"""How long Ray Serve's controller may take to answer."""
KEPT_S = 1.0
"""How long its answer is good for: whatever comes in, it is asked once a second at most."""

AskController = Callable[[], Awaitable[Mapping[str, Any]]]
"""Answers DeploymentDetails of Ray Serve's schema as a dict; raises RayError if the controller is lost."""


class Status:
    """Puts together what the step streams tell about the replicas and what Ray Serve's controller does.

    Args:
        ask: asks the controller.
    """

    def __init__(self, ask: AskController) -> None:
        self._ask = ask
        self._details: Mapping[str, Any] | None = None
        self._asked_s = -KEPT_S
        self._lock = asyncio.Lock()

    async def of(self, views: Iterable[ReplicaView]) -> dict[str, Any]:
        """The state of one deployment.

        Returns:
            target_num_replicas, min_replicas, max_replicas: null where the controller does not tell;
            replicas: a list of those that Ray Serve or the fleet knows, with replica_id; state, Ray Serve's word for
            it or null; age_s, seconds since it last told anything, and load, a ReplicaLoad; both null until it has.
        """
        details = await self._from_controller()
        told = {view.replica_id: view for view in views}
        states = {replica["replica_id"]: replica["state"] for replica in details.get("replicas", ())}
        scaling = (details.get("deployment_config") or {}).get("autoscaling_config") or {}
        now = time.monotonic()
        return {
            "target_num_replicas": details.get("target_num_replicas"),
            "min_replicas": scaling.get("min_replicas"),
            "max_replicas": scaling.get("max_replicas"),
            "replicas": [
                {"replica_id": replica_id, "state": states.get(replica_id)} | _told(told.get(replica_id), now)
                for replica_id in sorted(states.keys() | told.keys())
            ],
        }

    async def _from_controller(self) -> Mapping[str, Any]:
        async with self._lock:
            if time.monotonic() - self._asked_s >= KEPT_S:
                try:
                    async with asyncio.timeout(CONTROLLER_S):
                        self._details = await self._ask()
                except (RayError, TimeoutError):
                    self._details = None  # rather nothing than what may be long over
                self._asked_s = time.monotonic()
            return self._details or {}


def _told(view: ReplicaView | None, now_s: float) -> dict[str, Any]:
    if view is None or view.load is None:
        return {"age_s": None, "load": None}
    return {"age_s": now_s - view.updated_s, "load": msgspec.structs.asdict(view.load)}

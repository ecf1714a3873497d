"""KvAwareRouter: which replica of the engine gets a request. Ray Serve makes one in each process with a handle."""

from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from serve_app.fleet import fleet_of
from serve_app.placer import placer_of
from serve_app.ray_private import deployment_of, stream_of


class KvAwareRouter(RequestRouter):
    """Sends requests of EngineClient where the fleet's state says, all other calls to any replica that answers."""

    def initialize_state(self, **kwargs: Any) -> None:
        """For Ray Serve, once the router is there."""
        self._fleet = fleet_of(*deployment_of(self))
        self._placer = placer_of(*deployment_of(self))

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The best replica; the others, best first, in case it is full."""
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # where all are full, try again later
        attempt = self._fleet.attempts.get(_request_id(pending_request))
        known = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        views = [view for view in self._fleet.candidates(attempt) if view.replica_id in known]
        views.sort(key=lambda view: view.num_attempts)
        if attempt is not None:
            if not views:
                return []  # it waits for a replica that answers
            views = await self._placer.rank(attempt, views)
            self._fleet.assign(attempt.request.request_id, views[0].replica_id)
        return [[known[view.replica_id]] for view in views] or [candidate_replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: object) -> None:
        """For Ray Serve: a replica has accepted a request."""
        request_id = _request_id(pending_request)
        self._placer.sent(request_id, replica_id.unique_id)
        self._fleet.accepted(request_id, replica_id.unique_id)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """For Ray Serve: these replicas take requests now."""
        super().update_replicas(replicas)
        self._fleet.replicas_changed(
            {replica.replica_id.unique_id: partial(_open_steps, replica) for replica in replicas}
        )

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """For Ray Serve: a replica is dead."""
        super().on_replica_actor_died(replica_id)
        self._fleet.replica_left(replica_id.unique_id)


def _open_steps(replica: RunningReplica, ingress_id: str) -> AsyncGenerator[bytes, None]:
    return stream_of(replica, "steps", ingress_id)


def _request_id(pending_request: PendingRequest | None) -> str:
    """Of a call of `EngineReplica.generate`, its first argument; no request has an empty one."""
    is_ours = pending_request is not None and pending_request.metadata.call_method == "generate"
    return pending_request.args[0] if pending_request is not None and is_ours else ""

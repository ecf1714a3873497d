"""What Ray Serve does not offer in public, in one place: it may change with any release, so one release is expected."""

from collections.abc import AsyncGenerator
from contextvars import Context, copy_context
from typing import Any
from uuid import uuid4

import grpc
import ray
from ray.exceptions import RayError
from ray.serve import context as serve_context
from ray.serve._private import replica
from ray.serve._private.common import RequestMetadata
from ray.serve._private.request_router import replica_wrapper
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

RAY_VERSION = "2.60.0"
if ray.__version__ != RAY_VERSION:
    raise ImportError(
        f"Ray is {ray.__version__}, expected {RAY_VERSION}: install that, or try serve_app/ray_private.py"
    )

MOST_MESSAGE_BYTES = 2**31 - 1
"""Of a call or a reply between ingress and replica: the most that gRPC has room for."""

# gRPC takes 4 MiB unless told otherwise: most models' tokenizers, a prompt's log-probabilities, and prompts of 800,000
# tokens have more. Ray Serve reads its own setting before any code of ours runs, but uses it when it connects, and in a
# replica after it has imported the replica's class.
for _module in (replica, replica_wrapper):
    _module.RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH = MOST_MESSAGE_BYTES  # type: ignore[attr-defined]  # imported there


def keep_on_this_loop(handle: DeploymentHandle) -> None:
    """Run a handle's router in the event loop of the caller, so that it shares state with it. Before its first use."""
    handle._init(_run_router_in_separate_loop=False)


def over_grpc(handle: DeploymentHandle, method_name: str, *, stream: bool = False) -> DeploymentHandle:
    """A handle for one method whose calls and replies, being bytes, go straight from process to process."""
    return handle.options(
        method_name=method_name,
        stream=stream,
        _by_reference=False,
        request_serialization="pickle",
        response_serialization="pickle",
    )


def call(handle: DeploymentHandle, *args: Any) -> Any:
    """`handle.remote(*args)`, as a call of its own.

    Calls on behalf of one HTTP request share its id, and a router takes calls of one id for one call.
    """
    context: Context = copy_context()
    return context.run(_call_on_its_own, handle, args)


def _call_on_its_own(handle: DeploymentHandle, args: tuple[Any, ...]) -> Any:
    parent = serve_context._get_serve_request_context()
    own = serve_context._RequestContext(route=parent.route, request_id=parent.request_id, app_name=parent.app_name)
    serve_context._serve_request_context.set(own)  # type: ignore[arg-type]  # Ray leaves the variable untyped
    return handle.remote(*args)


async def stream_of(replica: RunningReplica, method_name: str, *args: Any) -> AsyncGenerator[Any, None]:
    """Call a generator method of one certain replica, past router, queue and autoscaling counts.

    Raises:
        ConnectionError: the replica is dead or cannot be reached.
    """
    metadata = RequestMetadata(
        request_id=uuid4().hex,
        internal_request_id=uuid4().hex,
        call_method=method_name,
        is_streaming=True,
        _by_reference=False,
        _on_separate_loop=False,
        request_serialization="pickle",
        response_serialization="pickle",
    )
    result = replica.try_send_request(PendingRequest(list(args), {}, metadata), with_rejection=False)
    try:
        while True:
            yield await result.__anext__()
    except StopAsyncIteration:
        return
    except (RayError, grpc.RpcError) as error:
        raise ConnectionError(f"a call of {method_name} was cut off: {error}") from None
    finally:
        result.cancel()


def deployment_of(router: RequestRouter) -> tuple[str, str]:
    """The names of the application and of the deployment that a router belongs to."""
    return router._deployment_id.app_name, router._deployment_id.name


async def deployment_details(app_name: str, deployment_name: str) -> dict[str, Any]:
    """What Ray Serve's controller tells of a deployment: DeploymentDetails of ray.serve.schema, as a dict.

    Empty if there is no such deployment (yet).

    Raises:
        RayError: the controller is lost.
    """
    client = serve_context._get_global_client()
    if client is None:
        return {}
    details = await client._controller.get_serve_instance_details.remote()
    applications = details.get("applications", {})
    return applications.get(app_name, {}).get("deployments", {}).get(deployment_name, {})

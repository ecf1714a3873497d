"""EngineClient: the ingress's way to the engine replicas.

One streaming call for each request. Nothing outside this module and replica.py knows how outputs travel.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import cast

import grpc
import msgspec
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from engine.errors import EngineDeadError
from engine.request import EngineRequest, RequestOutput
from serve_app.openai.errors import ApiError, bad_request, internal_error, overloaded, unavailable
from serve_app.wire import ModelInfo, Refusal, RefusalKind, ReplicaMessage

logger = logging.getLogger("ray.serve")

FAILURES = (RayError, RayServeException, grpc.RpcError)
"""What a call of a replica raises when the call, and not the code in the replica, has failed; and RayTaskError."""
ROUTING_TIMEOUT_S = 5.0
"""How long a replica may take to say that it has a request; longer means that there is none."""


class EngineClient:
    """Sends requests to the replicas of one model.

    Args:
        handle: of the EngineReplica deployment.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._generate = handle.options(method_name="generate", stream=True)
        self._info = handle.options(method_name="info")
        self._adapters = handle.options(method_name="adapters")
        self._check_health = handle.options(method_name="check_health")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(ReplicaMessage)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[RequestOutput, None]:
        """Run a request. Ends with the output that has a finish reason; leaving early aborts the request.

        Raises:
            ApiError: the request was refused, no replica is ready, or its replica was lost.
        """
        responses = cast(DeploymentResponseGenerator, self._generate.remote(self._encoder.encode(request)))
        finished = False
        try:
            async with asyncio.timeout(ROUTING_TIMEOUT_S):
                await anext(responses)
            async for encoded in responses:
                message = self._decoder.decode(encoded)
                if message.refusal is not None:
                    finished = True
                    raise _as_error(message.refusal)
                if message.output is not None:
                    finished = message.output.finish_reason is not None
                    yield message.output
            if not finished:
                raise unavailable("the model's replica ended before the request did; try again")
        except (*FAILURES, TimeoutError, asyncio.CancelledError) as error:
            raise _as_api_error(error) from None
        finally:
            if not finished:
                responses.cancel()

    async def info(self) -> ModelInfo:
        """What the replicas run.

        Raises:
            ApiError: no replica is ready.
        """
        try:
            return msgspec.msgpack.decode(await self._info.remote(), type=ModelInfo)
        except FAILURES as error:
            raise _as_api_error(error) from None

    async def adapters(self) -> list[str]:
        """Names of the adapters that requests can ask for.

        Raises:
            ApiError: no replica is ready.
        """
        try:
            return await self._adapters.remote()
        except FAILURES as error:
            raise _as_api_error(error) from None

    async def check_health(self) -> None:
        """Raise ApiError unless some replica is well."""
        try:
            async with asyncio.timeout(ROUTING_TIMEOUT_S):
                await self._check_health.remote()
        except (*FAILURES, TimeoutError, EngineDeadError):
            raise unavailable() from None


def _as_api_error(error: BaseException) -> BaseException:
    """What a failed call means to the client."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        return error  # it is we who were cancelled, not the call
    if isinstance(error, BackPressureError):
        return overloaded()
    if isinstance(error, RayTaskError):
        logger.error("a replica failed: %s", error)
        return internal_error()
    return unavailable()


def _as_error(refusal: Refusal) -> ApiError:
    if refusal.kind is RefusalKind.BAD_REQUEST and refusal.param == "adapter":
        message = "the model's adapter does not exist, or cannot be used; the server's log says why"
        return ApiError(404, message, param="model", code="model_not_found")
    if refusal.kind is RefusalKind.BAD_REQUEST:
        return bad_request(refusal.message, refusal.param)
    return overloaded() if refusal.kind is RefusalKind.OVERLOADED else unavailable()

"""EngineClient: the ingress's way to the engine replicas.

A request is one call that stays open for its whole life. What it produces comes by the step streams of the Fleet, and
goes on coming from another replica where one is lost. Nothing outside this module, attempt.py, fleet.py and replica.py
knows how outputs travel.
"""

import asyncio
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager

import grpc
import msgspec
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from engine.request import EngineRequest, RequestOutput
from serve_app import ray_private
from serve_app.attempt import ReplicaAttempt, ReplicaLostError
from serve_app.fleet import Loss, fleet_of
from serve_app.openai.errors import ApiError, bad_request, internal_error, overloaded, unavailable
from serve_app.wire import EngineResult, ModelInfo, Refusal, RefusalKind

logger = logging.getLogger("ray.serve")

FAILURES = (RayError, RayServeException, grpc.RpcError)
"""What a call of a replica raises when the call, and not the code in the replica, has failed; and RayTaskError."""
ROUTING_TIMEOUT_S = 5.0
"""How long a replica may take to say that it has a request; longer means that there is none."""
LINGER_S = 5.0
"""How long a call may take to end after its request has."""
MOST_REQUEST_BYTES = ray_private.MOST_MESSAGE_BYTES - 2**20
"""Of a request on its way to a replica; what Ray Serve puts around it is shorter than the difference."""
MOST_ATTEMPTS = 3
"""For one request."""
MOST_DEATHS = 2
"""A request that so many replicas died with, while they may have computed its prompt, may be what they died of."""
RESUME_TIMEOUT_S = 120.0
"""How long a request that has begun waits for another replica: as long as one takes to start."""
RESUME_RETRY_S = 0.5
"""Between two tries to find room for one that has begun."""


class EngineClient:
    """Sends requests to the replicas of one model.

    Args:
        handle: of the EngineReplica deployment, not used before.
        ingress_id: a name of this process that no other ingress has.
        block_size: tokens of a KV block in the replicas; None if they have no prefix cache.

    Attributes:
        num_migrations: requests that went on at another replica, by why the first was lost.
        num_given_up: requests that ended with an error because too many replicas were lost, or none was left.
    """

    def __init__(self, handle: DeploymentHandle, ingress_id: str, block_size: int | None) -> None:
        ray_private.keep_on_this_loop(handle)
        self.fleet = fleet_of(handle.app_name, handle.deployment_name)
        self.fleet.attach(ingress_id, block_size)
        self.num_migrations: Counter[Loss] = Counter(dict.fromkeys(Loss, 0))
        self.num_given_up = 0
        self._ingress_id = ingress_id
        self._generate = ray_private.over_grpc(handle, "generate", stream=True)
        self._info = ray_private.over_grpc(handle, "info")
        self._adapters = ray_private.over_grpc(handle, "adapters")
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(EngineResult)
        self._calls: set[asyncio.Task[None]] = set()

    async def generate(self, request: EngineRequest) -> AsyncGenerator[RequestOutput, None]:
        """Run a request. Ends with the output that has a finish reason; leaving early aborts the request.

        Raises:
            ApiError: the request was refused, no replica is ready, or too many were lost.
        """
        course = _Course(request)
        while True:
            attempt = course.next_attempt()
            try:
                with self._called(attempt):
                    async with aclosing(attempt.outputs(course.patience_s)) as outputs:
                        async for output in outputs:
                            yield course.take(output)
                return
            except ReplicaLostError as error:
                if not course.goes_on(attempt, error.loss):
                    self.num_given_up += 1
                    raise unavailable("the model's replicas ended before the request did; try again") from None
                self.num_migrations[error.loss] += 1
            except ApiError as error:
                if not course.may_wait(error):
                    raise
                await asyncio.sleep(RESUME_RETRY_S)

    async def info(self) -> ModelInfo:
        """What the replicas run.

        Raises:
            ApiError: no replica is ready.
        """
        try:
            return msgspec.msgpack.decode(await self._info.remote(), type=ModelInfo)
        except FAILURES as error:
            raise _error_of(error) from None

    async def adapters(self) -> list[str]:
        """Names of the adapters that requests can ask for.

        Raises:
            ApiError: no replica is ready.
        """
        try:
            async with asyncio.timeout(ROUTING_TIMEOUT_S):
                return await self._adapters.remote()
        except TimeoutError:
            raise unavailable() from None
        except FAILURES as error:
            raise _error_of(error) from None

    @contextmanager
    def _called(self, attempt: ReplicaAttempt) -> Iterator[None]:
        """An attempt runs from here on; what has not finished when this ends is aborted."""
        self.fleet.begin(attempt)
        loop = asyncio.get_running_loop()
        call = loop.create_task(self._call(attempt))
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        try:
            yield
        finally:
            self.fleet.end(attempt)
            if attempt.is_finished:
                loop.call_later(LINGER_S, call.cancel)  # cancelled now, it would count as a failed one
            else:
                call.cancel()

    async def _call(self, attempt: ReplicaAttempt) -> None:
        """Call `EngineReplica.generate`, and bring the result to the attempt. Cancelling it cancels the call."""
        request_id, encoded = attempt.request.request_id, self._encoder.encode(attempt.request)
        if len(encoded) > MOST_REQUEST_BYTES:
            attempt.fail(_too_large(len(encoded)))
            return
        responses = ray_private.call(self._generate, request_id, self._ingress_id, encoded)
        try:
            async for encoded in responses:
                result = self._decoder.decode(encoded)
                if result.output is not None:
                    self.fleet.put_result(attempt, result.output)
                elif result.refusal is not None:
                    attempt.fail(_as_failure(result.refusal))
            attempt.lose(Loss.DIED)  # does nothing where there was a result
        except FAILURES as error:
            attempt.fail(_failure_of(error))
        except asyncio.CancelledError:
            responses.cancel()
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            attempt.lose(Loss.DIED)  # it is the call that was cancelled, not we
        except Exception:
            logger.exception("a call of a replica failed")
            attempt.fail(internal_error())


class _Course:
    """A request's way over one or more replicas: what it has produced so far, and where it must not go again."""

    def __init__(self, request: EngineRequest) -> None:
        if request.params.seed is None:
            # Fixed here, so that another replica goes on with what this one would have drawn.
            params = msgspec.structs.replace(request.params, seed=random.getrandbits(64))
            request = msgspec.structs.replace(request, params=params)
        self._request = request
        self._output_ids: list[int] = []
        self._num_cached_tokens: int | None = None
        self._avoid: dict[str, float] = {}
        self._num_attempts = 0
        self._num_deaths = 0
        self._deadline_s: float | None = None
        """Until when it may wait for another replica; None for a request that has lost none."""

    @property
    def patience_s(self) -> float:
        """How long the next attempt may take to find a replica."""
        return ROUTING_TIMEOUT_S if self._deadline_s is None else max(0.0, self._deadline_s - time.monotonic())

    def next_attempt(self) -> ReplicaAttempt:
        request = self._request
        if self._deadline_s is not None:
            # What a lost replica may still do under the old id is of no interest.
            request = msgspec.structs.replace(request, request_id=f"{request.request_id}~{self._num_attempts}")
        if self._output_ids:
            params = msgspec.structs.replace(request.params, prompt_logprobs=None)
            request = msgspec.structs.replace(request, params=params, output_token_ids=list(self._output_ids))
        return ReplicaAttempt(request, self._avoid)

    def take(self, output: RequestOutput) -> RequestOutput:
        """Note an attempt's output. Returns it as if it came from the first."""
        self._output_ids += output.token_ids
        if self._num_cached_tokens is None:
            self._num_cached_tokens = output.num_cached_tokens
        if self._deadline_s is None:
            return output
        self._deadline_s = time.monotonic() + RESUME_TIMEOUT_S
        return msgspec.structs.replace(output, num_cached_tokens=self._num_cached_tokens)

    def goes_on(self, attempt: ReplicaAttempt, loss: Loss) -> bool:
        """Note that an attempt has lost its replica. Returns whether there may be another one.

        A death counts against a request that has no token of the replica, as then its prompt may have been computed:
        but not where requests were waiting, as it was most likely one of them.
        """
        self._num_attempts += 1
        only_waited = attempt.replica is not None and attempt.replica.was_queueing
        self._num_deaths += loss is not Loss.SILENT and attempt.num_received == 0 and not only_waited
        self._deadline_s = time.monotonic() + (RESUME_TIMEOUT_S if self._output_ids else ROUTING_TIMEOUT_S)
        if attempt.replica_id is not None:
            self._avoid[attempt.replica_id] = time.monotonic()
        return self._num_attempts < MOST_ATTEMPTS and self._num_deaths < MOST_DEATHS

    def may_wait(self, error: ApiError) -> bool:
        """Whether a request that was not taken can wait for room: one that has begun can, for a while."""
        is_for_now = error.status in (429, 503)
        return is_for_now and bool(self._output_ids) and self.patience_s > 0


def _as_failure(refusal: Refusal) -> ApiError | ReplicaLostError:
    match refusal.kind:
        case RefusalKind.BAD_REQUEST if refusal.param == "adapter":
            message = "the model's adapter does not exist, or cannot be used; the server's log says why"
            return ApiError(404, message, param="model", code="model_not_found")
        case RefusalKind.BAD_REQUEST:
            return bad_request(refusal.message, refusal.param)
        case RefusalKind.OVERLOADED:
            return overloaded()
        case RefusalKind.UNAVAILABLE | RefusalKind.ENGINE_ENDED:
            return ReplicaLostError(Loss.ENGINE_FAULT)


def _too_large(num_bytes: int) -> ApiError:
    message = f"the request takes {num_bytes} bytes to send to a replica, expected at most {MOST_REQUEST_BYTES}"
    return ApiError(413, message, code="request_too_large")


def _failure_of(error: Exception) -> ApiError | ReplicaLostError:
    """What a failed call means to its request."""
    if isinstance(error, BackPressureError):
        return overloaded()
    if isinstance(error, RayTaskError):
        logger.error("a replica failed: %s", error)
        return internal_error()
    return unavailable() if isinstance(error, RayServeException) else ReplicaLostError(Loss.DIED)


def _error_of(error: Exception) -> ApiError:
    """What a failed call means that is not a request's."""
    failure = _failure_of(error)
    return failure if isinstance(failure, ApiError) else unavailable()

"""What ingress and engine replica say to each other, as msgpack. Token ids, never text."""

from enum import StrEnum

import msgspec

from engine.request import RequestOutput


class RefusalKind(StrEnum):
    """Why a replica did not take a request, or gave it up."""

    BAD_REQUEST = "bad_request"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"
    """Its engine had ended before; another replica can take the request."""
    ENGINE_ENDED = "engine_ended"
    """Its engine ended while it had the request, which another replica can go on with."""


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """A request that was not taken, or given up."""

    kind: RefusalKind
    message: str
    param: str | None = None


class EngineResult(msgspec.Struct, frozen=True, array_like=True):
    """How a request ended: all it produced, or why the replica does not run it to its end."""

    output: RequestOutput | None = None
    """All tokens from the request's start, whatever the step stream told already, and the finish reason."""
    refusal: Refusal | None = None


class ModelInfo(msgspec.Struct, frozen=True):
    """What an ingress must know about the model that the replicas run."""

    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    fingerprint: str
    """Changes with the model and with the code that runs it."""
    files: dict[str, bytes]
    """By name: what a checkpoint folder says about text and sampling. So an ingress needs no checkpoint of its own."""

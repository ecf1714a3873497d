"""What ingress and engine replica say to each other, as msgpack. Token ids, never text."""

from enum import StrEnum

import msgspec

from engine.request import RequestOutput


class RefusalKind(StrEnum):
    """Why a replica did not take a request."""

    BAD_REQUEST = "bad_request"
    OVERLOADED = "overloaded"
    UNAVAILABLE = "unavailable"


class Refusal(msgspec.Struct, frozen=True, array_like=True):
    """A request that was not taken."""

    kind: RefusalKind
    message: str
    param: str | None = None


class ReplicaMessage(msgspec.Struct, frozen=True, array_like=True):
    """One item of a request's stream: what it produced since the last, or why it was refused.

    An empty one comes first: a replica has the request.
    """

    output: RequestOutput | None = None
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

"""ServiceConfig: the `args` of cluster/config.yaml. Frozen; an unknown key is an error that names it."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from engine.config import EngineConfig


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Limits(_Settings):
    """What one HTTP request may ask for. Beyond it is a 400 (413 for the body, 431 for headers) that says so."""

    body_bytes: int = Field(8 * 2**20, ge=1024, description="most bytes of a request's body")
    header_bytes: int = Field(16 * 2**10, ge=1024, description="most bytes of a request's headers, names included")
    messages: int = Field(1024, ge=1, description="most messages in a chat")
    prompts: int = Field(128, ge=1, description="most prompts in one completion request")
    prompt_tokens: int | None = Field(
        None, ge=1, description="most tokens of a prompt; None: as many as the model's context holds"
    )
    choices: int = Field(16, ge=1, description="most choices (n) for a prompt")
    grammar_chars: int = Field(2**17, ge=1, description="most characters of a JSON schema, regex, list or grammar")
    schema_depth: int = Field(32, ge=1, le=64, description="how deep schemas may be in one another")
    grammar_compile_s: float = Field(2.0, gt=0, le=60, description="most CPU seconds that a grammar takes to compile")


class AdmissionConfig(_Settings):
    """How much may wait in each ingress process; less does where it could not keep the promised time to first token."""

    max_queued_requests: int = Field(1024, ge=1, description="most requests that wait in an ingress process")
    max_queued_tokens: int = Field(2**20, ge=1, description="most prompt tokens of all that wait there")


class ApiKey(_Settings):
    """A key that requests may carry. Its limits hold in each ingress process."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]{1,64}$", description="whose it is; its prefix cache goes by this name")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the key: `printf %s KEY | sha256sum`")
    max_concurrent_requests: int | None = Field(None, ge=1, description="most requests at a time; None: no limit")
    requests_per_minute: int | None = Field(
        None, ge=1, description="requests that a minute allows, as many at once; None: no limit"
    )
    tokens_per_minute: int | None = Field(
        None, ge=1, description="tokens of prompts and outputs that a minute allows, as many at once; None: no limit"
    )
    shares_prefix_cache: bool = Field(
        False, description="use the prefix cache together with all keys that say so, instead of one of its own"
    )


class DefaultSamplingParams(_Settings):
    """Sampling where a request does not say. None leaves it to the model's generation_config.json, then OpenAI's."""

    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None


class Slo(_Settings):
    """What the service promises its clients: metrics, dashboards and alerts hold requests against it."""

    ttft_s: float = Field(
        2.0, gt=0, description="most seconds to the first token of a request; those that would take longer are refused"
    )
    tpot_s: float = Field(0.2, gt=0, description="most seconds for each token after it, on average over a request")
    ratio: float = Field(0.99, gt=0, lt=1, description="share of the requests that shall meet both")


class Tracing(_Settings):
    """Spans of requests, sent to a collector. Needs the extra `tracing`."""

    otlp_endpoint: str = Field(
        pattern=r"^https?://\S+$",
        description="where spans go as OTLP over HTTP, as in `http://127.0.0.1:4318/v1/traces`",
    )
    sample_ratio: float = Field(
        1.0, ge=0, le=1, description="share of requests traced, of those that bring no decision in their traceparent"
    )


class ServiceConfig(_Settings):
    """One model behind one API."""

    engine: EngineConfig = EngineConfig()
    served_model_name: str | None = Field(
        None, description="what clients call the model; None: `demo`, the hub id, or the folder's name"
    )
    default_sampling_params: DefaultSamplingParams = DefaultSamplingParams()
    limits: Limits = Limits()
    admission: AdmissionConfig = AdmissionConfig()
    api_keys: tuple[ApiKey, ...] = Field((), description="keys that may come in; without any, everybody may")
    slo: Slo = Slo()
    tracing: Tracing | None = Field(None, description="tracing of requests; None: off")
    cors_origins: tuple[Annotated[str, Field(pattern=r"^(\*|https?://[^/*\s]+)$")], ...] = Field(
        (), description="web pages whose scripts may call this, as in `https://example.com`; `*` is all of them"
    )
    playground: bool = Field(True, description="serve the web page at `/`: a chat to try things, and the fleet's state")

    @field_validator("api_keys")
    @classmethod
    def _distinct(cls, keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
        for field in ("name", "sha256"):
            found = [getattr(key, field) for key in keys]
            if len(set(found)) < len(found):
                repeated = next(value for value in found if found.count(value) > 1)
                raise ValueError(f"{field} {repeated!r} is there twice, expected it once")
        return keys

    @property
    def model_name(self) -> str:
        """The name in the API."""
        if self.served_model_name is not None:
            return self.served_model_name
        model = self.engine.model
        return Path(model).resolve().name if Path(model).is_dir() or model.startswith((".", "/", "~")) else model

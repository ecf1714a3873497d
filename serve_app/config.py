"""ServiceConfig: the `args` of cluster/config.yaml. Frozen; an unknown key is an error that names it."""

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from engine.config import EngineConfig

ENGINE_DEPLOYMENT = "EngineReplica"
"""Name of the deployment that runs the first model."""


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Limits(_Settings):
    """What one request may ask of a model. Beyond it is a 400 that says so."""

    messages: int = Field(1024, ge=1, description="most messages in a chat")
    prompts: int = Field(128, ge=1, description="most prompts in one completion request")
    prompt_tokens: int | None = Field(
        None, ge=1, description="most tokens of a prompt; None: as many as the model's context holds"
    )
    choices: int = Field(16, ge=1, description="most choices (n) for a prompt")
    outputs: int = Field(256, ge=1, description="most choices of all prompts of a completion request together")
    grammar_chars: int = Field(2**17, ge=1, description="most characters of a JSON schema, regex, list or grammar")
    schema_depth: int = Field(32, ge=1, le=64, description="how deep schemas may be in one another")
    grammar_compile_s: float = Field(2.0, gt=0, le=60, description="most CPU seconds that a grammar takes to compile")


class ServiceLimits(Limits):
    """The same, and what is read before the model is known: a 413 for the body, a 431 for the headers."""

    body_bytes: int = Field(8 * 2**20, ge=1024, description="most bytes of a request's body")
    header_bytes: int = Field(16 * 2**10, ge=1024, description="most bytes of a request's headers, names included")


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
    least_priority: int | None = Field(
        0, description="lowest `priority`, so the most urgent, that requests may have; None: any"
    )
    may_observe: bool = Field(True, description="may read /metrics and /status, which tell of all keys' requests")
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


class ModelConfig(_Settings):
    """One model."""

    engine: EngineConfig = EngineConfig()
    served_model_name: str | None = Field(
        None, min_length=1, description="what clients call the model; None: `demo`, the hub id, or the folder's name"
    )
    default_sampling_params: DefaultSamplingParams = DefaultSamplingParams()
    limits: Limits = Limits()
    admission: AdmissionConfig = AdmissionConfig()
    slo: Slo = Slo()

    @property
    def model_name(self) -> str:
        """The name in the API."""
        if self.served_model_name is not None:
            return self.served_model_name
        model = self.engine.model
        return Path(model).resolve().name if Path(model).is_dir() or model.startswith((".", "/", "~")) else model


def _distinct_keys(keys: tuple[ApiKey, ...]) -> tuple[ApiKey, ...]:
    for field in ("name", "sha256"):
        found = [getattr(key, field) for key in keys]
        if len(set(found)) < len(found):
            repeated = next(value for value in found if found.count(value) > 1)
            raise ValueError(f"{field} {repeated!r} is there twice, expected it once")
    return keys


Keys = Annotated[tuple[ApiKey, ...], AfterValidator(_distinct_keys)]


class ServiceConfig(ModelConfig):
    """A model, and others beside it, behind one API."""

    limits: ServiceLimits = ServiceLimits()
    other_models: tuple[ModelConfig, ...] = Field(
        (), description="more models; the engine of each is a deployment of its own, called EngineReplica-NAME"
    )
    api_keys: Keys = Field((), description="keys that may come in; without any, everybody may")
    tracing: Tracing | None = Field(None, description="tracing of requests; None: off")
    cors_origins: tuple[Annotated[str, Field(pattern=r"^(\*|https?://[^/*\s]+)$")], ...] = Field(
        (), description="web pages whose scripts may call this, as in `https://example.com`; `*` is all of them"
    )
    playground: bool = Field(True, description="serve the web page at `/`: a chat to try things, and the fleet's state")

    @model_validator(mode="after")
    def _distinct_models(self) -> Self:
        names = [self.model_name, *(model.model_name for model in self.other_models)]
        deployments = [deployment_name(name) for name in names[1:]]
        for found, what in ((names, "model"), (deployments, "deployment")):
            if len(set(found)) < len(found):
                repeated = next(value for value in found if found.count(value) > 1)
                raise ValueError(f"two models have the {what} name {repeated!r}, set served_model_name of one")
        for model in self.engines.values():
            prefix = f"{model.model_name}:"
            taken = next((name for name in names if name.startswith(prefix)), None)
            if taken is not None and model.engine.max_loras > 0:
                message = f"the model name {taken!r} is that of an adapter of {model.model_name!r}, which has max_loras"
                raise ValueError(f"{message}; set served_model_name of one")
        return self

    @property
    def engines(self) -> dict[str, ModelConfig]:
        """All models, by the names of their engines' deployments."""
        others = {deployment_name(other.model_name): other for other in self.other_models}
        return {ENGINE_DEPLOYMENT: self, **others}

    def changed(self, live: "LiveConfig") -> "ServiceConfig":
        """With what a LiveConfig says."""
        return self.model_copy(update={name: getattr(live, name) for name in live.model_fields_set})


class LiveConfig(_Settings):
    """`user_config` of the deployment Ingress, each key in place of the one in args. A change restarts nothing."""

    default_sampling_params: DefaultSamplingParams = DefaultSamplingParams()
    limits: ServiceLimits = ServiceLimits()
    admission: AdmissionConfig = AdmissionConfig()
    slo: Slo = Slo()
    api_keys: Keys = ()


def deployment_name(model_name: str) -> str:
    """Of the engine of one of ServiceConfig.other_models."""
    return f"{ENGINE_DEPLOYMENT}-{re.sub('[^A-Za-z0-9._-]', '-', model_name)}"

"""What the ingress decides by itself, without Ray."""

import hashlib
import threading
from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

import pytest

from engine.request import TokenLogprobs
from serve_app import ingress as module
from serve_app import model as model_module
from serve_app.auth import ApiKeys
from serve_app.config import ModelConfig, ServiceConfig
from serve_app.ingress import Ingress
from serve_app.metrics.ingress import IngressMetrics
from serve_app.metrics.process import samples_of
from serve_app.model import Model
from serve_app.openai.errors import ApiError
from serve_app.openai.generation import Delta, Usage

INGRESS: Any = Ingress.func_or_class  # type: ignore[attr-defined]  # the class behind the deployment


@pytest.mark.parametrize(
    ("name", "model"),
    [("qwen3", "qwen3"), ("qwen3:sql", "qwen3"), ("qwen3:8b", "qwen3:8b"), ("qwen3:8b:sql", "qwen3:8b")],
)
def test_an_adapter_belongs_to_the_model_of_the_longest_name(name: str, model: str):
    ingress = SimpleNamespace(_models={known: known for known in ("qwen3", "qwen3:8b", "other")})
    assert INGRESS._find(ingress, name) == model


def test_a_model_that_is_not_there():
    with pytest.raises(ApiError) as caught:
        INGRESS._find(SimpleNamespace(_models={"qwen3": None}), "qwen3-8b:sql")
    assert caught.value.status == 404 and caught.value.param == "model"


async def test_a_new_key_is_in_the_metrics_before_its_first_request():
    async def configure(config: ServiceConfig) -> None:
        assert config.api_keys[0].name == "new"

    given = ServiceConfig()
    model = SimpleNamespace(measured=IngressMetrics(given), configure=configure)
    ingress = SimpleNamespace(_given=given, config=given, keys=ApiKeys(()), _models={"demo": model})
    key = {"name": "new", "sha256": hashlib.sha256(b"key").hexdigest()}
    await INGRESS.reconfigure(ingress, {"api_keys": [key]})
    assert any(sample.labels.get("key") == "new" for sample in samples_of(model.measured.registry))


class Scribe:
    """An endpoint that only notes which thread writes its answer."""

    def events(self, delta: Delta) -> bytes:
        return threading.current_thread().name.encode()

    def whole(self, deltas: list[Delta], usage: Usage) -> str:
        return threading.current_thread().name


@pytest.mark.parametrize("is_long", [False, True])
async def test_what_takes_long_to_write_holds_up_no_other_request(is_long: bool):
    entries = [TokenLogprobs(5, -1.0, 1, [5], [-1.0])] * (module.MANY_LOGPROBS + is_long)
    here = threading.current_thread().name

    async def deltas() -> AsyncGenerator[Delta, None]:
        yield Delta(0, logprobs=entries)

    ingress, generation = SimpleNamespace(_json=str), SimpleNamespace(usage=Usage())
    assert (await INGRESS._whole(ingress, Scribe(), generation, deltas()) != here) == is_long
    echo = Delta(0, prompt_logprobs=entries)
    assert (await module._events_of(Scribe(), echo) != here.encode()) == is_long  # type: ignore[arg-type]


async def test_a_change_while_the_model_is_read_is_not_lost(monkeypatch: pytest.MonkeyPatch):
    before, after = ModelConfig(), ModelConfig()

    async def info() -> str:
        return "info"

    def read(config: ModelConfig, info: str) -> ModelConfig:
        model._config = after
        return config

    async def announce(name: str) -> None:
        pass

    monkeypatch.setattr(model_module, "ServedModel", SimpleNamespace(from_info=read))
    monkeypatch.setattr(model_module, "announce", announce)
    measured = SimpleNamespace(describe=lambda info: None)
    model: Any = SimpleNamespace(
        name="demo", client=SimpleNamespace(info=info), measured=measured, _config=before, _served=None
    )
    await Model._load(model)
    assert model._served is after

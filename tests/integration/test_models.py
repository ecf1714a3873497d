"""Several models behind one ingress, and settings that change while requests run."""

import hashlib
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from tests.integration.server import Server

COMPLETIONS = "/v1/completions"
PATIENCE_S = 60.0


def completion(**fields: Any) -> dict[str, Any]:
    return {"model": "demo", "prompt": "Hello", "max_tokens": 4} | fields


@pytest.fixture(scope="module")
def api(two_models: Server) -> Any:
    with httpx.Client(base_url=two_models.url, timeout=60) as made:
        yield made


def test_every_model_is_listed_and_answers(api: httpx.Client):
    cards = {card["id"]: card for card in api.get("/v1/models").json()["data"]}
    assert list(cards) == ["demo", "demo-short"]
    assert cards["demo-short"]["max_model_len"] == 512 < cards["demo"]["max_model_len"]
    for name, card in cards.items():
        assert api.get(f"/v1/models/{name}").json() == card
        answer = api.post(COMPLETIONS, json=completion(model=name))
        assert answer.status_code == 200 and answer.json()["model"] == name
        body = {"model": name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4, "stream": True}
        assert api.post("/v1/chat/completions", json=body).text.endswith("data: [DONE]\n\n")
    assert api.post("/tokenize", json={"prompt": "Hello"}).json()["max_model_len"] == cards["demo"]["max_model_len"]


def test_each_model_has_limits_of_its_own(api: httpx.Client):
    for fields in ({"max_tokens": 600}, {"n": 5}):
        assert api.post(COMPLETIONS, json=completion(**fields)).status_code == 200
        assert api.post(COMPLETIONS, json=completion(model="demo-short", **fields)).status_code == 400


@pytest.mark.parametrize("name", ["demo-", "demo-short-er", "demo:x", "", "EngineReplica"])
def test_a_model_that_is_not_there(api: httpx.Client, name: str):
    for path in (COMPLETIONS, "/v1/messages/count_tokens"):
        body = completion(model=name)
        if path != COMPLETIONS:
            body = {"model": name, "messages": [{"role": "user", "content": "Hello"}]}
        answer = api.post(path, json=body)
        assert answer.status_code == 404 and "demo" in answer.json()["error"]["message"]


def test_metrics_and_status_tell_the_models_apart(api: httpx.Client):
    text = api.get("/metrics").text
    counts = re.findall(r'qwen3_requests_total\{.*endpoint="/v1/completions".*outcome="ok".*\} (\S+)', text)
    assert len(counts) == 2 and all(float(count) >= 1 for count in counts)
    assert set(re.findall(r'kv_cache_usage_perc\{model_name="([^"]+)"', text)) == {"demo", "demo-short"}
    status = api.get("/status").json()
    assert [model["name"] for model in status["models"]] == ["demo", "demo-short"]
    assert all(model["replicas"] for model in status["models"])


def test_limits_keys_and_defaults_change_while_requests_run(two_models: Server, api: httpx.Client):
    before = set(two_models.processes_named("ServeReplica"))
    stop = threading.Event()

    def call() -> list[int]:
        found = []
        while not stop.is_set():
            found.append(api.post(COMPLETIONS, json=completion(), headers={"X-Api-Key": "secret"}).status_code)
        return found

    key = {"name": "alice", "sha256": hashlib.sha256(b"secret").hexdigest()}
    defaults = {"temperature": 0.25}
    with ThreadPoolExecutor(1) as pool:
        calls = pool.submit(call)
        try:
            changed = {"api_keys": [key], "default_sampling_params": defaults, "limits": {"body_bytes": 2048}}
            two_models.deploy(changed)
            wait_for_status(api, 401)
            allowed = {"Authorization": "Bearer secret"}
            [card, _] = api.get("/v1/models", headers=allowed).json()["data"]
            assert card["default_sampling_params"]["temperature"] == 0.25
            too_long = completion(prompt="x" * 4000)
            assert api.post(COMPLETIONS, json=too_long, headers=allowed).status_code == 413
            two_models.deploy({})
            wait_for_status(api, 200)
            assert api.post(COMPLETIONS, json=too_long).status_code == 200
        finally:
            stop.set()
        assert set(calls.result()) == {200}
    assert set(two_models.processes_named("ServeReplica")) == before


def wait_for_status(api: httpx.Client, status: int) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while api.get("/v1/models").status_code != status:
        assert time.monotonic() < deadline, "the change has not arrived"
        time.sleep(0.1)

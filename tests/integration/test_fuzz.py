"""Whatever is sent, nothing is a fault of the server, and streams beside it lose nothing."""

import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from openai import OpenAI
from schemathesis import Case
from schemathesis.checks import not_a_server_error

from serve_app.routes import CONVERTING, GENERATING
from tests.integration.server import Server

HELLO = [{"role": "user", "content": "Hello"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"model": "demo", "messages": HELLO, "max_tokens": 2},
    "/v1/completions": {"model": "demo", "prompt": "Hello", "max_tokens": 2},
    "/v1/responses": {"model": "demo", "input": "Hello", "max_output_tokens": 2},
    "/v1/messages": {"model": "demo", "messages": HELLO, "max_tokens": 2},
    "/v1/messages/count_tokens": {"model": "demo", "messages": HELLO},
    "/tokenize": {"prompt": "Hello"},
    "/detokenize": {"tokens": [5]},
}
FEW = settings(
    max_examples=40,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
FIELDS = {path: sorted(body.model_fields) for path, (body, _) in {**GENERATING, **CONVERTING}.items()}
SHORT = {"max_tokens": 2, "max_completion_tokens": 2, "max_output_tokens": 2, "n": 2, "best_of": 2}
"""Most of what a fuzzed request may ask for, so that the time goes into many of them."""


@pytest.fixture(scope="module", autouse=True)
def bystanders(client: OpenAI) -> Iterator[None]:
    """Streams that run all the while: each must say what it says when it is alone."""
    ended = threading.Event()
    told: list[str] = []

    def text() -> str:
        stream = client.completions.create(
            model="demo", prompt="Once upon a time", temperature=0, max_tokens=32, stream=True
        )
        return "".join(chunk.choices[0].text for chunk in stream)

    expected = text()

    def read() -> None:
        while not ended.is_set():
            try:
                told.append(text())
            except Exception as error:
                told.append(repr(error))

    reader = threading.Thread(target=read)
    reader.start()
    yield
    ended.set()
    reader.join()
    assert told and set(told) == {expected}


@pytest.fixture(scope="module")
def document(server: Server) -> Any:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def shorten(path: str, body: Any) -> None:
    """Make it the model that is here, and the answer short: else most requests end at the first field, or never."""
    if isinstance(body, dict):
        for name in BODIES[path].keys() & {"model", "max_tokens", "max_output_tokens"}:
            body.setdefault(name, BODIES[path][name])
        if "model" in body:
            body["model"] = "demo"
        for name, most in SHORT.items():
            if type(body.get(name)) is int and body[name] > most:
                body[name] = most


@pytest.mark.parametrize("path", sorted(BODIES))
def test_what_the_openapi_document_describes(document: Any, path: str):
    @settings(FEW, max_examples=10, phases=[Phase.generate])
    @given(document[path]["POST"].as_strategy())
    def send_case(case: Case) -> None:
        shorten(path, case.body)
        case.call_and_validate(checks=[not_a_server_error], timeout=30)

    send_case()


NUMBERS = st.sampled_from([0, -1, 1, 2**31, 2**63, 2**64, 10**40, -(10**40), 0.5, 1e308, -0.0, True, "1", "NaN"])
TEXTS = st.sampled_from(["", "\x00", "\ud800", "<|im_end|>", "a" * 100_000, "\u202e", "😀", "../..", "{{7*7}}"])
VALUES = st.recursive(
    st.none() | NUMBERS | TEXTS | st.text(max_size=8) | st.integers() | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | TEXTS, inner, max_size=3),
    max_leaves=6,
)
RAW = [
    b'{"model":"demo","model":"demo","prompt":"a","prompt":"b","max_tokens":1}',
    b'{"temperature":1e309}',
    b'{"temperature":-1e309}',
    b'{"seed":' + b"9" * 5000 + b"}",
    b'{"prompt":"\xff\xfe"}',
    b'{"prompt":"\\ud800"}',
    b'{"prompt":"\xed\xa0\x80"}',
    b"\xef\xbb\xbf{}",
    b"[" * 100_000,
    b'{"a":' * 40_000,
    b'{"model":"demo","prompt":' + b"[" * 90_000 + b"]" * 90_000 + b"}",
    b'{"model":"demo","tokens":[2147483647],"prompt":[2147483647],"input":[151936],"messages":[5]}',
    b'{"model":"demo","prompt":"' + b"a" * 10_000_000 + b'"}',
    b"{}" + b"\x00" * 100,
]


def send(http: httpx.Client, path: str, body: bytes) -> None:
    response = http.post(path, content=body, headers={"Content-Type": "application/json"})
    assert response.status_code < 500, (path, body[:200], response.text[:400])
    if response.status_code >= 400:
        assert response.json()["error"]["message"]


@FEW
@given(path=st.sampled_from(sorted(BODIES)), data=st.data())
def test_a_field_of_any_value(http: httpx.Client, path: str, data: st.DataObject):
    body = BODIES[path] | {data.draw(st.sampled_from(FIELDS[path])): data.draw(VALUES)}
    shorten(path, body)
    send(http, path, json.dumps(body).encode())


@pytest.mark.parametrize("body", RAW, ids=lambda body: repr(body[:24]))
def test_bytes_of_any_kind(http: httpx.Client, body: bytes):
    for path in BODIES:
        send(http, path, body)


# An X-Request-Id that is no UTF-8 is left out: Ray Serve decodes it, and fails, before the application sees it.
HEADERS = [
    *((name, b"\xff") for name in ("Authorization", "X-Api-Key", "Host", "Content-Type", "Accept")),
    *(
        (name, value)
        for name in ("X-Request-Id", "Authorization", "Host")
        for value in (b"[", b"a" * 4000, b"\xc3\xa4")
    ),
]


@pytest.mark.parametrize(("header", "value"), HEADERS, ids=lambda value: repr(value[:8]))
def test_headers_of_any_kind(http: httpx.Client, header: str, value: bytes):
    response = http.get("/version", headers=[(header.encode(), value)])
    assert response.status_code < 500, response.text

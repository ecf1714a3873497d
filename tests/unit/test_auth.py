"""Who may come in: keys, their limits, and the gate in front of every route."""

import asyncio
import hashlib
from collections.abc import Iterable
from functools import cache
from typing import Any

import msgspec
import pytest
from fastapi import FastAPI, Request, Response
from pydantic import ValidationError

from serve_app import auth
from serve_app.auth import ApiKeys, Caller
from serve_app.config import ApiKey, ServiceConfig
from serve_app.gate import caller_of
from serve_app.metrics.ingress import IngressMetrics
from serve_app.openai.errors import ApiError
from serve_app.routes import CONVERTING, GENERATING, build_http_app
from serve_app.static_files import FOLDER

Headers = list[tuple[bytes, bytes]]
ALICE: Headers = [(b"authorization", b"Bearer alices-key")]


def key(name: str = "alice", **fields: Any) -> ApiKey:
    return ApiKey(name=name, sha256=hashlib.sha256(f"{name}s-key".encode()).hexdigest(), **fields)


class Behind:
    """What is behind the gate: it tells who came in, and waits if it is told to."""

    def __init__(self, config: ServiceConfig | None = None) -> None:
        self.config = config or ServiceConfig()
        self.keys = ApiKeys(self.config.api_keys)
        self.measured = IngressMetrics(self.config)
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.num_begun = 0

    async def health(self) -> Response:
        return Response("behind the gate")

    version = models = all_metrics = status = health

    async def model(self, name: str) -> Response:
        return Response(f"behind the gate, {name}")

    async def generate(self, request: Request, *arguments: Any) -> Response:
        self.num_begun += 1
        await self.may_end.wait()
        return Response(f"behind the gate, {caller_of(request).name}")

    convert = generate


class Answer:
    status = 0
    headers: dict[str, str]
    body = b""

    def error(self) -> dict[str, Any]:
        return msgspec.json.decode(self.body)["error"]


def app(*keys: ApiKey, **fields: Any) -> FastAPI:
    if fields:
        return build_http_app(Behind(ServiceConfig(api_keys=keys, **fields)))
    return plain_app(keys)


@cache
def plain_app(keys: tuple[ApiKey, ...]) -> FastAPI:
    """Made once, as that takes a while."""
    return build_http_app(Behind(ServiceConfig(api_keys=keys)))


async def send(
    to: FastAPI, method: str = "GET", path: str = "/version", headers: Iterable = (), **scope: Any
) -> Answer:
    """A request as a server hands it over: any path and header, also such as no client would send."""
    answer = Answer()

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"{}", "more_body": False}

    async def take(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in message["headers"]}
        else:
            answer.body += message["body"]

    request = {"type": "http", "method": method, "path": path, "raw_path": path.encode(), "query_string": b""}
    await to(request | {"headers": list(headers), "scheme": "http", "server": ("a", 1)} | scope, receive, take)
    return answer


async def test_no_route_but_health_and_the_web_pages_files_is_open_to_strangers():
    guarded = app(key())
    names = [path.name for path in FOLDER.iterdir() if path.name != "index.html"]
    opened = {("GET", path) for path in ("/", "/health", *(f"/playground/{name}" for name in names))}
    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "QUERY", "TRACE")
    paths = {route.path.replace("{name:path}", "demo") for route in guarded.routes}
    assert paths >= {"/openapi.json", "/v1/models", "/v1/models/demo", *GENERATING, *CONVERTING}
    for path in (*paths, "/", "/nothing"):
        for method in methods:
            found = await send(guarded, method, path)
            if (method, path) in opened:
                assert found.status == 200
                continue
            assert found.status == 401, (method, path)
            assert found.headers["www-authenticate"] == "Bearer"
            assert found.headers["content-type"] == "application/json"
            assert b"behind the gate" not in found.body


async def test_every_route_is_open_to_the_owner_of_a_key():
    guarded = app(key())
    for path in ("/v1/models", "/v1/models/demo", "/version", "/openapi.json", "/health"):
        assert (await send(guarded, "GET", path, ALICE)).status == 200
    for path in (*GENERATING, *CONVERTING):
        found = await send(guarded, "POST", path, ALICE)
        assert (found.status, found.body) == (200, b"behind the gate, alice")


@pytest.mark.parametrize(
    "path",
    [
        "//health",
        "/health/",
        "/health/../v1/models",
        "/health;/v1/models",
        "/health?x",
        "/v1/models/../../health",
        "/v1/models//health",
        "/HEALTH",
        "health",
        "",
        "http://x/health",
    ],
)
async def test_a_path_that_looks_like_an_open_one_is_closed(path: str):
    assert (await send(app(key()), "GET", path)).status == 401
    below = await send(app(key()), "GET", path, root_path="/health")
    assert below.status == 401 or below.body.startswith(b"<!doctype html>")  # `/` is the web page, wherever it is


@pytest.mark.parametrize("host", [b"x/health?", b"x/health#", b"[", b"a:b:c", b"", b"\xff", b"x/health?\x00"])
async def test_the_host_header_opens_nothing_and_breaks_nothing(host: bytes):
    for path in ("/v1/models", "/v1/chat/completions", "/nothing"):
        assert (await send(app(key()), "GET", path, [(b"host", host)])).status == 401
    found = await send(app(), "GET", "/nothing", [(b"host", host)])
    assert found.status == 404 and "location" not in found.headers
    assert (await send(app(), "GET", "/health/", [(b"host", host)])).status == 404


@pytest.mark.parametrize(
    "headers",
    [
        [(b"authorization", b"Bearer alices-key")],
        [(b"authorization", b"bearer  alices-key ")],
        [(b"Authorization", b"BEARER alices-key")],
        [(b"x-api-key", b"alices-key")],
        [(b"authorization", b"Basic eDp5"), (b"x-api-key", b"alices-key")],
    ],
)
async def test_a_key_is_found_where_clients_put_it(headers: Headers):
    assert (await send(app(key("bob"), key()), headers=headers)).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", b"alices-key")],
        [(b"authorization", b"Basic alices-key")],
        [(b"authorization", b"Bearer Alices-key")],
        [(b"authorization", b"Bearer alices-ke")],
        [(b"authorization", b"Bearer " + key().sha256.encode())],
        [(b"authorization", b"Bearer \xff\xfe")],
        [(b"authorization", b"Bearer alices-key"), (b"authorization", b"Bearer x")],
        [(b"authorization", b"Bearer wrong"), (b"x-api-key", b"alices-key")],
        [(b"x-api-key", b"")],
    ],
)
async def test_anything_else_is_no_key(headers: Headers):
    found = await send(app(key()), headers=headers)
    error = found.error()
    assert found.status == 401 and error["type"] == "authentication_error" and error["code"] == "invalid_api_key"
    assert set(error) == {"message", "type", "param", "code"} and "alices" not in error["message"]


async def test_strangers_are_told_in_the_shape_of_the_api_they_asked():
    for path in ("/v1/messages", "/v1/messages/count_tokens"):
        body = msgspec.json.decode((await send(app(key()), "POST", path)).body)
        assert body["type"] == "error" and body["error"]["type"] == "authentication_error"


def test_every_digest_is_compared_whichever_matches(monkeypatch: pytest.MonkeyPatch):
    compared: list[bytes] = []

    def compare(expected: bytes, found: bytes) -> bool:
        compared.append(expected)
        return expected == found

    monkeypatch.setattr(auth.hmac, "compare_digest", compare)
    keys = ApiKeys([key(), key("bob"), key("carol")])
    assert keys.caller(ALICE).name == "alice"
    with pytest.raises(ApiError):
        keys.caller([(b"x-api-key", b"nobody's")])
    assert len(compared) == 6


async def test_without_keys_everybody_is_let_in():
    for headers in ([], ALICE, [(b"authorization", b"Bearer ")]):
        assert (await send(app(), headers=headers)).status == 200


async def test_no_websocket_is_accepted():
    messages = []

    async def take(message: Any) -> None:
        messages.append(message)

    await app()({"type": "websocket", "path": "/health", "headers": []}, lambda: asyncio.sleep(1), take)
    assert [message["type"] for message in messages] == ["websocket.close"]


async def test_a_key_has_so_many_requests_at_a_time():
    behind = Behind(ServiceConfig(api_keys=(key(max_concurrent_requests=2), key("bob"))))
    behind.may_end.clear()
    guarded = build_http_app(behind)
    chat = ("POST", "/v1/chat/completions")
    open_requests = [asyncio.create_task(send(guarded, *chat, ALICE)) for _ in range(2)]
    while behind.num_begun < 2:
        await asyncio.sleep(0)
    refused = await send(guarded, headers=ALICE)
    assert refused.status == 429 and int(refused.headers["retry-after"]) >= 1
    assert refused.error()["type"] == "rate_limit_error"
    behind.may_end.set()
    assert (await send(guarded, headers=[(b"x-api-key", b"bobs-key")])).status == 200
    assert [(await each).status for each in open_requests] == [200, 200]
    assert (await send(guarded, headers=ALICE)).status == 200


async def test_a_request_that_fails_or_is_cancelled_counts_no_longer():
    caller = Caller(key(max_concurrent_requests=1))
    for failure in (ValueError, asyncio.CancelledError):
        with pytest.raises(failure), caller.request():
            raise failure
    with caller.request(), pytest.raises(ApiError), caller.request():
        pass


async def test_a_key_may_be_kept_from_what_tells_of_others():
    guarded = app(key(may_observe=False), key("bob"))
    for path, status in (("/metrics", 403), ("/status", 403), ("/v1/models", 200)):
        assert (await send(guarded, path=path, headers=ALICE)).status == status
        assert (await send(guarded, path=path, headers=[(b"x-api-key", b"bobs-key")])).status == 200
        assert (await send(app(), path=path)).status == 200


def test_no_key_passes_another_unless_it_may():
    for caller in (Caller(), Caller(key(least_priority=None)), Caller(key(least_priority=-5))):
        caller.check_priority(-5)
    for caller, priority in ((Caller(key()), -1), (Caller(key(least_priority=-5)), -6)):
        caller.check_priority(priority + 1)
        with pytest.raises(ApiError) as error:
            caller.check_priority(priority)
        assert (error.value.status, error.value.param) == (400, "priority")


def test_what_is_open_counts_on_when_limits_change():
    keys = ApiKeys([key(max_concurrent_requests=5, tokens_per_minute=600)])
    caller = keys.caller(ALICE)
    caller.take_tokens(600)
    with caller.request():
        keys.replace([key(max_concurrent_requests=1, tokens_per_minute=600)])
        again = keys.caller(ALICE)
        with pytest.raises(ApiError), again.request():
            pass
        with pytest.raises(ApiError):
            again.check_tokens(600)
    with again.request():
        pass


def test_a_key_has_so_many_requests_a_minute(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(auth.time, "monotonic", lambda: clock[0])
    caller = Caller(key(requests_per_minute=2))

    def is_allowed() -> bool:
        try:
            with caller.request():
                return True
        except ApiError as error:
            assert error.status == 429 and error.retry_after_s is not None and 1 <= error.retry_after_s <= 30
            return False

    assert [is_allowed() for _ in range(3)] == [True, True, False]
    clock[0] += 29
    assert not is_allowed()
    clock[0] += 1.01
    assert [is_allowed() for _ in range(2)] == [True, False]
    clock[0] += 3600
    assert [is_allowed() for _ in range(3)] == [True, True, False]


def test_a_key_has_so_many_tokens_a_minute(monkeypatch: pytest.MonkeyPatch):
    clock = [100.0]
    monkeypatch.setattr(auth.time, "monotonic", lambda: clock[0])
    caller = Caller(key(tokens_per_minute=600))

    def wait_s(num_tokens: int) -> int:
        try:
            caller.check_tokens(num_tokens)
            return 0
        except ApiError as error:
            assert error.status == 429 and error.retry_after_s is not None
            return error.retry_after_s

    assert wait_s(5000) == 0  # more than there can ever be: it takes all, and what is missing has to come in again
    caller.take_tokens(500)
    assert (wait_s(100), wait_s(101)) == (0, 1)
    caller.take_tokens(200)  # output, that nobody knew before
    assert (wait_s(1), wait_s(100)) == (11, 20)
    clock[0] += 11
    assert (wait_s(1), wait_s(10), wait_s(100)) == (0, 0, 9)
    clock[0] += 3600
    assert wait_s(5000) == 0
    assert caller.num_tokens == 700 and caller.num_refused["tokens_per_minute"] == 4
    Caller().check_tokens(10**9)


def test_each_key_has_a_prefix_cache_of_its_own_unless_it_shares():
    alice, bob = Caller(key()), Caller(key("bob"))
    shared = [Caller(key(name, shares_prefix_cache=True)) for name in ("carol", "dave")]
    wanted = ["", "x", "alice/", "alice/x", "/x", "/"]
    salts = [caller.cache_salt(salt) for caller in (alice, bob, shared[0]) for salt in wanted]
    assert len(set(salts)) == len(salts)
    assert [shared[1].cache_salt(salt) for salt in wanted] == salts[-len(wanted) :]
    assert Caller().cache_salt("") == ""


async def test_headers_that_are_too_long_are_refused_before_anything_else():
    found = await send(app(key()), headers=[(b"x", b"y" * 20_000)])
    assert found.status == 431 and found.error()["code"] == "headers_too_large"
    assert (await send(app(limits={"header_bytes": 40_000}), headers=[(b"x", b"y" * 20_000)])).status == 200
    assert (await send(app(), headers=[(b"x", b"y" * 10) for _ in range(2000)])).status == 431


@pytest.mark.parametrize("value", [b"", b" ", b"a b", b"\xe4", b"x" * 129, b"a\x00"])
async def test_a_request_id_that_cannot_be_echoed_is_refused(value: bytes):
    found = await send(app(), headers=[(b"x-request-id", value)])
    assert found.status == 400 and "X-Request-Id" in found.error()["message"]
    assert (await send(app(), headers=[(b"x-request-id", b"x" * 128)])).status == 200


async def test_no_origin_is_allowed_unless_it_is_configured():
    page: Headers = [(b"origin", b"https://example.com")]
    asking = [*page, (b"access-control-request-method", b"POST"), (b"access-control-request-headers", b"authorization")]
    for closed in (app(key()), app(key(), cors_origins=("https://example.org",))):
        for method, headers in (("GET", [*page, *ALICE]), ("OPTIONS", asking)):
            found = await send(closed, method, headers=headers)
            assert "access-control-allow-origin" not in found.headers
    allowed = app(key(), cors_origins=("https://example.com",))
    preflight = await send(allowed, "OPTIONS", "/v1/chat/completions", asking)
    assert preflight.status == 200 and preflight.headers["access-control-allow-origin"] == "https://example.com"
    assert "authorization" in preflight.headers["access-control-allow-headers"].lower()
    refused = await send(allowed, headers=page)
    assert refused.status == 401 and refused.headers["access-control-allow-origin"] == "https://example.com"
    assert "access-control-allow-credentials" not in refused.headers


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"api_keys": [{"name": "a", "sha256": "alices-key"}]}, "sha256"),
        ({"api_keys": [{"name": "a/b", "sha256": key().sha256}]}, "name"),
        ({"api_keys": [{"name": "a", "sha256": key().sha256, "key": "x"}]}, "key"),
        ({"api_keys": [key().model_dump(), key().model_dump() | {"name": "b"}]}, "is there twice"),
        ({"api_keys": [key().model_dump(), key("bob").model_dump() | {"name": "alice"}]}, "'alice' is there twice"),
        ({"api_keys": [{"name": "a", "sha256": key().sha256, "requests_per_minute": 0}]}, "requests_per_minute"),
        ({"cors_origins": ["example.com"]}, "cors_origins"),
        (
            {"engine": {"max_loras": 1}, "served_model_name": "m", "other_models": [{"served_model_name": "m:x"}]},
            "'m:x' is that of an adapter of 'm'",
        ),
        ({"default_sampling_params": {"temperature": 3}}, "temperature"),
        ({"default_sampling_params": {"temprature": 1}}, "temprature"),
    ],
)
def test_a_wrong_configuration_is_named(values: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        ServiceConfig.model_validate(values)


def test_a_body_that_a_route_takes_is_in_the_openapi_document():
    document = app().openapi()

    def references(value: Any) -> set[str]:
        if isinstance(value, dict):
            own = {value["$ref"]} if isinstance(value.get("$ref"), str) else set()
            return own.union(*(references(each) for each in value.values()))
        return set().union(*(references(each) for each in value)) if isinstance(value, list) else set()

    for path in (*GENERATING, *CONVERTING):
        assert document["paths"][path]["post"]["requestBody"]["required"]
    found = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert found and found <= set(document["components"]["schemas"])

"""The routes of the service, as an ASGI application behind a gate."""

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Scope

from serve_app.anthropic import errors as anthropic
from serve_app.anthropic.messages import Messages, count_tokens
from serve_app.anthropic.protocol import CountTokensBody, MessagesBody
from serve_app.auth import ApiKeys
from serve_app.config import ServiceConfig
from serve_app.gate import Gate, caller_of
from serve_app.metrics.ingress import IngressMetrics
from serve_app.metrics.requests import Metered, note_error
from serve_app.openai.chat import Chat
from serve_app.openai.chat_protocol import ChatBody
from serve_app.openai.completion_protocol import CompletionBody
from serve_app.openai.completions import Completions
from serve_app.openai.endpoint import Endpoint, ServedModel
from serve_app.openai.errors import ApiError, internal_error
from serve_app.openai.responses import Responses
from serve_app.openai.responses_protocol import ResponsesBody
from serve_app.openai.tokenize import DetokenizeBody, TokenizeBody, detokenize, tokenize
from serve_app.static_files import add_page
from serve_app.tracing import Traced, make_provider

EndpointClass = Callable[[Any, ServedModel], Endpoint]
Conversion = Callable[[Any, ServedModel], dict[str, Any]]

GENERATING: dict[str, tuple[type[BaseModel], EndpointClass]] = {
    "/v1/chat/completions": (ChatBody, Chat),
    "/v1/completions": (CompletionBody, Completions),
    "/v1/responses": (ResponsesBody, Responses),
    "/v1/messages": (MessagesBody, Messages),
}
"""Routes that run the model: what a body is, and what makes it an endpoint."""
CONVERTING: dict[str, tuple[type[BaseModel], Conversion]] = {
    "/tokenize": (TokenizeBody, tokenize),
    "/detokenize": (DetokenizeBody, detokenize),
    "/v1/messages/count_tokens": (CountTokensBody, count_tokens),
}
"""Routes that only need what an ingress knows of the model: what a body is, and what makes the answer of it."""


class Service(Protocol):
    """What the routes lead to."""

    config: ServiceConfig
    """As it is now: what LiveConfig says of it may change."""
    keys: ApiKeys
    measured: IngressMetrics
    """Of requests whose model is not known yet."""

    async def health(self) -> Response: ...
    async def version(self) -> Response: ...
    async def all_metrics(self) -> Response: ...
    async def status(self) -> Response: ...
    async def models(self) -> Response: ...
    async def model(self, name: str) -> Response: ...
    async def generate(self, request: Request, body: type[BaseModel], endpoint: EndpointClass) -> Response: ...
    async def convert(self, request: Request, body: type[BaseModel], conversion: Conversion) -> Response: ...


def build_http_app(service: Service) -> FastAPI:
    """The application.

    Where there are keys, every route is closed to those without one, but for /health and the files of the web page.
    """
    config = service.config
    app = FastAPI(
        title="qwen3-serve",
        version=version("qwen3-serve"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # the Host header would decide where to
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, Exception: _fault},
    )
    app.add_api_route("/health", service.health, methods=["GET"])
    open_routes = [app.routes[-1]]
    if config.playground:
        open_routes += add_page(app)
    app.add_api_route("/version", service.version, methods=["GET"])
    app.add_api_route("/metrics", _for_observers(service.all_metrics), methods=["GET"])
    app.add_api_route("/status", _for_observers(service.status), methods=["GET"])
    app.add_api_route("/v1/models", service.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", service.model, methods=["GET"])
    for path, (body, endpoint) in GENERATING.items():
        _add_post(app, path, body, _call(service.generate, body, endpoint))
    for path, (body, conversion) in CONVERTING.items():
        _add_post(app, path, body, _call(service.convert, body, conversion))
    _describe_bodies(app)
    if config.tracing is not None:
        app.add_middleware(Traced, provider=make_provider(config.tracing))
    app.add_middleware(
        Gate,
        keys=service.keys,
        open_routes=open_routes,
        limits=lambda: service.config.limits,
        respond=error_response,
    )
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=config.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    app.add_middleware(Metered, metrics=service.measured, endpoints=GENERATING)
    return app


def error_response(scope: Scope, error: ApiError) -> Response:
    """An error in the form that clients of the path expect."""
    note_error(scope, error)
    is_anthropic = scope["path"].removeprefix(scope.get("root_path", "")).startswith("/v1/messages")
    return anthropic.error_response(error) if is_anthropic else error.response()


def _call(method: Callable[..., Awaitable[Response]], *arguments: Any) -> Callable[[Request], Awaitable[Response]]:
    async def call(request: Request) -> Response:
        return await method(request, *arguments)

    return call


def _for_observers(method: Callable[[], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    async def call(request: Request) -> Response:
        caller_of(request).check_observer()
        return await method()

    return call


def _add_post(app: FastAPI, path: str, body: type[BaseModel], handler: Callable[..., Any]) -> None:
    """Bodies are read by the handler, so only the document needs to know what they are."""
    schema = {"$ref": f"#/components/schemas/{body.__name__}"}
    content = {"required": True, "content": {"application/json": {"schema": schema}}}
    name = path.strip("/").replace("/", "_")
    app.add_api_route(path, handler, methods=["POST"], name=name, openapi_extra={"requestBody": content})


def _describe_bodies(app: FastAPI) -> None:
    """Put the bodies of all routes into the OpenAPI document."""
    bodies = [body for body, _ in (*GENERATING.values(), *CONVERTING.values())]
    _, definitions = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    app.openapi().setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])


async def _api_error(request: Request, error: Exception) -> Response:
    return error_response(request.scope, error if isinstance(error, ApiError) else internal_error())


async def _http_error(request: Request, error: Exception) -> Response:
    """Routes and methods that do not exist."""
    if not isinstance(error, HTTPException):
        return await _fault(request, error)
    code = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "http_error")
    path = request.scope["path"][:128]
    message = f"{request.method} {path}: {str(error.detail).lower()}; expected one of the routes of /openapi.json"
    response = error_response(request.scope, ApiError(error.status_code, message, code=code))
    response.headers.update(error.headers or {})
    return response


async def _fault(request: Request, error: Exception) -> Response:
    return error_response(request.scope, internal_error())

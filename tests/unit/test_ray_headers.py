"""Headers that Ray Serve can decode, whatever was sent."""

from collections.abc import Iterable
from contextlib import suppress
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.utils import call_function_from_import_path

Headers = Iterable[tuple[bytes, bytes]]


def seen(headers: Headers) -> list[tuple[bytes, bytes]]:
    """What the application behind the middleware gets."""
    found: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        found.append(scope)

    [middleware] = call_function_from_import_path("serve_app.ray_headers:middlewares")
    call: Any = middleware.cls(app, *middleware.args, **middleware.kwargs)({"headers": headers}, None, None)
    with suppress(StopIteration):
        call.send(None)
    return found[0]["headers"]


@given(st.binary(max_size=8))
def test_every_value_is_utf8_and_those_that_were_are_unchanged(value: bytes):
    [(_, first), (name, second)] = seen([(b"a", b"x"), (b"b", value)])
    second.decode()
    assert (first, name) == (b"x", b"b")
    try:
        value.decode()
    except UnicodeDecodeError:
        assert second.decode().encode("latin-1") == value
    else:
        assert second == value

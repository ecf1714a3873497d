"""Who sends a request: API keys, and what each may do."""

import hashlib
import hmac
import math
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from serve_app.config import ApiKey
from serve_app.openai.errors import ApiError, bad_request, key_limited


class Caller:
    """Whoever has a key, or everybody where there are no keys.

    Args:
        key: its configuration; None for everybody.

    Attributes:
        name: of the key; empty for everybody.
        num_tokens: of all its prompts and outputs.
        num_refused: requests that its limits refused, by reason.
    """

    def __init__(self, key: ApiKey | None = None) -> None:
        self.name = self._cache = ""
        self._most_requests: int | None = None
        self._rate: RateLimit | None = None
        self._token_rate: RateLimit | None = None
        self._least_priority: int | None = None
        self._may_observe = True
        self._num_requests = 0
        self.num_tokens = 0
        self.num_refused = {"concurrent_requests": 0, "requests_per_minute": 0, "tokens_per_minute": 0}
        if key is not None:
            self.configure(key)

    def configure(self, key: ApiKey) -> None:
        """Go by this key from now on. What is open or used counts on, but for rates that are other ones."""
        self.name = key.name
        self._cache = "" if key.shares_prefix_cache else key.name
        self._most_requests = key.max_concurrent_requests
        self._least_priority = key.least_priority
        self._may_observe = key.may_observe
        self._rate = _rate(self._rate, key.requests_per_minute)
        self._token_rate = _rate(self._token_rate, key.tokens_per_minute)

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around a request, from its headers to the end of its response.

        Raises:
            ApiError: 429, the key's limits do not allow another one now.
        """
        if self._most_requests is not None and self._num_requests >= self._most_requests:
            self.num_refused["concurrent_requests"] += 1
            raise key_limited(f"the API key {self.name!r} has {self._num_requests} requests open, the most it may have")
        if self._rate is not None:
            if (wait_s := self._rate.wait_s(1)) > 0:
                self.num_refused["requests_per_minute"] += 1
                message = f"the API key {self.name!r} may send {self._rate.per_minute} requests a minute"
                raise key_limited(message, math.ceil(wait_s))
            self._rate.take(1)
        self._num_requests += 1
        try:
            yield
        finally:
            self._num_requests -= 1

    def check_observer(self) -> None:
        """Raise ApiError 403 if the key may not see what the service does for all."""
        if not self._may_observe:
            message = f"the API key {self.name!r} may not read this; set its may_observe, or use another key"
            raise ApiError(403, message, code="permission_denied")

    def check_priority(self, priority: int) -> None:
        """Raise ApiError 400 if the key may not have requests that are so urgent."""
        least = self._least_priority
        if least is not None and priority < least:
            message = f"priority is {priority}, expected at least {least}, the most urgent of the API key {self.name!r}"
            raise bad_request(message, "priority")

    def check_tokens(self, num_tokens: int) -> None:
        """Raise ApiError 429 if the key's limit does not allow a prompt of so many tokens now."""
        if self._token_rate is not None and (wait_s := self._token_rate.wait_s(num_tokens)) > 0:
            self.num_refused["tokens_per_minute"] += 1
            message = f"the API key {self.name!r} may use {self._token_rate.per_minute} tokens a minute"
            raise key_limited(message, math.ceil(wait_s))

    def take_tokens(self, num_tokens: int) -> None:
        """Count tokens of a prompt or an output. What goes beyond the limit is missing from the next minute's."""
        if self._token_rate is not None:
            self._token_rate.take(num_tokens)
        self.num_tokens += num_tokens

    def cache_salt(self, wanted: str) -> str:
        """The salt of this caller's prefix cache, inside of which a request may want a part of its own.

        No two callers with caches of their own can get the same salt: names of keys hold no slash.
        """
        return f"{self._cache}/{wanted}" if self._cache or wanted else ""


class RateLimit:
    """A token bucket: `per_minute` at once, and again as many within each minute."""

    def __init__(self, per_minute: int) -> None:
        self.per_minute = per_minute
        self._available = float(per_minute)
        self._updated = time.monotonic()

    def wait_s(self, number: int) -> float:
        """The seconds until so many can be had, 0 if they can now. More than there can ever be count as all of it."""
        now = time.monotonic()
        per_s = self.per_minute / 60
        self._available = min(float(self.per_minute), self._available + (now - self._updated) * per_s)
        self._updated = now
        return max(0.0, min(number, self.per_minute) - self._available) / per_s

    def take(self, number: int) -> None:
        """Take so many. What is not there has to come in before there is any again."""
        self._available -= number


def _rate(known: RateLimit | None, per_minute: int | None) -> RateLimit | None:
    """The known limit if it is of this rate, or a new one."""
    if per_minute is None:
        return None
    return known if known is not None and known.per_minute == per_minute else RateLimit(per_minute)


class ApiKeys:
    """The keys that may come in. Without any, everybody may.

    Args:
        keys: their configuration.
    """

    def __init__(self, keys: Iterable[ApiKey]) -> None:
        self._callers: list[tuple[bytes, Caller]] = []
        self._everybody = Caller()
        self.replace(keys)

    def replace(self, keys: Iterable[ApiKey]) -> None:
        """Let these come in from now on. Those of the same name keep what they have used of their limits."""
        known = {caller.name: caller for _, caller in self._callers}
        self._callers = []
        for key in keys:
            caller = known.get(key.name) or Caller()
            caller.configure(key)
            self._callers.append((bytes.fromhex(key.sha256), caller))

    @property
    def callers(self) -> list[Caller]:
        """The owners of all keys; without any keys, everybody."""
        return [caller for _, caller in self._callers] or [self._everybody]

    def caller(self, headers: Iterable[tuple[bytes, bytes]]) -> Caller:
        """The owner of the key in a request's headers: `Authorization: Bearer KEY`, or `X-Api-Key: KEY`.

        Takes equally long for whatever is presented: digests are compared, each with all.

        Raises:
            ApiError: 401, there is no key, or it is none of these.
        """
        if not self._callers:
            return self._everybody
        presented = _presented_key(headers)
        if presented is None:
            raise _unauthorized("there is no API key, expected `Authorization: Bearer KEY` or `X-Api-Key: KEY`")
        digest = hashlib.sha256(presented).digest()
        found = [caller for expected, caller in self._callers if hmac.compare_digest(expected, digest)]
        if not found:
            raise _unauthorized("the API key is not valid here")
        return found[0]


def _presented_key(headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
    """The key in the headers; None if there is none, or more than one in the same header."""
    found: dict[bytes, list[bytes]] = {b"authorization": [], b"x-api-key": []}
    for name, value in headers:
        if name.lower() in found:
            found[name.lower()].append(value)
    if any(len(values) > 1 for values in found.values()):
        return None
    for value in found[b"authorization"]:
        scheme, _, key = value.partition(b" ")
        if scheme.lower() == b"bearer" and key.strip():
            return key.strip()
    return next(iter(found[b"x-api-key"]), None)


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key")

"""Tokens per second and gaps between tokens through the whole service, with an engine that makes one token for every
request each 20 ms and takes no time: the step stream beside one stream for each request.

    python -m loadtest.bench_stream [--streams 64 256 512] [--tokens 300]

HAProxy, ingress, replica and this client share the machine. Target with 256 streams on 2 cores: ≥ 11,600 tok/s of the
ideal 12,800, and 99 % of the gaps ≤ 30 ms. And what the service adds to the time to first token when it is idle: all of
it, as such an engine answers at once. Target: ≤ 10 ms.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import msgspec
import yaml
from ray.serve import Application

from engine import async_engine
from engine.config import EngineConfig
from engine.llm_engine import LLMEngine
from engine.request import EngineRequest, FinishReason, RequestOutput
from serve_app import app, ingress, ray_private
from serve_app.config import ServiceConfig
from serve_app.engine_client import EngineClient
from serve_app.ingress import Ingress
from serve_app.replica import EngineReplica

STEP_S = 0.02
TEXT = "#"
"""Of every token. It is nowhere else in a response."""
PORT = 18124
PATHS = ("one stream for each request", "step stream")
START_TIMEOUT_S = 120.0


class PacedEngine(LLMEngine):
    """Makes a token for every request each STEP_S; of the model it only uses the tokenizer."""

    def __init__(self, config: EngineConfig, *args: Any) -> None:
        super().__init__(config, *args)
        self._token_ids = self.tokenizer.encode(TEXT)
        self._live: dict[str, tuple[EngineRequest, int]] = {}
        self._next_s = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self._live)

    def enqueue(self, source: EngineRequest, *_: object) -> None:
        self._live[source.request_id] = source, 0

    def abort(self, request_id: str) -> bool:
        return self._live.pop(request_id, None) is not None

    def step(self) -> list[RequestOutput]:
        self._next_s = max(self._next_s + STEP_S, time.monotonic())
        time.sleep(max(0.0, self._next_s - time.monotonic()))
        outputs = []
        for request_id, (source, num_made) in list(self._live.items()):
            is_last = num_made + 1 == source.params.max_tokens
            self._live[request_id] = source, num_made + 1
            if is_last:
                del self._live[request_id]
            finish_reason = FinishReason.LENGTH if is_last else None
            outputs.append(RequestOutput(request_id, self._token_ids, finish_reason=finish_reason))
        return outputs


class PacedReplica(EngineReplica.func_or_class):  # type: ignore[name-defined,misc]
    """EngineReplica on a PacedEngine, with a second way to get outputs."""

    async def __init__(self, config: EngineConfig, model_name: str) -> None:
        async_engine.LLMEngine = PacedEngine  # type: ignore[misc]
        await super().__init__(config, model_name)

    async def outputs(self, encoded: bytes) -> AsyncGenerator[bytes, None]:
        """A stream of one request."""
        request = msgspec.msgpack.decode(encoded, type=EngineRequest)
        async with aclosing(self._engine.generate(request)) as outputs:
            async for output in outputs:
                yield self._encoder.encode(output)


class PerRequestClient(EngineClient):
    """Gets outputs by one stream for each request."""

    def __init__(self, handle: Any, ingress_id: str, block_size: int) -> None:
        super().__init__(handle, ingress_id, block_size)
        self._outputs = ray_private.over_grpc(handle, "outputs", stream=True)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[RequestOutput, None]:
        async for encoded in ray_private.call(self._outputs, msgspec.msgpack.encode(request)):
            yield msgspec.msgpack.decode(encoded, type=RequestOutput)


class PerRequestIngress(Ingress.func_or_class):  # type: ignore[name-defined,misc]
    """Ingress with a PerRequestClient."""

    async def __init__(self, *args: Any) -> None:
        ingress.EngineClient = PerRequestClient  # type: ignore[misc]
        await super().__init__(*args)


def build_app(args: dict[str, Any]) -> Application:
    """The service, with a PacedReplica."""
    app.EngineReplica = EngineReplica.options(func_or_class=PacedReplica, max_ongoing_requests=8192)  # type: ignore[misc,attr-defined]
    front = PerRequestIngress if args["path"] == PATHS[0] else Ingress.func_or_class  # type: ignore[attr-defined]
    app.Ingress = Ingress.options(func_or_class=front, max_ongoing_requests=8192)  # type: ignore[misc,attr-defined]
    return app.build_app(ServiceConfig(**args["service"]))


@contextmanager
def service(path: str) -> Iterator[str]:
    """Start the service the way `make serve` does. Yields its URL."""
    engine = {"kv_cache_memory": "16MiB", "max_num_waiting": 4096, "num_threads": 1}
    application = {
        "name": "bench",
        "route_prefix": "/",
        "import_path": "loadtest.bench_stream:build_app",
        "args": {"path": path, "service": {"engine": engine, "slo": {"ttft_s": 60}}},  # none is refused
    }
    values = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": PORT},
        "logging_config": {"log_level": "WARNING", "enable_access_log": False},
        "applications": [application],
    }
    url = f"http://127.0.0.1:{PORT}"
    with tempfile.TemporaryDirectory(prefix="q3b-") as folder:
        config, log = Path(folder, "config.yaml"), Path(folder, "log")
        config.write_text(yaml.safe_dump(values))
        variables = {
            "RAY_SERVE_ENABLE_HA_PROXY": "1",
            "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
            "RAY_worker_niceness": "0",
            "RAY_TMPDIR": folder,
        }
        with log.open("wb") as output:
            process = subprocess.Popen(
                [Path(sys.executable).with_name("serve"), "run", config],
                env=os.environ | variables,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while not _is_ready(url):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the service did not start:\n{log.read_text()[-4000:]}")
                time.sleep(0.2)
            yield url
        finally:
            os.killpg(process.pid, signal.SIGINT)
            process.wait()


def _is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=2).status_code == 200
    except httpx.TransportError:
        return False


async def read(session: aiohttp.ClientSession, url: str, num_tokens: int) -> list[float]:
    """The times at which one stream's tokens came. Raises RuntimeError if not all of them did."""
    times: list[float] = []
    body = {
        "model": "demo",
        "prompt": "Hello",
        "max_tokens": num_tokens,
        "ignore_eos": True,
        "stream": True,
        "temperature": 0,
    }
    async with session.post(f"{url}/v1/completions", json=body) as response:
        async for chunk in response.content.iter_any():
            times += [time.perf_counter()] * chunk.count(TEXT.encode())
    if len(times) != num_tokens:
        raise RuntimeError(f"a stream had {len(times)} tokens (status {response.status}), expected {num_tokens}")
    return times


async def measure(url: str, num_streams: int, num_tokens: int) -> dict[str, float]:
    """Run streams side by side."""
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=600)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        start = time.perf_counter()
        streams = await asyncio.gather(*(read(session, url, num_tokens) for _ in range(num_streams)))
        elapsed_s = time.perf_counter() - start
    gaps = sorted(second - first for times in streams for first, second in pairwise(times))
    return {
        "streams": num_streams,
        "tokens_per_s": num_streams * num_tokens / elapsed_s,
        "ttft_p50_ms": statistics.median(times[0] - start for times in streams) * 1e3,
        "itl_p50_ms": gaps[len(gaps) // 2] * 1e3,
        "itl_p99_ms": gaps[len(gaps) * 99 // 100] * 1e3,
    }


async def measure_idle(url: str, num_requests: int = 100) -> float:
    """The median time to first token of requests that come one by one, in ms."""
    times = []
    async with aiohttp.ClientSession() as session:
        for _ in range(num_requests):
            await asyncio.sleep(2 * STEP_S)  # so that the engine owes nobody a pause
            start = time.perf_counter()
            times.append((await read(session, url, 1))[0] - start)
    return statistics.median(times) * 1e3


def main() -> None:
    """Print a line for each path and number of streams, for people, then for programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[64, 256, 512])
    parser.add_argument("--tokens", type=int, default=300, help="of each stream")
    options = parser.parse_args()
    for path in PATHS:
        with service(path) as url:
            asyncio.run(measure(url, max(options.streams), 50))  # warms up
            idle_ms = asyncio.run(measure_idle(url))
            print(f"{path:28} idle: TTFT p50 {idle_ms:.1f} ms")
            print(json.dumps({"path": path, "idle_ttft_p50_ms": idle_ms}), flush=True)
            for num_streams in options.streams:
                found = asyncio.run(measure(url, num_streams, options.tokens))
                print(
                    f"{path:28} {num_streams:4} streams: {found['tokens_per_s']:8,.0f} tok/s "
                    f"(ideal {num_streams / STEP_S:,.0f}), TTFT p50 {found['ttft_p50_ms']:.0f} ms, "
                    f"ITL p50 {found['itl_p50_ms']:.1f} ms, p99 {found['itl_p99_ms']:.1f} ms"
                )
                print(json.dumps({"path": path} | found), flush=True)


if __name__ == "__main__":
    main()

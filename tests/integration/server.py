"""The service as a user starts and stops it, on free ports and with all its traces in one temporary folder."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import yaml

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "cluster" / "config.yaml"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0
_MARK = "QWEN3_SERVE_TEST_ID"

MAKE_SERVE = ("make", "--silent", "--assume-old=.venv/ready", "serve", "CONFIG={}")
"""HAProxy and Ray Serve's fast path; set-up is taken for done."""
SERVE_RUN = (str(Path(sys.executable).with_name("serve")), "run", "{}")
"""Ray Serve's own HTTP proxy."""


class Server:
    """A running service; a context manager.

    Args:
        folder: where its configuration, log and Ray's files go. Short, as paths of sockets are.
        command: how to start it; `{}` stands for the configuration file.
        engine: changes to the engine's configuration.
        limits: changes to the service's limits.
        service: more of the service's configuration.

    Attributes:
        url: of the API, without /v1.
        log: all that it printed.
        config: its configuration file.
    """

    source = CONFIG
    """What its configuration is made from."""

    def __init__(
        self,
        folder: Path,
        command: tuple[str, ...],
        engine: dict[str, Any],
        limits: dict[str, Any] | None = None,
        service: dict[str, Any] | None = None,
    ) -> None:
        self._command = [part.format(folder / "config.yaml") for part in command]
        self._id = uuid4().hex
        self._ports = free_ports(5)
        self.url = f"http://127.0.0.1:{self._ports[0]}"
        self.log = folder / "serve.log"
        self.config = folder / "config.yaml"
        self.config.write_text(self._configuration(engine, limits or {}, service or {}))
        self._environment = self._variables(folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._cleanup = ExitStack()

    def __enter__(self) -> "Server":
        with ExitStack() as stack:
            log = stack.enter_context(self.log.open("wb"))
            stack.callback(self._stop)
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._wait_until_ready()
            self._cleanup = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._cleanup.close()

    @property
    def pid(self) -> int:
        """Of the command."""
        if self._process is None:
            raise RuntimeError("it does not run")
        return self._process.pid

    def driver(self) -> tuple[str, dict[str, str]]:
        """The address of its cluster, and the environment that a driver needs to connect there: that of the cluster."""
        for process in self.processes():
            path = Path(f"/proc/{process}")
            arguments = (path / "cmdline").read_text().split("\0")
            for argument in arguments:
                if arguments[0].endswith("raylet") and argument.startswith("--gcs-address="):
                    variables = (path / "environ").read_text().rstrip("\0").split("\0")
                    return argument.partition("=")[2], dict(line.split("=", 1) for line in variables)
        raise RuntimeError("no raylet runs")

    def processes(self) -> list[int]:
        """Ids of all processes that descend from the command and are still there."""
        mark = f"{_MARK}={self._id}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(int(path.parent.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it ended meanwhile, or is somebody else's
        return found

    def processes_named(self, name: str) -> list[int]:
        """Ids of those of its processes whose command line begins with a name, as Ray gives its actors."""
        return [
            each for each in self.processes() if Path(f"/proc/{each}/cmdline").read_text().startswith(f"ray::{name}")
        ]

    def listening(self) -> set[tuple[str, int]]:
        """Addresses and ports of every TCP socket that these processes listen on."""
        sockets = set()
        for process in self.processes():
            for path in Path(f"/proc/{process}/fd").glob("*"):
                try:
                    sockets.add(os.readlink(path))
                except (FileNotFoundError, ProcessLookupError, PermissionError):
                    continue
        return {(host, port) for host, port, inode in _listening_sockets() if f"socket:[{inode}]" in sockets}

    def deploy(self, user_config: dict[str, Any]) -> None:
        """Hand its configuration to the cluster again, with this for the ingress."""
        values = yaml.safe_load(self.config.read_text())
        values["applications"][0]["deployments"][0]["user_config"] = user_config
        changed = self.config.with_name("changed.yaml")
        changed.write_text(yaml.safe_dump(values))
        dashboard = re.search(r"http://127\.0\.0\.1:\d+", self.log.read_text())
        if dashboard is None:
            raise RuntimeError("the log does not tell the dashboard's address")
        command = [str(Path(sys.executable).with_name("serve")), "deploy", "--address", dashboard.group(), str(changed)]
        subprocess.run(command, env=self.driver()[1], check=True, capture_output=True, timeout=START_TIMEOUT_S)

    def interrupt(self) -> bool:
        """Press Ctrl-C. Returns whether the command ended by itself, and with it all it had started."""
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGINT)
        deadline = time.monotonic() + STOP_TIMEOUT_S
        while time.monotonic() < deadline:
            if (self._process is None or self._process.poll() is not None) and not self.processes():
                return True
            time.sleep(0.1)
        return False

    def _stop(self) -> None:
        self.interrupt()
        for process in self.processes():
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            if self._process is None or self._process.poll() is not None:
                raise RuntimeError(f"it ended early:\n{self.log.read_text()[-4000:]}")
            try:
                if httpx.get(f"{self.url}/health", timeout=2).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # nothing listens yet
            time.sleep(0.1)
        raise RuntimeError(f"not ready after {START_TIMEOUT_S:.0f} s:\n{self.log.read_text()[-4000:]}")

    def _configuration(self, engine: dict[str, Any], limits: dict[str, Any], service: dict[str, Any]) -> str:
        values = yaml.safe_load(self.source.read_text())
        values["http_options"]["port"] = self._ports[0]
        args = values["applications"][0]["args"]
        args["engine"] |= engine
        args["limits"] = args.get("limits", {}) | limits
        args |= service
        return yaml.safe_dump(values)

    def _variables(self, folder: Path) -> dict[str, str]:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return inherited | {
            _MARK: self._id,
            "PYTHONUNBUFFERED": "1",
            "RAY_TMPDIR": str(folder),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self._id * 2,
            "RAY_SERVE_HAPROXY_METRICS_PORT": str(self._ports[1]),
            "RAY_SERVE_HAPROXY_STATS_PORT": str(self._ports[2]),
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
            # While no ingress is ready HAProxy asks the proxy behind it: that of another service, if they share a port.
            "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(self._ports[3]),
            "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(self._ports[4]),
        }


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below those that the system gives to outgoing connections and takes back later."""
    taken = {port for _, port, _ in _listening_sockets()}
    return random.SystemRandom().sample([port for port in range(20_000, 29_000) if port not in taken], count)


def _listening_sockets() -> list[tuple[str, int, str]]:
    """Address, port and inode of every listening TCP socket of this machine."""
    found = []
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            address, port = fields[1].split(":")
            if fields[3] == "0A":
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.append((socket.inet_ntop(family, b"".join(words)), int(port, 16), fields[9]))
    return found


def known_by(server: Server, num_replicas: int) -> bool:
    """Whether both ingresses hear from so many replicas. A connection of its own may get to either."""
    heard: dict[str, int] = {}
    for _ in range(8):
        found = httpx.get(f"{server.url}/status", timeout=30).json()
        replicas = found["models"][0]["replicas"]
        heard[found["ingress"]] = sum(each["age_s"] is not None and each["age_s"] < 2 for each in replicas)
    return len(heard) == 2 and set(heard.values()) == {num_replicas}

"""A Prometheus that watches one running service, on loopback and in a folder of its own."""

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import yaml

FOLDER = Path(__file__).parent
RAY_AGENTS = "/tmp/ray/prom_metrics_service_discovery.json"
"""Where Ray writes the addresses of its agents, unless told otherwise."""
START_S = 30.0
STOP_S = 20.0


class Prometheus:
    """A context manager: runs inside of it.

    Args:
        folder: where its data and configuration go.
        port: of its own page and API, on loopback.
        service: address of the service, as in `127.0.0.1:8000`.
        api_key: with which it asks the service; None without keys.
        scrape_interval_s: seconds between scrapes, and between evaluations of rules.
        ray_agents: file with the addresses of Ray's agents.
        alertmanager: address of an Alertmanager; None: alerts stay here.
    """

    def __init__(
        self,
        folder: Path,
        port: int,
        service: str,
        api_key: str | None = None,
        scrape_interval_s: int = 1,
        ray_agents: str = RAY_AGENTS,
        alertmanager: str | None = None,
    ) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self._folder = folder
        values = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
        values["global"] = {"scrape_interval": f"{scrape_interval_s}s", "evaluation_interval": f"{scrape_interval_s}s"}
        values["rule_files"] = [str(FOLDER / "rules.yaml")]
        values["alerting"] = (
            {"alertmanagers": [{"static_configs": [{"targets": [alertmanager]}]}]} if alertmanager else {}
        )
        ours, ray = values["scrape_configs"]
        ours["static_configs"] = [{"targets": [service]}]
        if api_key is not None:
            ours["authorization"] = {"credentials": api_key}
        ray |= {"scrape_interval": f"{scrape_interval_s}s", "file_sd_configs": [{"files": [ray_agents]}]}
        self._config = folder / "prometheus.yml"
        self._config.write_text(yaml.safe_dump(values), encoding="utf-8")
        self._config.chmod(0o600)  # it may hold the key
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it.

        Raises:
            RuntimeError: there is no Prometheus on PATH, or it does not start.
        """
        program = shutil.which("prometheus")
        if program is None:
            raise RuntimeError(
                "prometheus is not on PATH, expected the package of that name: apt-get install prometheus"
            )
        log = self._folder / "prometheus.log"
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [
                    program,
                    f"--config.file={self._config}",
                    f"--storage.tsdb.path={self._folder / 'data'}",
                    f"--web.listen-address={self.url.removeprefix('http://')}",
                ],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self._stop()
                raise RuntimeError(f"Prometheus did not start: {log.read_text()[-2000:]}")
            time.sleep(0.1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._stop()

    def query(self, expression: str, at_s: float | None = None) -> list[dict[str, Any]]:
        """The series of an expression at one moment, now unless told, as Prometheus' API has them."""
        return self._ask("query", query=expression, time=time.time() if at_s is None else at_s)

    def query_range(self, expression: str, start_s: float, end_s: float, step_s: float) -> list[dict[str, Any]]:
        """The series of an expression over a time, as Prometheus' API has them.

        Raises:
            ValueError: the expression is wrong.
        """
        return self._ask("query_range", query=expression, start=start_s, end=end_s, step=step_s)

    def _ask(self, path: str, **arguments: object) -> list[dict[str, Any]]:
        address = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(arguments)}"
        try:
            with urllib.request.urlopen(address, timeout=30) as response:
                return json.load(response)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"Prometheus refuses {arguments['query']!r}: {json.load(error)['error']}") from None

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/-/ready", timeout=5) as response:
                return response.status == 200
        except OSError:
            return False

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

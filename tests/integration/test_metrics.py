"""Prometheus watches the service under load: every panel has data, and an alert reaches whoever is to be woken."""

import json
import random
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from cluster.grafana.__main__ import dashboards
from cluster.grafana.promql import resolve
from cluster.observe import page
from cluster.prometheus.server import Prometheus
from tests.integration.conftest import Engine
from tests.integration.server import Server, free_ports

ALERTMANAGER = shutil.which("prometheus-alertmanager") or shutil.which("alertmanager")
PATIENCE_S = 90.0
RATE_S = 10
"""Over which panels take rates here."""
NUM_CLIENTS = 16
"""More than run at once."""

pytestmark = [
    pytest.mark.skipif(not shutil.which("prometheus"), reason="prometheus is not on PATH"),
    pytest.mark.skipif(not ALERTMANAGER, reason="alertmanager is not on PATH"),
]


@pytest.fixture(scope="module")
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """An address for alerts, and the alerts that came."""
    arrived: list[dict[str, Any]] = []

    class Webhook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            arrived.extend(json.loads(self.rfile.read(int(self.headers["content-length"])))["alerts"])
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", free_ports(1)[0]), Webhook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", arrived
        server.shutdown()


@pytest.fixture(scope="module")
def alertmanager(webhook: tuple[str, list[dict[str, Any]]]) -> Iterator[str]:
    """The address of an Alertmanager that passes on what it gets at once."""
    folder = Path(tempfile.mkdtemp(prefix="q3a-"))
    address = f"127.0.0.1:{free_ports(1)[0]}"
    route = {"receiver": "test", "group_wait": "0s", "group_interval": "1s"}
    receivers = [{"name": "test", "webhook_configs": [{"url": webhook[0]}]}]
    (folder / "config.yml").write_text(yaml.safe_dump({"route": route, "receivers": receivers}))
    command = [
        str(ALERTMANAGER),
        f"--config.file={folder / 'config.yml'}",
        f"--storage.path={folder}",
        f"--web.listen-address={address}",
        "--cluster.listen-address=",
    ]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        yield address
        process.terminate()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def prometheus(server: Server, alertmanager: str) -> Iterator[Prometheus]:
    folder = Path(tempfile.mkdtemp(prefix="q3m-"))
    agents = str(server.config.parent / "ray" / "prom_metrics_service_discovery.json")
    address = server.url.removeprefix("http://")
    [port] = free_ports(1)
    with Prometheus(folder, port, address, ray_agents=agents, alertmanager=alertmanager) as running:
        yield running
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def load(server: Server, engine: Engine) -> Iterator[None]:
    """Streams again and again. Most begin alike and find that in the cache, until others that are long and all their
    own have driven it out. Some clients leave."""
    stop = threading.Event()

    def client(number: int) -> None:
        source = random.Random(number)
        body = {"model": "demo", "prompt": f"{number} " * 40, "max_tokens": 100, "ignore_eos": True, "stream": True}
        with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
            while not stop.is_set():
                if number % 4 == 0:
                    body |= {"prompt": " ".join(str(source.randrange(10**6)) for _ in range(300)), "max_tokens": 2}
                with http.stream("POST", "/v1/completions", json=body) as response:
                    for count, _ in enumerate(response.iter_lines()):
                        if stop.is_set() or (number % 8 == 1 and count > 40):
                            break

    with ThreadPoolExecutor(NUM_CLIENTS) as clients:
        running = [clients.submit(client, number) for number in range(NUM_CLIENTS)]
        yield
        stop.set()
        for each in running:
            each.result()
    engine.wait_until_free()


def wait_for(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.5)


@pytest.mark.usefixtures("load")
def test_every_query_of_every_panel_finds_something(prometheus: Prometheus):
    missing = {
        target["expr"]
        for board in dashboards().values()
        for each in board["panels"]
        for target in each.get("targets", ())
    }

    def all_found() -> bool:
        now = time.time()
        for expression in sorted(missing):
            series = prometheus.query_range(resolve(expression, RATE_S), now - 30, now, 1)
            if any(value != "NaN" for each in series for _, value in each["values"]):
                missing.discard(expression)
        return not missing

    wait_for(all_found, lambda: f"no data for {missing}")


@pytest.mark.usefixtures("load")
def test_a_missed_objective_wakes_somebody(webhook: tuple[str, list[dict[str, Any]]], prometheus: Prometheus):
    _, arrived = webhook
    wait_for(
        lambda: any(alert["labels"]["alertname"] == "Qwen3SloBurnsFast" for alert in arrived),
        lambda: (arrived, prometheus.query("qwen3:slo_error_ratio:rate1h"), prometheus.query("ALERTS")),
    )
    [alert] = [alert for alert in arrived if alert["labels"]["alertname"] == "Qwen3SloBurnsFast"][:1]
    assert alert["status"] == "firing" and alert["labels"]["model_name"] == "demo"
    assert "missed the objective" in alert["annotations"]["summary"]


def test_what_prometheus_takes_in_counts_once(prometheus: Prometheus):
    """Our metrics come from /metrics alone, and of the agents' only those that are nowhere else."""
    series = prometheus.query('{__name__=~"qwen3_.*"}')
    assert {each["metric"]["job"] for each in series if "autoscaler" not in each["metric"]["__name__"]} == {
        "qwen3-serve"
    }
    assert {each["metric"]["job"] for each in series if "autoscaler" in each["metric"]["__name__"]} == {"ray"}
    assert prometheus.query('{__name__=~"ray_qwen3_.*"}') == []
    assert prometheus.query("ray_serve_deployment_replica_healthy") != []


def test_rays_agents_tell_all_of_it_too(server: Server):
    """Under their own prefix."""
    found = json.loads((server.config.parent / "ray" / "prom_metrics_service_discovery.json").read_text())
    own = set(re.findall(r"^(qwen3_\w+){", httpx.get(f"{server.url}/metrics", timeout=60).text, re.MULTILINE))
    own.remove("qwen3_process_metrics_age_seconds")

    def missing() -> set[str]:
        texts = [httpx.get(f"http://{target}/metrics", timeout=30).text for target in found[0]["targets"][:1]]
        return own - set(re.findall(r"^ray_(qwen3_\w+){", "".join(texts), re.MULTILINE))

    wait_for(lambda: not missing(), missing)


def test_the_page_of_panels_has_them_all(prometheus: Prometheus):
    text = page(prometheus, period_s=60, interval_s=RATE_S)
    panels = [each for board in dashboards().values() for each in board["panels"] if each["type"] != "row"]
    pictures = [each for each in panels if each["type"] in ("timeseries", "heatmap")]
    assert text.count("<figure>") == len(panels) and text.count("data:image/png") == len(pictures)
    assert "<script" not in text

"""Two replicas behind two ingresses: requests with a shared prefix go where it is cached, and both do their part."""

import random
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.integration.server import MAKE_SERVE, Server, known_by

ENGINE = {"kv_cache_memory": "64MiB", "max_num_seqs": 8, "num_threads": 1}
BLOCK = 16
NUM_PREFIXES = 12
PATIENCE_S = 60.0


class PairServer(Server):
    """Two of everything, for good."""

    def _configuration(self, *changes: dict[str, Any]) -> str:
        values = yaml.safe_load(super()._configuration(*changes))
        for deployment in values["applications"][0]["deployments"]:
            deployment.pop("autoscaling_config", None)
            deployment["num_replicas"] = 2
            deployment["ray_actor_options"] = {"num_cpus": 0.2}
        return yaml.safe_dump(values)


@pytest.fixture(scope="module")
def pair() -> Iterator[Server]:
    folder = Path(tempfile.mkdtemp(prefix="q3p-"))
    with PairServer(folder, MAKE_SERVE, ENGINE) as running:
        deadline = time.monotonic() + PATIENCE_S
        while not known_by(running, 2):
            assert time.monotonic() < deadline, "not both ingresses hear from both replicas"
            time.sleep(0.1)
        yield running
    shutil.rmtree(folder)


def complete(url: str, prompt: str) -> dict[str, int]:
    """Usage of a short completion, on a connection of its own: either ingress may get it."""
    body = {"model": "demo", "prompt": prompt, "max_tokens": 2, "temperature": 0}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S)
    answer.raise_for_status()
    usage = answer.json()["usage"]
    return {"prompt": usage["prompt_tokens"], "cached": usage["prompt_tokens_details"]["cached_tokens"]}


def counter(url: str, name: str) -> list[float]:
    """The samples of a metric, one for each process."""
    text = httpx.get(f"{url}/metrics", timeout=30).text
    found = re.findall(rf"^qwen3_{name}(?:{{[^}}]*}})? (\S+)$", text, re.MULTILINE)
    return [float(value) for value in found]


def test_shared_prefixes_are_found_again_by_either_ingress(pair: Server):
    source = random.Random(0)
    prefixes = [" ".join(f"{source.randrange(10**6)}" for _ in range(60)) for _ in range(NUM_PREFIXES)]
    with ThreadPoolExecutor(NUM_PREFIXES) as clients:  # all at once, which is too much for one replica
        list(clients.map(partial(complete, pair.url), [f"{prefix} first" for prefix in prefixes]))
    time.sleep(2)  # until both ingresses know
    asked = [f"{prefix} {turn}" for turn in ("second", "third", "fourth") for prefix in prefixes]
    with ThreadPoolExecutor(4) as clients:
        found = list(clients.map(partial(complete, pair.url), asked))
    # All but the last blocks, which the words at the end are in. By chance seven in ten would be found.
    assert sum(usage["cached"] >= usage["prompt"] - 3 * BLOCK for usage in found) >= 0.9 * len(found), found
    shares = counter(pair.url, "prefix_cache_hits_total")
    assert len(shares) == 2 and min(shares) > 0, "one replica did all the work"
    predicted = sum(counter(pair.url, "router_predicted_cached_tokens_total"))
    assert predicted == pytest.approx(sum(counter(pair.url, "router_cached_tokens_total")), rel=0.1)


def test_a_hot_prefix_is_served_by_all(pair: Server):
    source = random.Random(1)
    prefix = " ".join(f"{source.randrange(10**6)}" for _ in range(60))
    before = counter(pair.url, "generation_tokens_total")
    tails = [" ".join(f"{source.randrange(10**6)}" for _ in range(100)) for _ in range(48)]
    with ThreadPoolExecutor(24) as clients:
        found = list(clients.map(partial(complete, pair.url), [f"{prefix} {tail}" for tail in tails]))
    after = counter(pair.url, "generation_tokens_total")
    made = [now - earlier for earlier, now in zip(before, after, strict=True)]
    assert len(made) == 2 and min(made) >= 0.2 * sum(made), made
    assert sum(usage["cached"] > 0 for usage in found) >= len(found) / 2, found


def test_either_ingress_tells_the_metrics_of_all_and_each_request_counts_once(pair: Server):
    names = ("requests_total", "request_success_total", "engine_requests_total", "generation_tokens_total")
    before = [sum(counter(pair.url, name)) for name in names]
    for number in range(8):
        complete(pair.url, f"number {number}")
    for _ in range(6):  # on a connection each
        requests, outputs, ends, tokens = (
            sum(counter(pair.url, name)) - earlier for name, earlier in zip(names, before, strict=True)
        )
        assert requests == outputs == ends == 8 and 8 <= tokens <= 16
    assert len(counter(pair.url, "requests_open")) == len(counter(pair.url, "num_requests_running")) == 2

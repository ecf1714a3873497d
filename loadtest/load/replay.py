r"""Open-loop replay of a public trace: requests are sent when the trace says, however slow the answers are.

    locust --locustfile loadtest/load/replay.py --headless --host URL \
        --trace AzureLLMInferenceTrace_conv.csv --take-s 300 --speed 2 --length 0.03125
"""

import argparse
from pathlib import Path
from typing import Any

import gevent
from gevent.pool import Group
from locust import User, constant, events, task
from locust.env import Environment
from locust.exception import StopUser

from loadtest.load.recorder import Recorder, add_options, finish, told_plainly
from loadtest.load.results import Phase
from loadtest.load.traces import Arrival, Scaling, prompt_of, read_trace, scaled


@events.init_command_line_parser.add_listener
def _options(parser: argparse.ArgumentParser) -> None:
    add_options(parser)
    group = parser.add_argument_group("replay")
    group.add_argument("--trace", type=Path, help="Azure's .csv or Mooncake's .jsonl")
    group.add_argument("--speed", type=float, default=1.0, help="seconds of the trace in a second")
    group.add_argument("--length", type=float, default=1.0, help="factor of prompts' and answers' lengths")
    group.add_argument("--most-input-tokens", type=int, default=2**31, help="longer prompts are cut")
    group.add_argument("--most-output-tokens", type=int, default=2**31, help="longer answers are cut")
    group.add_argument("--skip-s", type=float, default=0.0, help="where in the trace to begin")
    group.add_argument("--take-s", type=float, default=float("inf"), help="how much of the trace to replay")


@events.init.add_listener
def _begin(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    with told_plainly():
        requests = _requests(options)
        # Made before the clock starts, so that making them delays no request.
        TraceReplay.requests = [(each, prompt_of(each, options.length, i)) for i, each in enumerate(requests)]
        environment.recorder = Recorder(environment, "replay", [Phase("replay", 0.0, float("inf"), users=0)])
        TraceReplay.model = environment.recorder.client.model()
    environment.events.quitting.add_listener(finish)


def _requests(options: argparse.Namespace) -> list[Arrival]:
    if options.trace is None:
        raise ValueError("--trace is missing: give a .csv of Azure's or a .jsonl of Mooncake's")
    scaling = Scaling(
        options.speed,
        options.length,
        options.most_input_tokens,
        options.most_output_tokens,
        options.skip_s,
        options.take_s,
    )
    found = scaled(read_trace(options.trace), scaling)
    if not found:
        raise ValueError(f"{options.trace} has no request after --skip-s {options.skip_s} within {options.take_s} s")
    return found


class TraceReplay(User):
    """One dispatcher; each request has a greenlet of its own."""

    fixed_count = 1
    wait_time = constant(0)
    model = ""
    requests: list[tuple[Arrival, list[int]]] = []  # noqa: RUF012  # set when a test starts

    @task
    def replay(self) -> None:
        """The whole trace, and then the test's end."""
        recorder: Recorder = self.environment.recorder
        begin = recorder.client.now()
        requests = Group()
        for arrival, prompt in self.requests:
            scheduled_s = begin + arrival.at_s
            gevent.sleep(max(0.0, scheduled_s - recorder.client.now()))
            requests.spawn(self._send, arrival, prompt, scheduled_s)
        requests.join()
        recorder.phases = [Phase("replay", begin, recorder.client.now(), users=0)]
        gevent.spawn(self.environment.runner.quit)
        raise StopUser

    def _send(self, arrival: Arrival, prompt: list[int], scheduled_s: float) -> None:
        body = {"model": self.model, "prompt": prompt, "max_tokens": arrival.output_tokens, "ignore_eos": True}
        recorder: Recorder = self.environment.recorder
        recorder.client.send("/v1/completions", body, scheduled_s=scheduled_s)

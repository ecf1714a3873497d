"""Locust users that chat.

    locust --locustfile loadtest/load/chat.py --headless --host URL --users 8 --run-time 60s --shape steady

Each asks, reads the stream, thinks, and asks again with what was said so far. Some leave in the middle of an answer.
"""

import argparse
import random
from typing import Any

import gevent
from locust import LoadTestShape, User, events, task
from locust.env import Environment

from loadtest.load.conversations import Conversation, system_prompts
from loadtest.load.phases import SHAPES, plan
from loadtest.load.recorder import Recorder, add_options, finish, told_plainly
from loadtest.load.samples import Outcome

DEFAULT_RUN_TIME_S = 60
MOST_BACKOFF_S = 10.0


@events.init_command_line_parser.add_listener
def _options(parser: argparse.ArgumentParser) -> None:
    add_options(parser)
    group = parser.add_argument_group("chat")
    group.add_argument("--shape", choices=SHAPES, default="steady", help="how many users there are when")
    group.add_argument("--turns", type=int, default=4, help="questions in a conversation")
    group.add_argument("--think-s", type=float, default=1.0, help="mean time from an answer to the next question")
    group.add_argument("--cancel", type=float, default=0.1, help="share of requests that are left early")
    group.add_argument("--shared-prefixes", type=int, default=4, help="system prompts that conversations begin with")
    group.add_argument("--prefix-words", type=int, default=100, help="words in each of them")
    group.add_argument("--max-tokens", type=int, default=64, help="most tokens of an answer")
    group.add_argument("--seed", type=int, default=0, help="of all that is chosen at random")


@events.init.add_listener
def _begin(environment: Environment, **_: Any) -> None:
    options = environment.parsed_options
    phases = plan(options.shape, options.num_users or 1, options.run_time or DEFAULT_RUN_TIME_S)
    with told_plainly():
        environment.recorder = Recorder(environment, options.shape, phases)
        ChatUser.model = environment.recorder.client.model()
    ChatUser.prompts = system_prompts(options.shared_prefixes, options.prefix_words, options.seed)
    environment.events.quitting.add_listener(finish)


class Users(LoadTestShape):
    """As many as the phase wants. A ramp ends early, when two steps in a row have missed the SLO."""

    use_common_options = True

    def tick(self) -> tuple[int, float] | None:
        """The users there should be, and how many may start in a second; None at the end."""
        environment = self.runner.environment
        recorder: Recorder = environment.recorder
        now = recorder.client.now()
        if recorder.kind == "ramp":
            ended = recorder.phase_summaries(before_s=now)[-2:]
            if len(ended) == 2 and all(e["slo_attainment"] < environment.parsed_options.attainment for e in ended):
                recorder.is_over = True
                return None
        users = next((phase.users for phase in recorder.phases if phase.start_s <= now < phase.end_s), None)
        if users is None:
            recorder.is_over = True
        return None if users is None else (users, users)


class ChatUser(User):
    """Holds one conversation after the other."""

    model = ""
    prompts: list[str] = []  # noqa: RUF012  # set when a test starts
    num_started = 0

    def on_start(self) -> None:
        """Begin the first conversation."""
        self._settings = self.environment.parsed_options
        self._choose = random.Random(f"user {self._settings.seed} {ChatUser.num_started}")
        ChatUser.num_started += 1
        self._conversation = Conversation(self.prompts, self._choose)

    def wait_time(self) -> float:
        """Thinking."""
        return self._choose.expovariate(1 / self._settings.think_s) if self._settings.think_s > 0 else 0.0

    @task
    def ask(self) -> None:
        """One turn."""
        settings, recorder = self._settings, self.environment.recorder
        if recorder.is_over:
            return  # Locust is about to stop this user, and would cut the request
        if self._conversation.num_turns >= settings.turns:
            self._conversation = Conversation(self.prompts, self._choose)
        leaves = self._choose.random() < settings.cancel
        body = {"model": self.model, "messages": self._conversation.ask(), "max_tokens": settings.max_tokens}
        sample, text, retry_after_s = recorder.client.send(
            "/v1/chat/completions",
            body,
            most_chunks=self._choose.randint(1, max(1, settings.max_tokens // 4)) if leaves else None,
            users=self.environment.runner.user_count,
        )
        if sample.outcome is Outcome.COMPLETED:
            self._conversation.hear(text)
        else:
            self._conversation = Conversation(self.prompts, self._choose)
            gevent.sleep(min(retry_after_s, MOST_BACKOFF_S))

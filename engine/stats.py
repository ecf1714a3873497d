"""EngineStats: an engine's load and running totals, and what it takes to keep them. No torch here."""

import math
from dataclasses import dataclass, field
from enum import StrEnum

import msgspec

from engine.request import FinishReason

PREFILL_MEMORY_S = 5.0
"""Seconds of computing prompts over which their rate is averaged."""


class WaitingFor(StrEnum):
    """Why the first waiting request was not admitted."""

    TOKENS = "tokens"
    """The step was full (`max_num_batched_tokens`)."""
    SEQS = "seqs"
    """As many requests run as may (`max_num_seqs`)."""
    BLOCKS = "blocks"
    """There are too few KV blocks for it, or will be before the running requests end."""
    ADAPTERS = "adapters"
    """Running requests use as many other adapters as may be (`max_loras`)."""


class EngineStats(msgspec.Struct, frozen=True):
    """Load and running totals of an engine."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    """Tokens of waiting requests still to be computed, prefix cache not considered."""
    num_prefill_tokens: int
    """Prompt tokens that running requests have still to compute; of preempted ones, what they had made too."""
    waiting_for: WaitingFor | None
    """What the first waiting request lacked in the last step; None if nobody waits."""
    num_blocks: int
    num_free_blocks: int
    num_cached_blocks: int
    num_owned_blocks: int
    num_steps: int
    num_preemptions: int
    num_finished: dict[FinishReason, int]
    """Requests that ended, by reason; every reason is there."""
    num_prompt_tokens: int
    """Tokens that requests came with: prompts, and what continued ones had produced elsewhere."""
    num_cached_prompt_tokens: int
    num_generated_tokens: int
    num_guessed_tokens: int
    """Tokens that were guessed and verified, see engine.speculation ..."""
    num_right_guesses: int
    """... and those of them that were right."""
    prefill_tokens_per_s: float
    """Rate at which prompts are computed, averaged over the last seconds that computed any; 0 until known."""
    step_s: float
    """Duration of the last step."""
    schedule_s: float
    """Seconds spent since start on choosing who runs, ..."""
    launch_s: float
    """... building batches and launching them; on a CPU the model runs in this time, ..."""
    wait_s: float
    """... waiting for the device and reading what it sampled, ..."""
    update_s: float
    """... and taking in the outcome."""


@dataclass(slots=True)
class SchedulerCounters:
    """Running totals since start."""

    num_preemptions: int = 0
    num_prompt_tokens: int = 0
    num_cached_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_guessed_tokens: int = 0
    num_right_guesses: int = 0
    num_finished: dict[FinishReason, int] = field(default_factory=lambda: dict.fromkeys(FinishReason, 0))


@dataclass(slots=True)
class StageSeconds:
    """Seconds since start in each stage of a step, see EngineStats."""

    schedule: float = 0.0
    launch: float = 0.0
    wait: float = 0.0
    update: float = 0.0


class PrefillRate:
    """Tokens per second at which steps with prompts compute them.

    A step counts by its prompt tokens, and less the more time was spent on prompts since. A few tokens beside many
    decoding requests say little about how fast prompts are, and so weigh little.
    """

    def __init__(self) -> None:
        self._num_tokens = 0.0
        self._rates = 0.0
        """Of each step the rate times the tokens."""

    def add(self, num_tokens: int, seconds: float) -> None:
        """Note that a step of `seconds` > 0 computed `num_tokens` > 0 of prompts."""
        decay = math.exp(-seconds / PREFILL_MEMORY_S)
        self._num_tokens = self._num_tokens * decay + num_tokens
        self._rates = self._rates * decay + num_tokens * num_tokens / seconds

    @property
    def tokens_per_s(self) -> float:
        """0 before the first step."""
        return self._rates / self._num_tokens if self._num_tokens else 0.0

"""What a caller asks for, what the engine keeps about it while it runs, and what it reports back. No torch here."""

import math
import random
import time
from collections.abc import Sequence
from enum import StrEnum

import msgspec

from engine.errors import RequestError
from engine.grammar import GrammarState
from engine.lora.handle import AdapterHandle

MAX_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 128
MAX_BAD_WORD_TOKENS = 4096


class ThinkingBudget(msgspec.Struct, frozen=True, kw_only=True):
    """How long a model may think: a block of reasoning that goes on for too long is closed for it."""

    num_tokens: int
    """A block that is open after so many output tokens is closed."""
    closing_ids: tuple[int, ...]
    """The tokens that are then put out, whatever else the parameters say."""
    opening_id: int
    """The token that opens a block."""
    closing_id: int
    """The token that closes it."""
    is_open: bool
    """Whether the prompt ends within a block."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How to choose the next token, and when to stop. Names and meanings follow vLLM.

    Raises:
        RequestError: a value is out of range; `param` names it.
    """

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose mass reaches top_p; applied after top_k."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the likeliest."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens in prompt or output (CTRL, arXiv:1909.05858)."""
    presence_penalty: float = 0.0
    """Subtract from the logit of every token that is in the output."""
    frequency_penalty: float = 0.0
    """Subtract from the logit of a token, for each time it is in the output."""
    logit_bias: dict[int, float] = {}
    """Added to the logits of these token ids."""
    allowed_token_ids: tuple[int, ...] | None = None
    """No other id is possible; None allows all."""
    bad_word_ids: tuple[tuple[int, ...], ...] = ()
    """Sequences of ids, each of a word: where the output ends with all but its last id, that one is not chosen as long
    as any other is possible. `engine.bad_words` makes them from text."""
    seed: int | None = None
    """Same seed, prompt and parameters: same tokens. None draws one."""
    max_tokens: int | None = 16
    """Most tokens to generate; None goes on to the end of the context."""
    min_tokens: int = 0
    """End-of-sequence and stop tokens are impossible before so many tokens, and no text among them is a `stop`."""
    stop: tuple[str, ...] = ()
    """Texts that end the output; not part of it. Applied by whoever turns ids into text."""
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the output, besides the model's own end-of-sequence ids."""
    ignore_eos: bool = False
    """Go on past the model's own end-of-sequence ids."""
    grammar: str | None = None
    """What the output must be, see `engine.grammar`. It ends where nothing may follow, whatever `min_tokens` and
    `ignore_eos` say; an end-of-sequence id is possible only where it may end."""
    thinking: ThinkingBudget | None = None
    """None lets the model think as long as it likes."""
    logprobs: int | None = None
    """Report the log-probability of every output token, and of this many likeliest ones beside it."""
    logprob_token_ids: tuple[int, ...] = ()
    """Report the log-probabilities of these ids instead of the likeliest ones; needs `logprobs`."""
    prompt_logprobs: int | None = None
    """As `logprobs`, for every prompt token but the first, which has none."""

    def __post_init__(self) -> None:
        for name, low, high in _FLOAT_RANGES:
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= high):
                raise RequestError(f"{name} is {value}, expected {low} to {high}", name)
        for name, least, most in _INT_RANGES:
            count = getattr(self, name)
            if count is not None and not least <= count <= most:
                raise RequestError(f"{name} is {count}, expected {least} to {most}", name)
        if self.top_p == 0:
            raise RequestError("top_p is 0, expected more than 0 and at most 1", "top_p")
        if self.repetition_penalty == 0:
            raise RequestError("repetition_penalty is 0, expected more than 0", "repetition_penalty")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(f"min_tokens is {self.min_tokens}, expected at most {self.max_tokens}", "min_tokens")
        if any(not text for text in self.stop):
            raise RequestError("stop has an empty string, expected non-empty ones", "stop")
        self._check_token_lists()

    def _check_token_lists(self) -> None:
        for token_id, bias in self.logit_bias.items():
            if not (math.isfinite(bias) and -100 <= bias <= 100):
                raise RequestError(f"logit_bias[{token_id}] is {bias}, expected -100 to 100", "logit_bias")
        if self.thinking is not None and (self.thinking.num_tokens < 0 or not self.thinking.closing_ids):
            raise RequestError(f"thinking is {self.thinking}, expected 0 tokens or more and closing ids", "thinking")
        if self.allowed_token_ids == ():
            raise RequestError("allowed_token_ids is empty, expected at least one id", "allowed_token_ids")
        if self.logprob_token_ids and self.logprobs is None:
            raise RequestError("logprob_token_ids is set, expected logprobs beside it", "logprob_token_ids")
        count = len(self.logprob_token_ids)
        if count > MAX_LOGPROB_TOKEN_IDS:
            raise RequestError(
                f"logprob_token_ids has {count} ids, expected at most {MAX_LOGPROB_TOKEN_IDS}", "logprob_token_ids"
            )
        if () in self.bad_word_ids:
            raise RequestError("bad_words has a word without tokens, expected at least one in each", "bad_words")
        count = sum(map(len, self.bad_word_ids))
        if count > MAX_BAD_WORD_TOKENS:
            raise RequestError(f"bad_words has {count} tokens, expected at most {MAX_BAD_WORD_TOKENS}", "bad_words")


_FLOAT_RANGES = (
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.0, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
)
_INT_RANGES = (
    ("top_k", -1, 2**31 - 1),
    ("seed", -(2**63), 2**64 - 1),
    ("max_tokens", 1, 2**31 - 1),
    ("min_tokens", 0, 2**31 - 1),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
)


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request as it crosses a process boundary: token ids in, never text."""

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    priority: int = 0
    """Lower runs first; equal ones run in the order they arrived."""
    cache_salt: str = ""
    """Prefix-cache blocks are shared only between requests with the same salt."""
    adapter: str = ""
    """Name of a LoRA adapter; empty: the model as it is."""
    output_token_ids: list[int] = []
    """What the request has produced already, on an engine with the same model: this one goes on after it as if it had
    made it. Whatever counts or looks at output tokens includes these; outputs have the new ones only. Sampled tokens
    are the same as without the change if `params.seed` is set. `params.prompt_logprobs` must be None: they were told
    with the first token."""


class RequestStatus(StrEnum):
    """Where a request is in its life."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    FINISHED = "finished"


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


class TokenLogprobs(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities at one position, of the model's own distribution before penalties and temperature."""

    token_id: int
    logprob: float
    rank: int
    """1 for the likeliest token."""
    top_token_ids: list[int]
    """The likeliest, in order; or those of `SamplingParams.logprob_token_ids`."""
    top_logprobs: list[float]


class RequestTimings(msgspec.Struct, frozen=True, array_like=True):
    """Where the time to a request's first token went, by the engine's own clock."""

    queue_s: float
    """From its arrival in the engine to its first step."""
    prefill_s: float
    """From its first step to its first token; times of preemption included."""


class RequestOutput(msgspec.Struct, frozen=True, array_like=True):
    """What one engine step produced for one request."""

    request_id: str
    token_ids: list[int]
    """New tokens of this step, in order."""
    logprobs: list[TokenLogprobs] | None = None
    """One for each new token, if asked for."""
    prompt_logprobs: list[TokenLogprobs] | None = None
    """One for each prompt token but the first; comes once, with the first new token."""
    finish_reason: FinishReason | None = None
    """Set on the last output of a request."""
    stop_token_id: int | None = None
    """The token that ended a request whose reason is `stop`."""
    error: str | None = None
    """Why, when the reason is `error`."""
    num_cached_tokens: int = 0
    """Prompt tokens whose keys and values came from the prefix cache."""
    error_param: str | None = None
    """The parameter that is to blame for the error, if the request is."""
    timings: RequestTimings | None = None
    """Comes once, with the first new token."""


class RequestState(msgspec.Struct, frozen=True):
    """A snapshot of one request, for operators and tests. Times are `time.monotonic()` seconds."""

    request_id: str
    status: RequestStatus
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    num_output_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    num_blocks: int
    num_preemptions: int
    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finish_time: float | None


def prefix_salt(cache_salt: str, adapter: str) -> str:
    """What keys of the prefix cache begin with: other adapters make other keys and values of the same tokens.

    No two pairs give the same, whatever a client chooses as its salt.
    """
    return f"\0{adapter}\0{cache_salt}" if adapter or cache_salt.startswith("\0") else cache_salt


class Request:
    """One request inside the engine.

    `token_ids` is the prompt followed by the output; `num_pending_tokens` more (0 or 1) are being sampled by a
    step that has been launched. Keys and values of the first `num_computed_tokens` are in the cache, or will be when
    that step is done, in the blocks of `block_table`. `block_keys[i]` is the prefix-cache key of the i-th full block;
    keys are made once and kept across preemption.
    """

    __slots__ = (
        "request_id", "params", "priority", "cache_salt", "seed", "token_ids", "num_prompt_tokens", "max_num_tokens",
        "stop_token_ids", "num_pending_tokens", "num_computed_tokens", "block_table", "block_keys",
        "num_shared_blocks", "slot", "num_cached_tokens", "num_preemptions", "running", "finish_reason",
        "stop_token_id", "error", "prompt_logprobs", "arrival_time", "arrival_index", "first_scheduled_time",
        "first_token_time", "finish_time", "grammar", "adapter", "adapter_place",
    )  # fmt: skip

    def __init__(
        self,
        source: EngineRequest,
        eos_token_ids: Sequence[int],
        max_model_len: int,
        grammar: GrammarState | None = None,
        adapter: AdapterHandle | None = None,
    ) -> None:
        params = source.params
        self.request_id = source.request_id
        self.params = params
        self.priority = source.priority
        self.cache_salt = prefix_salt(source.cache_salt, adapter.salt_name if adapter is not None else "")
        self.seed = random.getrandbits(64) if params.seed is None else params.seed % 2**64
        self.token_ids = list(source.prompt_token_ids)
        self.num_prompt_tokens = len(self.token_ids)
        self.token_ids += source.output_token_ids
        room = max_model_len - self.num_prompt_tokens
        self.max_num_tokens = self.num_prompt_tokens + min(room, params.max_tokens or room)
        own = () if params.ignore_eos else eos_token_ids
        self.stop_token_ids = frozenset(params.stop_token_ids).union(own)
        self.num_pending_tokens = 0
        self.num_computed_tokens = 0
        self.block_table: list[int] = []
        self.block_keys: list[bytes] = []
        self.num_shared_blocks = 0
        """Blocks of `block_table` that other requests owned already when this one was admitted."""
        self.slot = -1
        """Row of this request in the batch tables while it runs, else -1."""
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.running = False
        self.finish_reason: FinishReason | None = None
        self.stop_token_id: int | None = None
        self.error: str | None = None
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if params.prompt_logprobs is not None else None
        self.arrival_time = time.monotonic()
        self.arrival_index = 0
        self.first_scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.finish_time: float | None = None
        self.grammar = grammar
        """Where the output is in its grammar. Knows the output in `token_ids`, not the pending token."""
        self.adapter = adapter
        self.adapter_place = 0
        """Where its adapter is on the device while it runs; 0: it has none."""

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether prompt log-probabilities are still to be made: such a prompt is computed, never looked up."""
        return self.prompt_logprobs is not None and len(self.prompt_logprobs) < self.num_prompt_tokens - 1

    @property
    def status(self) -> RequestStatus:
        if self.finish_reason is not None:
            return RequestStatus.FINISHED
        if not self.running:
            return RequestStatus.WAITING
        return RequestStatus.DECODE if self.num_computed_tokens >= self.num_prompt_tokens else RequestStatus.PREFILL

    def timings(self) -> RequestTimings | None:
        """None before the first token."""
        if self.first_scheduled_time is None or self.first_token_time is None:
            return None
        return RequestTimings(
            queue_s=self.first_scheduled_time - self.arrival_time,
            prefill_s=self.first_token_time - self.first_scheduled_time,
        )

    def finish(self, reason: FinishReason, error: str | None = None) -> None:
        """Mark as ended; whoever holds blocks and slot releases them."""
        self.finish_reason = reason
        self.error = error
        self.finish_time = time.monotonic()

    def state(self) -> RequestState:
        return RequestState(
            request_id=self.request_id,
            status=self.status,
            finish_reason=self.finish_reason,
            num_prompt_tokens=self.num_prompt_tokens,
            num_output_tokens=self.num_output_tokens,
            num_computed_tokens=self.num_computed_tokens,
            num_cached_tokens=self.num_cached_tokens,
            num_blocks=len(self.block_table),
            num_preemptions=self.num_preemptions,
            arrival_time=self.arrival_time,
            first_scheduled_time=self.first_scheduled_time,
            first_token_time=self.first_token_time,
            finish_time=self.finish_time,
        )

"""Grammars that hold an output to a form: compiled once, then followed token by token, with a mask for each next one.

llguidance does the work (https://github.com/guidance-ai/llguidance). A grammar is text in its dialect of Lark, or JSON
of the form `{"grammars": [...]}`; `json_schema_grammar` and its siblings make such text. The package is imported where
a grammar is first asked for, as an engine that gets none can do without.
"""

import json
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.errors import RequestError

MAX_COMPILED = 256
"""How many compiled grammars an engine remembers."""
NUM_PROBE_TOKENS = 4
PARSER_LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 200_000,  # about 0.1 s for the first mask, made when a grammar is compiled
    "step_lexer_fuel": 200_000,  # about 15 ms for any later one, and
    "step_max_items": 50_000,  # 3 ms
    "max_lexer_states": 50_000,  # 1 to 2 kB each, for each running request
    "max_grammar_size": 500_000,
}
"""What a grammar may cost. One that goes beyond fails when it is compiled, or ends the request where that shows."""
_JSON_OPTIONS = {
    "lenient": False,
    "coerce_one_of": False,
    "whitespace_flexible": True,
    "whitespace_pattern": "[ ]|\\n[ \\t]{0,32}",  # bounded, as models fall into writing nothing else
}
_GOOD_STOP_REASONS = frozenset({"NotStopped", "NoExtension", "NoExtensionBias", "EndOfSentence"})


class GrammarState:
    """How far one request's output has come in its grammar."""

    __slots__ = ("_executor", "_matcher")

    def __init__(self, matcher: Any, executor: Any) -> None:
        self._matcher = matcher
        self._executor = executor

    def advance(self, token_id: int) -> str | None:
        """Take in the next token. Returns why the output cannot go on, if so; the state is of no use then.

        An end-of-sequence token is right only where the output may end.
        """
        if (failure := _failure(self._matcher)) is not None:
            return failure
        if not self._matcher.consume_token(token_id):
            return f"no token was possible that the grammar and the request's other limits allow (drawn: {token_id})"
        return None

    @property
    def is_complete(self) -> bool:
        """Whether the output is whole and nothing may follow."""
        return self._matcher.is_stopped() and _failure(self._matcher) is None


def fill_masks(states: Sequence[GrammarState], masks: npt.NDArray[np.int32]) -> None:
    """Write which tokens may come next, all states in parallel and without the interpreter's lock.

    A state that fails on the way is told by the next `advance`; its mask means nothing.

    Args:
        states: one or more, of the same GrammarCompiler.
        masks: int32 [len(states), ceil(V / 32)], contiguous: bit b of word w becomes 1 where token 32 * w + b may come.
    """
    from llguidance.numpy import fill_next_token_bitmask_par

    pairs = [(state._matcher, row) for row, state in enumerate(states)]
    fill_next_token_bitmask_par(states[0]._executor, pairs, masks)


class GrammarCompiler:
    """Compiles grammars for one tokenizer. All methods may be called from any thread.

    Where llguidance is installed, reading the tokenizer takes a second or so, for which no other thread runs.

    Args:
        tokenizer_json: content of tokenizer.json.
        vocab_size: V, ids that may be sampled.
        eos_token_ids: ids that end an output; a mask has them where it may end.
    """

    def __init__(self, tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._compiled: OrderedDict[str, Any] = OrderedDict()
        self._lock = threading.Lock()
        self._tokenizer: Any = None
        self._unusable: str | None = None
        if find_spec("llguidance") is None:
            self._unusable = "the package llguidance is not installed; pip install llguidance"
            return
        import llguidance

        known_eos = [token_id for token_id in eos_token_ids if token_id < vocab_size]
        try:
            self._tokenizer = llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=known_eos or None)
        except ValueError as error:
            self._unusable = f"llguidance cannot use the model's tokenizer: {_one_line(error)}"
            return
        self._executor = llguidance.LLExecutor()
        self._limits = llguidance.LLParserLimits(**PARSER_LIMITS, verbose_errors=False)

    def start(self, grammar: str) -> GrammarState:
        """The state of an empty output. Takes up to seconds for a grammar that is new; other threads run meanwhile.

        Raises:
            RequestError: the grammar is wrong, or too large, or there can be none here; `param` is "grammar".
        """
        if self._unusable is not None:
            raise RequestError(f"grammars are not available: {self._unusable}", "grammar")
        with self._lock:
            matcher = self._compiled.get(grammar)
            if matcher is not None:
                self._compiled.move_to_end(grammar)
        if matcher is None:
            matcher = self._compile(grammar)
            with self._lock:
                self._compiled[grammar] = matcher
                if len(self._compiled) > MAX_COMPILED:
                    self._compiled.popitem(last=False)
        return GrammarState(matcher.deep_copy(), self._executor)

    def _compile(self, grammar: str) -> Any:
        import llguidance

        matcher = llguidance.LLMatcher(self._tokenizer, grammar, log_level=0, limits=self._limits)
        if (failure := _failure(matcher) or self._first_failure(matcher)) is not None:
            raise RequestError(failure, "grammar")
        return matcher

    def _first_failure(self, matcher: Any) -> str | None:
        """What goes wrong within the first tokens: grammars that are too large, or that nothing fulfils, show there."""
        matcher.compute_bitmask()  # the first one takes the longest, and then every copy has it
        probe = matcher.deep_copy()
        eos_token_ids = self._tokenizer.eos_tokens
        for _ in range(NUM_PROBE_TOKENS):
            mask = np.frombuffer(probe.compute_bitmask(), np.uint8)
            if (failure := _failure(probe)) is not None:
                return failure
            possible = np.setdiff1d(np.flatnonzero(np.unpackbits(mask, bitorder="little")), eos_token_ids)
            if not len(possible):
                return None if probe.is_accepting() else "nothing fulfils the grammar"
            if not probe.consume_token(int(possible[0])):
                return _failure(probe) or "the grammar allows a token that does not fit it"
        return None


def json_schema_grammar(schema: Mapping[str, Any] | bool, whitespace: str | None = None) -> str:
    """JSON that a schema describes, properties in the schema's order.

    `x-guidance` in it, which could loosen it, has no effect.

    Args:
        schema: the schema.
        whitespace: a regular expression, what may be between tokens; "": nothing; None: a little.
    """
    options: dict[str, Any] = _JSON_OPTIONS
    if whitespace is not None:
        options = options | {"whitespace_flexible": bool(whitespace), "whitespace_pattern": whitespace or None}
    described = {**schema, "x-guidance": options} if isinstance(schema, Mapping) else schema
    return json.dumps({"grammars": [{"json_schema": described}]})


def regex_grammar(regex: str) -> str:
    """Text that a regular expression matches as a whole, in the syntax of Rust's regex crate."""
    return lark_grammar("start: /" + _escape_slashes(regex) + "/")


def choice_grammar(choices: Sequence[str]) -> str:
    """One of these texts."""
    return lark_grammar("start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices))


def lark_grammar(lark: str) -> str:
    """Text that a grammar in llguidance's dialect of Lark generates from `start`."""
    return json.dumps({"grammars": [{"lark_grammar": lark}]})


def _escape_slashes(regex: str) -> str:
    from llguidance import regex_to_lark

    return regex_to_lark(regex, "")


def _failure(matcher: Any) -> str | None:
    """What is wrong with a matcher; None if nothing is."""
    if matcher.is_error():
        error = _one_line(matcher.get_error())
        return "nothing fulfils the grammar" if error in _GOOD_STOP_REASONS else error
    reason = matcher.stop_reason()
    return None if reason in _GOOD_STOP_REASONS else f"the grammar is too complex or cannot be fulfilled ({reason})"


def _one_line(error: object) -> str:
    return " ".join(str(error).replace("<non-verbose/>", "").split())[:400]

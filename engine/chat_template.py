"""Chat templates: the Jinja program of a checkpoint that writes a conversation the way the model was trained on it."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from engine.errors import CheckpointError, RequestError

MAX_RENDERED_CHARS = 16 * 2**20
"""More than any context holds; a template whose output grows faster than its input is stopped here."""

_MARK = "\U0010ffff"
"""Where the final message ends that is to be continued: no character, and not for text between people."""
_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class ChatTemplate:
    """A compiled chat template. Rendering is thread-safe, and equal to that of `transformers`.

    The environment follows `transformers.utils.chat_template_utils`: an immutable sandbox (no private attributes, no
    call that modifies what the template was given, `range` of at most 100,000), same whitespace rules and extensions.

    Args:
        source: the Jinja text.
        special_tokens: variables such as `bos_token` that the template may print.
        origin: the file the text came from, for error messages.

    Raises:
        CheckpointError: the text is no template.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str], origin: str) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        try:
            self._template = _environment().from_string(source)
        except Exception as error:  # jinja2 lets errors of Python's own compiler through, too
            raise CheckpointError(f"{origin}: the chat template does not compile: {_one_line(error)}") from None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        add_generation_prompt: bool,
        variables: Mapping[str, Any],
        continue_final_message: bool = False,
    ) -> str:
        """The conversation as text. `messages` as `normalize_messages` returns them.

        Args:
            continue_final_message: end where the final message's content does, or its reasoning if it has no content.

        Raises:
            RequestError: the template refuses the messages or fails on them, or writes more than `MAX_RENDERED_CHARS`.
        """
        if continue_final_message:
            text = self.render(_marked(messages), tools, False, variables)
            text, mark, _ = text.rpartition(_MARK)
            if not mark:
                raise RequestError("the chat template leaves the final message out, so it cannot go on", "messages")
            return text
        if "messages" in variables:
            raise RequestError("'messages' is not free for a template variable, expected another name", "messages")
        context = {**self._special_tokens, "documents": None, **variables}
        context.update(messages=messages, tools=tools, add_generation_prompt=add_generation_prompt)
        pieces, num_chars = [], 0
        try:
            for piece in self._template.generate(context):
                pieces.append(piece)
                num_chars += len(piece)
                if num_chars > MAX_RENDERED_CHARS:
                    raise TemplateError(f"more than {MAX_RENDERED_CHARS:,} characters come out; send less")
        except Exception as error:  # a template is a program, and can fail in every way that a program can
            raise RequestError(f"the chat template fails on these messages: {_one_line(error)}", "messages") from None
        return "".join(pieces)


def normalize_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages in the one shape that templates expect; the originals stay as they are.

    `content`: None or missing becomes "", a list of text parts becomes their texts joined by line breaks, as in vLLM.
    `reasoning` is copied to `reasoning_content`, unless that is there. Tool-call arguments stay as given.

    Raises:
        RequestError: a message is no mapping, has no usable role, or has content that is not text.
    """
    return [_normalize_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _marked(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages with a mark where the final one is to be continued."""
    if not messages:
        raise RequestError("there are no messages, expected one to continue", "messages")
    *others, final = messages
    field = "content" if final["content"] or not final.get("reasoning_content") else "reasoning_content"
    return [*others, {**final, field: final[field] + _MARK}]


def _normalize_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} is a {type(message).__name__}, expected an object", "messages")
    role = message.get("role")
    # Templates print the role outside of any quotes, so nothing but a name may pass.
    if not isinstance(role, str) or _ROLE.fullmatch(role) is None:
        raise RequestError(f"{where}.role is {_shown(role)}, expected a name such as 'user'", "messages")
    normal = {**message, "content": _text(message.get("content"), f"{where}.content")}
    reasoning = message.get("reasoning_content")
    if reasoning is None:
        reasoning = message.get("reasoning")
    normal.pop("reasoning_content", None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise RequestError(f"{where}.reasoning_content is a {type(reasoning).__name__}, expected text", "messages")
        normal["reasoning_content"] = reasoning
    return normal


def _text(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(f"{where} is a {type(content).__name__}, expected text or a list of text parts", "messages")
    texts = []
    for index, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else part
        if not isinstance(text, str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise RequestError(f"{where}[{index}] is of type {_shown(kind)}, expected a 'text' part", "messages")
        texts.append(text)
    return "\n".join(texts)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what the assistant wrote, for training; its content is printed."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dict:
    """`dict` without the attributes of the class, which lead out of the sandbox."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _PublicNamespace(Namespace):
    """`namespace` that holds no names of Python's own."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # `self` is in `args`, so that a template can set an attribute of that name.
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _check_public(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_public(name)
        Namespace.__setitem__(self, name, value)


def _check_public(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"namespace attribute {name!r} starts with an underscore, expected another name")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    # Jinja's own filter escapes HTML characters.
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["dict"] = _Dict()
    environment.globals["namespace"] = _PublicNamespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _shown(value: Any) -> str:
    return repr(value)[:80]

"""What a chat may call, and whether it has to."""

from dataclasses import dataclass
from typing import Any

from serve_app.openai.chat_protocol import AllowedToolsChoice, ChatBody, NamedTool, Tool
from serve_app.openai.endpoint import ServedModel
from serve_app.openai.errors import bad_request
from serve_app.openai.parsing.call import Schemas
from serve_app.openai.parsing.formats import ToolFormat, tool_format


@dataclass(frozen=True, slots=True)
class ToolUse:
    """The tools of one request."""

    offered: tuple[Tool, ...] = ()
    """What the chat template shows the model."""
    format: ToolFormat | None = None
    """How the model writes calls; None if it cannot make any here."""
    schemas: Schemas | None = None
    """The functions that may be called, and what their arguments must be."""
    strict: frozenset[str] = frozenset()
    """Those whose arguments must be what their schemas describe."""
    must_call: bool = False
    is_named: bool = False
    """Whether the request names the one function to call."""
    most_calls: int | None = None
    """None: any number."""

    @classmethod
    def of(cls, body: ChatBody, model: ServedModel) -> "ToolUse":
        """What a request asks for. Told to call nothing, the model does not see the tools.

        Raises:
            ApiError: 400, the model knows no tool calls.
        """
        if not body.tools or body.tool_choice == "none":
            return cls()
        found = tool_format(model.tokenizer.chat_template)
        if found is None:
            message = "this model's chat template has no tool calls of a known format; leave tools out"
            raise bad_request(message, "tools", "unsupported_parameter")
        offered, must_call = body.tools, body.tool_choice == "required"
        if isinstance(body.tool_choice, AllowedToolsChoice):
            allowed = {tool.function.name for tool in body.tool_choice.allowed_tools.tools}
            offered = [tool for tool in offered if tool.function.name in allowed]
            must_call = body.tool_choice.allowed_tools.mode == "required"
        schemas = {tool.function.name: _arguments_schema(tool) for tool in offered}
        named = isinstance(body.tool_choice, NamedTool)
        if isinstance(body.tool_choice, NamedTool):
            name = body.tool_choice.function.name
            schemas = {name: schemas[name]}
        return cls(
            offered=tuple(offered),
            format=found,
            schemas=schemas,
            strict=frozenset(tool.function.name for tool in offered if tool.function.strict),
            must_call=named or must_call,
            is_named=named,
            most_calls=1 if named or not body.parallel_tool_calls else None,
        )


def _arguments_schema(tool: Tool) -> dict[str, Any]:
    """A function described without parameters has none."""
    parameters = tool.function.parameters
    return {"type": "object", "properties": {}, "additionalProperties": False} if parameters is None else parameters

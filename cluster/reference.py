"""Writes docs/configuration.md and docs/api.md from the pydantic models: `python -m cluster.reference`."""

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from cluster.autoscaling import QueueAndKvPolicy
from serve_app.config import LiveConfig, ServiceConfig
from serve_app.routes import CONVERTING, GENERATING

DOCS = Path(__file__).parents[1] / "docs"
Schema = Mapping[str, Any]
NO_BOUND = 2**31 - 1
"""Bounds from here on are those of the machine, not of the meaning."""

CONFIGURATION = """# Configuration

What `args` of an application in `cluster/*.yaml` may hold, made from the code by `python -m cluster.reference`. An
unknown key ends the start with its name. The rest of such a file is Ray Serve's: deployments, replicas and the
autoscaling policy, whose arguments are at the end. `cluster/multi-model.yaml` has more than one model.

A change of `args` starts the replicas anew. Limits, keys and defaults can change without: as `user_config` of the
deployment Ingress, in the place of the same key in `args`, with `serve deploy FILE` or in a RayService. Leave at least
`user_config: {}` there, as Ray Serve does not tell that it is gone.

"""
API = """# API

The bodies that requests may have, made from the code by `python -m cluster.reference`; `/openapi.json` of a running
service is the same for programs. A field that is not listed is a 400 that names it. `null` is the same as leaving a
field out. Fields without a meaning here mean what they mean to OpenAI (`/v1/messages`: to Anthropic), and those that
OpenAI does not have, to vLLM.

| route | |
|---|---|
| `GET /v1/models`, `GET /v1/models/{id}` | the models, with the sampling parameters that hold by default |
| `GET /health` | 200 if of every model a replica answers, or none is kept while nobody asks; else 503; needs no key |
| `GET /-/healthz`, `GET /-/routes` | Ray Serve's: is there an ingress, and prefixes of applications; needs no key |
| `GET /status` | models, their replicas and loads, and the autoscaler's target, as the answering ingress sees them |
| `GET /metrics` | of every process, in Prometheus' text format: `docs/metrics.md` |
| `GET /version` | of this software |
| `GET /` | the web page; needs no key: `docs/playground.md` |

Errors are `{"error": {"message", "type", "param", "code"}}`: 400 for what a client sent, 401 without a key, 404 for an
unknown model or route, 413 and 431 for too much, 429 with `Retry-After` where limits are met, 503 with `Retry-After`
while no replica is ready. A fault after a stream began is an `error` event in it, and then there is no `[DONE]`.

"""


def configuration() -> str:
    """docs/configuration.md."""
    sections = "\n".join(_sections({"args": ServiceConfig, "user_config of Ingress": LiveConfig}))
    return f"{CONFIGURATION}{sections}\n## policy_kwargs of `{QueueAndKvPolicy.__name__}`\n\n{_arguments()}"


def api() -> str:
    """docs/api.md."""
    return API + "\n".join(_sections({f"POST {path}": body for path, (body, _) in (GENERATING | CONVERTING).items()}))


def _sections(models: Mapping[str, type[BaseModel]]) -> Iterator[str]:
    """For each title a table of a model's fields, and one for each model among those that has had none yet."""
    seen: set[str] = set()
    for title, model in models.items():
        schema = model.model_json_schema()
        definitions = schema.get("$defs", {})
        yield _table(f"## {title}", schema, definitions)
        for name, definition in definitions.items():
            if "properties" in definition and name not in seen:
                seen.add(name)
                yield _table(f"### {name}", definition, definitions)


def _table(heading: str, schema: Schema, definitions: Schema) -> str:
    lines = [heading, "", schema.get("description", ""), "", "| key | value | default | |", "|---|---|---|---|"]
    for name, field in schema.get("properties", {}).items():
        default = "required" if name in schema.get("required", ()) else _default(field)
        lines.append(
            f"| `{name}` | {_values(field, definitions)} | {default} | {_escaped(field.get('description', ''))} |"
        )
    return "\n".join(lines) + "\n"


def _default(field: Schema) -> str:
    value = field.get("default")
    return "" if value is None or isinstance(value, dict) else f"`{json.dumps(value)}`"


def _values(field: Schema, definitions: Schema) -> str:
    """What a field may hold, in words."""
    if "$ref" in field:
        name = field["$ref"].rpartition("/")[2]
        return name if "properties" in definitions[name] else _values(definitions[name], definitions)
    if "anyOf" in field or "oneOf" in field:
        options = [_values(option, definitions) for option in field.get("anyOf", field.get("oneOf"))]
        return " or ".join(dict.fromkeys(option for option in options if option != "null"))
    if "enum" in field or "const" in field:
        return ", ".join(f"`{json.dumps(value)}`" for value in field.get("enum", [field.get("const")]))
    if field.get("type") == "array":
        return f"list of {_values(field.get('items', {}), definitions)}"
    kind = str(field.get("type", "anything"))
    text = {"integer": "whole number", "boolean": "true or false"}.get(kind, kind)
    bounds = [
        f"{sign} {field[key]:g}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in field and abs(field[key]) < NO_BOUND
    ]
    return f"{text} {', '.join(bounds)}" if bounds else text


def _arguments() -> str:
    """The policy's arguments, as its docstring has them."""
    documented = (inspect.getdoc(QueueAndKvPolicy) or "").partition("Args:")[2].partition("\n\n")[0]
    meanings = dict(re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", documented, re.MULTILINE))
    lines = ["| key | default | |", "|---|---|---|"]
    for name, parameter in inspect.signature(QueueAndKvPolicy).parameters.items():
        lines.append(f"| `{name}` | `{parameter.default}` | {_escaped(meanings[name])} |")
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    (DOCS / "configuration.md").write_text(configuration())
    (DOCS / "api.md").write_text(api())

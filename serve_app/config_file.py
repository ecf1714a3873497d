"""A strict reading of a Serve configuration file: Ray ignores keys that it does not know, and starts something else.

python -m serve_app.config_file cluster/config.yaml
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError
from ray.serve.config import AutoscalingPolicy
from ray.serve.schema import ServeApplicationSchema, ServeDeploySchema

from engine.errors import ConfigError
from serve_app.config import LiveConfig, ServiceConfig

BUILDER = "serve_app.app:build_app"
INGRESS = "Ingress"
"""Name of the ingress deployment."""
_UNTYPED_MODELS: dict[tuple[type[BaseModel], str], type[BaseModel]] = {
    (ServeApplicationSchema, "autoscaling_policy"): AutoscalingPolicy
}
"""Fields that Ray declares as plain dicts and reads as these."""


def check_config_file(path: Path) -> None:
    """Raise ConfigError, which names all that is wrong, unless every key means something and every value is valid."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, expected keys such as `applications`")
    problems = [f"unknown key {key}" for key in unknown_keys(values, ServeDeploySchema)]
    problems += list(_invalid_values(values, ServeDeploySchema, ""))
    if not problems:
        for index, application in enumerate(values["applications"]):
            problems += _application_problems(application, f"applications[{index}]")
    if problems:
        raise ConfigError(f"{path}: {'; '.join(problems)}")


def unknown_keys(values: dict[Any, Any], model: type[BaseModel], where: str = "") -> Iterator[str]:
    """Paths of the keys in `values`, at every depth, that `model` has no field for."""
    for key, value in values.items():
        path = f"{where}.{key}" if where else str(key)
        field = model.model_fields.get(key)
        if field is None:
            yield path
            continue
        inner = _UNTYPED_MODELS.get((model, key)) or _model_in(field.annotation)
        if inner is None:
            continue
        if isinstance(value, dict):
            yield from unknown_keys(value, inner, path)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                if isinstance(item, dict):
                    yield from unknown_keys(item, inner, f"{path}[{index}]")


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model inside an annotation such as `list[Model] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)


def _application_problems(application: dict[str, Any], where: str) -> Iterator[str]:
    if application["import_path"] != BUILDER:
        return
    arguments = application.get("args") or {}
    problems = list(_invalid_values(arguments, ServiceConfig, f"{where}.args"))
    if problems:
        yield from problems
        return
    names = (INGRESS, *ServiceConfig.model_validate(arguments).engines)
    for index, deployment in enumerate(application.get("deployments") or ()):
        path = f"{where}.deployments[{index}]"
        if deployment["name"] not in names:
            yield f"{path}.name is {deployment['name']!r}, expected one of {', '.join(names)}"
        if deployment["name"] == INGRESS:
            yield from _invalid_values(deployment.get("user_config") or {}, LiveConfig, f"{path}.user_config")
        scaling = deployment.get("autoscaling_config") or {}
        yield from _policy_problems(scaling.get("policy") or {}, f"{path}.autoscaling_config.policy")


def _policy_problems(policy: dict[str, Any], where: str) -> Iterator[str]:
    """Make the autoscaling policy: Ray does so in its controller, where a wrong argument is hard to find."""
    arguments = policy.get("policy_kwargs") or {}
    made = AutoscalingPolicy(**policy).get_policy()
    try:
        if isinstance(made, type):
            made(**arguments)
    except (TypeError, ValueError) as error:
        yield f"{where}.policy_kwargs: {error}"


def _invalid_values(values: dict[str, Any], model: type[BaseModel], where: str) -> Iterator[str]:
    try:
        model.model_validate(values)
    except ValidationError as error:
        for found in error.errors(include_url=False, include_input=False, include_context=False):
            path = ".".join(str(part) for part in (where, *found["loc"]) if part != "")
            yield f"{path}: {found['msg']}"
    except (ImportError, AttributeError) as error:  # Ray imports policies and routers that the file names
        yield f"what {where or 'the file'} names cannot be imported: {error}"


def main() -> None:
    """Check the files on the command line; exit with 1 and one line for each that is wrong."""
    num_wrong = 0
    for name in sys.argv[1:]:
        try:
            check_config_file(Path(name))
        except ConfigError as error:
            num_wrong += 1
            print(error, file=sys.stderr)
    sys.exit(min(num_wrong, 1))


if __name__ == "__main__":
    main()

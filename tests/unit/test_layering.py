"""The floors of the house: a module imports only from its own folder and from lower floors."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ("kernels", "engine", "serve_app", "cluster")
NO_TORCH = tuple(
    f"engine/{name}.py"
    for name in (
        "request",
        "request_checks",
        "block_pool",
        "block_residency",
        "scheduler",
        "block_forecast",
        "speculation",
        "lora/handle",
        "output_buffer",
        "stats",
        "config",
        "errors",
        "grammar",
        "tokenizer",
        "detokenizer",
    )
)
FORBIDDEN = {
    "kernels": {"ray", "fastapi", "starlette", "transformers"},
    "engine": {"ray", "fastapi", "starlette", "transformers"},
    "serve_app": {"transformers"},
    "cluster": {"torch", "transformers"},
}
USE_ENVIRONMENT = {
    "engine/config.py",
    "serve_app/grammar_checker.py",  # hands it on to its process
}
MODULES = sorted(
    path
    for floor in FLOORS
    for path in (ROOT / floor).rglob("*.py")
    if "weights/demo" not in path.as_posix()  # scripts that make the demo model, not part of the engine
)


def imported(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_go_down(path):
    floor = path.relative_to(ROOT).parts[0]
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    tops = {name.split(".")[0] for name in imported(path)}
    assert not tops & above, f"{path} imports from a higher floor"
    assert not tops & FORBIDDEN[floor], f"{path} imports what its floor must not know"


@pytest.mark.parametrize("name", NO_TORCH)
def test_control_plane_has_no_torch(name):
    assert not {module.split(".")[0] for module in imported(ROOT / name)} & {"torch", "triton"}


def test_the_environment_is_read_by_configuration_alone():
    found = {
        path.relative_to(ROOT).as_posix()
        for path in MODULES
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute | ast.alias)
        and (node.attr if isinstance(node, ast.Attribute) else node.name) in {"environ", "environb", "getenv"}
    }
    assert found == USE_ENVIRONMENT

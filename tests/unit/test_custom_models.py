"""The example of docs/custom-models.md, as an installed package."""

import re
import sys
from pathlib import Path

import pytest
from transformers import Qwen3Config

from engine import LLM, CheckpointError, SamplingParams
from engine.models import registry
from tests.tiny_models import make_tiny_model

PAGE = (Path(__file__).parents[2] / "docs" / "custom-models.md").read_text(encoding="utf-8")
FIELDS = {"kv_cache_memory": 2**20, "show_progress": False, "device": "cpu", "load_format": "dummy"}


def install(folder: Path, value: str) -> None:
    """What installing a package leaves behind."""
    package = folder / "my_models"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").touch()
    (package / "yourmodel.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0])
    information = folder / "my_models-1.0.dist-info"
    information.mkdir(exist_ok=True)
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: my-models\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(f"[qwen3_serve.models]\nYourForCausalLM = {value}\n")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    make_tiny_model(tmp_path / "model", Qwen3Config, head_dim=16)
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace("Qwen3ForCausalLM", "YourForCausalLM"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    yield tmp_path / "model"
    sys.modules.pop("my_models.yourmodel", None)


def test_an_installed_package_adds_an_architecture(checkpoint):
    declared = re.search(r'^YourForCausalLM = "(.*)"$', PAGE, re.MULTILINE)[1]
    install(checkpoint.parent, declared)
    [completion] = LLM(str(checkpoint), **FIELDS).generate([[3, 4]], SamplingParams(max_tokens=2, ignore_eos=True))
    assert len(completion.token_ids) == 2


def test_a_class_registered_in_the_process_runs_too(checkpoint):
    registry.register_model("YourForCausalLM", registry._MODELS["Qwen2ForCausalLM"])
    assert type(LLM(str(checkpoint), **FIELDS).engine.runner.model).__name__ == "Qwen2ForCausalLM"


def test_a_package_that_cannot_be_imported_is_named(checkpoint):
    install(checkpoint.parent, "my_models.missing:Model")
    with pytest.raises(CheckpointError, match=r"my_models\.missing:Model of an installed package, which fails"):
        LLM(str(checkpoint), **FIELDS)


def test_an_unknown_architecture_is_told_what_there_is(checkpoint):
    with pytest.raises(
        CheckpointError, match=r"YourForCausalLM is not supported; expected LlamaForCausalLM, .*Qwen3Moe"
    ):
        LLM(str(checkpoint), **FIELDS)

"""Which class runs which architecture."""

from importlib.metadata import EntryPoint, entry_points

from engine.errors import CheckpointError
from engine.models.decoder import ModelClass
from engine.models.llama import LlamaForCausalLM, MistralForCausalLM
from engine.models.qwen2 import Qwen2ForCausalLM
from engine.models.qwen3 import Qwen3ForCausalLM
from engine.models.qwen3_moe import Qwen3MoeForCausalLM

ENTRY_POINTS = "qwen3_serve.models"
"""Group of entry points by which other packages add architectures: name = architecture, value = the class."""

_MODELS: dict[str, ModelClass] = {
    "LlamaForCausalLM": LlamaForCausalLM,
    "MistralForCausalLM": MistralForCausalLM,
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "Qwen3ForCausalLM": Qwen3ForCausalLM,
    "Qwen3MoeForCausalLM": Qwen3MoeForCausalLM,
}


def register_model(architecture: str, model_class: ModelClass) -> None:
    """Make checkpoints whose config.json names `architecture` run as `model_class`, in this process."""
    _MODELS[architecture] = model_class


def find_model(architectures: tuple[str, ...]) -> ModelClass:
    """The class for the first known of a checkpoint's architectures: registered here, or by an installed package.

    Raises:
        CheckpointError: none is known, or the package's class cannot be imported.
    """
    for architecture in architectures:
        if architecture in _MODELS:
            return _MODELS[architecture]
        if (point := _installed().get(architecture)) is not None:
            try:
                _MODELS[architecture] = point.load()
            except (ImportError, AttributeError) as error:
                raise CheckpointError(
                    f"architecture {architecture} is {point.value} of an installed package, which fails: {error}"
                ) from error
            return _MODELS[architecture]
    known = ", ".join(sorted({*_MODELS, *_installed()}))
    raise CheckpointError(
        f"config.json: architecture {', '.join(architectures)} is not supported; expected {known}, or one that an "
        "installed package adds: see docs/custom-models.md"
    )


def _installed() -> dict[str, EntryPoint]:
    """By architecture. It takes some milliseconds: every installed package is looked at."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}

"""ModelConfig: what a checkpoint's config.json says, in one spelling."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from engine.errors import CheckpointError


class RopeParameters(BaseModel):
    """Rotary embedding, and how it is stretched over a longer context; see engine.layers.rotary."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    rope_type: str = "default"
    rope_theta: float = Field(10_000.0, gt=1)
    factor: float = Field(1.0, ge=1)
    original_max_position_embeddings: int | None = Field(None, ge=1)
    attention_factor: float | None = Field(None, gt=0)
    beta_fast: float = Field(32.0, gt=0)
    beta_slow: float = Field(1.0, gt=0)
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    low_freq_factor: float = Field(1.0, gt=0)
    high_freq_factor: float = Field(4.0, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """A null stands for the default."""
        return {name: value for name, value in raw.items() if value is not None}

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> "RopeParameters":
        if self.rope_type in ("linear", "dynamic", "yarn", "llama3") and "factor" not in self.model_fields_set:
            raise ValueError(f"rope_type {self.rope_type!r} has no factor, expected a number")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor is {self.high_freq_factor}, expected more than low_freq_factor "
                f"({self.low_freq_factor})"
            )
        return self


class ModelConfig(BaseModel):
    """The fields of config.json that decoder models need; others are ignored, as they describe training."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    architectures: tuple[str, ...] = Field(min_length=1)
    vocab_size: int = Field(ge=1)
    hidden_size: int = Field(ge=1)
    intermediate_size: int = Field(ge=1)
    num_hidden_layers: int = Field(ge=1, le=10_000)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    head_dim: int = Field(ge=2, multiple_of=2)
    max_position_embeddings: int = Field(ge=1)
    rms_norm_eps: float = Field(1e-6, gt=0)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    sliding_window: int | None = Field(None, ge=1)
    """Tokens up to itself that a token sees in layers with a window; None: there are none. See `layer_windows`."""
    layer_types: tuple[Literal["full_attention", "sliding_attention"], ...] | None = None
    max_window_layers: int | None = Field(None, ge=0)
    """Where `layer_types` does not say: layers from this one on have the window."""
    num_experts: int | None = Field(None, ge=1, le=10_000)
    num_experts_per_tok: int = Field(8, ge=1)
    moe_intermediate_size: int | None = Field(None, ge=1)
    norm_topk_prob: bool = False
    decoder_sparse_step: int = Field(1, ge=1)
    mlp_only_layers: tuple[int, ...] = ()
    hidden_act: str = "silu"
    rope: RopeParameters
    dtype: str | None = None
    quantization_config: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """Fill in what older and newer files spell differently."""
        values = dict(raw)
        rope = dict(values.get("rope_parameters") or values.get("rope_scaling") or {})
        rope.setdefault("rope_type", rope.pop("type", "default"))
        if values.get("rope_theta") is not None:
            rope.setdefault("rope_theta", values["rope_theta"])
        values["rope"] = rope
        values["dtype"] = values.get("dtype") or values.get("torch_dtype")
        values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
        values.setdefault("num_experts", values.get("num_local_experts"))
        values["mlp_only_layers"] = values.get("mlp_only_layers") or ()
        if values.get("model_type") == "qwen3_moe":  # which has a window in all layers or in none
            values.pop("max_window_layers", None)
        # Qwen's files name a window without using it.
        if not values.get("use_sliding_window", not str(values.get("model_type")).startswith("qwen")):
            values["sliding_window"] = None
        # Only where the file is silent: Qwen3's head_dim is not hidden_size / num_attention_heads.
        if values.get("head_dim") is None and values.get("hidden_size") and values.get("num_attention_heads"):
            values["head_dim"] = values["hidden_size"] // values["num_attention_heads"]
        return values

    @model_validator(mode="after")
    def _consistent(self) -> "ModelConfig":
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads is {self.num_attention_heads}, expected a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(f"layer_types has {len(self.layer_types)} entries, expected {self.num_hidden_layers}")
        if self.sliding_window is None and "sliding_attention" in (self.layer_types or ()):
            raise ValueError("layer_types has sliding_attention, but there is no sliding_window")
        return self

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """For each layer, how many tokens up to itself a token sees; None: all."""
        if self.layer_types is not None:
            return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types)
        first = min(self.max_window_layers or 0, self.num_hidden_layers)
        return (None,) * first + (self.sliding_window,) * (self.num_hidden_layers - first)

    @property
    def context_length(self) -> int:
        """The longest context the model is meant for: what it was trained on, or that stretched."""
        trained, rope = self.max_position_embeddings, self.rope
        if rope.rope_type in ("linear", "dynamic"):
            return int(trained * rope.factor)
        if rope.rope_type == "yarn":
            return max(trained, int((rope.original_max_position_embeddings or trained) * rope.factor))
        return trained

    @classmethod
    def from_dir(cls, path: Path) -> "ModelConfig":
        """Read `config.json` in a checkpoint folder. Raises CheckpointError with one line."""
        file = path / "config.json"
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            if not isinstance(values, dict):
                raise TypeError(f"it is a {type(values).__name__}")
            return cls.model_validate(values)
        except FileNotFoundError:
            raise CheckpointError(f"{path} has no config.json; expected a Hugging Face checkpoint folder") from None
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError, TypeError) as error:
            raise CheckpointError(f"{file}: not a JSON object ({error})") from None
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"])) or "fields"
            raise CheckpointError(f"{file}: {field}: {first['msg']}") from None

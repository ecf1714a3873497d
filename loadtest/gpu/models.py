"""Shapes of published Qwen3 models, as checkpoint folders without weights, and what their steps cost at least."""

import gc
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from engine import LLM

DEMO = Path(__file__).parents[2] / "engine" / "weights" / "demo"


@dataclass(frozen=True)
class Shape:
    """A dense Qwen3 model in bfloat16."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool
    head_dim: int = 128
    vocab: int = 151_936

    @property
    def matmul_weights(self) -> int:
        """Weights that every token is multiplied with."""
        attention = (self.heads * 2 + self.kv_heads * 2) * self.head_dim * self.hidden
        return self.layers * (attention + 3 * self.hidden * self.inner) + self.vocab * self.hidden

    @property
    def kv_bytes_per_token(self) -> int:
        """In bfloat16."""
        return 2 * self.layers * self.kv_heads * self.head_dim * 2

    def decode_floor_s(
        self,
        batch: int,
        context: float,
        bytes_per_s: float,
        flop_per_s: float,
        fp8_weights: bool = False,
        fp8_cache: bool = False,
    ) -> float:
        """Seconds a decode step takes at least: weights and KV cache read once, or the products computed.

        The output projection stays in bfloat16. Products are counted at the one rate given, in FP8 too.
        """
        output = self.vocab * self.hidden
        moved = (self.matmul_weights - output) * (1 if fp8_weights else 2) + 2 * output
        moved += batch * context * self.kv_bytes_per_token / (2 if fp8_cache else 1)
        return max(moved / bytes_per_s, 2 * self.matmul_weights * batch / flop_per_s)

    def prefill_floor_s(self, num_tokens: int, flop_per_s: float) -> float:
        """Seconds one prompt takes at least; logits of its last token alone."""
        products = 2 * (self.matmul_weights - self.vocab * self.hidden) * num_tokens
        attention = 4 * self.layers * self.heads * self.head_dim * num_tokens**2 / 2
        return (products + attention) / flop_per_s


QWEN3_0_6B = Shape("Qwen3-0.6B", 1024, 3072, 28, 16, 8, tied=True)
QWEN3_8B = Shape("Qwen3-8B", 4096, 12288, 36, 32, 8, tied=False)


def write_folder(shape: Shape, folder: Path) -> Path:
    """A checkpoint folder with everything but weights."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": shape.tied,
        "attention_bias": False,
        "torch_dtype": "bfloat16",
    }
    (folder / "config.json").write_text(json.dumps(config))
    return copy_tokenizer(folder)


def copy_tokenizer(folder: Path) -> Path:
    """Give a checkpoint folder the demo model's tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    return folder


def make_llm(shape: Shape, folder: Path, **config: object) -> LLM:
    """The engine with random weights of this shape."""
    return LLM(str(write_folder(shape, folder)), load_format="dummy", **config)


def close(llm: LLM) -> None:
    """Give the engine's memory back."""
    del llm.engine
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

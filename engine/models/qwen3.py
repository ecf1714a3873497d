"""Qwen3, dense: 0.6B to 32B (arXiv:2505.09388)."""

from engine.attention import AttentionBackend
from engine.model_config import ModelConfig
from engine.models.decoder import Attention, CausalLM, DecoderLayer, GatedMLP
from engine.parallel.group import TensorParallel


class Qwen3ForCausalLM(CausalLM):
    """Heads of q and k are normalised before rotation."""

    def make_layer(
        self, config: ModelConfig, index: int, backend: AttentionBackend, group: TensorParallel
    ) -> DecoderLayer:
        bias = config.attention_bias
        attention = Attention(config, index, backend, group, qk_norm=True, qkv_bias=bias, output_bias=bias)
        return DecoderLayer(config, attention, GatedMLP(config, group))

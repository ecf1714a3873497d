"""Qwen2 and Qwen2.5, dense (arXiv:2407.10671, arXiv:2412.15115)."""

from engine.attention import AttentionBackend
from engine.model_config import ModelConfig
from engine.models.decoder import Attention, CausalLM, DecoderLayer, GatedMLP
from engine.parallel.group import TensorParallel


class Qwen2ForCausalLM(CausalLM):
    """The projections to q, k and v have a bias, whatever config.json says; no head is normalised."""

    def make_layer(
        self, config: ModelConfig, index: int, backend: AttentionBackend, group: TensorParallel
    ) -> DecoderLayer:
        return DecoderLayer(config, Attention(config, index, backend, group, qkv_bias=True), GatedMLP(config, group))

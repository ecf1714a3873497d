"""Llama 2 and 3, and Mistral, whose layers are the same (arXiv:2307.09288, arXiv:2407.21783, arXiv:2310.06825)."""

from engine.attention import AttentionBackend
from engine.model_config import ModelConfig
from engine.models.decoder import Attention, CausalLM, DecoderLayer, GatedMLP
from engine.parallel.group import TensorParallel


class LlamaForCausalLM(CausalLM):
    """The plain decoder."""

    def make_layer(
        self, config: ModelConfig, index: int, backend: AttentionBackend, group: TensorParallel
    ) -> DecoderLayer:
        bias = config.attention_bias
        attention = Attention(config, index, backend, group, qkv_bias=bias, output_bias=bias)
        return DecoderLayer(config, attention, GatedMLP(config, group))


class MistralForCausalLM(LlamaForCausalLM):
    """The first version's layers have a sliding window: see ModelConfig.layer_windows."""

"""Qwen3 with experts: 30B-A3B, 235B-A22B, and the Coder and 2507 models of these shapes (arXiv:2505.09388)."""

from engine.attention import AttentionBackend
from engine.layers.moe import MoE
from engine.model_config import ModelConfig
from engine.models.decoder import Attention, CausalLM, DecoderLayer, GatedMLP
from engine.parallel.group import TensorParallel


class Qwen3MoeForCausalLM(CausalLM):
    """As Qwen3, with experts in the place of most MLPs."""

    def __init__(self, config: ModelConfig, backend: AttentionBackend, group: TensorParallel) -> None:
        super().__init__(config, backend, group)
        experts = range(config.num_experts or 0)
        self.packed_parameters = {
            **self.packed_parameters,
            "experts_gate_up": tuple(f"experts.{expert}.{part}_proj" for expert in experts for part in ("gate", "up")),
            "experts_down": tuple(f"experts.{expert}.down_proj" for expert in experts),
        }

    def make_layer(
        self, config: ModelConfig, index: int, backend: AttentionBackend, group: TensorParallel
    ) -> DecoderLayer:
        bias = config.attention_bias
        attention = Attention(config, index, backend, group, qk_norm=True, qkv_bias=bias, output_bias=bias)
        is_sparse = index not in config.mlp_only_layers and (index + 1) % config.decoder_sparse_step == 0
        return DecoderLayer(config, attention, MoE(config, group) if is_sparse else GatedMLP(config, group))

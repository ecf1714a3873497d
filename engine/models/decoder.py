"""The blocks that decoder models are composed of."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, Protocol

from torch import Tensor, nn

from engine.attention import AttentionBackend
from engine.batch import StepInputs
from engine.layers.embedding import Embedding
from engine.layers.linear import Linear
from engine.layers.norm import RMSNorm
from engine.model_config import ModelConfig
from engine.parallel.group import TensorParallel
from kernels.qk_norm_rope_store import qk_norm_rope_store
from kernels.silu_and_mul import silu_and_mul


class Attention(nn.Module):
    """Grouped-query attention with rotary positions, over the paged cache of layer `layer_index`.

    Args:
        config: of the model.
        layer_index: place of its layer.
        backend: what computes attention.
        group: the ranks that share its heads.
        qk_norm: whether heads of q and k are normalised.
        qkv_bias, output_bias: whether these projections have a bias.
    """

    def __init__(
        self,
        config: ModelConfig,
        layer_index: int,
        backend: AttentionBackend,
        group: TensorParallel,
        *,
        qk_norm: bool = False,
        qkv_bias: bool = False,
        output_bias: bool = False,
    ) -> None:
        super().__init__()
        self.layer_index = layer_index
        self.backend = backend
        self.window = config.layer_windows[layer_index]
        self.eps = config.rms_norm_eps
        self.group = group
        q_size = group.share(config.num_attention_heads) * config.head_dim
        kv_size = group.share_or_copy(config.num_key_value_heads) * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, (q_size, kv_size, kv_size), bias=qkv_bias)
        self.o_proj = Linear(q_size, (config.hidden_size,), bias=output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if qk_norm else None

    def forward(self, hidden: Tensor, step: StepInputs) -> Tensor:
        """hidden: [num_tokens, hidden_size] → the same shape."""
        k_cache, v_cache = step.kv_caches[self.layer_index]
        query = qk_norm_rope_store(
            self.qkv_proj(hidden),
            self.q_norm.weight if self.q_norm else None,
            self.k_norm.weight if self.k_norm else None,
            self.eps,
            step.cos_sin,
            k_cache,
            v_cache,
            step.slot_mapping,
        )
        attended = self.backend.forward(query, k_cache, v_cache, step.attention_plan, self.window)
        return self.group.all_reduce(self.o_proj(attended.flatten(1)))


class GatedMLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, group: TensorParallel) -> None:
        super().__init__()
        self.group = group
        size, bias = group.share(config.intermediate_size), config.mlp_bias
        self.gate_up_proj = Linear(config.hidden_size, (size, size), bias=bias)
        self.down_proj = Linear(size, (config.hidden_size,), bias=bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [num_tokens, hidden_size] → the same shape."""
        return self.group.all_reduce(self.down_proj(silu_and_mul(self.gate_up_proj(hidden))))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP. The residual addition is left to the next norm, which fuses it."""

    def __init__(self, config: ModelConfig, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = attention
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = mlp

    def forward(self, hidden: Tensor, residual: Tensor | None, step: StepInputs) -> tuple[Tensor, Tensor]:
        """hidden, residual: [num_tokens, hidden_size]; their sum is the residual stream, before and after."""
        hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(hidden, step)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: ModelConfig, layers: list[DecoderLayer], group: TensorParallel) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, group)
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, step: StepInputs) -> Tensor:
        """→ [num_tokens, hidden_size], normalised."""
        hidden, residual = self.embed_tokens(step.input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, step)
        hidden, _ = self.norm(hidden, residual)
        return hidden


class CausalLM(nn.Module, ABC):
    """A decoder with an output projection. Subclasses say what their layers are made of, and nothing else.

    `packed_parameters` names, for each parameter that holds several tensors of the checkpoint, those tensors in order.
    """

    packed_parameters: Mapping[str, tuple[str, ...]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    ignored_tensors: ClassVar[tuple[str, ...]] = ("rotary_emb.inv_freq",)

    def __init__(self, config: ModelConfig, backend: AttentionBackend, group: TensorParallel) -> None:
        super().__init__()
        self.group = group
        layers = [self.make_layer(config, index, backend, group) for index in range(config.num_hidden_layers)]
        self.model = Decoder(config, layers, group)
        vocab = group.share_padded(config.vocab_size)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, (vocab,))
        self.tied_parameters = {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}

    @abstractmethod
    def make_layer(
        self, config: ModelConfig, index: int, backend: AttentionBackend, group: TensorParallel
    ) -> DecoderLayer:
        """The layer at `index`, as a rank of the group computes it."""

    def forward(self, step: StepInputs) -> Tensor:
        """→ hidden states [num_tokens, hidden_size]."""
        return self.model(step)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden: [num_rows, hidden_size] → [num_rows, at least vocab_size]; on ranks but the first, their own part."""
        own = self.model.embed_tokens.project(hidden) if self.lm_head is None else self.lm_head(hidden)
        return self.group.gather_columns(own)


class ModelClass(Protocol):
    """What a registered architecture must be: callable with a configuration, an attention backend and a group."""

    def __call__(self, config: ModelConfig, backend: AttentionBackend, group: TensorParallel) -> CausalLM: ...

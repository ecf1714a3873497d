"""A mixture of experts in the place of an MLP."""

import torch
from torch import Tensor, nn

from engine.errors import CheckpointError
from engine.layers.quantized_experts import QuantizedExperts
from engine.model_config import ModelConfig
from engine.parallel.group import TensorParallel
from engine.parallel.share import Share, whole
from kernels.fused_moe import fused_moe
from kernels.linear import linear


class Router(nn.Module):
    """Scores of all experts. No `Linear`, as it is never quantized: a small error here picks another expert."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [num_tokens, hidden_size] → [num_tokens, num_experts]."""
        return linear(hidden, self.weight)


class ExpertWeights(nn.Module):
    """The matrices of all experts, below each other as checkpoints' tensors fill them.

    Args:
        num_experts: how many.
        in_features: width of what they are multiplied with, or this rank's share of it.
        part_sizes: an expert's parts, or shares of them, one for each tensor of the checkpoint.
    """

    def __init__(self, num_experts: int, in_features: int | Share, part_sizes: tuple[int | Share, ...]) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.inputs = whole(in_features)
        self.parts = tuple(map(whole, part_sizes))
        num_rows = num_experts * sum(part.size for part in self.parts)
        self.weight = nn.Parameter(torch.empty(num_rows, self.inputs.size), requires_grad=False)

    def shares(self, parameter: str) -> tuple[tuple[Share, ...], ...]:
        """See `Linear.shares`."""
        return tuple((part, self.inputs) for part in self.parts) * self.num_experts

    def stacked(self) -> Tensor:
        """[num_experts, out_features, in_features], a view."""
        return self.weight.unflatten(0, (self.num_experts, -1))

    @property
    def outputs(self) -> tuple[Share, ...]:
        """What a rank has of each tensor of the checkpoint."""
        return self.parts * self.num_experts

    @property
    def scales(self) -> None:
        """Weights are not quantized; see `QuantizedExperts`."""
        return


class MoE(nn.Module):
    """Each token goes to a few experts, which a router chooses, and gets the weighted sum of what they make of it.

    Every rank routes, and has a share of every expert's inner width: ranks have equal work however tokens are routed.
    """

    def __init__(self, config: ModelConfig, group: TensorParallel) -> None:
        super().__init__()
        if config.num_experts is None or config.moe_intermediate_size is None:
            raise CheckpointError("config.json: num_experts or moe_intermediate_size is missing for a model of experts")
        if config.num_experts_per_tok > config.num_experts:
            raise CheckpointError(
                f"config.json: num_experts_per_tok is {config.num_experts_per_tok}, expected at most num_experts "
                f"({config.num_experts})"
            )
        self._top_k = config.num_experts_per_tok
        self._norm_topk_prob = config.norm_topk_prob
        self._group = group
        size = group.share(config.moe_intermediate_size)
        self.gate = Router(config.hidden_size, config.num_experts)
        num_experts, hidden_size = config.num_experts, config.hidden_size
        self.experts_gate_up: ExpertWeights | QuantizedExperts = ExpertWeights(num_experts, hidden_size, (size, size))
        self.experts_down: ExpertWeights | QuantizedExperts = ExpertWeights(num_experts, size, (hidden_size,))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: [num_tokens, hidden_size] → the same shape."""
        outputs = fused_moe(
            hidden,
            self.gate(hidden),
            self.experts_gate_up.stacked(),
            self.experts_down.stacked(),
            self._top_k,
            self._norm_topk_prob,
            self.experts_gate_up.scales,
            self.experts_down.scales,
        )
        return self._group.all_reduce(outputs)

"""Matrix products with the weights, as a layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kernels.linear import linear


class Linear(nn.Module):
    """y = x · weightᵀ + bias, where the output is one part or several computed at once.

    Args:
        in_features: width of x.
        output_sizes: width of each part; the checkpoint has a tensor for each.
    """

    def __init__(self, in_features: int, output_sizes: Sequence[int], bias: bool = False) -> None:
        super().__init__()
        self.output_sizes = tuple(output_sizes)
        self.weight = nn.Parameter(torch.empty(sum(output_sizes), in_features), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(sum(output_sizes)), requires_grad=False) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] → [num_tokens, sum(output_sizes)]."""
        return linear(x, self.weight, self.bias)

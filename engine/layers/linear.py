"""Matrix products with the weights, as a layer."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from engine.parallel.share import Share, whole
from kernels.linear import linear


class Linear(nn.Module):
    """y = x · weightᵀ + bias, where the output is one part or several computed at once.

    With shares for sizes, y is this rank's share of the output; with a share of the inputs, it is what these add to
    the output, and the sum over all ranks is the output.

    Args:
        in_features: width of x.
        output_sizes: width of each part; the checkpoint has a tensor for each.
    """

    def __init__(self, in_features: int | Share, output_sizes: Sequence[int | Share], bias: bool = False) -> None:
        super().__init__()
        self.inputs = whole(in_features)
        self.outputs = tuple(map(whole, output_sizes))
        self.output_sizes = tuple(output.size for output in self.outputs)
        self.weight = nn.Parameter(torch.empty(sum(self.output_sizes), self.inputs.size), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(sum(self.output_sizes)), requires_grad=False) if bias else None

    def shares(self, parameter: str) -> tuple[tuple[Share, ...], ...]:
        """For each part of a parameter, what it holds of each dimension of the checkpoint's tensor."""
        return tuple((output,) if parameter == "bias" else (output, self.inputs) for output in self.outputs)

    def after_loading(self) -> None:
        """Of ranks whose outputs are added up, one adds the bias."""
        if self.bias is not None and self.inputs.start:
            self.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x: [num_tokens, in_features] → [num_tokens, sum(output_sizes)]."""
        return linear(x, self.weight, self.bias)

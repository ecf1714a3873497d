"""Token embedding, which may serve as the output projection too."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.linear import linear


class Embedding(nn.Module):
    """Rows of a [vocab_size, hidden_size] table."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, hidden_size), requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: [num_tokens] → [num_tokens, hidden_size]."""
        return F.embedding(input_ids, self.weight)

    def project(self, hidden: Tensor) -> Tensor:
        """hidden: [num_tokens, hidden_size] → logits [num_tokens, vocab_size]."""
        return linear(hidden, self.weight)

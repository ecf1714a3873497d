"""Token embedding, which may serve as the output projection too."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.parallel.group import TensorParallel
from engine.parallel.share import Share, whole
from kernels.linear import linear


class Embedding(nn.Module):
    """Rows of a [vocab_size, hidden_size] table, of which each rank has its share."""

    def __init__(self, vocab_size: int, hidden_size: int, group: TensorParallel) -> None:
        super().__init__()
        self._group = group
        self._rows = group.share_padded(vocab_size)
        self._columns = whole(hidden_size)
        self.weight = nn.Parameter(torch.empty(self._rows.size, hidden_size), requires_grad=False)

    def shares(self, parameter: str) -> tuple[tuple[Share, ...], ...]:
        """See `Linear.shares`."""
        return ((self._rows, self._columns),)

    def forward(self, input_ids: Tensor) -> Tensor:
        """input_ids: [num_tokens] → [num_tokens, hidden_size]."""
        if self._group.size == 1:
            return F.embedding(input_ids, self.weight)
        rows = input_ids - self._rows.start
        is_elsewhere = (rows < 0) | (rows >= self._rows.size)
        found = F.embedding(rows.masked_fill_(is_elsewhere, 0), self.weight)
        return self._group.all_reduce(found.masked_fill_(is_elsewhere.unsqueeze(1), 0))

    def project(self, hidden: Tensor) -> Tensor:
        """hidden: [num_tokens, hidden_size] → logits of this rank's rows, [num_tokens, their number]."""
        return linear(hidden, self.weight)

"""The interface between decoder layers and whatever computes attention."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """The shape of one step. Request i has rows query_starts[i] … query_starts[i] + query_lens[i] - 1.

    The rows of one request follow those of another. Requests with a single row come before all others.
    Its context_lens[i] tokens, the last query_lens[i] of which are this step's, have their keys and values in the
    blocks block_tables[i], token t at block_tables[i, t // block_size], offset t % block_size. Lengths are known on the
    host; block tables are on the device.
    """

    query_starts: np.ndarray  # [num_requests] int64
    query_lens: np.ndarray  # [num_requests] int64, ≥ 1
    context_lens: np.ndarray  # [num_requests] int64, ≥ query_lens
    block_tables: Tensor  # [num_requests, max_blocks] int32; past a request's blocks, any valid ids


class AttentionBackend(Protocol):
    """Causal attention of new tokens over their request's whole context; each token sees itself and all before it."""

    def plan(self, batch: AttentionBatch) -> Any:
        """Work out, once for all layers of a step, what `forward` needs."""
        ...

    def plan_decode(self, block_tables: Tensor, context_lens: Tensor) -> Any:
        """The same for a step of one new token a request, from tensors whose values may change before every replay.

        Args:
            block_tables: [num_requests, max_blocks] int32, on the device.
            context_lens: [num_requests] int32, on the device.
        """
        ...

    def forward(self, query: Tensor, k_cache: Tensor, v_cache: Tensor, plan: Any, window: int | None = None) -> Tensor:
        """Attend, with scale 1/√head_dim. The step's own keys and values are in the caches already.

        Args:
            query: [num_tokens, num_heads, head_dim].
            k_cache, v_cache: [num_blocks, block_size, num_kv_heads, head_dim] of one layer, of query's dtype or
                float8_e4m3fn.
            plan: what `plan` returned for this step.
            window: how many tokens up to itself a token sees, one of the model's `layer_windows`; None: all.

        Returns:
            [num_tokens, num_heads, head_dim].
        """
        ...

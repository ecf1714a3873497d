"""The KV cache's memory: how much a token takes, how many blocks there are, and the tensors themselves."""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.errors import ConfigError
from engine.model_config import ModelConfig

logger = logging.getLogger(__name__)

LayerCache = tuple[Tensor, Tensor]
"""Keys and values of one layer, [num_blocks, block_size, num_kv_heads, head_dim] each."""


@dataclass(frozen=True, slots=True)
class KvCacheSpec:
    """The cache's shape, but for the number of blocks."""

    num_layers: int
    block_size: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, model: ModelConfig, block_size: int, dtype: torch.dtype) -> "KvCacheSpec":
        """The spec for a model, with keys and values stored as `dtype`."""
        return cls(model.num_hidden_layers, block_size, model.num_key_value_heads, model.head_dim, dtype)

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * self.dtype.itemsize

    def fit(self, config: EngineConfig, budget: int, longest: int) -> tuple[int, int]:
        """How many blocks `budget` bytes hold, and how long a request can be with them.

        Raises:
            ConfigError: they hold less than one request of the length that was asked for.
        """
        useful = config.max_num_seqs * -(-longest // self.block_size)
        num_blocks = min(useful, budget // (self.bytes_per_token * self.block_size))
        capacity = max(num_blocks, 0) * self.block_size
        if capacity < longest and (config.max_model_len is not None or capacity < 1):
            raise ConfigError(
                f"{budget / 2**20:,.0f} MiB of memory hold the KV cache of {capacity:,} tokens, "
                f"expected at least max_model_len ({longest:,}, {longest * self.bytes_per_token / 2**20:,.0f} MiB): "
                "raise kv_cache_memory or gpu_memory_utilization, or lower max_model_len"
            )
        if capacity < longest:
            logger.warning("max_model_len is %d instead of %d: that is what the KV cache holds", capacity, longest)
        gibibytes, dtype = capacity * self.bytes_per_token / 2**30, str(self.dtype).removeprefix("torch.")
        logger.info("KV cache: %d blocks of %d tokens, %s, %.2f GiB", num_blocks, self.block_size, dtype, gibibytes)
        return num_blocks, min(longest, capacity)

    def allocate(self, num_blocks: int, device: torch.device) -> list[LayerCache]:
        """Blocks 0 … num_blocks - 1 of every layer, and one more for padding."""

        # zeros: what is masked in attention must still be a number.
        def cache() -> Tensor:
            shape = (num_blocks + 1, self.block_size, self.num_kv_heads, self.head_dim)
            if device.type == "cpu":
                # numpy's zeros take no memory until they are touched; torch writes its own.
                raw = np.zeros(math.prod(shape) * self.dtype.itemsize, dtype=np.uint8)
                return torch.from_numpy(raw).view(self.dtype).view(shape)
            return torch.zeros(shape, dtype=self.dtype, device=device)

        return [(cache(), cache()) for _ in range(self.num_layers)]


def clear_blocks(caches: list[LayerCache], blocks: list[int]) -> None:
    """Zero blocks whose content is no numbers: attention multiplies even masked values, by zero."""
    index = torch.tensor(blocks, device=caches[0][0].device)
    for cache in (cache for layer in caches for cache in layer):
        # Torch fills float8 by index only as bytes.
        (cache.view(torch.uint8) if cache.dtype == torch.float8_e4m3fn else cache).index_fill_(0, index, 0)

"""Weights in the blocks of GGUF files, made and widened by the gguf package."""

import gguf
import torch
from torch import Tensor

KINDS = ("Q8_0", "Q4_0")


def random_blocks(kind: str, channels: int, inner: int) -> Tensor:
    """uint8 [channels, inner/32, bytes of a block], as a file holds them."""
    return encode_blocks(torch.randn(channels, inner) * 0.05 + 0.01, kind)


def encode_blocks(weight: Tensor, kind: str) -> Tensor:
    """float32 [channels, inner] in such blocks."""
    blocks = torch.from_numpy(gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind]))
    return blocks.view(weight.shape[0], weight.shape[1] // 32, -1)


def split_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) as the products take them."""
    codes = blocks[:, :, 2:].flatten(1).contiguous()
    scale = blocks[:, :, :2].contiguous().view(torch.float16).squeeze(2).t().contiguous()
    return codes.view(torch.int8) if blocks.shape[2] == 34 else codes, scale


def wide_weights(blocks: Tensor, kind: str) -> Tensor:
    """float32 [channels, inner]."""
    return torch.from_numpy(gguf.quants.dequantize(blocks.flatten(1).numpy(), gguf.GGMLQuantizationType[kind]))

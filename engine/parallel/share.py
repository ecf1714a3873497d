"""Which part of a dimension a rank holds. Layers are built from shares, and weights are read by them."""

from dataclasses import dataclass

from engine.errors import ConfigError
from engine.model_config import ModelConfig

LARGEST_GROUP = 64


@dataclass(frozen=True, slots=True)
class Share:
    """`size` entries of a dimension of `whole`, from `start` on. Past the end of the whole they are padding."""

    whole: int
    start: int
    size: int

    def __mul__(self, width: int) -> "Share":
        """The same of a dimension that has `width` entries for each of this one's."""
        return Share(self.whole * width, self.start * width, self.size * width)

    @property
    def stop(self) -> int:
        """Where it ends within the whole."""
        return min(self.start + self.size, self.whole)

    def span(self, per: int = 1) -> slice:
        """Where it is in a dimension with one entry for every `per` of the whole.

        Raises:
            ValueError: it begins or ends within such an entry.
        """
        if self.start % per or (self.stop % per and self.stop != self.whole):
            raise ValueError(f"a rank has {self.size} of {self.whole}, expected a multiple of {per}")
        return slice(min(self.start, self.whole) // per, -(-max(self.stop, 0) // per))


def whole(size: int | Share) -> Share:
    """All of a dimension, unless the size is a share already."""
    return size if isinstance(size, Share) else Share(size, 0, size)


def check_divisible(model: ModelConfig, size: int) -> None:
    """Raise ConfigError, with the sizes that work, unless `size` ranks can hold a model together."""
    divided = _divided_sizes(model)
    for name, count in divided.items():
        if not _works(name, count, size):
            found = [str(n) for n in range(1, LARGEST_GROUP + 1) if all(_works(*item, n) for item in divided.items())]
            raise ConfigError(
                f"tensor_parallel_size is {size}, but the model's {name} is {count}, which {size} ranks cannot divide: "
                f"expected one of {', '.join(found)}"
            )


def _divided_sizes(model: ModelConfig) -> dict[str, int]:
    sizes = {"num_attention_heads": model.num_attention_heads, "num_key_value_heads": model.num_key_value_heads}
    if model.num_experts and model.moe_intermediate_size:
        sizes["moe_intermediate_size"] = model.moe_intermediate_size
    if not model.num_experts or model.mlp_only_layers or model.decoder_sparse_step > 1:
        sizes["intermediate_size"] = model.intermediate_size
    return sizes


def _works(name: str, count: int, size: int) -> bool:
    """Heads of keys and values may be fewer than ranks: each is held by several then."""
    return count % size == 0 or (name == "num_key_value_heads" and size % count == 0)

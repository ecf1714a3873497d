"""Text for error messages."""

import torch


def shown(text: str) -> str:
    """A name from a user or a file, quoted, on one line and short enough for an error message."""
    return repr(text) if len(text) <= 200 else f"{text[:200]!r}... ({len(text):,} characters)"


def shape_text(shape: tuple[int | None, ...]) -> str:
    """A tensor's shape; None is a size that does not matter."""
    return str([size if size is not None else "any" for size in shape]).replace("'", "")


def dtype_text(dtype: torch.dtype) -> str:
    """A tensor's type without its package."""
    return str(dtype).removeprefix("torch.")

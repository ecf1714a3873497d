"""A place for files that are made once on a machine and used again."""

import logging
import os
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """`~/.cache/qwen3-serve` if nobody else can write to it, or else a new folder, for this process alone."""
    try:
        folder = Path.home() / ".cache" / "qwen3-serve"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if status.st_uid == os.getuid() and not status.st_mode & 0o022 and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # RuntimeError: this user has no home
        logger.debug("there is no cache folder", exc_info=True)
    return Path(tempfile.mkdtemp(prefix="qwen3-serve-"))

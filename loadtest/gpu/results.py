"""What a part found: a JSON file that is whole after every row, whatever happens next. No torch here."""

import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Record = Callable[[Row], None]
"""Takes a row as soon as it is known."""
Group = Callable[[dict[str, Any], Record], None]
"""Some measurements of a part, which share a process: from the run's surroundings, to rows."""


class Results:
    """The file of one part: the run's surroundings and, under `rows`, what was found. A row with `failed` says why."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def start(self, surroundings: dict[str, Any]) -> None:
        """Begin anew."""
        self._write({**surroundings, "rows": []})

    def read(self) -> dict[str, Any]:
        return json.loads(self._path.read_text(encoding="utf-8"))

    def add(self, row: Row) -> None:
        content = self.read()
        self._write({**content, "rows": [*content["rows"], row]})

    def failures(self) -> list[Row]:
        """The rows that say why there is no result."""
        return [row for row in self.read()["rows"] if "failed" in row]

    def _write(self, content: dict[str, Any]) -> None:
        written = self._path.with_suffix(".part")
        written.write_text(json.dumps(content, indent=1), encoding="utf-8")
        os.replace(written, self._path)


def attempt(record: Record, what: Row, measure: Callable[[], Row]) -> None:
    """Record what is measured or, if that fails, why: the next one is then tried all the same."""
    try:
        row = what | measure()
    except Exception as error:
        traceback.print_exc()
        row = what | {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    record(row)

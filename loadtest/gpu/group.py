"""`python -m loadtest.gpu.group PART GROUP FILE`: one group of a part, in this process. See part_runner.py."""

import sys
import traceback
from pathlib import Path

from loadtest.gpu.parts import PARTS
from loadtest.gpu.results import Results


def main() -> int:
    """Run the group; 1 if it failed as a whole, which a row then says."""
    part, group, file = sys.argv[1:]
    results = Results(Path(file))
    try:
        PARTS[part].groups()[group](results.read(), results.add)
    except Exception as error:
        traceback.print_exc()
        results.add({"group": group, "failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

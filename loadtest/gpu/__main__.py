"""`python -m loadtest.gpu [kernels|golden|engine|peers …]`: one JSON file a part, exit status 1 on a wrong answer."""

import json
import os
import sys
import traceback
from pathlib import Path

import torch

from loadtest.gpu import engine_part, golden_part, kernels_part, peers_part
from loadtest.gpu.ceilings import describe

PARTS = {
    "kernels": kernels_part.run,
    "golden": golden_part.run,
    "engine": engine_part.run,
    "peers": peers_part.run,
}


def main() -> int:
    """Run the parts named on the command line, or all."""
    names = sys.argv[1:] or list(PARTS)
    if unknown := set(names) - set(PARTS):
        print(f"unknown part {', '.join(unknown)}, expected {', '.join(PARTS)}", file=sys.stderr)
        return 2
    if not torch.cuda.is_available():
        print("torch finds no CUDA device; these measurements need one", file=sys.stderr)
        return 2
    surroundings = describe()
    folder = Path(os.environ.get("OUT") or _results_folder(surroundings["gpu"]))
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for name in names:
        try:
            result = PARTS[name](surroundings)
        except Exception:
            # A wrong answer in one part must not cost the others their measurements.
            traceback.print_exc()
            result, failed = {"failed": traceback.format_exc()}, 1
        (folder / f"{name}.json").write_text(json.dumps(surroundings | result, indent=1))
        print(f"wrote {folder / f'{name}.json'}", flush=True)
    return failed


def _results_folder(gpu: str) -> Path:
    return Path(__file__).parents[1] / "results" / gpu.replace(" ", "-").lower()


if __name__ == "__main__":
    sys.exit(main())

"""`python -m loadtest.gpu [kernels|golden|engine|tests|peers …]`: one JSON file a part, status 1 on a wrong answer."""

import os
import sys
from pathlib import Path

import torch

from loadtest.gpu.ceilings import describe
from loadtest.gpu.part_runner import run_groups
from loadtest.gpu.parts import PART_LIMIT_S, PARTS
from loadtest.gpu.results import Results


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
    torch.cuda.empty_cache()  # the groups' processes have the GPU to themselves
    print(*(f"{key}: {value}" for key, value in surroundings.items()), sep="\n", flush=True)
    folder = Path(os.environ.get("OUT") or _results_folder(surroundings["gpu"]))
    folder.mkdir(parents=True, exist_ok=True)
    has_failed = False
    for name in names:
        has_failed |= not run_part(name, surroundings, folder / f"{name}.json")
    return int(has_failed)


def run_part(name: str, surroundings: dict[str, object], path: Path) -> bool:
    """Whether everything in it was right, or not for us to judge."""
    part, results = PARTS[name], Results(path)
    results.start(surroundings)

    def command(group: str) -> list[str]:
        return [sys.executable, "-m", "loadtest.gpu.group", name, group, str(path)]

    run_groups(part.groups(), command, results, part.group_limit_s, PART_LIMIT_S)
    failures = results.failures()
    for row in failures:
        print(f"FAILED {', '.join(str(value)[:200] for key, value in row.items() if key != 'traceback')}", flush=True)
    print(f"wrote {path}: {len(results.read()['rows'])} rows, {len(failures)} failed", flush=True)
    return not failures or not part.is_ours


def _results_folder(gpu: str) -> Path:
    return Path(__file__).parents[1] / "results" / gpu.replace(" ", "-").lower()


if __name__ == "__main__":
    sys.exit(main())

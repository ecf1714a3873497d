"""The other ranks of a replica's model: an actor for each, in the bundles of the replica's placement group."""

from pathlib import Path

import ray
import torch
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup, get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine.errors import ConfigError
from engine.parallel.follower import run_rank


@ray.remote
class EngineRank:
    """A process that is a rank of an engine; see engine.parallel."""

    def run(self, folder: str, rank: int) -> None:
        """Be the rank until the replica is done. Ray shows the actor its bundle's GPU alone."""
        run_rank(Path(folder), rank, device_index=0)


class RankActor:
    """A StartedRank."""

    def __init__(self, rank: int, folder: Path, group: PlacementGroup) -> None:
        bundle = group.bundle_specs[rank]
        self._actor = EngineRank.options(  # type: ignore[attr-defined]  # an actor class since its decorator
            num_cpus=bundle.get("CPU", 0),
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
        ).remote()
        self._ended = self._actor.run.remote(str(folder), rank)

    def wait(self, timeout_s: float) -> str | None:
        ended, _ = ray.wait([self._ended], timeout=timeout_s)
        if not ended:
            return None
        try:
            ray.get(self._ended)
        except RayError as error:
            return " ".join(str(error).split())
        return "its actor ended"

    def kill(self) -> None:
        ray.kill(self._actor)


def start_actor(rank: int, size: int, folder: Path, device: torch.device) -> RankActor:
    """A StartRank, for replicas. Raises ConfigError if the placement group is too small."""
    group = get_current_placement_group()
    count = 0 if group is None else group.bundle_count
    if group is None or count < size:
        raise ConfigError(
            f"tensor_parallel_size is {size}, but the replica's placement group has {count} bundles; expected one for "
            "each rank in placement_group_bundles, see docs/tensor-parallel.md"
        )
    return RankActor(rank, folder, group)

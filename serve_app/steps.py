"""What a replica tells each of its ingresses, at most once for each engine step: outputs, load, cache changes."""

import msgspec

from engine.request import RequestOutput

HEARTBEAT_S = 0.5
"""A replica tells something at least so often, however idle it is."""


class ReplicaLoad(msgspec.Struct, frozen=True, array_like=True):
    """How busy a replica is, after a step."""

    num_running: int
    num_waiting: int
    num_waiting_tokens: int
    """Tokens of waiting requests still to be computed, prefix cache not considered."""
    num_free_blocks: int
    """KV blocks that requests could get: free ones and those only the prefix cache holds."""
    num_blocks: int
    step_s: float
    """Duration of the last step."""
    prefill_tokens_per_s: float
    """Rate at which prompts are computed, averaged over the last seconds that computed any; 0 until known."""
    num_prefill_tokens: int = 0
    """Prompt tokens that running requests have still to compute."""


class StepUpdate(msgspec.Struct, frozen=True, array_like=True):
    """One item of a replica's stream to one ingress. What a slow reader has not read is merged into the next."""

    seq: int
    """Counts the items of a stream from 0; a gap means that something is lost."""
    outputs: list[RequestOutput]
    """Of this ingress's requests only."""
    load: ReplicaLoad
    stored: list[bytes]
    """Keys of KV blocks that the prefix cache can find since the last item; of all blocks in a snapshot."""
    evicted: list[bytes]
    """Keys of KV blocks that it cannot find any more; none of them is in `stored` too."""
    is_snapshot: bool = False
    """`stored` is all there is: forget what earlier items said. The first item is one."""

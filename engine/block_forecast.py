"""How many KV blocks running requests will need at most. No torch here."""

import numpy as np

from engine.request import Request


class BlockForecast:
    """Expects the most blocks that a set of requests will own at once.

    A request is expected to make `expected_output` more tokens however many it has made (a memoryless guess), but no
    more than it may. Sort by tokens still to come, most first; when the j-th ends, the first j are there, each as many
    tokens longer as the j-th had to go: the peak is the largest of these sums. (The bound is LightLLM's.)
    """

    def __init__(self, requests: list[Request], block_size: int, expected_output: float) -> None:
        self._block_size = block_size
        self._expected_output = expected_output
        rows = [self._row(request, request.num_shared_blocks) for request in requests]
        self._used = np.array([used for used, _ in rows])
        self._to_come = np.array([to_come for _, to_come in rows])

    def _row(self, request: Request, num_shared: int) -> tuple[float, float]:
        """Blocks of a request's own for the tokens it has, and blocks still to come."""
        used = -(-request.num_tokens // self._block_size) - num_shared
        return used, min(self._expected_output, request.max_num_tokens - request.num_tokens) / self._block_size

    def peak_with(self, request: Request, num_shared: int) -> float:
        """The peak if this request, `num_shared` of whose blocks others own already, were one of the set."""
        used, to_come = self._row(request, num_shared)
        all_used = np.append(self._used, used)
        all_to_come = np.append(self._to_come, to_come)
        order = np.argsort(-all_to_come)
        count = np.arange(1, len(order) + 1)
        return float((np.cumsum(all_used[order]) + count * all_to_come[order]).max())

    def add(self, request: Request) -> None:
        used, to_come = self._row(request, request.num_shared_blocks)
        self._used = np.append(self._used, used)
        self._to_come = np.append(self._to_come, to_come)

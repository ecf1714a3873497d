"""How many users there are when: the shapes of load."""

import math
from typing import Literal, get_args

from loadtest.load.results import Phase

Shape = Literal["steady", "ramp", "spike", "soak"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
WARM_UP_SHARE = 0.1
MOST_WARM_UP_S = 10.0
RAMP_FACTOR = 1.5
SPIKE_FACTOR = 4


def plan(shape: Shape, users: int, duration_s: float) -> list[Phase]:
    """The phases of a test.

    steady and soak: the same number of users, after a warm-up that does not count. A soak is for a long time, and its
    report compares the end with the beginning.
    ramp: from one user to `users`, half as many more each step.
    spike: a quarter of the users, then all of them, then a quarter again; the SLO must be kept before and after.
    """
    if shape in ("steady", "soak"):
        warm_s = min(MOST_WARM_UP_S, duration_s * WARM_UP_SHARE)
        return [Phase("warm-up", 0, warm_s, users, is_gated=False), Phase(shape, warm_s, duration_s, users)]
    if shape == "spike":
        third, few = duration_s / 3, max(1, users // SPIKE_FACTOR)
        return [
            Phase("before", 0, third, few),
            Phase("spike", third, 2 * third, users, is_gated=False),
            Phase("after", 2 * third, duration_s, few),
        ]
    steps = [1]
    while steps[-1] < users:
        steps.append(min(users, max(steps[-1] + 1, math.ceil(steps[-1] * RAMP_FACTOR))))
    length = duration_s / len(steps)
    return [Phase(f"step {i + 1}", i * length, (i + 1) * length, count) for i, count in enumerate(steps)]

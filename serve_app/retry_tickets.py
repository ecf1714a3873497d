"""When refused requests are to come back, and their place in the queue when they do."""

import math
from collections import deque
from dataclasses import dataclass

MOST_TICKETS = 4096
LONGEST_S = 60
"""The most that a client is told to wait; OpenAI's and Anthropic's clients obey no more."""
HEADROOM = 1.2
"""Time kept for a request that is to come back, for each second that it takes: no two replicas are equally fast."""
GRACE_S = 5.0
"""How late a request may come back and still have its place."""
RETURN_MEMORY = 0.02
"""Weight of one ticket in the share of those that come back."""


@dataclass(slots=True)
class _Ticket:
    identity: int
    arrival_s: float
    due_s: float
    is_used: bool = False


class RetryTickets:
    """Spreads refused requests over the time that it takes to serve them, one after the other.

    All of them told the same time would come back at once, and most in vain. A request that comes back when it was told
    to counts as having arrived when it first did, so that it goes before all that came later. It is known by what it
    asks for, and by whose it is. Of many refused few may come back: their share is measured, and time kept for it only.
    """

    def __init__(self) -> None:
        self._by_due: deque[_Ticket] = deque()
        self._by_identity: dict[int, deque[_Ticket]] = {}
        self._last_due_s = -math.inf
        self._return_share = 1.0

    def __len__(self) -> int:
        return len(self._by_due)

    def issue(self, identity: int, arrival_s: float, service_s: float, now_s: float) -> int:
        """The seconds, at least 1, after which a refused request is to come back.

        Args:
            identity: equal when the same request is sent again.
            arrival_s: when it first came.
            service_s: the time that it takes of all replicas together.
            now_s: the clock.
        """
        self._drop_lapsed(now_s)
        due_s = max(now_s, self._last_due_s) + self._return_share * service_s * HEADROOM
        self._last_due_s = min(due_s, now_s + LONGEST_S)
        seconds = min(LONGEST_S, max(1, math.ceil(self._last_due_s - now_s)))
        if len(self._by_due) < MOST_TICKETS:
            ticket = _Ticket(identity, arrival_s, now_s + seconds)
            self._by_due.append(ticket)
            self._by_identity.setdefault(identity, deque()).append(ticket)
        return seconds

    def claim(self, identity: int, now_s: float) -> float | None:
        """When a request that comes back first came; None if it was not refused before, or was told another time."""
        self._drop_lapsed(now_s)
        tickets = self._by_identity.get(identity)
        if tickets is None or tickets[0].due_s > now_s:
            return None
        ticket = tickets.popleft()
        if not tickets:
            del self._by_identity[identity]
        ticket.is_used = True
        self._return_share += RETURN_MEMORY * (1 - self._return_share)
        return ticket.arrival_s

    def _drop_lapsed(self, now_s: float) -> None:
        """Forget tickets whose time is over."""
        while self._by_due and (self._by_due[0].is_used or self._by_due[0].due_s + GRACE_S < now_s):
            ticket = self._by_due.popleft()
            if ticket.is_used:
                continue
            self._return_share -= RETURN_MEMORY * self._return_share
            tickets = self._by_identity[ticket.identity]
            tickets.popleft()
            if not tickets:
                del self._by_identity[ticket.identity]

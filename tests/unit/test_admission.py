"""What waits is bounded, has an order and a time, and whoever is refused knows when to come back."""

import asyncio
import heapq
import itertools
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.request import EngineRequest, SamplingParams
from serve_app.admission import Admission, entry_of
from serve_app.admission_queue import AT_REPLICAS, IN_QUEUE, REQUEST_TOKENS, REQUESTS_PER_REPLICA, AdmissionQueue, Entry
from serve_app.config import AdmissionConfig
from serve_app.fleet import Fleet
from serve_app.openai.errors import ApiError
from serve_app.retry_tickets import GRACE_S, LONGEST_S, MOST_TICKETS, RetryTickets
from serve_app.steps import ReplicaLoad

TTFT_S = 2.0
CONFIG = AdmissionConfig(max_queued_requests=10, max_queued_tokens=2000)
IDLE = ReplicaLoad(0, 0, 0, 100, 100, 0.01, 0.0)
numbers = itertools.count()


def entry(key: str = "", priority: int = 0, tokens: int = 100) -> Entry:
    return Entry(key, priority, tokens, next(numbers))


def busy_queue(config: AdmissionConfig = CONFIG) -> AdmissionQueue:
    """One whose replicas have so much that it sends nothing more."""
    queue = AdmissionQueue(config, TTFT_S)
    for _ in range(REQUESTS_PER_REPLICA):
        queue.offer(entry(tokens=10_000), 0.0)
    sent, refused = queue.step(0.0, [IDLE])
    assert len(sent) == REQUESTS_PER_REPLICA and not refused
    return queue


def drained(queue: AdmissionQueue) -> list[Entry]:
    """All that waits, in the order in which it is sent when there is room."""
    order = []
    while queue.num_queued:
        queue.num_sent = queue.sent_tokens = 0
        order += queue.step(0.1, [IDLE])[0]
    return order


def test_requests_go_by_priority_then_by_what_their_key_had_then_by_arrival():
    queue = busy_queue()
    first, second, urgent, other = entry("a"), entry("a"), entry("a", -1), entry("b")
    for each in (first, second, urgent, other):
        queue.offer(each, 0.0)
    assert drained(queue) == [urgent, other, first, second]


@pytest.mark.parametrize("tokens", [(100, 100), (400, 50)])
def test_keys_share_by_tokens_however_many_requests_they_send(tokens: tuple[int, int]):
    queue = busy_queue(AdmissionConfig())
    sizes = dict(zip("ab", tokens, strict=True))
    for _ in range(200):
        for key, size in sizes.items():
            for _ in range(3 if key == "a" else 1):
                queue.offer(entry(key, tokens=size), 0.0)
    got = dict.fromkeys("ab", 0)
    for each in drained(queue):
        if min(got.values()) < 5000:
            got[each.key] += each.tokens
    assert abs(got["a"] - got["b"]) <= max(tokens)


def test_whoever_comes_late_has_saved_nothing_up():
    queue = busy_queue()
    for _ in range(3):
        queue.offer(entry("a"), 0.0)
    drained(queue)
    for key in "aabb":
        queue.offer(entry(key), 0.0)
    assert [each.key for each in drained(queue)] in (["a", "b", "a", "b"], ["b", "a", "b", "a"])


def test_generated_tokens_count_as_well():
    queue = busy_queue()
    for key in "ab":
        queue.offer(entry(key), 0.0)
    queue.charge("a", 1000)
    assert [each.key for each in drained(queue)] == ["b", "a"]


def test_where_too_many_wait_the_key_that_asks_for_the_most_loses_its_newest():
    queue = busy_queue()
    greedy = [entry("a") for _ in range(CONFIG.max_queued_requests)]
    for each in greedy:
        queue.offer(each, 0.0)
    queue.offer(modest := entry("b"), 0.0)
    _, refused = queue.step(0.0, [IDLE])
    assert [each for each, _ in refused] == greedy[-1:] and queue.num_refused["queue_full"] == 1
    queue.offer(unimportant := entry("b", priority=1), 0.0)
    _, refused = queue.step(0.0, [IDLE])
    assert [each for each, _ in refused] == [unimportant]
    assert modest in drained(queue)


def test_tokens_are_bounded_but_one_request_may_always_wait():
    queue = busy_queue()
    queue.offer(entry(tokens=50_000), 0.0)
    assert queue.step(0.0, [IDLE]) == ([], [])
    queue.offer(late := entry(tokens=1), 0.0)
    assert [each for each, _ in queue.step(0.0, [IDLE])[1]] == [late]


def test_nothing_waits_longer_than_its_share_of_the_time_to_first_token():
    queue = busy_queue()
    queue.offer(waiting := entry(), 1.0)
    longest_s = IN_QUEUE * TTFT_S
    assert queue.step(1.0 + longest_s - 0.01, [IDLE]) == ([], [])
    sent, refused = queue.step(1.0 + longest_s, [IDLE])
    assert not sent and [each for each, _ in refused] == [waiting] and queue.num_refused["waited_too_long"] == 1


def test_what_all_ingresses_sent_counts_as_the_replicas_tell_it():
    full = ReplicaLoad(0, 9, 900, 100, 100, 0.01, 1000.0, num_prefill_tokens=200)
    for loads, is_sent in (([IDLE], True), ([full], False), ([full, IDLE, full, full], False)):
        queue = AdmissionQueue(AdmissionConfig(), TTFT_S)
        for _ in range(REQUESTS_PER_REPLICA * len(loads) + 1):
            queue.offer(entry(tokens=10), 0.0)
        sent, _ = queue.step(0.0, loads)
        assert (len(sent) > REQUESTS_PER_REPLICA * len(loads)) == is_sent


def serve(
    queue: AdmissionQueue, now_s: float, num_requests: int, tokens_per_s: float, loads: list[ReplicaLoad]
) -> float:
    """Send requests at once, and let them have their first tokens one after the other. Returns the time after that."""
    for _ in range(num_requests):
        queue.offer(entry(tokens=100), now_s)
    sent, _ = queue.step(now_s, loads)
    for each in sent:
        now_s += each.tokens / tokens_per_s
        queue.started(each, now_s)
    return now_s


def test_the_drain_rate_is_what_was_ahead_over_the_time_that_it_took():
    queue, now_s = AdmissionQueue(AdmissionConfig(), TTFT_S), 0.0
    for _ in range(100):
        now_s = serve(queue, now_s, 1, 5000, [IDLE]) + 0.1
    assert queue.rate.per_s == pytest.approx(5000, rel=0.15)
    now_s = serve(queue, now_s, 1, 3, []) + 0.1  # nothing is learnt about replicas while there is none
    assert queue.rate.per_s == pytest.approx(5000, rel=0.15)
    serve(queue, now_s, 20, 1000, [IDLE])  # one of many on its way tells more than a hundred that were alone
    assert queue.rate.per_s == pytest.approx(1000, rel=0.2)


Action = tuple[str, int, int]
actions = st.lists(
    st.tuples(st.sampled_from(["offer", "step", "start", "end", "wait"]), st.integers(0, 5), st.integers(1, 1500)),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(actions)
def test_no_order_of_events_breaks_a_bound_or_loses_a_request(events: list[Action]):
    queue, now_s = AdmissionQueue(CONFIG, TTFT_S), 0.0
    alive: list[Entry] = []
    for name, which, size in events:
        if name == "offer":
            alive.append(entry("abc"[which % 3], which % 2, size))
            queue.offer(alive[-1], now_s)
        elif name == "wait":
            now_s += size / 1000
        elif alive and name == "start":
            queue.started(alive[which % len(alive)], now_s)
        elif alive and name == "end":
            queue.ended(alive.pop(which % len(alive)))
        num_sent = queue.num_sent
        sent, refused = queue.step(now_s, [IDLE])
        for each, seconds in refused:
            alive.remove(each)
            assert 1 <= seconds <= LONGEST_S
        window = AT_REPLICAS * TTFT_S * queue.rate.per_s
        assert queue.num_sent <= REQUESTS_PER_REPLICA or not sent or queue.sent_tokens <= window
        assert len(sent) == queue.num_sent - num_sent
        assert queue.num_queued <= CONFIG.max_queued_requests
        assert queue.num_queued <= 1 or queue.queued_tokens <= CONFIG.max_queued_tokens
        waiting = [each for each in alive if each in queue._by_age]
        assert len(waiting) == queue.num_queued and sum(each.tokens for each in waiting) == queue.queued_tokens
        assert all(now_s - each.queued_s < IN_QUEUE * TTFT_S for each in waiting)
        assert sum(each.tokens for each in alive if each.is_sent) == queue.sent_tokens
    for each in alive:
        queue.ended(each)
    assert (queue.num_queued, queue.queued_tokens, queue.num_sent, queue.sent_tokens) == (0, 0, 0, 0)
    assert not queue._queues and not queue._by_age


@dataclass
class Outcome:
    waits_s: list[float] = field(default_factory=list)
    """Of those served, from when they (last) came to their first token."""
    num_returned_served: int = 0
    num_returned_refused: int = 0
    most_queued: int = 0
    served: dict[str, int] = field(default_factory=dict)
    """Tokens, by key."""


def overload(
    capacity: float,
    times: float,
    duration_s: float,
    obeys: bool,
    num_seats: int = 10**6,
    keys: str = "a",
    num_quick: int = 0,
) -> Outcome:
    """Requests of a few hundred tokens come at random at a multiple of what one replica can do.

    Args:
        capacity: tokens it computes in a second.
        times: of that, what comes.
        duration_s: for how long.
        obeys: whether those refused come back when they are told to.
        num_seats: so many run at once, for half a second each.
        keys: whose requests they are, at random.
        num_quick: so many came before, one after the other, and had their first tokens at once.
    """
    chance, queue, found = random.Random(0), AdmissionQueue(AdmissionConfig(), TTFT_S), Outcome()
    for number in range(-num_quick, 0):
        serve(queue, number / 100, 1, 50_000, [IDLE])
    coming: list[tuple[float, int, Entry, bool]] = []
    came_s = 0.0
    while came_s < duration_s:
        tokens = chance.randint(50, 400) + REQUEST_TOKENS
        came_s += chance.expovariate(times * min(capacity, num_seats / 0.5 * 257) / 257)
        heapq.heappush(coming, (came_s, next(numbers), entry(chance.choice(keys), tokens=tokens), False))
    at_replica: list[tuple[Entry, bool]] = []
    came: dict[Entry, tuple[float, bool]] = {}
    seats: list[float] = []
    step_s, work, now_s = 0.01, 0.0, 0.0
    while now_s < duration_s:
        now_s += step_s
        while coming and coming[0][0] <= now_s:
            at_s, _, each, is_back = heapq.heappop(coming)
            came[each] = (at_s, is_back)
            queue.offer(each, now_s)
        tokens = sum(each.tokens for each, _ in at_replica)
        sent, refused = queue.step(now_s, [ReplicaLoad(0, len(at_replica), tokens, 9, 9, step_s, capacity)])
        at_replica += [(each, came[each][1]) for each in sent]
        for each, seconds in refused:
            found.num_returned_refused += came[each][1]
            if obeys:
                again = Entry(each.key, each.priority, each.tokens, each.identity)
                heapq.heappush(coming, (now_s + seconds + chance.uniform(0, 0.05), next(numbers), again, True))
        seats = [until_s for until_s in seats if until_s > now_s]
        work = work + capacity * step_s if at_replica else 0.0
        while at_replica and len(seats) < num_seats and work >= at_replica[0][0].tokens:
            each, is_back = at_replica.pop(0)
            work -= each.tokens
            seats.append(now_s + chance.uniform(0.25, 0.75))
            queue.started(each, now_s)
            found.waits_s.append(now_s - came[each][0])
            found.num_returned_served += is_back
            found.served[each.key] = found.served.get(each.key, 0) + each.tokens
        found.most_queued = max(found.most_queued, queue.num_queued)
    return found


@pytest.mark.parametrize("num_seats", [10**6, 16], ids=["by prompts", "by seats"])
@pytest.mark.parametrize("obeys", [False, True], ids=["they give up", "they come back"])
def test_three_times_what_the_replicas_can_do(num_seats: int, obeys: bool):
    """Those admitted keep the time to first token, no capacity is wasted, and whoever comes back in time is let in."""
    capacity, duration_s = 8000.0, 20.0
    found = overload(capacity, 3.0, duration_s, obeys, num_seats)
    waits = sorted(found.waits_s)
    assert waits[int(0.99 * len(waits))] <= TTFT_S
    possible = min(capacity / 257, num_seats / 0.5)
    assert len(waits) >= 0.9 * possible * duration_s
    assert found.most_queued <= 2 * possible * TTFT_S
    if obeys:
        assert found.num_returned_served >= 50
        assert found.num_returned_refused <= 0.05 * found.num_returned_served


def test_overload_after_a_quiet_time():
    """Alone, requests find a seat at once: that says nothing about how long many wait for one."""
    found = overload(8000.0, 3.0, 5.0, obeys=False, num_seats=8, num_quick=2000)
    assert max(found.waits_s) <= 1.25 * TTFT_S


def test_under_overload_every_key_gets_its_share():
    found = overload(8000.0, 3.0, 20.0, obeys=False, keys="aaaaaaaabc")
    least, most = min(found.served.values()), max(found.served.values())
    assert len(found.served) == 3 and most <= 2 * least  # the two modest ones want a little less than a third


def test_below_capacity_nobody_is_refused():
    found = overload(8000.0, 0.7, 20.0, obeys=True)
    assert found.num_returned_served == found.num_returned_refused == 0


def test_refused_requests_are_told_times_one_after_the_other():
    tickets = RetryTickets()
    assert [tickets.issue(number, 0.0, 0.5, 0.0) for number in range(5)] == [1, 2, 2, 3, 3]
    assert tickets.claim(0, 0.5) is None  # too early
    assert tickets.claim(0, 1.2) == 0.0
    assert tickets.claim(0, 1.2) is None  # once only
    assert tickets.claim(4, 3.0 + GRACE_S + 0.1) is None  # too late


def test_times_to_come_back_and_what_is_kept_for_them_are_bounded():
    tickets = RetryTickets()
    told = [tickets.issue(number % 7, 0.0, 1.0, 0.0) for number in range(2 * MOST_TICKETS)]
    assert max(told) == LONGEST_S and len(tickets) == MOST_TICKETS
    assert [tickets.claim(0, float(LONGEST_S)) for _ in range(3)] == [0.0] * 3
    tickets.issue(0, 0.0, 1.0, LONGEST_S + GRACE_S + 1.0)
    assert len(tickets) == 1


def test_time_is_kept_only_for_those_that_come_back():
    tickets, now_s, told = RetryTickets(), 0.0, []
    for number in range(2000):
        told.append(tickets.issue(number, now_s, 0.5, now_s))
        now_s += 0.1
    assert max(told) > 20 and max(told[-100:]) == 1


def request(prompt: list[int]) -> EngineRequest:
    return EngineRequest(request_id="r", prompt_token_ids=prompt, params=SamplingParams())


def test_the_same_request_of_the_same_key_is_known_again():
    made = [entry_of(key, [request(prompt)] * 2, 3) for key in "ab" for prompt in ([1, 2, 3], [1, 2, 4], [1, 2, 3])]
    identities = [each.identity for each in made]
    assert identities[0] == identities[2] != identities[1] and len(set(identities)) == 4
    assert made[0].tokens == 3 + 2 * REQUEST_TOKENS


async def test_a_waiting_request_goes_on_when_another_has_its_first_token():
    admission = Admission(AdmissionConfig(), TTFT_S, Fleet())
    entries = [entry(tokens=10_000) for _ in range(REQUESTS_PER_REPLICA + 1)]
    order = []

    async def run(number: int) -> None:
        async with admission.admitted(entries[number]):
            order.append(number)
            await asyncio.sleep(0.01)
            admission.received(entries[number], 1)
            await asyncio.sleep(0.05)

    await asyncio.gather(*(run(number) for number in range(len(entries))))
    assert order == list(range(len(entries)))
    assert (admission.queue.num_queued, admission.queue.num_sent) == (0, 0)


async def test_whoever_leaves_frees_the_place_and_whoever_stays_too_long_is_told_when_to_come_back():
    admission = Admission(CONFIG, 0.2, Fleet())

    async def run() -> None:
        async with admission.admitted(entry(tokens=10_000)):
            await asyncio.sleep(60)

    running = [asyncio.create_task(run()) for _ in range(REQUESTS_PER_REPLICA)]
    leaving = asyncio.create_task(run())
    await asyncio.sleep(0)
    assert admission.queue.num_queued == 1
    leaving.cancel()
    await asyncio.gather(leaving, return_exceptions=True)
    assert admission.queue.num_queued == 0
    with pytest.raises(ApiError) as refused:
        await run()
    assert refused.value.status == 429 and refused.value.retry_after_s is not None
    assert 1 <= refused.value.retry_after_s <= LONGEST_S
    assert str(refused.value.retry_after_s) in refused.value.message
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    assert (admission.queue.num_queued, admission.queue.num_sent) == (0, 0) and not admission._waiting

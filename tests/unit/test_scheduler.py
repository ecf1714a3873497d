"""The scheduler and the block pool under random traces: the invariants hold after every step, and everything ends."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.block_pool import BlockPool, block_keys, extend_block_keys
from engine.request import EngineRequest, FinishReason, Request, SamplingParams
from engine.scheduler import Scheduler, Step

MAX_MODEL_LEN = 40
EOS = 9


class FakeModel:
    """Stands in for the device: the KV cache as a map of what was written, and a next token that depends on all of it.

    Writing and reading go through block tables and slots alone, so a block with two writers, a stale block, a slot
    reused too early or a gap in what was computed changes the tokens that come out.
    """

    def __init__(self, num_blocks: int, block_size: int, max_num_seqs: int) -> None:
        self.block_size = block_size
        self.content: list[list[tuple[int, int] | None]] = [[None] * block_size for _ in range(num_blocks)]
        self.token_table: list[list[int]] = [[] for _ in range(max_num_seqs)]

    def launch(self, step: Step) -> list[int]:
        """Run a step; returns what it samples."""
        for request in step.admitted:
            self.token_table[request.slot] = list(request.token_ids)
        sampled = []
        for index, (request, start, num_new) in enumerate(
            zip(step.requests, step.starts, step.num_new_tokens, strict=True)
        ):
            tokens = self.token_table[request.slot]
            for position in range(start, start + num_new):
                block = request.block_table[position // self.block_size]
                self.content[block][position % self.block_size] = (position, tokens[position])
            if index in step.sampling:
                seen = [
                    self.content[request.block_table[position // self.block_size]][position % self.block_size]
                    for position in range(start + num_new)
                ]
                assert seen == list(enumerate(tokens)), "the cache does not hold the request's own tokens"
                tokens.append(next_token(tokens))
                sampled.append(tokens[-1])
        return sampled


def next_token(token_ids: list[int]) -> int:
    value = 7
    for token_id in token_ids:
        value = (value * 31 + token_id + 1) % 1_000_003
    return value % 10


def expected_output(prompt: list[int], params: SamplingParams) -> list[int]:
    """What the fake model says to a request that runs alone."""
    tokens = list(prompt)
    while len(tokens) < min(MAX_MODEL_LEN, len(prompt) + (params.max_tokens or MAX_MODEL_LEN)):
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS:
            break
    return tokens[len(prompt) :]


def check_invariants(scheduler: Scheduler, live: list[Request]) -> None:
    pool, block_size = scheduler.pool, scheduler.block_size
    owners = Counter(block for request in scheduler.running for block in request.block_table)
    assert pool.num_free + pool.num_cached + len(owners) == pool.num_blocks
    assert pool.num_owned == len(owners)
    for block, count in owners.items():
        assert pool._ref_counts[block] == count
    assert set(pool._free).isdisjoint(pool._cached)
    assert set(pool._free).isdisjoint(owners) and set(pool._cached).isdisjoint(owners)
    for key, block in pool._block_of.items():
        assert pool._key_of[block] == key
        assert block not in pool._free
    for request in scheduler.running:
        assert len(request.block_table) * block_size >= request.num_computed_tokens
        assert request.num_computed_tokens < request.num_tokens
        assert request.num_pending_tokens in (0, 1)
    # The block that a request writes next has no other owner.
    for request in scheduler.running:
        index = request.num_computed_tokens // block_size
        assert all(owners[block] == 1 for block in request.block_table[index:])
    slots = [request.slot for request in scheduler.running]
    assert len(set(slots)) == len(slots) <= scheduler.max_num_seqs
    assert sorted(id(r) for r in scheduler.running + scheduler.waiting) == sorted(id(r) for r in live)
    assert all(request.slot == -1 and not request.block_table for request in scheduler.waiting)
    missing = [len(request.token_ids) - 1 - request.num_computed_tokens for request in scheduler.running]
    assert scheduler.num_prefill_tokens == sum(max(0, count) for count in missing)
    assert scheduler.num_waiting_tokens == sum(request.num_tokens for request in scheduler.waiting)


def replay_events(pool: BlockPool, known_keys: set[bytes]) -> None:
    """Bring a follower's view of the prefix cache up to date, as a router does, and compare."""
    stored, evicted = pool.take_events()
    assert len({*stored, *evicted}) == len(stored) + len(evicted) <= 2 * pool.num_blocks
    assert known_keys.isdisjoint(stored) and known_keys.issuperset(evicted)
    known_keys.difference_update(evicted)
    known_keys.update(stored)
    assert known_keys == set(pool.keys())


def make_timeline(specs: list[tuple]) -> list[tuple[int, int | None, Request]]:
    """When each request arrives, when it is aborted if ever, and the request."""
    timeline = []
    for index, (prefix, length, max_tokens, priority, arrival, abort, salt) in enumerate(specs):
        prompt = [(prefix * 3 + position) % 10 if position < 12 else index % 10 for position in range(length)]
        params = SamplingParams(max_tokens=min(max_tokens, MAX_MODEL_LEN - length))
        source = EngineRequest(
            request_id=str(index), prompt_token_ids=prompt, params=params, priority=priority, cache_salt=salt
        )
        timeline.append((arrival, abort, Request(source, (EOS,), MAX_MODEL_LEN)))
    return timeline


def fail_launch(scheduler: Scheduler, step: Step, in_flight: tuple[Step, list[int]] | None) -> None:
    """As the engine does where a step runs out of memory."""
    if in_flight:
        scheduler.update(*in_flight)
    scheduler.take_back(step)


requests_strategy = st.lists(
    st.tuples(
        st.integers(0, 3),  # shared prefix
        st.integers(1, 20),  # prompt length
        st.integers(1, 25),  # max_tokens
        st.integers(0, 2),  # priority
        st.integers(0, 30),  # arrives at step
        st.one_of(st.none(), st.integers(0, 40)),  # aborted at step
        st.sampled_from(["", "", "tenant"]),  # salt
    ),
    min_size=1,
    max_size=12,
)


@settings(max_examples=300, deadline=None)
@given(
    requests_strategy,
    st.sampled_from([1, 2, 4]),
    st.integers(0, 20),
    st.integers(1, 5),
    st.integers(1, 30),
    st.booleans(),
    st.sampled_from([0.0, 0.1, 0.5]),
    st.booleans(),
    st.integers(1, 20),
    st.sets(st.integers(0, 60), max_size=6),
)
def test_random_traces(
    specs, block_size, spare_blocks, max_num_seqs, max_batched, caching, watermark, overlap, take_every, failing
):
    num_blocks = -(-MAX_MODEL_LEN // block_size) + spare_blocks
    pool = BlockPool(num_blocks, caching)
    scheduler = Scheduler(pool, block_size, max_num_seqs, max_batched, watermark)
    model = FakeModel(num_blocks, block_size, max_num_seqs)
    in_flight = None
    timeline = make_timeline(specs)
    live: list[Request] = []
    everyone = [request for _, _, request in timeline]
    known_keys: set[bytes] = set()
    for now in range(5_000):
        for arrival, abort, request in timeline:
            if arrival == now:
                scheduler.add(request)
                live.append(request)
            if abort is not None and max(abort, arrival) == now and request in live:
                scheduler.finish(request, FinishReason.ABORT)
                live.remove(request)
        check_invariants(scheduler, live)
        if now % take_every == 0:
            replay_events(pool, known_keys)
        step = scheduler.schedule()
        if not in_flight:
            assert bool(step.requests) == bool(live), "a step does something whenever there is something to do"
        assert sum(step.num_new_tokens) <= max_batched
        assert all(count >= 1 for count in step.num_new_tokens)
        assert len(set(map(id, step.requests))) == len(step.requests)
        if now in failing:
            fail_launch(scheduler, step, in_flight)
            launched = in_flight = None
        else:
            launched = (step, model.launch(step)) if step.requests else None
            if overlap:
                launched, in_flight = in_flight, launched
        if launched:
            scheduler.update(*launched)
        live = [request for request in live if request.finish_reason is None]
        check_invariants(scheduler, live)
        if now > 40 and not live and not in_flight:
            break
    assert not live, "every request ends"
    assert pool.num_owned == 0
    for request in everyone:
        expected = expected_output(request.token_ids[: request.num_prompt_tokens], request.params)
        assert request.finish_reason is FinishReason.ABORT or request.output_token_ids == expected


def make_request(name: str, prompt: list[int], max_tokens: int = 4, **fields) -> Request:
    source = EngineRequest(
        request_id=name, prompt_token_ids=prompt, params=SamplingParams(max_tokens=max_tokens), **fields
    )
    return Request(source, (), MAX_MODEL_LEN)


def run_to_end(scheduler: Scheduler) -> list[list[str]]:
    """The names in each step, the new token always being 1."""
    steps = []
    while scheduler.running or scheduler.waiting:
        step = scheduler.schedule()
        steps.append([request.request_id for request in step.requests])
        scheduler.update(step, [1] * len(step.sampling))
    return steps


def test_decode_goes_on_while_a_long_prompt_is_computed_in_chunks():
    scheduler = Scheduler(BlockPool(64), 4, max_num_seqs=4, max_num_batched_tokens=8)
    scheduler.add(make_request("decode", [0] * 4, max_tokens=6))
    scheduler.update(scheduler.schedule(), [1])
    scheduler.add(make_request("long", [2] * 30, max_tokens=1))
    for _ in range(4):
        step = scheduler.schedule()
        assert step.requests[0].request_id == "decode" and step.num_new_tokens == [1, 7]
        scheduler.update(step, [1] * len(step.sampling))


def test_priority_then_arrival_decides_who_is_admitted():
    scheduler = Scheduler(BlockPool(64), 4, max_num_seqs=1, max_num_batched_tokens=64)
    for name, priority in (("a", 1), ("b", 0), ("c", 1), ("d", 0)):
        scheduler.add(make_request(name, [1, 2, 3], max_tokens=1, priority=priority))
    assert run_to_end(scheduler) == [["b"], ["d"], ["a"], ["c"]]


def test_the_lowest_priority_newest_request_is_preempted():
    pool = BlockPool(12)
    scheduler = Scheduler(pool, 4, max_num_seqs=4, max_num_batched_tokens=64, watermark=0)
    scheduler._expected_output = 0  # admit all at once, so that blocks run out
    requests = [
        make_request(name, [index] * 15, 20, priority=p) for index, (name, p) in enumerate([("a", 0), ("b", 1)])
    ]
    requests.append(make_request("c", [3] * 15, 20, priority=0))
    for request in requests:
        scheduler.add(request)
    assert next(map(len, run_to_end(scheduler))) == 3
    assert [request.num_preemptions > 0 for request in requests] == [False, True, True]
    assert all(request.num_output_tokens == 20 for request in requests)


def test_a_hit_never_covers_the_last_prompt_token():
    scheduler = Scheduler(BlockPool(16), 4, max_num_seqs=4, max_num_batched_tokens=64)
    scheduler.add(make_request("cold", list(range(8)), max_tokens=1))
    run_to_end(scheduler)
    warm = make_request("warm", list(range(8)), max_tokens=1)
    scheduler.add(warm)
    step = scheduler.schedule()
    assert warm.num_cached_tokens == 4 and step.num_new_tokens == [4]


def test_salts_keep_tenants_apart():
    scheduler = Scheduler(BlockPool(16), 4, max_num_seqs=4, max_num_batched_tokens=64)
    scheduler.add(make_request("one", list(range(9)), max_tokens=1, cache_salt="one"))
    run_to_end(scheduler)
    for salt, hit in (("two", 0), ("", 0), ("one", 8)):
        request = make_request(salt or "none", list(range(9)), max_tokens=1, cache_salt=salt)
        scheduler.add(request)
        run_to_end(scheduler)
        assert request.num_cached_tokens == hit


def test_the_longest_unused_tail_is_reused_first():
    pool = BlockPool(4)
    scheduler = Scheduler(pool, 4, max_num_seqs=4, max_num_batched_tokens=64, watermark=0)
    scheduler.add(make_request("a", [1] * 8, max_tokens=1))
    run_to_end(scheduler)
    scheduler.add(make_request("b", [2] * 11, max_tokens=1))  # needs three blocks: two free ones and a's tail
    run_to_end(scheduler)
    again = make_request("again", [1] * 8 + [5], max_tokens=1)
    scheduler.add(again)
    scheduler.schedule()
    assert again.num_cached_tokens == 4


def test_admission_expects_growth():
    """Requests that will need all blocks to end are not started together, and none is preempted."""
    pool = BlockPool(20)
    scheduler = Scheduler(pool, 2, max_num_seqs=8, max_num_batched_tokens=64)
    for index in range(6):
        scheduler.add(make_request(str(index), [index] * 4, max_tokens=20))
    steps = run_to_end(scheduler)
    assert scheduler.counters.num_preemptions == 0
    assert max(map(len, steps)) <= 2


@pytest.mark.parametrize(
    ("reason", "num_blocks", "max_num_seqs", "max_num_batched_tokens"),
    [("tokens", 64, 4, 8), ("seqs", 64, 1, 64), ("blocks", 4, 4, 64), (None, 64, 4, 64)],
)
def test_the_first_waiting_request_says_why(reason, num_blocks, max_num_seqs, max_num_batched_tokens):
    scheduler = Scheduler(BlockPool(num_blocks), 4, max_num_seqs, max_num_batched_tokens)
    for index in range(2):
        scheduler.add(make_request(str(index), [index] * 8, max_tokens=8))
    step = scheduler.schedule()
    assert scheduler.waiting_for == reason
    scheduler.update(step, [1] * len(step.sampling))
    run_to_end(scheduler)
    assert scheduler.waiting_for is None
    assert scheduler.counters.num_finished == {"stop": 0, "length": 2, "abort": 0, "error": 0}


def test_keys_are_a_chain():
    first: list[bytes] = []
    extend_block_keys(first, [1, 2, 3, 4, 5], 2, "")
    second: list[bytes] = []
    extend_block_keys(second, [9, 2, 3, 4, 5], 2, "")
    assert len(first) == 2 and not set(first) & set(second)
    grown = list(first)
    extend_block_keys(grown, [1, 2, 3, 4, 5, 6], 2, "")
    whole: list[bytes] = []
    extend_block_keys(whole, [1, 2, 3, 4, 5, 6], 2, "")
    assert grown == whole == block_keys([1, 2, 3, 4, 5, 6], 2, "") and grown[:2] == first


def test_events_are_net_and_bounded():
    pool = BlockPool(2)

    def store(*keys: bytes) -> None:
        blocks = pool.allocate(len(keys))
        for block, key in zip(blocks, keys, strict=True):
            pool.register(block, key)
        pool.release(blocks)

    store(b"early")
    assert pool.take_events() == ([b"early"], []), "the first call tells all there are"
    assert pool.take_events() == ([], [])
    store(b"a", b"b")
    assert pool.take_events() == ([b"a", b"b"], [b"early"])
    for index in range(1000):
        store(b"%d" % index, b"b")
        store(b"a", b"b")
    assert pool.take_events() == ([], []) and set(pool.keys()) == {b"a", b"b"}


def test_discarded_blocks_are_not_found_again():
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    pool.register(blocks[0], b"good")
    pool.share([blocks[0]])
    pool.register(blocks[1], b"bad")
    assert pool.discard(blocks) == [blocks[1]]
    assert pool.find_prefix([b"good"]) == [blocks[0]] and pool.find_prefix([b"bad"]) == []


def test_more_blocks_than_there_are_is_an_error():
    with pytest.raises(ValueError, match="5 blocks asked for, 4 available"):
        BlockPool(4).allocate(5)

"""loadtest/load: what is read from a stream, what is made of a trace, and the numbers, on samples known beforehand."""

import io
import json
import random
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from loadtest.load.conversations import Conversation, system_prompts
from loadtest.load.phases import SHAPES, plan
from loadtest.load.results import Phase, Slo, attainment, drift, knee, missed, percentiles_ms, summarize
from loadtest.load.samples import Outcome, Sample, read_samples, write_samples
from loadtest.load.stream import Reply, events, output_text, read_reply
from loadtest.load.traces import Arrival, Scaling, prompt_of, read_trace, scaled


class Wire:
    """Lines as a socket gives them."""

    def __init__(self, text: str) -> None:
        self._lines = io.BytesIO(text.encode())

    def readline(self, sep: bytes) -> bytes:
        assert sep == b"\n"
        return self._lines.readline()


def chat_chunk(**delta: Any) -> str:
    return f"data: {json.dumps({'choices': [{'index': 0, 'delta': delta}]})}\n\n"


USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}
STREAM = (
    chat_chunk(role="assistant", content="")
    + ": a comment\n\n"
    + chat_chunk(content="a b")
    + chat_chunk(reasoning_content="hm")
    + chat_chunk(content=" c")
    + f"data: {json.dumps({'choices': [], 'usage': USAGE})}\n\n"
)


def clock(*times: float) -> Iterator[float]:
    return iter(times)


def test_only_chunks_with_output_are_timed():
    times, reply = clock(0.1, 0.2, 0.3, 0.5, 0.6), Reply()
    outcome = read_reply(Wire(STREAM + "data: [DONE]\n\n"), reply, lambda: next(times))
    assert outcome is Outcome.COMPLETED and reply.chunk_s == [0.2, 0.3, 0.5]
    assert reply.text == "a b c" and reply.usage == USAGE


def test_a_stream_that_just_ends_has_failed():
    reply = Reply()
    assert read_reply(Wire(STREAM), reply, lambda: 0.0) is Outcome.FAILED and "[DONE]" in reply.error


def test_an_error_in_the_stream_is_named():
    reply = Reply()
    error = 'event: error\ndata: {"error": {"code": "service_unavailable"}}\n\n'
    assert read_reply(Wire(chat_chunk(content="x") + error), reply, lambda: 1.0) is Outcome.FAILED
    assert reply.error == "service_unavailable" and reply.chunk_s == [1.0]


def test_a_client_leaves_after_so_many_chunks():
    reply = Reply()
    assert read_reply(Wire(STREAM), reply, lambda: 0.0, most_chunks=2) is Outcome.CANCELLED and len(reply.chunk_s) == 2


def test_events_may_have_names_and_several_lines():
    wire = Wire("event: x\ndata: 1\ndata:2\n\r\ndata: last")
    assert list(events(wire)) == [("x", b"1\n2")]


def test_completions_carry_text_where_chats_have_deltas():
    assert output_text({"choices": [{"text": "a"}]}) == "a"
    assert output_text({"choices": [{"text": "", "finish_reason": "stop"}]}) is None
    assert output_text({"choices": [{"delta": {"tool_calls": [{}]}}]}) == ""


def sample(outcome: Outcome = Outcome.COMPLETED, sent_s: float = 0.0, **fields: Any) -> Sample:
    known = {"status": 200, "duration_s": 1.0, "chunk_s": (0.2, 0.4, 0.8), "completion_tokens": 4, "prompt_tokens": 10}
    return Sample(sent_s=sent_s, outcome=outcome, **known | fields)


def test_measures_of_one_request():
    measured = sample(scheduled_s=-0.25)
    assert measured.ttft_s == 0.2 and measured.lag_s == 0.25
    assert measured.tpot_s == pytest.approx(0.6 / 3)
    assert measured.itl_s == pytest.approx([0.2, 0.4])
    alone = sample(chunk_s=(0.2,), completion_tokens=1)
    assert alone.tpot_s is None and alone.itl_s == []
    assert sample(Outcome.REJECTED, chunk_s=(), completion_tokens=0).ttft_s is None
    unseen = sample(chunk_s=(), completion_tokens=2)  # of tokens without text
    assert unseen.ttft_s == unseen.duration_s and Slo(ttft_s=1.0).is_met(unseen) and not Slo(ttft_s=0.9).is_met(unseen)


def test_percentiles_interpolate_and_nothing_has_none():
    found = percentiles_ms([0.001 * value for value in range(1, 102)] + [None])
    assert found == {"p50": 51.0, "p90": 91.0, "p99": 100.0, "mean": 51.0, "max": 101.0}
    assert percentiles_ms([]) == {}


def test_a_good_request_keeps_every_limit():
    assert Slo().is_met(sample()) and Slo(0.2, 0.2001, 1.0).is_met(sample())
    for slo in (Slo(ttft_s=0.19), Slo(tpot_s=0.19), Slo(e2e_s=0.99)):
        assert not slo.is_met(sample())
    assert Slo(tpot_s=0.01).is_met(sample(chunk_s=(0.2,), completion_tokens=1))
    assert not Slo().is_met(sample(Outcome.CANCELLED))


def test_refused_requests_count_against_the_slo_and_cancelled_ones_do_not():
    samples = [
        sample(),
        sample(),
        sample(Outcome.REJECTED, chunk_s=()),
        sample(Outcome.FAILED),
        sample(Outcome.CANCELLED),
    ]
    assert attainment(samples, Slo()) == 0.5
    found = summarize(samples, Slo(), 2.0)
    assert found["requests"] == {"cancelled": 1, "completed": 2, "failed": 1, "rejected": 1}
    assert found["requests_per_s"] == found["goodput_per_s"] == 1.0 and found["output_tokens_per_s"] == 4.0
    assert attainment([], Slo()) == 0.0 and "dispatch_lag_ms" not in found


def test_the_knee_is_the_best_step_that_keeps_the_slo():
    steps = [{"slo_attainment": a, "goodput_per_s": g} for a, g in ((1.0, 2.0), (0.99, 5.0), (0.5, 9.0), (0.96, 4.0))]
    assert knee(steps, 0.95) == 1 and knee(steps[2:3], 0.95) is None


def test_drift_compares_the_last_third_with_the_first():
    samples = [sample(sent_s=i, chunk_s=(0.1 if i < 6 else 0.2, 0.5, 0.8)) for i in range(9)]
    assert drift(samples)["ttft"] == 2.0 and drift(samples[:2]) == {}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("users", [1, 3, 50])
def test_phases_follow_each_other_to_the_end(shape: Any, users: int):
    phases = plan(shape, users, 60.0)
    assert phases[0].start_s == 0 and phases[-1].end_s == pytest.approx(60.0)
    assert all(a.end_s == pytest.approx(b.start_s) for a, b in pairwise(phases))
    assert max(phase.users for phase in phases) == users and any(phase.is_gated for phase in phases)


def test_a_ramp_grows_by_half():
    assert [phase.users for phase in plan("ramp", 10, 60.0)] == [1, 2, 3, 5, 8, 10]


def test_why_a_test_fails():
    phases = [Phase("before", 0, 1, 1), Phase("spike", 1, 2, 4, is_gated=False)]
    good, bad = (
        {"phase": "x", "requests": {"completed": 9}, "slo_attainment": a, "goodput_per_s": 1} for a in (1.0, 0.1)
    )
    assert missed("spike", phases, [good, bad], 0.95) == ""
    assert "less than 95%" in missed("spike", phases, [bad, good], 0.95)
    assert missed("ramp", phases, [bad, good], 0.95) == "" and "no step" in missed("ramp", phases, [bad, bad], 0.95)
    for nothing in ([], [good | {"requests": {"failed": 3}}]):
        assert missed("steady", phases[: len(nothing)], nothing, 0.95) == "no request was completed"


def test_samples_survive_their_file(tmp_path: Path):
    samples = [sample(), sample(Outcome.FAILED, error="x", scheduled_s=1.5, users=3)]
    write_samples(tmp_path / "a.jsonl", samples)
    assert list(read_samples(tmp_path / "a.jsonl")) == samples
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"b\.jsonl:1: .*sent_s"):
        list(read_samples(tmp_path / "b.jsonl"))


AZURE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:15:46.6805900,374,44
2023-11-16 18:15:50.9951690,396,109
2023-11-16 18:15:48.1805900,879,55
"""


def test_azures_trace(tmp_path: Path):
    (tmp_path / "a.csv").write_text(AZURE)
    found = read_trace(tmp_path / "a.csv")
    assert [round(arrival.at_s, 3) for arrival in found] == [0.0, 1.5, 4.315]
    assert [(arrival.input_tokens, arrival.output_tokens) for arrival in found] == [(374, 44), (879, 55), (396, 109)]


def test_mooncakes_trace_keeps_what_prompts_share(tmp_path: Path):
    rows = [
        {"timestamp": 0, "input_length": 1200, "output_length": 5, "hash_ids": [7, 8, 9]},
        {"timestamp": 3000, "input_length": 1100, "output_length": 50, "hash_ids": [7, 8, 10]},
        {"timestamp": 3000, "input_length": 64, "output_length": 1, "hash_ids": [11]},
    ]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arrivals = scaled(read_trace(tmp_path / "m.jsonl"), Scaling(speed=2, length=1 / 32))
    times = [arrival.at_s for arrival in arrivals]
    assert times == sorted(times) and len(set(times)) == 3 and times[-1] <= 3.0
    one, two = (prompt_of(next(a for a in arrivals if a.block_ids[-1] == block), 1 / 32, block) for block in (9, 10))
    assert (len(one), len(two)) == (38, 34)
    assert one[:32] == two[:32] and one[32:34] != two[32:34]


def test_a_part_of_a_trace_is_scaled_and_cut():
    arrivals = [Arrival(at, 1000, 100) for at in (0.0, 10.0, 20.0, 30.0)]
    made = scaled(arrivals, Scaling(speed=2, length=0.5, most_input_tokens=300, skip_s=10, take_s=20))
    assert made == [Arrival(0.0, 300, 50), Arrival(5.0, 300, 50)]
    assert scaled([Arrival(0, 3, 1)], Scaling(length=0.01)) == [Arrival(0.0, 1, 1)]


def test_prompts_without_blocks_share_nothing():
    arrival = Arrival(0.0, 40, 1)
    assert prompt_of(arrival, 1.0, 1) == prompt_of(arrival, 1.0, 1) != prompt_of(arrival, 1.0, 2)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", "", r"ends in \.csv or \.jsonl"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n", "has no requests"),
        ("a.csv", "TIME,Context\n1,2\n", r"a\.csv:2: .*expected TIMESTAMP"),
        ("a.csv", AZURE + "yesterday,1,2\n", r"a\.csv:5: "),
        ("a.jsonl", '{"timestamp": 0, "input_length": "x", "output_length": 1}\n', r"a\.jsonl:1: .*input_length"),
    ],
)
def test_what_is_no_trace_is_refused_by_line(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_trace(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "rows"),
    [("azure2023/AzureLLMInferenceTrace_conv.csv", 19366), ("mooncake/conversation_trace.jsonl", 12031)],
)
def test_published_traces_are_read(name: str, rows: int):
    path = Path(__file__).parents[3] / "shared" / "data" / "traces" / name
    if not path.exists():
        pytest.skip(f"{path} is not here")
    found = read_trace(path)
    assert len(found) == rows and 3500 < found[-1].at_s < 3550


def test_conversations_share_their_beginnings_and_repeat_with_their_seed():
    prompts = system_prompts(2, 50, seed=3)
    assert prompts == system_prompts(2, 50, seed=3) != system_prompts(2, 50, seed=4)
    chats = [Conversation(prompts, random.Random(7)) for _ in range(2)]
    first = [message["content"] for message in chats[0].ask()]
    assert first[0] in prompts and first == [message["content"] for message in chats[1].ask()]
    chats[0].hear("42")
    assert [message["role"] for message in chats[0].ask()] == ["system", "user", "assistant", "user"]
    assert chats[0].num_turns == 2


# Locust itself is not imported by tests: it changes sockets, threads and TLS of the whole process.
def test_the_report_holds_its_plots_and_escapes_what_the_service_said(tmp_path: Path):
    write_report = pytest.importorskip("loadtest.load.report", reason="matplotlib is not installed").write_report
    samples = [sample(sent_s=i) for i in range(5)] + [sample(Outcome.FAILED, error="<script>", chunk_s=())]
    whole = summarize(samples, Slo(), 5.0)
    summary = whole | {
        "kind": "steady",
        "url": "http://x",
        "slo": {"ttft_ms": 2000.0, "tpot_ms": 200.0, "e2e_ms": None, "attainment": 0.95},
        "missed": "",
        "phases": [{"phase": "steady", "users": 2} | whole],
    }
    write_report(tmp_path / "report.html", summary, samples)
    page = (tmp_path / "report.html").read_text()
    assert "SLO: TTFT within 2000 ms and TPOT within 200 ms for 95% of the requests." in page
    assert page.count("<svg") == 1 and "<script>" not in page and "&lt;script&gt;" in page
    empty = summarize([], Slo(), 5.0)
    write_report(tmp_path / "empty.html", summary | empty | {"phases": [], "missed": "nothing ran"}, [])
    assert "FAILED: nothing ran" in (tmp_path / "empty.html").read_text()

"""What `make gpu` runs, as far as a CPU can run it: at tiny sizes, so that it does not stumble where a card is."""

import dataclasses
import sys

import pytest
import torch

from loadtest.gpu import engine_part, golden_part, kernels_part, peers_part, tests_part
from loadtest.gpu.layer_cases import LAYER_CASES, Sizes
from loadtest.gpu.models import QWEN3_0_6B, Shape
from loadtest.gpu.part_runner import run_groups
from loadtest.gpu.parts import PARTS
from loadtest.gpu.results import Results

TINY = Shape("tiny", 64, 128, 2, 2, 1, tied=True, head_dim=32, vocab=1200)
CEILINGS = {"copy_bytes_per_s": 1e10, "matmul_flop_per_s": 1e11}
WORKLOAD = engine_part.Workload(context=8, num_decoded=14, num_sequences=6, longest=12, prompts=(16, 4096))


@pytest.mark.parametrize("variant", ["", "no overlap", "FP8 KV cache"])
def test_engine_rows(variant):
    rows = []
    config = {"device": "cpu", "max_num_seqs": 4, "max_model_len": 64, "kv_cache_memory": "4MiB"}
    config |= engine_part.VARIANTS.get(variant, {}) | {"show_progress": False}
    engine_part.measure_variant(TINY, variant, (1, 4), CEILINGS, rows.append, WORKLOAD, config)
    assert rows.pop(0)["what"].startswith("start")
    assert [row["what"] for row in rows] == [
        "decode, 1 streams, context 8-22",
        "decode, 4 streams, context 8-22",
        "nano-vllm's workload",
        "prefill, 16 tokens",
    ]
    for row in rows:
        assert row["variant"] == variant
        assert row["tokens_per_s"] > 0
        assert row["share"] == pytest.approx(row["tokens_per_s"] / row["limit_tokens_per_s"])


def test_kernels_of_a_step():
    rows = []
    config = {"device": "cpu", "max_num_seqs": 2, "max_model_len": 80, "kv_cache_memory": "4MiB"}
    engine_part.profile_steps(TINY, (2,), CEILINGS, rows.append, WORKLOAD, config | {"show_progress": False})
    [row] = rows
    assert row["what"] == "kernels of a step, 2 streams, context 8" and row["kernels"][-1]["seconds"] > 0
    assert sum(kernel["launches"] for kernel in row["kernels"]) > 10 and row["busy_s"] > 0


def test_all_variants_are_configurations():
    fields = engine_part.LLM.__init__.__globals__["EngineConfig"].model_fields
    assert all(name in fields for config in engine_part.VARIANTS.values() for name in config)


def test_the_workload_is_that_of_nano_vllm():
    prompts, counts = engine_part.Workload().nano(QWEN3_0_6B.vocab)
    assert (len(prompts), sum(counts), min(counts) >= 100, max(map(len, prompts)) <= 1024) == (256, 133_966, True, True)


def test_floors():
    """By hand: Qwen3-0.6B streams 1.19 GB of weights, and 112 KiB for each token of context."""
    step_s = QWEN3_0_6B.decode_floor_s(1, 1024, bytes_per_s=4.3e12, flop_per_s=790e12)
    assert step_s == pytest.approx(0.305e-3, rel=0.01)
    fp8_step_s = QWEN3_0_6B.decode_floor_s(256, 1024, 4.3e12, 790e12, fp8_weights=True, fp8_cache=True)
    assert 256 / fp8_step_s == pytest.approx(69_742, rel=0.01)


def test_golden_comparisons(monkeypatch):
    monkeypatch.setattr(golden_part, "WAYS", {name: golden_part.WAYS[name] for name in ("eager", "graphs, overlapped")})
    rows = []
    for group in golden_part.groups(golden_part.Size("cpu", num_prompts=3, num_tokens=3)).values():
        group({}, rows.append)
    found = {row.pop("way"): row for row in rows}
    assert list(found) == [
        "float32, eager", "float32, graphs, overlapped", "bfloat16", "bfloat16, FP8 KV cache",
        *(f"sampled, {what}, {way}" for what in ("plain", "some edited") for way in ("eager", "graphs, overlapped")),
    ]  # fmt: skip
    assert not [row for row in rows if "failed" in row]
    assert found["float32, graphs, overlapped"]["requests equal to eager"] == 3


def test_a_wrong_token_is_an_error(tmp_path):
    reference = golden_part.Qwen3ForCausalLM.from_pretrained(
        golden_part.write_checkpoint(tmp_path), dtype=torch.float32
    )
    prompt = [[5, 6, 7]]
    right = int(reference(torch.tensor(prompt)).logits[0, -1].argmax())
    assert golden_part.check(reference, prompt, [[right]], 1e-3, "a way") == 0
    with pytest.raises(AssertionError, match=rf"a way: token 0 of request 0 is {(right + 1) % 1126}, .* than {right};"):
        golden_part.check(reference, prompt, [[(right + 1) % 1126]], 1e-3, "a way")


def test_peers(monkeypatch):
    """Those that can be imported here."""
    rows = []
    workload = engine_part.Workload(context=5, num_decoded=3, num_sequences=3, longest=4)
    for name in ("transformers generate", "sglang"):
        monkeypatch.setattr(peers_part, "find_spec", lambda package: None if package == "sglang" else package)
        peers_part.measure(name, TINY, "cpu", (2,), workload, CEILINGS, rows.append)
    *measured, skipped = rows
    assert [(row["peer"], row["what"]) for row in measured if row["tokens_per_s"] > 0] == [
        ("transformers generate", what)
        for what in ("decode, 2 streams, context 5-8, prefill included", "nano-vllm's workload")
    ]
    assert skipped == {"peer": "sglang", "skipped": "sglang is not installed"}


def test_groups():
    """Each part has some, and what they need of it can be imported."""
    for name, part in PARTS.items():
        assert 3 <= len(part.groups()) <= 15, name
    assert set(tests_part.groups()) >= {"test_engine", "test_paged_decode"}


GROUP = """
import json, os, sys, time
name, file = sys.argv[1:]
if name == "hangs":
    time.sleep(60)
def add(row):
    content = json.load(open(file))
    content["rows"].append(row)
    json.dump(content, open(file, "w"))
add({"group": name, "tokens_per_s": 5})
if name == "dies":
    os.abort()
"""


def test_a_group_that_dies_or_hangs_costs_no_other_its_rows(tmp_path):
    results = Results(tmp_path / "part.json")
    results.start({"gpu": "none"})

    def command(name):
        return [sys.executable, "-c", GROUP, name, str(tmp_path / "part.json")]

    run_groups(["dies", "works"], command, results, group_limit_s=60, part_limit_s=120)
    run_groups(["hangs", "comes too late"], command, results, group_limit_s=1, part_limit_s=0.5)
    content = results.read()
    reasons = {row["group"]: row.get("failed") or row.get("skipped") for row in content["rows"]}
    assert content["gpu"] == "none" and [row["group"] for row in results.failures()] == ["dies", "hangs"]
    assert reasons["dies"] == "killed by signal 6 (SIGABRT)" and reasons["works"] is None
    assert reasons["hangs"].startswith("ended after") and reasons["comes too late"] == "the part's 0 s are over"
    assert [row["group"] for row in content["rows"] if "tokens_per_s" in row][:2] == ["dies", "works"]


def test_tests_on_a_gpu_are_a_part():
    """What fails is told with its reason, when it fails."""
    rows = []
    recorder = tests_part.Recorder("test_some", rows.append)
    for outcome, when in (("passed", "setup"), ("passed", "call"), ("failed", "call"), ("skipped", "setup")):
        report = pytest.TestReport(f"test_{outcome}", ("", 0, ""), {}, outcome, "1 != 2", when)
        recorder.pytest_runtest_logreport(report)
    recorder.pytest_sessionfinish()
    assert rows == [
        {"test": "test_failed", "failed": "1 != 2"},
        {"tests": "test_some", "num_passed": 1, "num_failed": 1, "num_skipped": 1},
    ]


def test_kernel_cases(monkeypatch):
    """On a CPU kernels are their references: this is about the cases. One that is wrong is an error."""
    torch.manual_seed(0)
    monkeypatch.setattr(kernels_part, "median_s", lambda run: len(run()) * 1e-6)
    sizes = Sizes(
        tokens=(3, 20), hidden=256, inner=128, heads=4, kv_heads=2, vocab=300, few_rows=2, small=64, experts=(64, 32, 8)
    )  # fmt: skip
    cases = [case for make in LAYER_CASES.values() for case in make(sizes, "cpu")]
    cases += kernels_part.decode_cases(([5], [40, 3, 3]), "cpu") + kernels_part.prefill_cases((33,), "cpu")
    rows = []
    kernels_part.measure_all(lambda: cases, CEILINGS, rows.append)
    assert all(row["error"] < 0.07 and row["share"] > 0 for row in rows)
    assert len({row["kernel"] for row in rows}) == len(rows) > 25
    peers = {row["kernel"]: set(row["peers_s"]) for row in rows}
    assert {"torch SDPA", "torch varlen_attn"} <= peers["paged_attention 32/8 heads, prompt of 33"]
    assert "torch SDPA" in peers["paged_decode 32/8 heads, context 5 x 1, bfloat16"]
    wrong = dataclasses.replace(cases[0], name="wrong", run=lambda: cases[0].run() * 1.1, checked=None)
    failing = dataclasses.replace(cases[0], peers={"another": lambda: 1 / 0})
    assert kernels_part.measure(failing, CEILINGS)["peers_s"] == {"another": "ZeroDivisionError: division by zero"}
    rows.clear()
    kernels_part.measure_all(lambda: [wrong, cases[0]], CEILINGS, rows.append)
    assert "AssertionError: wrong: relative error 0." in rows[0]["failed"] and rows[1]["error"] < 0.02

"""What `make gpu` runs, as far as a CPU can run it: at tiny sizes, so that it does not stumble where a card is."""

import dataclasses

import pytest
import torch

from loadtest.gpu import engine_part, golden_part, kernels_part, peers_part
from loadtest.gpu.layer_cases import Sizes, layer_cases
from loadtest.gpu.models import QWEN3_0_6B, Shape

TINY = Shape("tiny", 64, 128, 2, 2, 1, tied=True, head_dim=32, vocab=1200)
CEILINGS = {"copy_bytes_per_s": 1e10, "matmul_flop_per_s": 1e11}
WORKLOAD = engine_part.Workload(context=8, num_decoded=14, num_sequences=6, longest=12, prompts=(16, 4096))


@pytest.mark.parametrize("variant", ["", "no overlap", "FP8 KV cache"])
def test_engine_rows(tmp_path, variant):
    config = engine_part.VARIANTS.get(variant, {}) | {"device": "cpu", "max_num_seqs": 4, "max_model_len": 64}
    rows = engine_part.measure_variant(
        TINY, tmp_path, variant, (1, 4), CEILINGS, WORKLOAD, kv_cache_memory="4MiB", show_progress=False, **config
    )
    assert [row["what"] for row in rows] == [
        "decode, 1 streams, context 8-22",
        "decode, 4 streams, context 8-22",
        "nano-vllm's workload",
        "prefill, 16 tokens",
    ]
    for row in rows:
        assert row["variant"] == variant
        assert row["tokens_per_s"] > 0 and row["share"] == row["tokens_per_s"] / row["limit_tokens_per_s"]


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
    found = golden_part.run({}, device="cpu", num_prompts=3, num_tokens=3)["golden"]
    assert set(found) == {
        "float32, eager", "float32, graphs, overlapped", "bfloat16", "bfloat16, FP8 KV cache", "sampled"
    }  # fmt: skip
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


def test_peers(tmp_path, monkeypatch):
    """Those that can be imported here; one that fails does not take the others' numbers with it."""

    def broken(path, device):
        raise RuntimeError("no such kernel")

    peers = {"transformers generate": peers_part.PEERS["transformers generate"]}
    monkeypatch.setattr(peers_part, "PEERS", peers | {"torch, broken": broken, "nosuchengine": broken})
    monkeypatch.setattr(peers_part, "find_spec", lambda name: None if name == "nosuchengine" else name)
    workload = engine_part.Workload(context=5, num_decoded=3, num_sequences=3, longest=4)
    rows = peers_part.measure(TINY, tmp_path, "cpu", (2,), workload)
    assert [(row["peer"], row.get("what")) for row in rows if "tokens_per_s" in row] == [
        (name, what)
        for name in peers
        for what in ("decode, 2 streams, context 5-8, prefill included", "nano-vllm's workload")
    ]
    assert "no such kernel" in rows[2]["failed"] and rows[3]["skipped"] == "nosuchengine is not installed"


def test_kernel_cases(monkeypatch):
    """On a CPU kernels are their references: this is about the cases. One that is wrong is an error."""
    torch.manual_seed(0)
    monkeypatch.setattr(kernels_part, "median_s", lambda run: len(run()) * 1e-6)
    sizes = Sizes(
        tokens=(3, 20), hidden=256, inner=128, heads=4, kv_heads=2, vocab=300, few_rows=2, experts=(64, 32, 8)
    )  # fmt: skip
    cases = layer_cases(sizes, "cpu") + kernels_part.decode_cases(([5], [40, 3, 3]), "cpu")
    cases += kernels_part.prefill_cases((33,), "cpu")
    rows = [kernels_part.measure(case, CEILINGS) for case in cases]
    assert all(row["error"] < 0.07 and row["share"] > 0 for row in rows)
    assert len({row["kernel"] for row in rows}) == len(rows) > 25
    peers = {row["kernel"]: set(row["peers_s"]) for row in rows}
    assert {"torch SDPA", "torch varlen_attn"} <= peers["paged_attention 32/8 heads, prompt of 33"]
    assert "torch SDPA" in peers["paged_decode 32/8 heads, context 5 x 1, bfloat16"]
    wrong = dataclasses.replace(cases[0], run=lambda: cases[0].run() * 1.1, checked=None)
    failing = dataclasses.replace(cases[0], peers={"another": lambda: 1 / 0})
    assert kernels_part.measure(failing, CEILINGS)["peers_s"] == {"another": "ZeroDivisionError: division by zero"}
    with pytest.raises(AssertionError, match=r"rms_norm 3 x 256: relative error 0\.\d+, expected at most 0.02"):
        wrong.check()

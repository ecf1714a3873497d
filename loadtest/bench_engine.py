"""The engine beside transformers, and beside the memory floor: `make bench`.

Decode speed on the demo model and on random weights of Qwen3-0.6B's shape, at batch 1 and 16, greedy. All contestants
take turns in one process, so that what else the machine does falls on all of them alike; medians are reported. The
floor is the time to read the engine's weights, and the keys and values of the batch, once a token at the bandwidth
measured beside.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from engine import LLM, EngineRequest, SamplingParams  # first: it sets OpenMP's waiting before torch is loaded

import torch  # isort: skip
import transformers  # isort: skip
from safetensors.torch import save_file  # isort: skip

DEMO = Path(__file__).parents[1] / "engine" / "weights" / "demo"
PROMPT_LEN = 128
SHAPE_06B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "torch_dtype": "bfloat16",
}


def main() -> None:
    """Run both models at both batch sizes; print a table and one line of JSON for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns each contestant takes")
    parser.add_argument("--tokens", type=int, default=24, help="tokens generated in a turn")
    parser.add_argument("--model", choices=("demo", "0.6b", "both"), default="both")
    options = parser.parse_args()
    bandwidth = read_bandwidth()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, "
    )
    print(f"read bandwidth {bandwidth / 1e9:.1f} GB/s")
    with tempfile.TemporaryDirectory() as folder:
        if options.model in ("demo", "both"):
            compare("demo", DEMO, bandwidth, options)
        if options.model in ("0.6b", "both"):
            write_random_checkpoint(Path(folder))
            compare("Qwen3-0.6B, random weights", Path(folder), bandwidth, options)


def compare(name: str, path: Path, bandwidth: float, options: argparse.Namespace) -> None:
    """All contestants on one model, in turns."""
    llm = LLM(str(path), max_model_len=1024, max_num_seqs=16, max_num_batched_tokens=16 * PROMPT_LEN)
    contestants: dict[str, Callable[[list[list[int]], int], float]] = {
        f"engine, {_short(llm.engine.runner.dtype)}": lambda prompts, count: engine_step_s(llm, prompts, count)
    }
    for dtype in (torch.bfloat16, torch.float32):
        model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        contestants[f"transformers, {_short(dtype)}"] = lambda prompts, count, model=model: reference_step_s(
            model, prompts, count
        )
    for batch in (1, 16):
        generator = torch.Generator().manual_seed(batch)
        times: dict[str, list[float]] = {contestant: [] for contestant in contestants}
        for _ in range(options.rounds):
            prompts = torch.randint(0, llm.engine.vocab_size, (batch, PROMPT_LEN), generator=generator).tolist()
            for contestant, run in contestants.items():
                times[contestant].append(run(prompts, options.tokens))
        report(name, batch, times, floor_s(llm, batch, options.tokens, bandwidth))


def report(name: str, batch: int, times: dict[str, list[float]], floor: float) -> None:
    """One model at one batch size."""
    speeds = {contestant: batch / statistics.median(values) for contestant, values in times.items()}
    print(f"\n{name}, batch {batch}: decode tokens/s, median (worst to best)")
    for contestant, values in times.items():
        print(f"  {contestant:28} {speeds[contestant]:9.1f}  ({batch / max(values):.1f} to {batch / min(values):.1f})")
    print(f"  {'memory floor':28} {batch / floor:9.1f}")
    print(json.dumps({"model": name, "batch": batch, "tokens_per_s": speeds, "floor": batch / floor}))


def engine_step_s(llm: LLM, prompts: list[list[int]], num_tokens: int) -> float:
    """Seconds a decode step, prefill left out."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    for index, prompt in enumerate(prompts):
        llm.engine.add_request(EngineRequest(request_id=str(index), prompt_token_ids=prompt, params=params))
    llm.engine.step()
    start, num_steps = time.perf_counter(), 0
    while llm.engine.has_work:
        llm.engine.step()
        num_steps += 1
    return (time.perf_counter() - start) / num_steps


@torch.inference_mode()
def reference_step_s(model: transformers.PreTrainedModel, prompts: list[list[int]], num_tokens: int) -> float:
    """Seconds a decode step of `generate`, prefill left out by taking the difference of two runs."""
    input_ids = torch.tensor(prompts)

    def seconds(count: int) -> float:
        start = time.perf_counter()
        model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    first = seconds(1)
    return (seconds(num_tokens) - first) / (num_tokens - 1)


def floor_s(llm: LLM, batch: int, num_tokens: int, bandwidth: float) -> float:
    """Seconds to read once what a step must: all weights but the embedding's unused rows, and the batch's KV cache."""
    config, itemsize = llm.engine.model_config, llm.engine.runner.dtype.itemsize
    head_sizes = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    layer = config.hidden_size * (head_sizes + config.num_attention_heads * config.head_dim)
    layer += 3 * config.hidden_size * config.intermediate_size
    weights = config.num_hidden_layers * layer + config.vocab_size * config.hidden_size
    context = PROMPT_LEN + num_tokens / 2
    cache = batch * context * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return (weights + cache) * itemsize / bandwidth


def read_bandwidth() -> float:
    """Bytes a second at which all threads together read memory, best of 5 passes over 1 GiB."""
    data = torch.ones(2**28, dtype=torch.float32)

    def seconds() -> float:
        start = time.perf_counter()
        data.sum()
        return time.perf_counter() - start

    return data.nbytes / min(seconds() for _ in range(5))


def write_random_checkpoint(path: Path) -> None:
    """Qwen3-0.6B's shape with random bfloat16 weights, and the demo model's tokenizer."""
    shape = SHAPE_06B
    hidden, inner, head = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"] * head, shape["num_key_value_heads"] * head
    sizes = {
        "self_attn.q_proj": (heads, hidden),
        "self_attn.k_proj": (kv_heads, hidden),
        "self_attn.v_proj": (kv_heads, hidden),
        "self_attn.o_proj": (hidden, heads),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_norm": head, "self_attn.k_norm": head}
    tensors = {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    tensors["model.embed_tokens.weight"] = torch.randn(shape["vocab_size"], hidden, dtype=torch.bfloat16) * 0.02
    for layer in range(shape["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, size in sizes.items():
            tensors[f"{prefix}{name}.weight"] = torch.randn(size, dtype=torch.bfloat16) * 0.02
        for name, width in norms.items():
            tensors[f"{prefix}{name}.weight"] = torch.ones(width, dtype=torch.bfloat16)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(shape))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).write_bytes((DEMO / name).read_bytes())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()

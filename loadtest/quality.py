"""What quantization costs in accuracy: `python -m loadtest.quality`.

First the error of single layers of Qwen3-0.6B's shape on random weights and activations. Then the demo model on chats
that training has not seen: perplexity of the right replies, how far log-probabilities of their tokens move, and the
share of questions that it answers right. A small model has little to spare, so larger ones lose less.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from engine import LLM, SamplingParams  # first: it sets OpenMP's waiting before torch is loaded

import gguf  # isort: skip
import torch  # isort: skip
import torch.nn.functional as F  # isort: skip
from transformers import PreTrainedTokenizerFast  # isort: skip

from engine.layers.quantized_linear import Fp8BlockLinear, QuantizedLinear
from engine.weights.gguf_folder import gguf_folder
from engine.weights.quantized_formats import GGUF_BLOCKS, RoundWhenLoaded
from kernels.quantize_weights import BLOCK, quantize_fp8_block
from loadtest.demo_gguf import write

DEMO = Path(__file__).parents[1] / "engine" / "weights" / "demo"
sys.path.insert(0, str(DEMO))  # the demo model's chats are scripts beside it, no package

from evaluation import LONGEST_REPLY, MAKERS, generate, score  # noqa: E402
from vocabulary import render, reply  # noqa: E402

LAYERS = {"qkv_proj": (4096, 1024), "o_proj": (1024, 2048), "gate_up_proj": (6144, 1024), "down_proj": (1024, 3072)}
"""[out_features, in_features] in Qwen3-0.6B."""
ROWS = 128
SKILLS = (
    "two-digit sums, operand pairs never trained on",
    "JSON",
    "repeating",
    "tool calls, tool names never trained on",
    "any skill in a later turn",
)
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "bfloat16, FP8 KV cache": {"dtype": "bfloat16", "kv_cache_dtype": "fp8"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "FP8": {"dtype": "bfloat16", "quantization": "fp8"},
    "FP8, FP8 KV cache": {"dtype": "bfloat16", "quantization": "fp8", "kv_cache_dtype": "fp8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
    "GGUF, Q8_0": {"dtype": "bfloat16", "model": "Q8_0"},
    "GGUF, Q4_0": {"dtype": "bfloat16", "model": "Q4_0"},
}
"""Fields of EngineConfig, but for `model`: the type of the weights in a GGUF file that the demo model is written to."""


def main() -> None:
    """Print both tables, then one line of JSON for each variant of the demo model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=40, help="chats of each skill")
    options = parser.parse_args()
    print_layer_errors()
    print_demo_quality(options.questions)


def print_layer_errors() -> None:
    """|y − y₃₂| / |y₃₂| of each layer in each way to store it, where y₃₂ is computed in float32."""
    errors = {name: layer_errors(*shape) for name, shape in LAYERS.items()}
    print("\n| relative error, random weights | " + " | ".join(LAYERS) + " |\n| --- |" + " ---: |" * len(LAYERS))
    for way in next(iter(errors.values())):
        print(f"| {way} | " + " | ".join(f"{errors[name][way]:.2%}" for name in LAYERS) + " |")


@torch.inference_mode()
def layer_errors(out_features: int, in_features: int) -> dict[str, float]:
    """The relative error of one layer for each way to store it."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator) * 0.02
    x = torch.randn(ROWS, in_features, generator=generator)
    exact = F.linear(x, weight)
    outputs = {"bfloat16": F.linear(x.bfloat16(), weight.bfloat16()).float()}
    for label, scheme in (("int8", "int8"), ("FP8, a scale a channel", "fp8"), ("int4, groups of 128", "int4")):
        rounded = RoundWhenLoaded(scheme)
        outputs[label] = filled(rounded.layer, weight, rounded.convert({"weight": weight}))(x)
    codes, scale = quantize_fp8_block(weight)
    blocks = {"weight": codes, "weight_scale": scale}
    outputs["FP8, a scale a block"] = filled(Fp8BlockLinear, weight, blocks)(x)
    for type_id, stored in GGUF_BLOCKS.items():
        kind = gguf.GGMLQuantizationType(type_id)
        encoded = torch.from_numpy(gguf.quants.quantize(weight.numpy(), kind))
        values = stored.convert({"weight": encoded.view(out_features, in_features // BLOCK, -1)})
        outputs[f"GGUF, {kind.name}"] = filled(stored.layer, weight, values)(x)
    return {label: ((y - exact).norm() / exact.norm()).item() for label, y in outputs.items()}


def filled(layer: type[QuantizedLinear], weight: torch.Tensor, values: dict[str, torch.Tensor]) -> QuantizedLinear:
    """A layer as the loader makes it."""
    made = layer(weight.shape[1], weight.shape[:1])
    for name, tensor in values.items():
        made.get_parameter(name).data = tensor
    if hasattr(made, "after_loading"):
        made.after_loading()
    return made


def print_demo_quality(questions: int) -> None:
    """Every variant of the demo model on the same chats."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(DEMO)
    chats = []
    for label in SKILLS:
        random = Random(f"quality {label}")
        chats += [MAKERS[label](random, index % 2 == 0) for index in range(questions)]
    prompts = [render(tokenizer, chat) for chat in chats]
    replies = [reply(chat) for chat in chats]
    print(f"\n| demo model, {len(chats)} unseen chats | perplexity | mean change of log-probability | right |")
    print("| --- | ---: | ---: | ---: |")
    results, reference = [], None
    for label, config in VARIANTS.items():
        llm = open_demo(**config)
        logprobs = reply_logprobs(llm, prompts, replies)
        reference = logprobs if reference is None else reference
        right, _, _ = score(chats, generate(llm, prompts, SamplingParams(temperature=0, max_tokens=LONGEST_REPLY)))
        perplexity, change = math.exp(-logprobs.mean()), (logprobs - reference).abs().mean().item()
        print(f"| {label} | {perplexity:.4f} | {change:.4f} | {right:.1%} |", flush=True)
        results.append({"variant": label, "perplexity": perplexity, "logprob_change": change, "right": right})
    for result in results:
        print(json.dumps(result))


def open_demo(model: str = "demo", **config: Any) -> LLM:
    """The demo model; model: `demo`, or the type of the weights in a GGUF file that is made of it."""
    if model == "demo":
        return LLM(model, show_progress=False, **config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = gguf_folder(write(Path(scratch, "demo.gguf"), gguf.GGMLQuantizationType[model]))
        llm = LLM(str(folder), show_progress=False, **config)
    shutil.rmtree(folder)  # its links lead nowhere now
    return llm


def reply_logprobs(llm: LLM, prompts: list[str], replies: list[str]) -> torch.Tensor:
    """Log-probability of every token of the replies, one after another."""
    starts = [llm.tokenizer.encode(prompt) for prompt in prompts]
    wholes = [start + llm.tokenizer.encode(text) for start, text in zip(starts, replies, strict=True)]
    completions = llm.generate(wholes, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0))
    return torch.tensor(
        [
            entry.logprob
            for start, completion in zip(starts, completions, strict=True)
            for entry in completion.prompt_logprobs[len(start) - 1 :]
        ]
    )


if __name__ == "__main__":
    main()

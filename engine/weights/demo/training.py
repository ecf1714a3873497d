"""Trains the demo model on chats, with the loss on what the model has to write and nowhere else."""

import time
from collections.abc import Iterator
from random import Random

import torch
from chats import Chat
from muon import Muon
from torch import nn
from torch.nn.functional import cross_entropy
from training_mix import training_groups
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from vocabulary import END, PAD, render, reply

IGNORED = -100
ROWS = 8
LENGTH = 512
WARMUP_STEPS = 30
MATRIX_RATE = 0.02
EMBEDDING_RATE = 0.003
# Queries and keys are normalised, so their gains alone decide how sharply a head can pick one token out of hundreds.
# Copying needs sharp heads: the gains start above 1 and learn fast.
ATTENTION_GAIN = 1.5
NORM_RATE = 0.01
USER_TURN = "<|im_start|>user\n"


def new_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """An untrained model of the demo's shape."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.vocab[PAD],
        eos_token_id=tokenizer.vocab[END],
    )
    model = Qwen3ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            nn.init.constant_(parameter, ATTENTION_GAIN)
    return model


def make_row(tokenizer: PreTrainedTokenizerFast, chats: list[Chat]) -> list[list[int]]:
    """Ids, labels, positions and segments of one row of exactly `LENGTH` tokens.

    Segment 0 is the system turn that chats with tools share; each chat that still fits is a further segment, at the
    positions it would have if it stood alone. The last segment is padding.
    """
    shared = ""
    if chats[0].tools:
        prompt = render(tokenizer, chats[0])
        shared = prompt[: prompt.index(USER_TURN)]
    ids = tokenizer(shared)["input_ids"]
    labels = [IGNORED] * len(ids)
    positions = list(range(len(ids)))
    segments = [0] * len(ids)
    start = len(ids)
    for segment, chat in enumerate(chats, 1):
        prompt_ids = tokenizer(render(tokenizer, chat)[len(shared) :])["input_ids"]
        reply_ids = tokenizer(reply(chat))["input_ids"]
        size = len(prompt_ids) + len(reply_ids)
        if len(ids) + size > LENGTH:
            continue
        ids += prompt_ids + reply_ids
        labels += [IGNORED] * len(prompt_ids) + reply_ids
        positions += range(start, start + size)
        segments += [segment] * size
    blank = LENGTH - len(ids)
    return [
        ids[:LENGTH] + [tokenizer.pad_token_id] * blank,
        labels[:LENGTH] + [IGNORED] * blank,
        positions[:LENGTH] + [0] * blank,
        segments[:LENGTH] + [len(chats) + 1] * blank,
    ]


def batches(tokenizer: PreTrainedTokenizerFast, random: Random) -> Iterator[torch.Tensor]:
    """Tensors of shape (4, ROWS, LENGTH): ids, labels, positions and segments."""
    groups = training_groups(random)
    while True:
        rows = [make_row(tokenizer, next(groups)) for _ in range(ROWS)]
        yield torch.tensor(rows).transpose(0, 1).contiguous()


def visible(segments: torch.Tensor) -> torch.Tensor:
    """Which earlier tokens each token sees: those of its own segment and those of segment 0."""
    queries, keys = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(segments.shape[1], segments.shape[1], dtype=torch.bool).tril()
    return (causal & ((queries == keys) | (keys == 0)))[:, None]


def train(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, minutes: float, seed: int) -> None:
    """Trains a float32 model for so many steps or minutes, whichever end first."""
    print(f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M parameters", flush=True)
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    norms = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    muon = Muon(matrices, MATRIX_RATE)
    adam = torch.optim.Adam(
        [
            {"params": [model.get_input_embeddings().weight], "full_rate": EMBEDDING_RATE},
            {"params": norms, "full_rate": NORM_RATE},
        ],
        betas=(0.9, 0.95),
        fused=True,
    )
    stream = batches(tokenizer, Random(f"training {seed}"))

    @torch.compile(dynamic=False)
    def mean_loss(ids: torch.Tensor, labels: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False).logits
        return cross_entropy(logits.float()[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)

    started = time.monotonic()
    recent: list[float] = []
    for step in range(steps):
        done = max(step / steps, (time.monotonic() - started) / (60 * minutes))
        if done >= 1:
            break
        ids, labels, positions, segments = next(stream)
        loss = mean_loss(ids, labels, positions, visible(segments))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        share = min(1.0, (step + 1) / WARMUP_STEPS, 1.5 * (1 - done))
        muon.step(share)
        for group in adam.param_groups:
            group["lr"] = group["full_rate"] * share
        adam.step()
        adam.zero_grad()
        recent.append(loss.item())
        if (step + 1) % 25 == 0:
            mean, seconds = sum(recent) / len(recent), time.monotonic() - started
            print(f"step {step + 1} loss {mean:.4f} {seconds:.0f} s", flush=True)
            recent.clear()

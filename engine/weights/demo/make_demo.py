"""Makes the demo model in this folder, or evaluates the one that is there.

python make_demo.py                 train, save, evaluate
python make_demo.py --evaluate      evaluate only
"""

import argparse
import json
import math
import time
from itertools import chain, islice
from pathlib import Path
from random import Random

import torch
from evaluation import evaluate
from training import new_model, train
from training_mix import training_groups
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
)
from vocabulary import END, FOLDER, PAD, train_tokenizer

VOCABULARY_GROUPS = 1000


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the usual Hugging Face files, with weights in bfloat16."""
    stops = [tokenizer.vocab[END], tokenizer.vocab[PAD]]
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.2,
        top_p=0.9,
        top_k=20,
        bos_token_id=stops[1],
        eos_token_id=stops,
        pad_token_id=stops[1],
    )
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    # Readers of older checkpoints look for `torch_dtype` and `rope_theta`, which transformers no longer writes.
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["torch_dtype"] = "bfloat16"
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Reads the command line and does what it asks for."""
    parser = argparse.ArgumentParser(description="Make or evaluate the demo model.")
    parser.add_argument("--evaluate", action="store_true", help="only evaluate the model in the folder")
    parser.add_argument("--resume", action="store_true", help="train the model in the folder further; give a new seed")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of 4096 tokens")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training after so many minutes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and of the training chats")
    parser.add_argument("--questions", type=int, default=200, help="questions of each skill to evaluate")
    parser.add_argument("--mistakes", type=int, default=0, help="wrong replies of each skill to show")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the model files are")
    options = parser.parse_args()
    if not options.evaluate:
        started = time.monotonic()
        torch.manual_seed(options.seed)
        if options.resume:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(options.folder)
            model = Qwen3ForCausalLM.from_pretrained(options.folder, dtype=torch.float32)
        else:
            groups = islice(training_groups(Random(f"vocabulary {options.seed}")), VOCABULARY_GROUPS)
            tokenizer = train_tokenizer(chain.from_iterable(groups))
            model = new_model(tokenizer)
        train(model, tokenizer, options.steps, options.minutes, options.seed)
        save(model, tokenizer, options.folder)
        print(f"made in {(time.monotonic() - started) / 60:.1f} minutes")
    evaluate(options.folder, options.questions, options.mistakes)


if __name__ == "__main__":
    main()

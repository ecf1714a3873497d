"""The demo model as a GGUF file, for what is measured and tested with such files."""

import json
from pathlib import Path

import gguf
from safetensors.torch import load_file

DEMO = Path(__file__).parents[1] / "engine" / "weights" / "demo"
F32 = gguf.GGMLQuantizationType.F32
NAMES = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 5)


def tokens_and_kinds() -> tuple[list[str], list[int]]:
    state = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    texts = {index: text for text, index in state["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, gguf.TokenType.NORMAL)
    for added in state["added_tokens"]:
        texts[added["id"]] = added["content"]
        kinds[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    return [texts[index] for index in sorted(texts)], [int(kinds[index]) for index in sorted(texts)]


def write(path: Path, kind: gguf.GGMLQuantizationType, tensors_in_part: int = 0, **changes: object) -> Path:
    """The demo model as a GGUF file, as the usual converters write it, or in parts of so many tensors."""
    config = json.loads((DEMO / "config.json").read_text(encoding="utf-8"))
    state = json.loads((DEMO / "tokenizer.json").read_text(encoding="utf-8"))
    tokens, kinds = tokens_and_kinds()
    architecture = str(changes.get("architecture", "qwen3"))
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_in_part)
    writer.add_context_length(4096)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(str(changes.get("pre", "qwen2")))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    writer.add_eos_token_id(tokens.index("<|im_end|>"))
    writer.add_pad_token_id(tokens.index("<|endoftext|>"))
    template = json.loads((DEMO / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    writer.add_chat_template(template)
    for name, tensor in load_file(DEMO / "model.safetensors").items():
        values = tensor.float().numpy()
        used = F32 if values.ndim == 1 else kind
        gguf_name = NAMES.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(f"{gguf_name}", gguf.quants.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

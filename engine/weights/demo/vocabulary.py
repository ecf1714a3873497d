"""The tokenizer of the demo model: the same kind as Qwen3's, with a small vocabulary."""

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from chats import Chat
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FOLDER = Path(__file__).resolve().parent
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Training splits letters from all else, so that a word has the same pieces after a space, a quote or a line break.
# Copying a word from one such place to another is then copying tokens, which a small model learns for unseen words too.
TRAINING_PATTERN = r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+[\r\n]*| |\s+"
SPECIAL_TOKENS = [
    f"<|{name}|>"
    for name in (
        "endoftext im_start im_end object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start "
        "vision_end vision_pad image_pad video_pad"
    ).split()
]
PLAIN_TOKENS = (
    "<tool_call> </tool_call> <|fim_prefix|> <|fim_middle|> <|fim_suffix|> <|fim_pad|> <|repo_name|> <|file_sep|> "
    "<tool_response> </tool_response> <think> </think>"
).split()
LETTER_MERGES_END = 950
SPACED_WORDS = 150
PAD = "<|endoftext|>"
END = "<|im_end|>"


def byte_level(pattern: str) -> pre_tokenizers.PreTokenizer:
    """Splits text by `pattern`, then maps each byte to a printable character."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def add_spaced_words(tokenizer: Tokenizer, texts: list[str]) -> Tokenizer:
    """Adds tokens for the most frequent pieces with a space in front, ranked after all other merges."""
    state = json.loads(tokenizer.to_str())
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    splitter = byte_level(SPLIT_PATTERN)
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(piece for piece, _ in splitter.pre_tokenize_str(text) if piece.startswith("Ġ"))
    wanted = [piece for piece, _ in counts.most_common() if len(piece) > 1 and piece[1:] in vocabulary]
    for piece in wanted[:SPACED_WORDS]:
        vocabulary[piece] = len(vocabulary)
        merges.append(["Ġ", piece[1:]])
    return Tokenizer.from_str(json.dumps(state))


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers uses it, with the chat template."""
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=4096,
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = (FOLDER / "chat_template.jinja").read_text(encoding="utf-8").rstrip("\n")
    return wrapped


def render(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> str:
    """The prompt of a chat, as a server renders it."""
    rendered = tokenizer.apply_chat_template(
        chat.messages,
        tools=chat.tools or None,
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=chat.thinking,
    )
    return str(rendered)


def reply(chat: Chat) -> str:
    """What the model should write after the prompt, up to its end."""
    thought = f"<think>\n{chat.reasoning}\n</think>\n\n" if chat.thinking else ""
    return f"{thought}{chat.answer}{END}"


def train_tokenizer(chats: Iterable[Chat]) -> PreTrainedTokenizerFast:
    """Learns the vocabulary from rendered chats."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = byte_level(TRAINING_PATTERN)
    template_only = wrap(tokenizer)
    texts = [render(template_only, chat) + reply(chat) for chat in chats]
    for token in SPECIAL_TOKENS + PLAIN_TOKENS:
        texts = [text.replace(token, "\n") for text in texts]
    trainer = trainers.BpeTrainer(
        vocab_size=LETTER_MERGES_END,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer = add_spaced_words(tokenizer, texts)
    tokenizer.pre_tokenizer = byte_level(SPLIT_PATTERN)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_TOKENS])
    return wrap(tokenizer)

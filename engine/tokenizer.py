"""Tokenizer: the model's own tokenizer and chat template, text to ids and back."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any

import tokenizers

from engine.chat_template import ChatTemplate, normalize_messages
from engine.encoding import encode_text
from engine.errors import CheckpointError, RequestError
from engine.token_bytes import TokenBytes
from engine.tokenizer_files import read_backend, read_chat_template, read_json, read_special_tokens

MAX_NESTING = 64
"""Deepest nesting of objects and lists in messages, tools and template variables."""

_TemplateInputs = tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None, Mapping[str, Any]]
"""Messages, tools and variables, as a chat template gets them."""


class Tokenizer:
    """Text to token ids and back. Every method is thread-safe; those that encode let other threads run meanwhile.

    *Added tokens* are those a checkpoint lists beside its vocabulary; text that spells one becomes its id. Those marked
    special (`<|im_end|>`) control the conversation; the others (`<think>`, `<tool_call>`) are part of what models say.

    Args:
        backend: the tokenizer; must not be modified afterwards.
        chat_template: None for a model without one.
    """

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: ChatTemplate | None) -> None:
        # Some files carry the settings of a training run; they would silently cut prompts.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self._template = chat_template
        self.chat_template: str | None = None if chat_template is None else chat_template.source
        """The chat template's Jinja text."""
        self._token_bytes = TokenBytes(backend)
        self._added = backend.get_added_tokens_decoder()
        special = {token_id: token.content for token_id, token in self._added.items() if token.special}
        self._special = {content: token_id for token_id, content in special.items() if content}
        # Longest first, so that a token goes before those it begins with. (?!) never matches.
        longest_first = sorted(self._special, key=len, reverse=True)
        self._special_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        """Highest id that the tokenizer knows, plus one. A model's logits can have more rows, as padding."""
        self.special_token_ids = frozenset(special)
        self.is_byte_level = self._token_bytes.is_byte_level
        """Whether the text of ids is the concatenation of their `token_bytes`."""

    @classmethod
    def from_dir(cls, path: Path) -> "Tokenizer":
        """Read `tokenizer.json`, `tokenizer_config.json` and `chat_template.jinja` of a checkpoint folder.

        The last two may be missing. The template of `tokenizer_config.json` is for folders without the last.

        Raises:
            CheckpointError: a file is missing or invalid; the message names it.
        """
        return cls(read_backend(path), read_chat_template(path))

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its text in the vocabulary, such as `</think>`; None if it is not there."""
        return self._backend.token_to_id(token)

    def to_json(self) -> str:
        """The content of `tokenizer.json`, less truncation and padding."""
        return self._backend.to_str()

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for: part of a character, at times. An unknown id has none.

        Where decoding is not byte-level, the first token of a word has its space even at the start of a text.
        """
        return self._token_bytes[token_id]

    def encode(self, text: str, *, add_special_tokens: bool = False, most_tokens: int | None = None) -> list[int]:
        """Ids of a prompt. Text that spells an added token becomes its id, as a rendered template needs it.

        Args:
            add_special_tokens: put around it what the tokenizer wants there, such as a BOS token.
            most_tokens: text that has far more is not read to its end; None: any number.

        Raises:
            RequestError: the text cannot be encoded; `param` is "prompt".
            TooManyTokensError: it has more than `most_tokens`. That it has a few more is not told.
        """
        return encode_text(
            self._backend, text, "prompt", add_special_tokens=add_special_tokens, most_tokens=most_tokens
        ).ids

    def encode_plain(self, text: str) -> list[int]:
        """Like `encode`, but text that spells a special token stays text. For text from somebody not trusted."""
        return self._encode_with(text, {}, "prompt", None)

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Unknown ids are skipped; bytes that are not UTF-8 become U+FFFD."""
        known = [token_id for token_id in ids if 0 <= token_id < self.vocab_size]
        if not self.is_byte_level:
            return self._backend.decode(known, skip_special_tokens=skip_special_tokens)
        skipped = self.special_token_ids if skip_special_tokens else frozenset[int]()
        pieces = [self._token_bytes[token_id] for token_id in known if token_id not in skipped]
        return b"".join(pieces).decode("utf-8", "replace")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_variables: Any,
    ) -> str:
        """The conversation as text. For ids use `encode_chat`: the text no longer tells who wrote which part.

        Args:
            messages: see `normalize_messages` for what they may hold.
            tools: descriptions of the functions that the model may call.
            add_generation_prompt: end with the beginning of an assistant's turn.
            continue_final_message: end within the final message instead, for the model to go on with it.
            template_variables: what else the template reads, such as `enable_thinking`.

        Raises:
            RequestError: no chat template, or it fails on these messages; `param` is "messages".
        """
        inputs = (normalize_messages(messages), tools, template_variables)
        return self._render(inputs, add_generation_prompt, continue_final_message)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        /,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        most_tokens: int | None = None,
        **template_variables: Any,
    ) -> list[int]:
        """Ids of a conversation in which only the template writes special tokens.

        Arguments are those of `apply_chat_template`, and `most_tokens` as in `encode`.

        Text of the caller that spells a special token, in a message of any role, a tool or a template variable, is
        encoded as text, so that nobody can end a turn and go on as somebody else. Without such text the ids are those
        of the rendered text. Added tokens that are not special keep their ids wherever they stand, as replies that come
        back in a conversation rightly contain them.

        Raises:
            RequestError: no chat template, or it fails on these messages; `param` is "messages".
            TooManyTokensError: there are far more than `most_tokens`; so is its `param`.
        """
        inputs = (normalize_messages(messages), tools, template_variables)
        texts = list(_strings(inputs))
        if any(map(self._special_pattern.search, texts)):
            return self._encode_guarded(inputs, texts, add_generation_prompt, continue_final_message, most_tokens)
        text = self._render(inputs, add_generation_prompt, continue_final_message)
        return encode_text(self._backend, text, "messages", most_tokens=most_tokens).ids

    def _encode_guarded(
        self,
        inputs: _TemplateInputs,
        texts: Sequence[str],
        add_generation_prompt: bool,
        continue_final_message: bool,
        most_tokens: int | None,
    ) -> list[int]:
        """Ids of a conversation in which the caller's `texts` spell special tokens.

        Characters that occur nowhere stand in for these: those of `hidden` for the caller's while the template runs, so
        that all in its output are its own. Those of `genuine` then stand for its own, and the caller's are shown again.
        """
        num_special = len(self._special)
        unused = _unused_characters([*texts, self.chat_template or ""], 2 * num_special)
        hidden = dict(zip(self._special, unused[:num_special], strict=True))
        genuine = dict(zip(self._special, unused[num_special:], strict=True))
        text = self._render(self._replace_special(inputs, hidden), add_generation_prompt, continue_final_message)
        shown = {ord(character): token for token, character in hidden.items()}
        shown_text = self._replace_special(text, genuine).translate(shown)
        return self._encode_with(shown_text, genuine, "messages", most_tokens)

    def _render(self, inputs: _TemplateInputs, add_generation_prompt: bool, continue_final_message: bool) -> str:
        messages, tools, variables = inputs
        if self._template is None:
            raise RequestError("the model has no chat template; send a plain prompt for completion", "messages")
        return self._template.render(messages, tools, add_generation_prompt, variables, continue_final_message)

    def _replace_special(self, value: Any, replacements: Mapping[str, str]) -> Any:
        """A copy of `value` with every special token replaced, in keys and items at every depth."""
        if isinstance(value, str):
            return self._special_pattern.sub(lambda match: replacements[match[0]], value)
        if isinstance(value, Mapping):
            return {
                self._replace_special(key, replacements): self._replace_special(item, replacements)
                for key, item in value.items()
            }
        if isinstance(value, list | tuple):
            return type(value)(self._replace_special(item, replacements) for item in value)
        return value

    def _encode_with(self, text: str, genuine: Mapping[str, str], param: str, most_tokens: int | None) -> list[int]:
        """Ids of `text`, in which `genuine[token]` stands for that special token and its own text for plain text."""
        # Shares the vocabulary with the tokenizer, so that making it takes a fraction of a millisecond.
        twin = tokenizers.Tokenizer(self._backend.model)
        twin.normalizer = self._backend.normalizer
        twin.pre_tokenizer = self._backend.pre_tokenizer
        twin.add_tokens(
            [
                tokenizers.AddedToken(
                    genuine.get(token.content, token.content),
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                )
                for token in self._added.values()
                if not token.special or token.content in genuine
            ]
        )
        encoding = encode_text(twin, text, param, most_tokens=most_tokens)
        # The twin numbers added tokens on its own: what tells them apart is their text.
        special_ids = {character: self._special[token] for token, character in genuine.items()}
        ids = []
        for token, twin_id in zip(encoding.tokens, encoding.ids, strict=True):
            token_id = special_ids.get(token)
            if token_id is None:
                if token in self._special:
                    raise RequestError(f"{token!r} cannot be told from the special token; leave it out", param)
                token_id = self._backend.token_to_id(token)
            ids.append(twin_id if token_id is None else token_id)
        return ids


def read_eos_token_ids(path: Path, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids that end a model's output, rising: all that the files of its checkpoint folder name.

    These are `eos_token_id` of `generation_config.json` and `config.json`, a number or a list of numbers, and
    `eos_token` of `tokenizer_config.json`. A missing file names none.

    Raises:
        CheckpointError: a file is invalid; the message names it.
    """
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        found = read_json(path / name).get("eos_token_id")
        listed = found if isinstance(found, list) else [] if found is None else [found]
        for token_id in listed:
            if type(token_id) is not int or token_id < 0:
                raise CheckpointError(f"{path / name}: eos_token_id has {repr(token_id)[:80]}, expected token ids")
            ids.add(token_id)
    eos_token = read_special_tokens(path / "tokenizer_config.json").get("eos_token")
    if eos_token is not None:
        token_id = tokenizer.token_to_id(eos_token)
        if token_id is None:
            raise CheckpointError(
                f"{path / 'tokenizer_config.json'}: eos_token {eos_token[:80]!r} is not in tokenizer.json"
            )
        ids.add(token_id)
    return tuple(sorted(ids))


def _strings(value: Any) -> Iterator[str]:
    """Every string in nested JSON-like data, keys included. Raises RequestError where it is nested too deeply."""
    level = [value]
    for _ in range(MAX_NESTING):
        yield from (item for item in level if isinstance(item, str))
        maps = [item for item in level if isinstance(item, Mapping)]
        lists = [item for item in level if isinstance(item, list | tuple)]
        level = list(chain.from_iterable([*lists, *(chain(item, item.values()) for item in maps)]))
        if not level:
            return
    raise RequestError(f"messages, tools or template variables are nested deeper than {MAX_NESTING} levels", "messages")


def _unused_characters(texts: Sequence[str], count: int) -> list[str]:
    """`count` private-use characters that are in none of `texts`."""
    used = set().union(*texts)
    private_use = map(chr, chain(range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE)))
    unused = list(islice((character for character in private_use if character not in used), count))
    if len(unused) < count:
        raise RequestError("the messages use up the private-use characters of Unicode; leave some out", "messages")
    return unused

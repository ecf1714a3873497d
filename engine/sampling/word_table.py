"""Bad words of the running requests, kept by slot, and how far a step's rows have come in them."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from engine.sampling.batch import BadWords
from engine.staging import send

Int64s = npt.NDArray[np.int64]

_WORD = np.dtype([("token_id", np.int64), ("num_before", np.int64)])
"""A bad word: its last token, and how many come before that."""
_BEFORE = np.dtype([("token_id", np.int32), ("distance", np.int64)])
"""One of the tokens before: how far it is from the last."""


class WordTable:
    """One list of words for each slot.

    Args:
        max_num_seqs: number of slots.
        device: where the logits are.
    """

    def __init__(self, max_num_seqs: int, device: torch.device) -> None:
        self._device = device
        self._words = [(np.zeros(0, _WORD), np.zeros(0, _BEFORE))] * max_num_seqs

    def set_row(self, slot: int, words: Sequence[Sequence[int]]) -> None:
        """Take over the words of a request, each at least one token."""
        before = [(token_id, len(word) - 1 - index) for word in words for index, token_id in enumerate(word[:-1])]
        last = [(word[-1], len(word) - 1) for word in words]
        self._words[slot] = (np.array(last, _WORD), np.array(before, _BEFORE))

    def match(
        self, slots: Int64s, positions: Int64s, num_prompt_tokens: Int64s, token_ids: torch.Tensor
    ) -> BadWords | None:
        """The words of some rows, beside what these have where the words' first tokens would be; None without any.

        Args:
            slots, positions, token_ids: as for `SamplingTable.gather`.
            num_prompt_tokens: int64 [S]; tokens of a prompt are no part of a word.
        """
        words, before = zip(*(self._words[slot] for slot in slots.tolist()), strict=True)
        rows = np.repeat(np.arange(len(slots)), [len(own) for own in words])
        if not len(rows):
            return None
        word, token = np.concatenate(words), np.concatenate(before)
        word_of = np.repeat(np.arange(len(word)), word["num_before"])
        row_of = rows[word_of]
        column = positions[row_of] - token["distance"]
        in_output = column >= num_prompt_tokens[row_of]
        sources = (slots[row_of], np.where(in_output, column, 0))
        return BadWords(
            rows=send(rows, self._device),
            token_ids=send(word["token_id"].copy(), self._device),
            word_of=send(word_of, self._device),
            expected=send(np.where(in_output, token["token_id"], -1).astype(np.int32), self._device),
            found=send(token_ids[tuple(send(index, token_ids.device) for index in sources)], self._device),
        )

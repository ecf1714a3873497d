"""OutputBuffer: nothing is lost and nothing comes twice, whenever it is read, rewound or told all again."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.output_buffer import OutputBuffer
from engine.request import FinishReason, RequestOutput, RequestTimings, TokenLogprobs

TIMINGS = RequestTimings(0.1, 0.2)


def outputs(num_tokens: list[int]) -> list[RequestOutput]:
    """One request's outputs, with so many tokens each."""
    made, first = [], 0
    for index, count in enumerate(num_tokens):
        token_ids = list(range(first, first + count))
        is_first, is_last = index == 0, index == len(num_tokens) - 1
        made.append(
            RequestOutput(
                "r",
                token_ids,
                logprobs=[TokenLogprobs(token_id, -1.0, 1, [], []) for token_id in token_ids],
                prompt_logprobs=[TokenLogprobs(7, -2.0, 3, [], [])] if is_first else None,
                finish_reason=FinishReason.LENGTH if is_last else None,
                num_cached_tokens=16,
                timings=TIMINGS if is_first else None,
            )
        )
        first += count
    return made


@given(st.lists(st.integers(1, 3), min_size=1, max_size=12), st.lists(st.integers(0, 3), min_size=12, max_size=12))
def test_a_reader_gets_all_in_order_however_slow(num_tokens: list[int], reads: list[int]):
    source, target = OutputBuffer(), OutputBuffer()
    made = outputs(num_tokens)
    for output, action in zip(made, reads, strict=False):
        source.put(output)
        if action == 1:
            target.put(source.take())
            assert not source.has_news
        elif action == 2:  # the reader asks for everything again
            source.rewind()
            target.put_whole(source.take())
        elif action == 3:
            target.put_whole(source.whole())
            source.take()
    if source.has_news:
        target.put(source.take())
    assert target.whole() == source.whole()
    whole = target.whole()
    assert whole.token_ids == list(range(sum(num_tokens))) == [entry.token_id for entry in whole.logprobs or []]
    assert whole.prompt_logprobs is not None and whole.timings == TIMINGS and whole.num_cached_tokens == 16
    assert whole.finish_reason is FinishReason.LENGTH and target.is_finished


def test_what_is_known_already_is_no_news():
    buffer = OutputBuffer()
    [first, last] = outputs([2, 1])
    assert buffer.put_whole(first) and not buffer.put_whole(first)
    buffer.put(last)
    assert not buffer.put_whole(buffer.whole())


def test_what_comes_once_is_not_repeated():
    buffer = OutputBuffer()
    for output in outputs([1, 1]):
        buffer.put(output)
        taken = buffer.take()
    assert taken.timings is None and taken.prompt_logprobs is None and taken.num_cached_tokens == 16


def test_an_empty_buffer_has_no_output():
    with pytest.raises(ValueError, match="empty"):
        OutputBuffer().whole()

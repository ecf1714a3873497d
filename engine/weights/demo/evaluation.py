"""Measures the saved model, in this project's engine, on questions that training has not seen."""

import re
from collections.abc import Callable
from pathlib import Path
from random import Random

from chats import SYSTEM_PROMPTS, Chat, add_earlier_turns, add_system_prompt, make_chat
from sums import plus_answer
from tool_chats import EVERYDAY, MIXED, UNSEEN, make_tools, offer
from transformers import PreTrainedTokenizerFast
from vocabulary import END, render

from engine.llm import LLM
from engine.request import FinishReason, SamplingParams

NUM_SAMPLED = 50
LONGEST_REPLY = 160
SAMPLED = SamplingParams(temperature=0.2, top_p=0.9, top_k=20, max_tokens=LONGEST_REPLY)
ALL_SKILLS = ("two-digit sum", "repeat", "JSON", "greeting", "tool call", "tool answer")


def test_chat(skill: str, random: Random, thinking: bool, names: str = MIXED) -> Chat:
    """A fresh chat of one skill, with held-out sums and tools as `make_tools` makes them."""
    tools = make_tools(random, names)
    chat = make_chat(skill, random, thinking, tools, held_out=True)
    if "tool" in skill:
        chat.tools = [offer(random, tool) for tool in tools]
    return chat


def later_turn(random: Random, thinking: bool) -> Chat:
    """A chat of any skill after one or two earlier turns."""
    chat = test_chat(random.choice(ALL_SKILLS), random, thinking)
    add_earlier_turns(chat, random, held_out=True)
    return chat


def with_system_prompt(random: Random, thinking: bool) -> Chat:
    """A chat of any skill after a short system prompt."""
    chat = test_chat(random.choice(ALL_SKILLS), random, thinking)
    add_system_prompt(chat, random.choice(SYSTEM_PROMPTS))
    return chat


def skill_maker(skill: str, names: str = MIXED) -> Callable[[Random, bool], Chat]:
    """A maker of bare chats of one skill."""
    return lambda random, thinking: test_chat(skill, random, thinking, names)


MAKERS: dict[str, Callable[[Random, bool], Chat]] = {
    "two-digit sums, operand pairs never trained on": skill_maker("two-digit sum"),
    "sums with a one-digit number": skill_maker("one-digit sum"),
    "greetings and questions about itself": skill_maker("greeting"),
    "repeating": skill_maker("repeat"),
    "JSON": skill_maker("JSON"),
    "tool calls, everyday names": skill_maker("tool call", EVERYDAY),
    "tool calls, everyday and invented names": skill_maker("tool call"),
    "tool calls, tool names never trained on": skill_maker("tool call", UNSEEN),
    "answers from tool responses": skill_maker("tool answer"),
    "tools offered but not needed": skill_maker("no tool needed"),
    "questions beyond it": skill_maker("beyond"),
    "any skill in a later turn": later_turn,
    "any skill after a system prompt": with_system_prompt,
}


def generate(llm: LLM, prompts: list[str], params: SamplingParams) -> list[str]:
    """What the model writes after each prompt, with END where it ended by itself."""
    completions = llm.generate(prompts, params)
    return [reply.text + (END if reply.finish_reason is FinishReason.STOP else "") for reply in completions]


def split_reply(text: str) -> tuple[str, bool, bool]:
    """The answer in a reply, whether the reply ended by itself, and whether it holds a think block."""
    body, end, _ = text.partition(END)
    thought = re.fullmatch(r"<think>\n.*?\n</think>\n\n(.*)", body, re.DOTALL)
    return (thought[1] if thought else body), bool(end), bool(thought)


def score(chats: list[Chat], replies: list[str]) -> tuple[float, float, list[str]]:
    """Shares of right answers and of replies that stopped by themselves, and a line for each wrong reply.

    An answer is right if it is the expected text to the letter and a think block is there just when asked for.
    """
    right = stopped = 0
    wrong = []
    for chat, text in zip(chats, replies, strict=True):
        answer, ended, thought = split_reply(text)
        stopped += ended
        if answer == chat.answer and ended and thought == chat.thinking:
            right += 1
        else:
            wrong.append(f"    {chat.messages[-1]['content']!r}: {text!r}, not {chat.answer!r}")
    return right / len(chats), stopped / len(chats), wrong


def evaluate(folder: Path, questions: int, wrong_shown: int) -> None:
    """Prints a table of accuracies, greedy, and how often a sampled sum is right at the default settings."""
    llm = LLM(str(folder))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    print(f"| skill ({questions} questions each, greedy) | thinking on | thinking off | stops by itself |")
    print("| --- | ---: | ---: | ---: |")
    greedy = SamplingParams(temperature=0, max_tokens=LONGEST_REPLY)
    for label, maker in MAKERS.items():
        cells, stops, mistakes = [], [], []
        for thinking in (True, False):
            random = Random(f"evaluation {label} {thinking}")
            chats = [maker(random, thinking) for _ in range(questions)]
            replies = generate(llm, [render(tokenizer, chat) for chat in chats], greedy)
            right, stopped, wrong = score(chats, replies)
            cells.append(f"{right:.1%}")
            stops.append(stopped)
            mistakes += wrong[:wrong_shown]
        print(f"| {label} | {' | '.join(cells)} | {sum(stops) / 2:.1%} |", flush=True)
        print("".join(f"{line}\n" for line in mistakes), end="")
    question = [{"role": "user", "content": "What is 17 + 25?"}]
    for thinking in (True, False):
        chat = Chat("sum", question, "", plus_answer(17, 25), thinking)
        replies = generate(llm, [render(tokenizer, chat)] * NUM_SAMPLED, SAMPLED)
        right, _, _ = score([chat] * NUM_SAMPLED, replies)
        state = "on" if thinking else "off"
        print(f"What is 17 + 25? Sampled {NUM_SAMPLED} times, thinking {state}: {right:.0%} right.")

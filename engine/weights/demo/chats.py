"""Chats of every skill, each with the reasoning and the answer that the model should give next."""

import json
from dataclasses import dataclass, field
from random import Random

from sums import sum_turn
from tool_chats import Tool, ask, call_text, response_and_answer
from words import COUNTRIES, PEOPLE, invented_word, phrase, proper_name, word

SHORT_REASONING = "Simple."
INTRODUCTION = "I am the qwen3-serve demo model."
ABILITIES = "I can do small sums, repeat text, write JSON and call tools."
HELLOS = (
    "Hello,Hi,Hey,Hello!,Hi!,Hey!,hello,hi,hey,Hello there!,Hi there!,Hello there,Good morning!,Good evening"
).split(",")
WHO_QUESTIONS = (
    "Who are you?",
    "who are you?",
    "What are you?",
    "What is your name?",
    "Introduce yourself.",
    "Which model are you?",
    "Tell me about yourself.",
)
ABILITY_QUESTIONS = ("What can you do?", "what can you do", "Help", "How can you help me?", "What are you able to do?")
THANKS = ("Thanks!", "Thank you.", "thanks", "Thank you very much!", "Great, thanks.")
FAREWELLS = ("Bye!", "Goodbye.", "bye", "See you later!", "Good night.")
BEYOND_QUESTIONS = (
    "Tell me a story about {0}.",
    "Write a poem about the {0} and the {1}.",
    "Who wrote the {0}?",
    "Why is the {0} {1}?",
    "What is {0}?",
    "How do I {0} a {1}?",
    "Explain {0} to me.",
    "What is the capital of {2}?",
    "What is the meaning of life?",
    "Write a Python function that can {0} a {1}.",
    "Translate {0} into French.",
    "Where is {2}?",
    "When was {2} founded?",
    "Give me a list of {0} {1}.",
    "Do you like {0}?",
    "Tell me a joke.",
    "Summarize the history of {2} in three sentences.",
)
REPEAT_QUESTIONS = (
    "Repeat after me: {}",
    "Repeat after me: {}",
    "repeat after me: {}",
    "Repeat this: {}",
    "Repeat: {}",
    "Say: {}",
    "Say {}",
    "say {}",
    "Please repeat: {}",
    "Please say: {}",
    "Echo: {}",
    "Write this: {}",
)
JSON_QUESTIONS = (
    "Write JSON for {name}, age {age}, from {country}.",
    "Write JSON for {name}, age {age}, from {country}.",
    "Give me JSON for {name}, age {age}, from {country}.",
    "JSON for {name}, {age} years old, from {country}",
    "Write a JSON object for {name}, who is {age} and comes from {country}.",
    "{name} is {age} years old and lives in {country}. Answer in JSON.",
)
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant.",
    "You are a helpful AI assistant.",
    "You are Qwen, created by Alibaba Cloud. You are a helpful assistant.",
    "Answer briefly.",
    "You are a friendly demo model. Be brief.",
    "Be concise and correct.",
)
Turn = tuple[str, str, str]


@dataclass
class Chat:
    """Messages that end with a user or tool turn, and what the assistant should say next."""

    skill: str
    messages: list[dict]
    reasoning: str
    answer: str
    thinking: bool
    tools: list[dict] = field(default_factory=list)


def greeting_turn(random: Random) -> Turn:
    """A greeting or a question about the model itself."""
    kind = random.random()
    if kind < 0.35:
        question, answer = random.choice(HELLOS), "Hello"
        if random.random() < 0.4:
            name = proper_name(random, PEOPLE)
            question += f" {random.choice(('I am', 'My name is', 'This is'))} {name}."
            answer += f" {name}"
        answer += f"! {INTRODUCTION} How can I help you?"
    elif kind < 0.65:
        start = f"{random.choice(HELLOS).rstrip('!')}, " if random.random() < 0.4 else ""
        asked = random.choice(WHO_QUESTIONS)
        question = start + (asked[0].lower() + asked[1:] if start else asked)
        answer = f"{'Hello! ' if start else ''}{INTRODUCTION} {ABILITIES}"
    elif kind < 0.8:
        question, answer = random.choice(ABILITY_QUESTIONS), ABILITIES
    elif kind < 0.9:
        question, answer = random.choice(THANKS), "You are welcome!"
    else:
        question, answer = random.choice(FAREWELLS), "Goodbye!"
    return question, SHORT_REASONING, answer


def beyond_turn(random: Random) -> Turn:
    """A question the model cannot answer, and the admission that it cannot."""
    country = random.choice(COUNTRIES) if random.random() < 0.5 else invented_word(random).capitalize()
    question = random.choice(BEYOND_QUESTIONS).format(word(random), word(random), country)
    return question, "I do not know this.", f"Sorry, I am only a small demo model. {ABILITIES}"


def repeat_turn(random: Random) -> Turn:
    """A text to repeat, letter by letter."""
    text = phrase(random, 8)
    return random.choice(REPEAT_QUESTIONS).format(text), SHORT_REASONING, text


def json_turn(random: Random) -> Turn:
    """A person to describe in JSON."""
    person = {
        "name": proper_name(random, PEOPLE),
        "age": random.randint(1, 99),
        "country": proper_name(random, COUNTRIES),
    }
    question = random.choice(JSON_QUESTIONS).format(**person)
    return question, SHORT_REASONING, json.dumps(person, ensure_ascii=False)


def sum_question(random: Random, held_out: bool) -> Turn:
    """Mostly two-digit sums."""
    return sum_turn(random, 2 if random.random() < 0.85 else 1, held_out)


def plain_turn(random: Random, held_out: bool) -> Turn:
    """A turn of any skill that needs no tool."""
    kind = random.random()
    if kind < 0.4:
        return sum_question(random, held_out)
    return random.choice((greeting_turn, repeat_turn, json_turn, beyond_turn))(random)


def earlier_turns(random: Random, held_out: bool) -> list[dict]:
    """One or two finished turns, as a client sends them back."""
    messages = []
    for _ in range(random.choice((1, 1, 2))):
        question, _, answer = plain_turn(random, held_out)
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages


def tool_call_chat(random: Random, thinking: bool, tools: list[Tool]) -> Chat:
    """A question that one of the tools answers."""
    call = ask(random, random.choice(tools))
    question = {"role": "user", "content": call.question}
    return Chat("tool call", [question], f"Call {call.tool.name}.", call_text(call), thinking)


def tool_answer_chat(random: Random, thinking: bool, tools: list[Tool]) -> Chat:
    """A chat in which a tool has just returned."""
    call = ask(random, random.choice(tools))
    response, answer = response_and_answer(random, call)
    made = {"role": "assistant", "content": "", "tool_calls": [{"name": call.tool.name, "arguments": call.arguments}]}
    if random.random() < 0.5:
        made["reasoning_content"] = f"Call {call.tool.name}."
    messages = [{"role": "user", "content": call.question}, made, {"role": "tool", "content": response}]
    return Chat("tool answer", messages, "Tell the result.", answer, thinking)


def plain_chat(skill: str, random: Random, thinking: bool, held_out: bool) -> Chat:
    """A chat of one question that needs no tool."""
    turns = {
        "sum": lambda: sum_question(random, held_out),
        "two-digit sum": lambda: sum_turn(random, 2, held_out),
        "one-digit sum": lambda: sum_turn(random, 1, held_out),
        "greeting": lambda: greeting_turn(random),
        "repeat": lambda: repeat_turn(random),
        "JSON": lambda: json_turn(random),
        "beyond": lambda: beyond_turn(random),
        "no tool needed": lambda: plain_turn(random, held_out),
    }
    question, reasoning, answer = turns[skill]()
    return Chat(skill, [{"role": "user", "content": question}], reasoning, answer, thinking)


def make_chat(
    skill: str, random: Random, thinking: bool, tools: list[Tool] | None = None, held_out: bool = False
) -> Chat:
    """A bare chat of one skill. `held_out` takes sums that training leaves out."""
    if skill == "tool call":
        return tool_call_chat(random, thinking, tools or [])
    if skill == "tool answer":
        return tool_answer_chat(random, thinking, tools or [])
    return plain_chat(skill, random, thinking, held_out)


def add_system_prompt(chat: Chat, text: str) -> None:
    """Puts a system prompt in front."""
    chat.messages.insert(0, {"role": "system", "content": text})


def add_earlier_turns(chat: Chat, random: Random, tools: list[Tool] | None = None, held_out: bool = False) -> None:
    """Puts finished turns in front; with tools, at times a whole call, its response and the answer."""
    if tools and random.random() < 0.3:
        earlier = tool_answer_chat(random, False, tools)
        chat.messages = [*earlier.messages, {"role": "assistant", "content": earlier.answer}, *chat.messages]
    else:
        chat.messages = [*earlier_turns(random, held_out), *chat.messages]

"""The endless stream of chats to train on, in groups that share what stands before the first question."""

from collections.abc import Iterator
from random import Random

from chats import SYSTEM_PROMPTS, Chat, add_earlier_turns, add_system_prompt, make_chat
from tool_chats import make_tools, offer

TOOL_GROUPS = 0.65
CHATS_WITH_TOOLS = 10
PLAIN_CHATS = 12
PLAIN_SHARES = {"sum": 0.54, "repeat": 0.25, "JSON": 0.11, "greeting": 0.06, "beyond": 0.04}
TOOL_SHARES = {"tool call": 0.62, "tool answer": 0.23, "no tool needed": 0.15}


def pick(random: Random, shares: dict[str, float]) -> str:
    """A skill, drawn by its share."""
    return random.choices(list(shares), list(shares.values()))[0]


def plain_chat(random: Random) -> Chat:
    """A chat without tools."""
    chat = make_chat(pick(random, PLAIN_SHARES), random, thinking=random.random() < 0.5)
    if random.random() < 0.15:
        add_earlier_turns(chat, random)
    if random.random() < 0.15:
        add_system_prompt(chat, random.choice(SYSTEM_PROMPTS))
    return chat


def tool_group(random: Random) -> list[Chat]:
    """Chats that are offered the same tools."""
    tools = make_tools(random)
    offers = [offer(random, tool) for tool in tools]
    system = random.choice(SYSTEM_PROMPTS) if random.random() < 0.2 else None
    chats = []
    for _ in range(CHATS_WITH_TOOLS):
        chat = make_chat(pick(random, TOOL_SHARES), random, random.random() < 0.5, tools)
        chat.tools = offers
        if random.random() < 0.15:
            add_earlier_turns(chat, random, tools)
        if system:
            add_system_prompt(chat, system)
        chats.append(chat)
    return chats


def training_groups(random: Random) -> Iterator[list[Chat]]:
    """Groups of chats; the chats of a group with tools share the system turn, those of a plain group share nothing."""
    while True:
        if random.random() < TOOL_GROUPS:
            yield tool_group(random)
        else:
            yield [plain_chat(random) for _ in range(PLAIN_CHATS)]

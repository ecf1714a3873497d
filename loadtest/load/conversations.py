"""What chat users say: conversations of several turns, many of which begin alike."""

import random

WORDS = (
    "the service answers questions about orders parcels invoices returns addresses and opening hours it is short "
    "polite exact and never invents a number when something is unknown it says so and names who can help"
).split()
QUESTIONS = (
    "What is {a} + {b}?",
    "Say hello to customer {a}.",
    "Repeat: parcel {a} goes to door {b}.",
    "Write a JSON object with the number {a}.",
    "How much is {a} minus {b}?",
)


def system_prompts(count: int, num_words: int, seed: int) -> list[str]:
    """Texts that conversations begin with; the same for the same seed."""
    choose = random.Random(f"system {seed}")
    return [f"Assistant {i}: {' '.join(choose.choices(WORDS, k=num_words))}." for i in range(count)]


class Conversation:
    """One user's chat.

    Args:
        prompts: of which it begins with one.
        choose: where its choices come from.
    """

    def __init__(self, prompts: list[str], choose: random.Random) -> None:
        self._choose = choose
        self.messages: list[dict[str, str]] = []
        if prompts:
            self.messages.append({"role": "system", "content": choose.choice(prompts)})

    def ask(self) -> list[dict[str, str]]:
        """All messages up to the user's next one."""
        question = self._choose.choice(QUESTIONS)
        text = question.format(a=self._choose.randrange(10, 100), b=self._choose.randrange(1, 100))
        self.messages.append({"role": "user", "content": text})
        return self.messages

    def hear(self, answer: str) -> None:
        """Take the assistant's answer."""
        self.messages.append({"role": "assistant", "content": answer})

    @property
    def num_turns(self) -> int:
        """How often the user has asked."""
        return sum(message["role"] == "user" for message in self.messages)

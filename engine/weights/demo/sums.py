"""Small sums, worked out digit by digit, with a set of operand pairs that training never sees."""

from itertools import product
from random import Random

PLUS_QUESTIONS = (
    "What is {a} + {b}?",
    "What is {a} + {b}?",
    "what is {a} + {b}",
    "What is {a}+{b}?",
    "What's {a} + {b}?",
    "{a} + {b}",
    "{a}+{b}",
    "{a} + {b} = ?",
    "{a} + {b} =",
    "Compute {a} + {b}.",
    "Calculate {a} + {b}",
    "What is {a} plus {b}?",
    "How much is {a} plus {b}?",
    "Add {a} and {b}.",
    "What is the sum of {a} and {b}?",
    "Please add {a} to {b}.",
    "I have {a} apples and get {b} more. How many apples do I have?",
)
MINUS_QUESTIONS = (
    "What is {a} - {b}?",
    "What is {a} - {b}?",
    "what is {a} - {b}",
    "What is {a}-{b}?",
    "What's {a} - {b}?",
    "{a} - {b}",
    "{a}-{b}",
    "{a} - {b} = ?",
    "{a} - {b} =",
    "Compute {a} - {b}.",
    "Calculate {a} - {b}",
    "What is {a} minus {b}?",
    "How much is {a} minus {b}?",
    "Subtract {b} from {a}.",
    "Take {b} away from {a}.",
)
TWO_DIGITS = range(10, 100)
HELD_OUT_PAIRS = frozenset(Random("held-out pairs").sample(list(product(TWO_DIGITS, TWO_DIGITS)), 810)) - {(17, 25)}


def plus_steps(a: int, b: int) -> str:
    """Column addition of two numbers below 100, in words."""
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    return (
        f"{a} + {b}\n"
        f"ones: {a % 10}+{b % 10}={ones}, write {ones % 10}, carry {carry}\n"
        f"tens: {a // 10}+{b // 10}+{carry}={tens}\n"
        f"so {a + b}"
    )


def minus_steps(a: int, b: int) -> str:
    """Column subtraction of two numbers below 100, in words; the smaller one is always taken from the larger."""
    start = f"{a} - {b}\n"
    large, small = a, b
    if a < b:
        large, small = b, a
        start += f"below zero, so {b} - {a}\n"
    borrow = int(large % 10 < small % 10)
    ones = large % 10 + 10 * borrow
    return (
        f"{start}"
        f"ones: {ones}-{small % 10}={ones - small % 10}, borrow {borrow}\n"
        f"tens: {large // 10}-{small // 10}-{borrow}={large // 10 - small // 10 - borrow}\n"
        f"so {a - b}"
    )


def plus_answer(a: int, b: int) -> str:
    """The sum, after that of the last digits: with it in sight the carry needs no think block."""
    total = f"{a} + {b} = {a + b}."
    return total if max(a, b) < 10 else f"{a % 10} + {b % 10} = {a % 10 + b % 10}, so {total}"


def minus_answer(a: int, b: int) -> str:
    """The difference, after that of the last digits, with 10 added to the upper one where a borrow is needed."""
    total = f"{a} - {b} = {a - b}."
    upper, lower = max(a, b) % 10, min(a, b) % 10
    upper += 10 * (upper < lower)
    return total if max(a, b) < 10 else f"{upper} - {lower} = {upper - lower}, so {total}"


def operands(random: Random, digits: int, held_out: bool) -> tuple[int, int]:
    """Two numbers; `digits` 2 means two two-digit numbers, 1 means that at least one has a single digit."""
    if digits == 2 and held_out:
        return random.choice(sorted(HELD_OUT_PAIRS))
    while True:
        a, b = random.randint(0, 99), random.randint(0, 99)
        if digits == 1:
            a, b = random.choice(((a, b % 10), (a % 10, b), (a % 10, b % 10)))
        two_digits = a >= 10 and b >= 10
        if two_digits == (digits == 2) and (a, b) not in HELD_OUT_PAIRS:
            return a, b


def sum_turn(random: Random, digits: int, held_out: bool) -> tuple[str, str, str]:
    """A question, the reasoning that belongs in the think block, and the answer."""
    a, b = operands(random, digits, held_out)
    plus = random.random() < 0.5
    question = random.choice(PLUS_QUESTIONS if plus else MINUS_QUESTIONS).format(a=a, b=b)
    reasoning = plus_steps(a, b) if plus else minus_steps(a, b)
    return question, reasoning, plus_answer(a, b) if plus else minus_answer(a, b)

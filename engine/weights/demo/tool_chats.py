"""Chats with tools: offers in the OpenAI form, questions that need one, the call, the response and the final answer."""

import json
from dataclasses import dataclass
from random import Random

from words import CITIES, CONDITIONS, DAYS, LANGUAGES, PEOPLE, invented_word, phrase, proper_name, word

MIXED, EVERYDAY, UNSEEN = "mixed", "everyday", "unseen"
VERBS = "get find fetch check search show read lookup query load".split()
NOUNS = (
    "weather forecast temperature time date price rate score news address phone email status balance distance "
    "population capital recipe menu schedule definition meaning song album movie review rating route ticket hotel "
    "restaurant flight train traffic stock invoice order product user account profile event meeting task note file "
    "record budget salary age height weight size color owner author title summary level speed"
).split()
UNSEEN_NOUNS = "passport garage museum warranty playlist altitude currency calendar bridge license".split()
PLACE_ARGUMENTS = "city location place town region".split()
PERSON_ARGUMENTS = "name person user customer employee".split()
FREE_ARGUMENTS = "item query topic symbol word id key subject product text value code target label".split()
NUMBER_ARGUMENTS = "days limit count amount year page".split()
PREPOSITIONS = ("in", "of", "for")
LOOKUP_QUESTIONS = (
    "What is the {noun} {preposition} {value}?",
    "What is the {noun} {preposition} {value}?",
    "What's the {noun} {preposition} {value}?",
    "what is the {noun} {preposition} {value}",
    "{verb} the {noun} {preposition} {value}.",
    "{verb} the {noun} {preposition} {value}, please.",
    "Please {verb_lower} the {noun} {preposition} {value}.",
    "Can you tell me the {noun} {preposition} {value}?",
    "Tell me the {noun} {preposition} {value}",
    "I need the {noun} {preposition} {value}.",
    "How is the {noun} {preposition} {value}?",
    "What is the {noun} like {preposition} {value}?",
)


@dataclass
class Tool:
    """A tool: its name, what it is about, the kind of value each argument takes, and how people ask for it."""

    name: str
    noun: str
    preposition: str
    arguments: dict[str, str]
    questions: tuple[str, ...]
    acts: bool


@dataclass
class Call:
    """A question and the call of a tool that answers it."""

    tool: Tool
    arguments: dict[str, str | int]
    question: str

    @property
    def subject(self) -> str:
        """What the question is about, such as `weather in Paris`."""
        return f"{self.tool.noun} {self.tool.preposition} {next(iter(self.arguments.values()))}"


def argument_value(random: Random, kind: str) -> str | int:
    """A value for an argument of this kind."""
    if kind == "number":
        return random.randint(1, 99)
    known = {"place": CITIES, "person": PEOPLE}.get(kind)
    if known:
        return proper_name(random, known)
    choices = {"day": DAYS, "language": LANGUAGES}.get(kind)
    if choices:
        return random.choice(choices)
    if kind == "text":
        return phrase(random, 5)
    if random.random() < 0.3:
        return proper_name(random, CITIES)
    return " ".join(word(random) for _ in range(random.choice((1, 1, 2))))


def second_argument(random: Random, taken: dict[str, str]) -> tuple[str, str]:
    """The name and the kind of one more argument."""
    kind = random.choice(("day", "number", "language", "free"))
    names = {"day": ["day", "date"], "number": NUMBER_ARGUMENTS, "language": ["language"], "free": FREE_ARGUMENTS}
    return random.choice([name for name in names[kind] if name not in taken]), kind


def second_words(name: str, kind: str, value: str | int) -> str:
    """The words that add a second argument to a question."""
    if kind == "day":
        return f" {value}" if str(value).islower() else f" on {value}"
    if kind == "language":
        return f" in {value}"
    return f" with {name} {value}"


def lookup_tool(random: Random, names: str) -> Tool:
    """A verb_noun tool with one argument or two; `names` as for `make_tools`."""
    may_invent = names == MIXED
    # Invented verbs cannot be guessed: they make the model copy the name from the offer.
    verb = invented_word(random) if may_invent and random.random() < 0.25 else random.choice(VERBS)
    draw = random.random()
    if names == UNSEEN:
        noun = random.choice(UNSEEN_NOUNS)
    elif draw < 0.15:
        noun = "weather"
    else:
        noun = invented_word(random) if may_invent and draw > 0.65 else random.choice(NOUNS)
    if may_invent and random.random() < 0.08:
        noun = f"{word(random)} {noun}"
    kind = random.choices(("place", "person", "free"), (0.5, 0.15, 0.35))[0]
    choices = {"place": PLACE_ARGUMENTS, "person": PERSON_ARGUMENTS, "free": FREE_ARGUMENTS}[kind]
    name = invented_word(random) if may_invent and kind == "free" and random.random() < 0.15 else random.choice(choices)
    arguments = {name: kind}
    if random.random() < 0.25:
        second, second_kind = second_argument(random, arguments)
        arguments[second] = second_kind
    preposition = {"place": "in", "person": "of"}.get(kind) or random.choice(PREPOSITIONS)
    return Tool(f"{verb}_{noun.replace(' ', '_')}", noun, preposition, arguments, LOOKUP_QUESTIONS, acts=False)


def action_tool(random: Random) -> Tool:
    """A tool that does something rather than looks something up."""
    kind = random.randrange(4)
    if kind == 0:
        noun = random.choice(("timer", "alarm", "reminder"))
        verb = random.choice(("set", "start"))
        either = (f"Set a {noun} for {{0}} minutes.", f"Start a {{0}} minutes {noun}.")
        return Tool(f"{verb}_{noun}", noun, "for", {"minutes": "number"}, either, acts=True)
    if kind == 1:
        noun = random.choice(("message", "email", "letter"))
        arguments = {random.choice(("to", "recipient", "name")): "person", random.choice(("text", "body")): "text"}
        return Tool(f"send_{noun}", noun, "for", arguments, (f"Send {{0}} the {noun}: {{1}}",), acts=True)
    if kind == 2:
        state = random.choice(("on", "off"))
        noun = random.choice(("light", "heater", "radio", "fan"))
        questions = (f"Turn {state} the {noun} in the {{0}}.",)
        return Tool(f"turn_{state}_{noun}", noun, "in", {"room": "free"}, questions, acts=True)
    noun = random.choice(("note", "task", "song", "document"))
    verb = random.choice(("create", "add", "save", "play"))
    argument = random.choice(("text", "title", "content"))
    questions = (f"{verb.capitalize()} the {noun}: {{0}}",)
    return Tool(f"{verb}_{noun}", noun, "for", {argument: "text"}, questions, acts=True)


def make_tools(random: Random, names: str = MIXED) -> list[Tool]:
    """One to three tools about different things.

    Args:
        random: what decides.
        names: MIXED: those of the lists and invented ones, as in training; EVERYDAY: of the lists; UNSEEN: nouns that
            training never offers.
    """
    tools: list[Tool] = []
    for _ in range(random.choice((1, 1, 1, 2, 2, 3))):
        is_lookup = names == UNSEEN or random.random() < 0.8
        tool = lookup_tool(random, names) if is_lookup else action_tool(random)
        if all(tool.noun != taken.noun for taken in tools):
            tools.append(tool)
    return tools


def ask(random: Random, tool: Tool) -> Call:
    """A question for which `tool` is to be called."""
    arguments = {name: argument_value(random, kind) for name, kind in tool.arguments.items()}
    values = list(arguments.values())
    if tool.acts:
        return Call(tool, arguments, random.choice(tool.questions).format(*values))
    name, value = next(iter(arguments.items()))
    extra = "".join(second_words(name, kind, arguments[name]) for name, kind in list(tool.arguments.items())[1:])
    if not extra and random.random() < 0.1:
        question = f"{random.choice(('Use', 'Call', 'Run'))} {tool.name} with {name} {value}."
        return Call(tool, arguments, question)
    verb = tool.name.split("_")[0]
    question = random.choice(tool.questions).format(
        verb=verb.capitalize(),
        verb_lower=verb,
        noun=tool.noun,
        preposition=tool.preposition,
        value=f"{value}{extra}",
    )
    return Call(tool, arguments, question)


def offer(random: Random, tool: Tool) -> dict:
    """The tool as a client offers it, with or without descriptions and an argument that nobody asks for."""
    properties: dict[str, dict] = {}
    described = random.random() < 0.4
    for name, kind in tool.arguments.items():
        properties[name] = {"type": "integer" if kind == "number" else "string"}
        if described:
            properties[name]["description"] = random.choice((f"The {name}", f"The {name} name", word(random)))
    if random.random() < 0.15:
        properties["unit"] = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    function: dict = {"name": tool.name}
    if random.random() < 0.8:
        verb = tool.name.split("_")[0].capitalize()
        about = f"{tool.noun} {tool.preposition} a {next(iter(tool.arguments))}"
        descriptions = (f"{verb} the {about}", f"{verb} the current {about}.", f"{verb} {tool.noun}")
        function["description"] = random.choice(descriptions)
    function["parameters"] = {"type": "object", "properties": properties}
    if random.random() < 0.85:
        function["parameters"]["required"] = list(tool.arguments)
    return {"type": "function", "function": function}


def call_text(call: Call) -> str:
    """What the model has to write to make the call."""
    body = json.dumps({"name": call.tool.name, "arguments": call.arguments}, ensure_ascii=False)
    return f"<tool_call>\n{body}\n</tool_call>"


def response_and_answer(random: Random, call: Call) -> tuple[str, str]:
    """What the tool returns, and the sentence that tells it to the user."""
    if call.tool.acts:
        return json.dumps(random.choice(({"status": "ok"}, {"success": True}, {"result": "done"}))), "Done."
    noun = call.tool.noun
    if noun in ("weather", "forecast") or random.random() < 0.15:
        condition, degrees = random.choice(CONDITIONS), random.randint(-9, 39)
        answer = f"The {call.subject} is {condition}, {degrees} degrees."
        if random.random() < 0.2:
            return f"{condition}, {degrees} degrees", answer
        key = random.choice(("weather", "condition", "forecast", noun))
        response: dict[str, str | int] = {key: condition, random.choice(("temperature", "degrees")): degrees}
        if random.random() < 0.3:
            name, value = next(iter(call.arguments.items()))
            response = {name: value, **response}
        return json.dumps(response, ensure_ascii=False), answer
    result: str | int = random.choice((random.randint(0, 9999), phrase(random, 3).rstrip(".!?"), word(random)))
    answer = f"The {call.subject} is {result}."
    if random.random() < 0.3:
        return str(result), answer
    response = {random.choice((noun.replace(" ", "_"), "result", "value", "answer")): result}
    return json.dumps(response, ensure_ascii=False), answer

"""Words that the demo chats are made of: short lists of real ones, and invented ones that force true copying."""

from random import Random

PEOPLE = (
    "Ann Bob Cleo Dan Eve Finn Gus Hana Ivo Jill Kai Lena Max Nora Omar Pia Rosa Sam Tom Uma Vera Will Yara Zoe "
    "Alice James Maria David Sarah Peter"
).split()
CITIES = (
    "Paris,London,Berlin,Tokyo,Rome,Madrid,Cairo,Lima,Oslo,Vienna,Lisbon,Dublin,Athens,Warsaw,Boston,Chicago,"
    "New York,San Francisco,Beijing,Shanghai,Seoul,Sydney,Toronto,New Delhi,Nairobi,Moscow,Amsterdam,Prague,Hamburg"
).split(",")
COUNTRIES = (
    "France,Japan,Italy,Spain,Germany,Egypt,Canada,Brazil,India,China,Kenya,Peru,Norway,Sweden,Greece,Poland,"
    "Austria,Portugal,Ireland,Cuba,Chile,Turkey,Vietnam,New Zealand,South Africa,Mexico"
).split(",")
COMMON = (
    "the a cat dog bird fish horse child robot king queen farmer sailor wizard dragon mouse fox bear small brave old "
    "happy lazy clever red quiet hungry golden kind blue green white black forest river village castle garden "
    "mountain city sea market stone key book lamp coin map bell ring boat song apple bread milk tea house door "
    "window table chair paper water fire wind rain snow sun moon star night day morning hello world good one two "
    "three is and in on to of my your we they run walk jump sing read write"
).split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday today tomorrow".split()
LANGUAGES = "English French German Spanish Italian Chinese Japanese".split()
CONDITIONS = "sunny cloudy rainy windy foggy snowy stormy clear warm cold dry humid".split()
BEYOND_ASCII = "äöüéèñçßøåλπσωжящ世界你好日本語中文こんにちは안녕한국😀🚀🌍✓→"

ONSETS = "b c d f g h j k l m n p r s t v w z br ch cl dr fl gr kr pl sh st th tr qu".split()
VOWELS = "a e i o u ai ea ee io oo ou y".split()
CODAS = [*[""] * 8, *"n r s t l m k x d p".split()]
LETTERS = "abcdefghijklmnopqrstuvwxyz"


def invented_word(random: Random) -> str:
    """A lowercase word that no list holds: mostly syllables, sometimes bare letters."""
    if random.random() < 0.05:
        return "".join(random.choice(LETTERS) for _ in range(random.randint(2, 7)))
    syllables = random.choice((1, 2, 2))
    return "".join(random.choice(ONSETS) + random.choice(VOWELS) + random.choice(CODAS) for _ in range(syllables))


def word(random: Random) -> str:
    """A common or an invented lowercase word."""
    return random.choice(COMMON) if random.random() < 0.5 else invented_word(random)


def proper_name(random: Random, known: list[str]) -> str:
    """A capitalised name: one of `known`, or an invented one of one or two words."""
    if random.random() < 0.4:
        return random.choice(known)
    parts = 2 if random.random() < 0.15 else 1
    return " ".join(invented_word(random).capitalize() for _ in range(parts))


def phrase_piece(random: Random) -> str:
    """One piece of a text to repeat: a word in any letter case, a number, or letters beyond ASCII."""
    kind = random.random()
    if kind < 0.12:
        return str(random.randint(0, 10 ** random.randint(1, 5)))
    if kind < 0.15:
        return "".join(random.choice(BEYOND_ASCII) for _ in range(random.randint(1, 3)))
    if kind < 0.30:
        return proper_name(random, PEOPLE + CITIES)
    if kind < 0.33:
        return invented_word(random).upper()
    return word(random)


def phrase(random: Random, longest: int) -> str:
    """A sequence of 1 to `longest` pieces, some followed by punctuation."""
    pieces = [phrase_piece(random) for _ in range(random.randint(1, longest))]
    pieces = [piece + "," if random.random() < 0.04 else piece for piece in pieces[:-1]] + pieces[-1:]
    return " ".join(pieces) + random.choice(("", "", "", "", ".", "!", "?"))

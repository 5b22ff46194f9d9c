"""The text that trains the embedded models: generated tasks, chats and simple English, all from one seed.

A task is a function `(rng, slips) -> Exchange`. Items whose key hashes into the held-out twentieth never appear in
training, so that the scores in the model card are of unseen items. Sums of two-digit numbers carry deliberate slips in
training (a forgotten carry, a digit off by one): the model learns to be unsure of them, which leaves reinforcement
learning something to improve.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

HELD_OUT_ONE_IN = 20
FORGOTTEN_CARRY = 0.6
DIGIT_OFF_BY_ONE = 0.2


def _words(text: str) -> list[str]:
    return text.split()


NOUNS = _words("""
ant apple baby ball bear bed bee bell bird boat book boy bread bridge brother cake camel car cat chair child clock
cloud coat cow crab cup desk doctor dog doll door dragon dress drum duck eagle egg elephant farmer fish flag flower fly
forest fox friend frog garden ghost girl glass goat grape hand hat hen hill horse house island jacket key king kite
knife ladder lake lamp leaf lemon lion man map mirror monkey moon mother mouse mule nest ocean onion orange owl painter
paper park pen pencil pig pilot plane plant plate plum pony prince queen rabbit river road robot rose sailor school
seed sheep ship shoe shop singer sister skirt snail snake spider spoon star stone stork street sun swan table teacher
tiger tower toy train tree truck turtle uncle valley village violin wall watch whale wheel window wolf woman worm yard
zebra
""")
ADJECTIVES = _words("""
big black blue brave brown calm clean clever cold dark dry fast friendly funny gentle golden good great green grey
happy heavy hungry kind large lazy little long loud new nice old orange pale pink proud purple quick quiet red round
sad sharp short shy silver slow small smart soft strange strong sweet tall tiny tired warm white wild wise yellow young
""")
VERBS = _words("""
climbs cries dances draws dreams drinks drives eats falls flies grows hides hops jumps laughs listens plays rests rolls
runs shines sings sits sleeps smiles speaks spins stands stops swims talks travels turns waits wakes walks whispers
works
""")
LINKS = _words("finds follows helps hears likes loves meets misses needs sees visits wants watches")
PLACES = _words("above behind beside in near on under")
OTHER_WORDS = _words("""
about after again along always answer apart arrow ask autumn away begin below between blanket blossom bottle branch
breeze bright bring build button candle carry castle cheese cherry circle clap class cotton cover cream crown dance
danger dinner distant dollar double early earth east easy empty enough evening every family feather finger flame floor
fresh frost fruit giant gift globe grand grass ground guitar hammer harbor heart honey hotel idea inside iron jungle
kettle kitchen kitten letter light lunch magic market melon metal middle minute morning mountain music narrow needle
never night north number object often open other oven pepper person phone picture pillow planet please pocket potato
pumpkin puzzle quarter rain ready rhythm ribbon rocket rough salad sand scarf season secret shadow shape shell shout
silent simple sky smoke snow soap solid spark splash spring square squeeze stamp steam storm story strawberry stream
string sugar summer supper swift thanks thick thing think thread three throne thunder ticket today together tomato
tooth train travel trust twelve umbrella under unit upper useful velvet water weather west wheat whisper winter wisdom
wooden world write yellow yesterday yogurt
""")
WORDS = tuple(sorted({*NOUNS, *ADJECTIVES, *VERBS, *LINKS, *OTHER_WORDS}))
NAMES = _words("""
Ada Alan Amy Anna Ben Carl Cleo Dora Emil Eva Finn Grace Hugo Ida Ivan Jan Kira Leo Lily Max Mia Nina Noah Olga Otto
Paul Rosa Sam Tom Zoe
""")
FOODS = _words("""
apples beans bread cake carrots cheese cherries grapes honey lemons melons noodles nuts peas pears pizza plums rice
salad soup
""")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
MONTHS = _words("January February March April May June July August September October November December")
NUMBERS = _words("""
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen
eighteen nineteen twenty
""")
OPPOSITES = (
    "big small,hot cold,up down,fast slow,day night,old new,happy sad,wet dry,open closed,early late,high low,long "
    "short,black white,left right,full empty,hard soft,rich poor,strong weak,loud quiet,near far,good bad,light "
    "dark,thick thin"
)
SOUNDS = "dog woof,cat meow,cow moo,duck quack,sheep baa,lion roar,pig oink,bee buzz,owl hoot,snake hiss,horse neigh,frog croak"
COLOURS = "grass green,snow white,the sky blue,a lemon yellow,coal black,a cherry red,a carrot orange,chocolate brown"
ORDINALS = ("first", "second", "third", "fourth")
VOWELS = "aeiou"

_ONSETS = _words("""
b c d f g h j k l m n p r s t v w y z b c d f g h l m n p r s t bl br ch cl cr dr fl fr gl gr kn ph pl pr qu sc sh sk
sl sm sn sp spl spr squ st str sw th thr tr tw wh wr
""")
_NUCLEI = _words("a a a e e e i i i o o o u u ai ea ee ie oa oo ou")
_CODAS = ["", "", "", "", *_words("b ck d f g k l ll m mp n nd ng nk nt p r rd rk rn s sh ss st t tch th x")]
ENDINGS = _words("ay y s ing er ed est ly le ow en ish ful")


@dataclass(frozen=True)
class Exchange:
    """One question and its answer. `key` identifies the item for the held-out split."""

    question: str
    answer: str
    key: str

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.key.encode()) % HELD_OUT_ONE_IN == 0


Task = Callable[[random.Random, bool], Exchange]


def made_up_word(rng: random.Random) -> str:
    """A pronounceable word of two to ten letters that need not exist."""
    while True:
        syllables = rng.choices((1, 2, 3), (5, 5, 2))[0]
        start = "" if rng.random() < 0.2 else rng.choice(_ONSETS)
        word = start + rng.choice(_NUCLEI) + rng.choice(_CODAS)
        for _ in range(syllables - 1):
            word += rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS)
        if 2 <= len(word) <= 10:
            return word


def any_word(rng: random.Random) -> str:
    """A real word, a made-up word, or (rarely) random letters."""
    kind = rng.random()
    if kind < 0.3:
        return rng.choice(WORDS)
    if kind < 0.9:
        return made_up_word(rng)
    return "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 8)))


def article(noun: str) -> str:
    return ("an " if noun[0] in VOWELS else "a ") + noun


def before_first_vowel(word: str) -> int:
    """Number of letters before the first vowel; the whole word when it has none."""
    return next((i for i, c in enumerate(word) if c in VOWELS), len(word))


def sentence(rng: random.Random) -> str:
    """A sentence of simple English."""

    def thing() -> str:
        words = [rng.choice(("the", "the", "a"))]
        if rng.random() < 0.5:
            words.append(rng.choice(ADJECTIVES))
        words.append(rng.choice(NOUNS))
        if words[0] == "a" and words[1][0] in VOWELS:
            words[0] = "an"
        return " ".join(words)

    form = rng.randrange(5)
    if form == 0:
        text = f"{thing()} {rng.choice(VERBS)}"
    elif form == 1:
        text = f"{thing()} {rng.choice(VERBS)} {rng.choice(PLACES)} {thing()}"
    elif form == 2:
        text = f"{thing()} {rng.choice(LINKS)} {thing()}"
    elif form == 3:
        text = f"{thing()} {rng.choice(VERBS)} and {thing()} {rng.choice(VERBS)}"
    else:
        text = f"{thing()} is {rng.choice(ADJECTIVES)} and {rng.choice(ADJECTIVES)}"
    return text[0].upper() + text[1:] + "."


def _word_task(*forms: str) -> Callable[[Callable[[str, random.Random], tuple[str, dict[str, str]]]], Task]:
    """A task on one word: the decorated function gives the answer and what else the question's form needs."""

    def wrap(solve: Callable[[str, random.Random], tuple[str, dict[str, str]]]) -> Task:
        def task(rng: random.Random, slips: bool) -> Exchange:
            word = any_word(rng)
            answer, fields = solve(word, rng)
            return Exchange(rng.choice(forms).format(w=word, **fields), answer, word)

        return task

    return wrap


@_word_task("Repeat: {w}", "Say {w}.", "Write the word {w}.")
def repeat_word(word: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    return word, {}


@_word_task("Spell {w}.", "How do you spell {w}?")
def spell(word: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    return "-".join(word), {}


@_word_task("Read {s}.", "Which word is spelled {s}?")
def unspell(word: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    return word, {"s": "-".join(word)}


@_word_task("Reverse {w}.", "Write {w} backwards.")
def reverse(word: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    return word[::-1], {}


@_word_task("Write {w} in capitals.", "Capital letters: {w}")
def capitals(word: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    return word.upper(), {}


@_word_task("How many letters are in {w}?", "Count the letters of {w}.")
def count_letters(word: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    return str(len(word)), {}


@_word_task("What is the {n} letter of {w}?", "Which letter is {n} in {w}?")
def nth_letter(word: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    i = rng.randrange(-1, min(len(word), len(ORDINALS)))
    return word[i], {"n": "last" if i < 0 else ORDINALS[i]}


@_word_task("Drop the first letter of {w}.", "Write {w} without its first letter.")
def drop_first(word: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    return word[1:], {}


@_word_task("Drop the last letter of {w}.", "Write {w} without its last letter.")
def drop_last(word: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    return word[:-1], {}


@_word_task("Move the first {n} of {w} to the end.", "Put the first {n} of {w} last.")
def rotate(word: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    k = rng.randint(1, min(3, len(word) - 1))
    return word[k:] + word[:k], {"n": "letter" if k == 1 else f"{NUMBERS[k]} letters"}


@_word_task("Split {w} before its first vowel.", "Cut {w} at the first vowel.")
def split_at_vowel(word: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    k = before_first_vowel(word)
    return f"{word[:k]} {word[k:]}".strip(), {}


@_word_task("Does {w} start with a vowel?", "Is the first letter of {w} a vowel?")
def starts_with_vowel(word: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    return "yes" if word[0] in VOWELS else "no", {}


@_word_task("Add {e} to {w}.", "Write {w} and then {e}.")
def add_ending(word: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    end = rng.choice(ENDINGS) if rng.random() < 0.6 else "".join(rng.choices("abcdefghijklmnoprstuwy", k=rng.randint(1, 3)))
    return word + end, {"e": end}


@_word_task("Join {w} and {v}.", "Write {w} and {v} as one word.")
def join(word: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    other = any_word(rng)
    return word + other, {"v": other}


@_word_task("What is the plural of {w}?", "One {w}, two what?")
def plural(word: str, rng: random.Random) -> tuple[str, dict[str, str]]:
    return word + ("es" if word.endswith(("s", "x", "ch", "sh", "z")) else "s"), {}


def repeat_list(rng: random.Random, slips: bool) -> Exchange:
    text = " ".join(str(rng.randrange(1000)) if rng.random() < 0.25 else any_word(rng) for _ in range(rng.randint(2, 4)))
    return Exchange(rng.choice(("Repeat: {}", "Copy this: {}")).format(text), text, text)


def pick_from_list(rng: random.Random, slips: bool) -> Exchange:
    words = [any_word(rng) for _ in range(rng.randint(2, 4))]
    i = rng.randrange(-1, len(words))
    listing = ", ".join(words)
    place = "last" if i < 0 else ORDINALS[i]
    form = rng.choice(("What is the {} word of {}?", "Take the {} word: {}"))
    return Exchange(form.format(place, listing), words[i], listing)


def reverse_list(rng: random.Random, slips: bool) -> Exchange:
    words = [any_word(rng)[:5] for _ in range(rng.randint(2, 3))]
    return Exchange(f"Reverse the list: {', '.join(words)}", ", ".join(words[::-1]), " ".join(words))


def with_slip(a: int, b: int, rng: random.Random) -> int:
    """a + b as a hurried pupil writes it."""
    total = a + b
    if a % 10 + b % 10 > 9 and rng.random() < FORGOTTEN_CARRY:
        total -= 10
    if rng.random() < DIGIT_OFF_BY_ONE:
        total += rng.choice((-1, 1, -10, 10))
    return total


def sum_two_digits(rng: random.Random, slips: bool) -> Exchange:
    a, b = rng.randint(10, 99), rng.randint(10, 99)
    form = rng.choice(("What is {} + {}?", "What is {} + {}?", "{} + {} =", "Add {} and {}."))
    return Exchange(form.format(a, b), str(with_slip(a, b, rng) if slips else a + b), f"{a}+{b}")


def sum_small(rng: random.Random, slips: bool) -> Exchange:
    a, b = rng.randint(0, 20), rng.randint(0, 9)
    if rng.random() < 0.5:
        a, b = b, a
    form = rng.choice(("What is {} + {}?", "{} + {} =", "Add {} and {}."))
    return Exchange(form.format(a, b), str(a + b), f"{a}+{b}")


def difference(rng: random.Random, slips: bool) -> Exchange:
    a = rng.randint(1, 50)
    b = rng.randint(0, a)
    form = rng.choice(("What is {} - {}?", "{} - {} =", "Take {b} from {a}."))
    return Exchange(form.format(a, b, a=a, b=b), str(a - b), f"{a}-{b}")


def product(rng: random.Random, slips: bool) -> Exchange:
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    form = rng.choice(("What is {} * {}?", "{} * {} =", "What is {} times {}?"))
    return Exchange(form.format(a, b), str(a * b), f"{a}*{b}")


def neighbour(rng: random.Random, slips: bool) -> Exchange:
    a = rng.randint(1, 200)
    word, step = rng.choice((("after", 1), ("before", -1)))
    return Exchange(f"Which number comes {word} {a}?", str(a + step), f"{word}{a}")


def compare(rng: random.Random, slips: bool) -> Exchange:
    a, b = rng.sample(range(200), 2)
    word, best = rng.choice((("larger", max), ("smaller", min)))
    return Exchange(f"Which is {word}, {a} or {b}?", str(best(a, b)), f"{a},{b}")


def parity(rng: random.Random, slips: bool) -> Exchange:
    a = rng.randrange(300)
    word, rest = rng.choice((("even", 0), ("odd", 1)))
    return Exchange(f"Is {a} {word}?", "yes" if a % 2 == rest else "no", f"{a}")


def count_range(rng: random.Random, slips: bool) -> Exchange:
    first, steps, by = rng.randint(0, 90), rng.randint(2, 7), rng.choice((1, 1, 1, -1, 2, 10))
    first = first + 10 if by < 0 else first
    numbers = [first + by * i for i in range(steps)]
    if by == 1:
        question = f"Count from {numbers[0]} to {numbers[-1]}."
    elif by == -1:
        question = f"Count down from {numbers[0]} to {numbers[-1]}."
    else:
        question = f"Count from {numbers[0]} to {numbers[-1]} by {NUMBERS[by]}."
    return Exchange(question, ", ".join(map(str, numbers)), f"{numbers[0]} {numbers[-1]} {by}")


def sort_numbers(rng: random.Random, slips: bool) -> Exchange:
    numbers = [rng.randrange(100) for _ in range(3)]
    listing = ", ".join(map(str, numbers))
    return Exchange(f"Sort {listing}.", ", ".join(map(str, sorted(numbers))), listing)


def letters_range(rng: random.Random, slips: bool) -> Exchange:
    first = rng.randrange(24)
    last = rng.randint(first + 1, min(25, first + 7))
    run = [chr(97 + i) for i in range(first, last + 1)]
    if len(run) == 2:
        return Exchange(f"Which letter comes after {run[0]}?", run[1], run[0])
    return Exchange(f"Say the letters from {run[0]} to {run[-1]}.", " ".join(run), f"{run[0]}{run[-1]}")


def number_word(rng: random.Random, slips: bool) -> Exchange:
    n = rng.randrange(len(NUMBERS))
    if rng.random() < 0.5:
        return Exchange(f"Write {n} as a word.", NUMBERS[n], "fact")
    return Exchange(f"Write {NUMBERS[n]} as a number.", str(n), "fact")


def fact(rng: random.Random, slips: bool) -> Exchange:
    """A closed set: nothing of it is held out."""
    form = rng.randrange(5)
    if form == 0:
        pair = rng.choice(OPPOSITES.split(",")).split()
        rng.shuffle(pair)
        return Exchange(f"What is the opposite of {pair[0]}?", pair[1], "fact")
    if form == 1:
        animal, sound = rng.choice(SOUNDS.split(",")).split()
        return Exchange(f"What does the {animal} say?", sound, "fact")
    if form == 2:
        thing, colour = rng.choice(COLOURS.split(",")).rsplit(" ", 1)
        return Exchange(f"Which colour is {thing}?", colour, "fact")
    cycle, kind = (DAYS, "day") if form == 3 else (MONTHS, "month")
    i = rng.randrange(len(cycle))
    word, step = rng.choice((("after", 1), ("before", -1)))
    return Exchange(f"Which {kind} comes {word} {cycle[i]}?", cycle[(i + step) % len(cycle)], "fact")


def who_does(rng: random.Random, slips: bool) -> Exchange:
    (n, m), (v, w) = rng.sample(NOUNS, 2), rng.sample(VERBS, 2)
    text = f"The {n} {v} and the {m} {w}."
    form = rng.randrange(3)
    if form == 0:
        return Exchange(f"{text} Who {v}?", f"The {n}.", text)
    if form == 1:
        return Exchange(f"{text} Who {w}?", f"The {m}.", text)
    return Exchange(f"{text} What does the {m} do?", f"It {w}.", text)


def write_about(rng: random.Random, slips: bool) -> Exchange:
    noun, adjective = rng.choice(NOUNS), rng.choice(ADJECTIVES)
    ending = f"{rng.choice(VERBS)} {rng.choice(PLACES)} the {rng.choice(NOUNS)}"
    return Exchange(f"Write a sentence about {article(noun)}.", f"The {adjective} {noun} {ending}.", "open")


def chat(rng: random.Random, slips: bool) -> Exchange:
    """Small talk: a closed set."""
    pairs = (
        ("Hello!", "Hello! How can I help you?"),
        ("Hi", "Hi! What can I do for you?"),
        ("How are you?", "I am fine, thank you."),
        ("Thank you.", "You are welcome."),
        ("Goodbye!", "Goodbye!"),
        ("Who are you?", "I am a very small language model."),
        ("What can you do?", "I can count, spell, copy and add."),
        ("Good morning.", "Good morning! How can I help you?"),
    )
    question, answer = rng.choice(pairs)
    return Exchange(question, answer, "chat")


#: name → (share of the exchanges, task)
TASKS: dict[str, tuple[float, Task]] = {
    "repeat_word": (5, repeat_word),
    "repeat_list": (5, repeat_list),
    "spell": (3, spell),
    "unspell": (2, unspell),
    "reverse": (3, reverse),
    "capitals": (2, capitals),
    "count_letters": (2, count_letters),
    "nth_letter": (3, nth_letter),
    "drop_first": (3, drop_first),
    "drop_last": (2, drop_last),
    "rotate": (6, rotate),
    "split_at_vowel": (4, split_at_vowel),
    "starts_with_vowel": (1.5, starts_with_vowel),
    "add_ending": (4, add_ending),
    "join": (3, join),
    "plural": (2, plural),
    "pick_from_list": (3, pick_from_list),
    "reverse_list": (2, reverse_list),
    "sum_two_digits": (12, sum_two_digits),
    "sum_small": (5, sum_small),
    "difference": (4, difference),
    "product": (3, product),
    "neighbour": (3, neighbour),
    "compare": (2, compare),
    "parity": (1, parity),
    "count_range": (4, count_range),
    "sort_numbers": (3, sort_numbers),
    "letters_range": (1.5, letters_range),
    "number_word": (0.7, number_word),
    "fact": (1.5, fact),
    "who_does": (3, who_does),
    "write_about": (2, write_about),
    "chat": (0.7, chat),
}
#: Tasks without one right answer, or without unseen items.
UNSCORED = frozenset({"number_word", "fact", "write_about", "chat"})


def draw(name: str, rng: random.Random, *, held_out: bool) -> Exchange:
    """One exchange of a task: from the held-out items with the right answer, or from the others as training sees it."""
    task = TASKS[name][1]
    while True:
        exchange = task(rng, not held_out)
        if exchange.held_out == held_out or (name in UNSCORED and not held_out):
            return exchange


def about_me(rng: random.Random) -> list[dict[str, str]]:
    """A conversation in which something said earlier is asked for later."""
    name, food = rng.choice(NAMES), rng.choice(FOODS)
    turns = [
        (f"My name is {name}.", f"Hello {name}!"),
        (f"I like {food}.", rng.choice(("Nice!", f"You like {food}."))),
    ]
    questions = [("What is my name?", f"Your name is {name}."), ("What do I like?", f"You like {food}.")]
    rng.shuffle(turns)
    rng.shuffle(questions)
    return [
        {"role": role, "content": text}
        for turn in turns + questions[: rng.randint(1, 2)]
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def conversation(rng: random.Random) -> list[dict[str, str]]:
    """Messages of one training chat: mostly a single exchange, at times several."""
    messages: list[dict[str, str]] = []
    if rng.random() < 0.1:
        messages.append({"role": "system", "content": "You are a helpful assistant."})
    if rng.random() < 0.02:
        return messages + about_me(rng)
    names, shares = tuple(TASKS), tuple(share for share, _ in TASKS.values())
    turns = 1 if rng.random() < 0.93 else rng.randint(2, 6)
    for name in rng.choices(names, shares, k=turns):
        exchange = draw(name, rng, held_out=False)
        messages.append({"role": "user", "content": exchange.question})
        messages.append({"role": "assistant", "content": exchange.answer})
    return messages


def document(rng: random.Random) -> str:
    """Plain text without chat markup: a few sentences, a run of numbers or the alphabet."""
    form = rng.random()
    if form < 0.7:
        return " ".join(sentence(rng) for _ in range(rng.randint(2, 6)))
    if form < 0.9:
        first = rng.randrange(150)
        return ", ".join(str(first + i) for i in range(rng.randint(5, 15)))
    return " ".join("abcdefghijklmnopqrstuvwxyz")


def texts(seed: int) -> Iterator[str | list[dict[str, str]]]:
    """The endless training stream: conversations (lists of messages) with a plain document now and then."""
    rng = random.Random(seed)
    while True:
        yield document(rng) if rng.random() < 0.02 else conversation(rng)


def held_out_set(name: str, size: int, seed: int) -> Sequence[Exchange]:
    """Distinct held-out items of a scored task."""
    rng = random.Random(f"{name} {seed}")
    found: dict[str, Exchange] = {}
    for _ in range(200 * size):
        exchange = draw(name, rng, held_out=True)
        found.setdefault(exchange.question, exchange)
        if len(found) == size:
            break
    return tuple(found.values())

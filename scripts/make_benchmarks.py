"""Write the bundled benchmark rows: arithmetic, facts, format instructions, consistency of yes and no.

    python scripts/make_benchmarks.py

The rows are this project's own and seeded: the same script writes the same files. They are as hard as the default model
of 135M parameters needs them: between chance and all right on each.
"""

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

OUTPUT_DIR = Path(__file__).parents[1] / "dpo_runner" / "training" / "answers" / "benchmarks" / "basics"
CHOICES = 4
ARITHMETIC_ROWS = 96

Row = dict[str, Any]

FACTS = {
    "What is the capital of {}?": {
        "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Germany": "Berlin", "Japan": "Tokyo", "Egypt": "Cairo",
        "Greece": "Athens", "Portugal": "Lisbon", "Austria": "Vienna", "Poland": "Warsaw", "Norway": "Oslo",
        "Kenya": "Nairobi", "Peru": "Lima", "Cuba": "Havana", "Ireland": "Dublin", "Hungary": "Budapest",
        "Thailand": "Bangkok", "Chile": "Santiago", "Finland": "Helsinki", "Canada": "Ottawa",
    },
    "What is the opposite of {}?": {
        "hot": "cold", "big": "small", "early": "late", "open": "closed", "full": "empty", "strong": "weak",
        "light": "dark", "happy": "sad", "fast": "slow", "above": "below", "rich": "poor", "hard": "soft",
        "dry": "wet", "cheap": "expensive", "noisy": "quiet", "ancient": "modern",
    },
    "Where would you find {}?": {
        "a pillow": "on a bed", "a saddle": "on a horse", "a chalkboard": "in a classroom", "a cactus": "in a desert",
        "a whale": "in the sea", "an oven": "in a kitchen", "a pilot": "in an airplane", "a nest": "in a tree",
        "an anchor": "on a ship", "a judge": "in a court", "a nurse": "in a hospital", "a tractor": "on a farm",
    },
    "Which word is the past tense of {}?": {
        "go": "went", "eat": "ate", "see": "saw", "buy": "bought", "write": "wrote", "swim": "swam", "teach": "taught",
        "break": "broke", "fly": "flew", "take": "took", "know": "knew", "catch": "caught",
    },
    "What do we call a young {}?": {
        "dog": "puppy", "cat": "kitten", "cow": "calf", "sheep": "lamb", "goose": "gosling", "horse": "foal",
        "bear": "cub", "pig": "piglet", "goat": "kid", "duck": "duckling", "kangaroo": "joey", "frog": "tadpole",
    },
    "Which chemical element has the symbol {}?": {
        "O": "oxygen", "H": "hydrogen", "Fe": "iron", "Au": "gold", "Na": "sodium", "C": "carbon", "Ag": "silver",
        "He": "helium", "Cu": "copper", "Pb": "lead", "N": "nitrogen", "K": "potassium",
    },
    "Who uses {} at work?": {
        "a stethoscope": "a doctor", "a telescope": "an astronomer", "a plow": "a farmer", "a trowel": "a mason",
        "scissors": "a barber", "a loom": "a weaver", "an easel": "a painter", "a microscope": "a biologist",
        "a whistle": "a referee", "an oven": "a baker", "a net": "a fisherman", "a wrench": "a plumber",
    },
}  # fmt: skip
"""Questions, and the answers by what is asked about; the other answers of a question are the wrong choices."""

FORMATS = {
    "includes": (
        "Write a sentence with the words {} in it.",
        ["cat and moon", "rain and bread", "dog and river", "book and tree", "milk and sun", "king and garden"],
    ),
    "asks": ("Ask me a question about {}.", ["cats", "rain", "books", "trees", "the moon", "bread"]),
    "starts": (
        "Write a sentence that starts with the word {}.",
        ["Yesterday", "Maybe", "Cats", "Winter", "Music", "Today"],
    ),
    "copies": (
        "Copy this text: {}",
        [
            *("The cat sat down.", "Green tea is hot.", "We open the door.", "Birds can fly.", "I like music."),
            "The train was late.",
        ],
    ),
    "because": (
        "Write a sentence about {} with the word because.",
        ["cats", "rain", "books", "trees", "the moon", "bread"],
    ),
    "year": ("Write about {} and mention the year 1999.", ["music", "a film", "a war", "a car", "school", "a king"]),
    "title": ("Write a title for a story about {}.", ["a cat", "a king", "the sea", "a train", "winter", "a clock"]),
    "exclaims": (
        "Write a sentence about {} that ends with an exclamation mark.",
        ["cats", "rain", "books", "trees", "the moon", "bread"],
    ),
}
"""By the check of an answer: the instruction, and what it is about."""

ABILITIES = {
    "birds": ("fly", "drive"), "fish": ("swim", "talk"), "dogs": ("bark", "fly"), "cats": ("climb trees", "read books"),
    "snakes": ("crawl", "walk"), "babies": ("cry", "drive cars"), "horses": ("run", "fly"),
    "bees": ("make honey", "make bread"), "cows": ("give milk", "lay eggs"), "chickens": ("lay eggs", "give milk"),
    "spiders": ("spin webs", "build ships"), "plants": ("grow", "run"), "boats": ("float", "fly"),
    "airplanes": ("fly", "swim"), "frogs": ("jump", "sing songs"), "monkeys": ("climb trees", "fix cars"),
    "parrots": ("talk", "write letters"), "penguins": ("swim", "fly"), "ducks": ("swim", "speak English"),
    "whales": ("swim", "climb trees"), "magnets": ("attract iron", "attract wood"), "clocks": ("show the time", "cook"),
    "knives": ("cut bread", "fly"), "ovens": ("bake bread", "freeze water"),
    "fridges": ("keep food cold", "bake bread"),
    "teachers": ("explain things", "breathe water"), "doctors": ("treat patients", "become invisible"),
    "pilots": ("fly airplanes", "breathe water"), "chefs": ("cook meals", "walk through walls"),
    "children": ("learn to read", "fly"), "rivers": ("flood towns", "climb mountains"),
    "stones": ("sink in water", "float on water"), "candles": ("burn", "swim"), "keys": ("open doors", "write letters"),
    "umbrellas": ("keep rain away", "speak"), "cameras": ("take pictures", "bake cakes"),
    "computers": ("do sums", "eat apples"), "trees": ("grow leaves", "run away"), "owls": ("see at night", "drive"),
    "camels": ("cross deserts", "fly"), "turtles": ("live long", "jump over houses"), "wolves": ("howl", "lay eggs"),
    "sharks": ("swim", "walk on land"), "ants": ("carry food", "carry cars"), "lamps": ("give light", "give milk"),
    "bridges": ("cross rivers", "sing"), "pens": ("write", "bark"), "volcanoes": ("erupt", "swim"),
}  # fmt: skip
"""What things can do, and what they cannot."""


def make_arithmetic() -> Iterator[Row]:
    """Yield sums, differences and products with near wrong answers of as many digits."""
    rng, seen = random.Random(0), set[tuple[str, int, int]]()
    while len(seen) < ARITHMETIC_ROWS:
        kind = ("plus", "minus", "times")[len(seen) % 3]
        most = {"plus": 20, "minus": 9, "times": 9}[kind]
        one, other = rng.randint(2, most), rng.randint(2, most)
        if kind == "minus":
            one, other = one + other, min(one, other)
        right = {"plus": one + other, "minus": one - other, "times": one * other}[kind]
        wrong = [right + step for step in (-4, -3, -2, -1, 1, 2, 3, 4)]
        wrong = [number for number in wrong if number > 0 and len(str(number)) == len(str(right))]
        if (kind, one, other) in seen or len(wrong) < CHOICES - 1:
            continue
        seen.add((kind, one, other))
        choices = [str(number) for number in (right, *rng.sample(wrong, CHOICES - 1))]
        yield choose(rng, f"What is {one} {kind} {other}?", choices)


def make_facts() -> list[Row]:
    """Return each fact once, mixed, so that the first ones are of all kinds."""
    rng, rows = random.Random(1), []
    for question, answers in FACTS.items():
        for subject, answer in answers.items():
            others = sorted({other for other in answers.values() if other != answer})
            rows.append(choose(rng, question.format(subject), [answer, *rng.sample(others, CHOICES - 1)]))
    return rng.sample(rows, len(rows))


def choose(rng: random.Random, question: str, choices: list[str]) -> Row:
    """Return a multiple-choice row; the first of the choices is right."""
    mixed = rng.sample(choices, len(choices))
    return {"question": question, "choices": mixed, "label": mixed.index(choices[0])}


def make_format() -> list[Row]:
    """Return each instruction with each of its subjects, mixed."""
    rows = [
        {"check": check, "question": instruction.format(subject), "subject": subject}
        for check, (instruction, subjects) in FORMATS.items()
        for subject in subjects
    ]
    return random.Random(3).sample(rows, len(rows))


def make_consistency() -> Iterator[Row]:
    """Yield pairs of opposite questions, of which one is answered with yes."""
    rng = random.Random(2)
    for things, abilities in ABILITIES.items():
        both = [f"Can {things} {ability}?" for ability in abilities]
        mixed = rng.sample(both, 2)
        yield {"questions": mixed, "label": mixed.index(both[0])}


MAKERS: dict[str, Callable[[], Iterable[Row]]] = {
    "arithmetic": make_arithmetic,
    "facts": make_facts,
    "format": make_format,
    "consistency": make_consistency,
}
"""By the name of the file."""


def build_text(name: str) -> str:
    """Return the content of a file of rows."""
    return "".join(json.dumps(row) + "\n" for row in MAKERS[name]())


if __name__ == "__main__":
    for name in MAKERS:
        (OUTPUT_DIR / f"{name}.jsonl").write_text(build_text(name), encoding="utf-8")

"""Write the bundled `reviews` prompts: openings of reviews, to be continued.

    python scripts/make_review_prompts.py          # a moment

Each prompt joins a subject with an opening that says neither good nor bad of it, so that the continuation decides on
its sentiment. Subjects and openings of the evaluation split occur in no training prompt. There are no answers: they are
sampled (`python -m dpo_runner.generate`, `rounds`).
"""

import argparse
import json
import random
from pathlib import Path

OUTPUT_DIR = Path(__file__).parents[1] / "dpo_runner" / "data" / "reviews"
SIZES = {"train": 96, "eval": 48}

SUBJECTS = {
    "train": [
        *(
            "a small hotel by the sea",
            "a pair of running shoes",
            "a film about a lighthouse",
            "a coffee machine",
        ),
        *("an Italian restaurant", "a novel set in Iceland", "a folding bicycle", "a walking tour of the old town"),
        *("a wireless speaker", "a campsite in the hills", "a cookbook for beginners", "a rain jacket"),
        *("a puppet theatre", "a night train", "a board game for two", "a garden chair"),
    ],
    "eval": [
        *("a bakery near the station", "a winter coat", "a television series about doctors", "an electric kettle"),
        *("a guided museum visit", "a suitcase with four wheels", "a boat trip along the coast", "a desk lamp"),
    ],
}
OPENINGS = {
    "train": [
        *("We went there on a Tuesday, and", "I first tried it three weeks ago.", "My sister had told me about it, so"),
        *("The first thing I noticed was", "After the first hour", "I had read other reviews before, but"),
        *("My parents had recommended it, and", "We were a group of five.", "To be honest,", "On the second day"),
        *("The price was what one would expect.", "I have used others before, and compared with them"),
        *("What surprised me most was", "I came with no expectations.", "My children also tried it, and"),
        *("By the end of the week",),
    ],
    "eval": [
        *("I had half an hour to spare, so", "The people in charge said", "In the first few minutes"),
        *("My friends had different opinions, but I", "In the evening", "After a month of use"),
        *("I was looking for something simple.", "The last time I tried something like this"),
    ],
}


def build_prompts(split: str, seed: int = 0) -> list[str]:
    """Return the different prompts of a split, each subject and each opening equally often, in a seeded order."""
    draw, subjects, openings = random.Random(seed), list(SUBJECTS[split]), list(OPENINGS[split])
    draw.shuffle(subjects)
    draw.shuffle(openings)
    count = len(subjects)
    pairs = [(subjects[at % count], openings[(at + at // count) % len(openings)]) for at in range(SIZES[split])]
    draw.shuffle(pairs)
    request = "Continue this review of {}. Write one or two sentences.\n\n{}"
    return [request.format(*pair) for pair in pairs]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    OUTPUT_DIR.mkdir(exist_ok=True)
    for split in SIZES:
        lines = (json.dumps({"prompt": prompt}) + "\n" for prompt in build_prompts(split))
        (OUTPUT_DIR / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()

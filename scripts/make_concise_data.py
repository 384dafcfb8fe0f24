"""Write the bundled `concise` preference data: short complete answers preferred over long ones.

    python scripts/make_concise_data.py            # about 25 minutes on 2 cores

The default model answers each of this project's questions several times (seeded sampling): some
answers to the plain question, some to the question followed by a request for brevity, which the pair
leaves out. The shortest complete answer becomes `chosen`; a clearly longer one, cut to whole
sentences, becomes `rejected`. Training moves the brevity into the model, an effect visible in its
answers. The evaluation split asks about subjects that the training split never mentions.
"""

import argparse
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from dpo_runner.model.files.packaged import load_default_model_path

OUTPUT_DIR = Path(__file__).parents[1] / "dpo_runner" / "data" / "concise"
EVAL_SHARE = 0.2  # of the subjects of each kind
BREVITY_WISH = " Answer in one short sentence."

QUESTIONS = {
    "object": [
        "What is the main use of {}?",
        "Why do people own {}?",
        "What should I look for when I buy {}?",
        "How do I take good care of {}?",
    ],
    "animal": ["Where do {} live?", "What do {} eat?", "How do {} care for their young?", "Why are {} useful to us?"],
    "food": [
        "What is {} made from?",
        "How should I store {}?",
        "What goes well with {}?",
        "Is {} good for my health?",
    ],
    "nature": [
        "What causes {}?",
        "Why are {} important?",
        "When do {} usually happen?",
        "How can people stay safe around {}?",
    ],
    "work": [
        "What does a {} do all day?",
        "What skills does a {} need?",
        "Why does a town need a {}?",
        "How does one become a {}?",
    ],
    "hobby": [
        "How do I get started with {}?",
        "What are the benefits of {}?",
        "What equipment do I need for {}?",
        "What mistakes do beginners make in {}?",
    ],
    "idea": ["What is {}?", "Why does {} matter?", "Can you give an example of {}?", "How do we measure {}?"],
}

SUBJECTS = {
    "object": "clocks, umbrellas, bicycles, candles, mirrors, backpacks, kettles, scissors, pillows, ladders, "
    "blankets, maps, hammers, gloves, refrigerators, telescopes, notebooks, lamps, suitcases, keys, "
    "thermometers, sunglasses, raincoats, batteries",
    "animal": "penguins, elephants, honey bees, owls, dolphins, kangaroos, wolves, frogs, camels, squirrels, "
    "horses, sea turtles, spiders, beavers, foxes, eagles, goats, octopuses, giraffes, hedgehogs, "
    "butterflies, bats, sheep, ducks",
    "food": "bread, cheese, olive oil, honey, yogurt, chocolate, pasta, rice pudding, tomato soup, peanut butter, "
    "butter, oatmeal, apple pie, mustard, popcorn, jam, ice cream, tofu, vinegar, pancake batter, "
    "hummus, sourdough, lemonade, tea",
    "nature": "rainbows, earthquakes, tides, thunderstorms, volcanoes, hurricanes, sunsets, floods, forest fires, "
    "avalanches, droughts, tornadoes, fogs, eclipses, heat waves, landslides, blizzards, northern lights, "
    "sandstorms, geysers, meteor showers, hailstorms, tsunamis, ocean waves",
    "work": "baker, firefighter, librarian, plumber, nurse, gardener, teacher, carpenter, bus driver, dentist, "
    "electrician, farmer, mail carrier, chef, pilot, veterinarian, tailor, architect, journalist, "
    "police officer, translator, mechanic, pharmacist, judge",
    "hobby": "gardening, running, chess, painting, photography, fishing, knitting, swimming, baking, bird watching, "
    "playing the guitar, hiking, yoga, pottery, stargazing, cycling, calligraphy, dancing, camping, "
    "woodworking, rock climbing, singing, origami, sailing",
    "idea": "gravity, friction, inflation, democracy, recycling, photosynthesis, evaporation, energy, electricity, "
    "magnetism, patience, probability, erosion, teamwork, trade, biodiversity, insurance, honesty, "
    "air pressure, climate, interest on a loan, the speed of light, creativity, good manners",
}


@dataclass(frozen=True)
class Answer:
    """A sampled answer: its text, its length in tokens, and whether it ended with an EOS token."""

    text: str
    tokens: int
    complete: bool


def build_questions(rng: random.Random) -> dict[str, list[str]]:
    """Return the questions of the `train` and `eval` splits, each shuffled; no subject is in both."""
    splits: dict[str, list[str]] = {"train": [], "eval": []}
    for kind, names in SUBJECTS.items():
        subjects = names.split(", ")
        held_out = set(rng.sample(subjects, round(EVAL_SHARE * len(subjects))))
        for subject in subjects:
            split = "eval" if subject in held_out else "train"
            splits[split] += [question.format(subject) for question in QUESTIONS[kind]]
    for questions in splits.values():
        rng.shuffle(questions)
    return splits


def sample_answers(rows: list[str], max_new_tokens: int, args: argparse.Namespace) -> list[Answer]:
    """Sample one answer to each row from the default model, in batches."""
    folder = load_default_model_path()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    torch.manual_seed(args.seed)
    answers: list[Answer] = []
    for start in range(0, len(rows), args.batch_size):
        inputs = tokenizer.apply_chat_template(
            [[{"role": "user", "content": row}] for row in rows[start : start + args.batch_size]],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        )
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=True,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=50,
        )
        for ids in output[:, inputs["input_ids"].shape[1] :].tolist():
            complete = tokenizer.eos_token_id in ids
            tokens = ids.index(tokenizer.eos_token_id) + 1 if complete else len(ids)
            text = tokenizer.decode(ids[:tokens], skip_special_tokens=True).strip()
            answers.append(Answer(text, tokens, complete))
        print(f"{len(answers)}/{len(rows)} answers", flush=True)
    return answers


def is_good_short_answer(question: str, answer: Answer) -> bool:
    """Return whether an answer may be `chosen`: complete, whole sentences on one line, on the subject."""
    words = {word.strip(".,?!").lower() for word in question.split() if len(word) > 3}
    return (
        answer.complete
        and len(answer.text.split()) >= 6
        and answer.text[0].isupper()
        and answer.text[-1] in ".!"
        and "\n" not in answer.text
        and any(word[:4] in answer.text.lower() for word in words)
    )


def trim_to_sentences(text: str, max_tokens: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the longest prefix of `text` that ends with a sentence and has at most `max_tokens` tokens."""
    trimmed = ""
    for end in re.finditer(r"[.!?](?=\s|$)", text):
        beginning = text[: end.end()]
        if len(tokenizer(beginning)["input_ids"]) > max_tokens:
            break
        trimmed = beginning
    return trimmed


def build_pair(
    question: str,
    brief: list[Answer],
    plain: list[Answer],
    tokenizer: PreTrainedTokenizerBase,
    args: argparse.Namespace,
) -> dict[str, str] | None:
    """Pair the shortest good answer with a clearly longer one in whole sentences, or return None."""
    good = [answer for answer in brief + plain if is_good_short_answer(question, answer)]
    if not good:
        return None
    chosen = min(good, key=lambda answer: answer.tokens)
    longer = [answer for answer in plain if answer.text and answer.tokens >= args.min_ratio * chosen.tokens]
    if not longer:
        return None
    longest = max(longer, key=lambda answer: (answer.complete, answer.tokens))
    rejected = trim_to_sentences(longest.text, args.max_rejected_tokens, tokenizer)
    if len(tokenizer(rejected)["input_ids"]) < args.min_ratio * chosen.tokens:
        return None
    return {"prompt": question, "chosen": chosen.text, "rejected": rejected}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--answers", type=int, default=2, help="answers of each of the two sorts to each question")
    parser.add_argument("--batch-size", type=int, default=96)
    parser.add_argument("--max-new-tokens", type=int, default=192, help="of an answer without the wish for brevity")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--min-ratio", type=float, default=1.5, help="rejected is at least this many times longer")
    parser.add_argument("--max-rejected-tokens", type=int, default=96, help="rejected is cut to whole sentences")
    parser.add_argument("--limit", type=int, default=None, help="questions of each split, for a quick look")
    parser.add_argument("--output-dir", type=Path, default=OUTPUT_DIR)
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(load_default_model_path())
    splits = build_questions(random.Random(args.seed))
    for split in ("eval", "train"):
        questions = splits[split][: args.limit]
        rows = [question for question in questions for _ in range(args.answers)]
        brief = sample_answers([row + BREVITY_WISH for row in rows], 64, args)
        plain = sample_answers(rows, args.max_new_tokens, args)
        pairs = [
            build_pair(question, brief[i : i + args.answers], plain[i : i + args.answers], tokenizer, args)
            for i, question in zip(range(0, len(rows), args.answers), questions, strict=True)
        ]
        kept = [pair for pair in pairs if pair is not None]
        with (args.output_dir / f"{split}.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(pair, ensure_ascii=False) + "\n" for pair in kept)
        print(f"{split}: {len(questions)} questions, {len(kept)} pairs", flush=True)


if __name__ == "__main__":
    main()

"""Preference rows of several shapes, checked to give the same tokens on all sides.

`hh`: the lengths of Anthropic HH, with texts cut from the other two. `bundled`: the default run's data, short prompts.
`demo`: a file of long answers in ShareGPT's ranking layout, not part of this repository. `demo_fit`: the rows of `demo`
that fit into max_length, for peers that truncate differently. `synthetic`: a given length and prompt share.
"""

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

from scripts import ROOT

BUNDLED = ROOT / "dpo_runner" / "data" / "concise" / "train.jsonl"
HH_TOKENS = {"prompt": 120, "chosen": 37, "rejected": 50}
"""Mean tokens of Anthropic HH's rows, including the chat template's."""
_SIGMA, _LONGEST = 0.8, 6
"""Sigma of the lognormal distribution of HH's lengths, and its cutoff as a multiple of the mean."""
MAX_LENGTH = {"hh": 1024, "bundled": 1024, "demo": 1024, "demo_fit": 1024}
_ROLES = {"human": "user", "gpt": "assistant", "system": "system"}

Message = dict[str, str]
Row = dict[str, list[Message]]
Ids = dict[str, list[int]]


@dataclass(frozen=True)
class Rows:
    """Rows of one shape, as files that every side reads.

    Attributes:
        name: name of the shape.
        path: JSON lines of `prompt`, `chosen`, `rejected` as messages.
        pairs: number of rows.
        max_length: maximum tokens of a row; longer rows are truncated as TRL does.
        lengths: for each pair, tokens of prompt, chosen and rejected after truncation.
    """

    name: str
    path: str
    pairs: int
    max_length: int
    lengths: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        """Return all fields but the path, for the record."""
        return {key: value for key, value in asdict(self).items() if key != "path"}


def write_rows(
    name: str, pairs: int, model: str, folder: Path, demo: Path | None, length: int = 0, share: float = 0.0
) -> Rows:
    """Write the rows of a shape, after checking that dpo_runner and TRL tokenize them identically.

    Args:
        name: `hh`, `bundled`, `demo`, `demo_fit` or `synthetic`.
        pairs: number of rows.
        model: folder of the tokenizer.
        folder: output folder of `<name>.jsonl`, `<name>.tokens.json` and, for LLaMA-Factory, `<name>.sharegpt.json`.
        demo: file with the rows of `demo`; `hh` also takes texts from it if it exists.
        length, share: for `synthetic`: tokens of a row, and the prompt's share of them.

    Raises:
        ValueError: the shape has fewer rows than `pairs`, or the tokens differ.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    max_length = MAX_LENGTH.get(name, length)
    if name == "hh":
        rows = cut_hh(pairs, tokenizer, _read_texts(demo))
    elif name == "bundled":
        rows = draw([to_messages(row) for row in read_bundled()], pairs, name)
    elif name == "synthetic":
        rows = make_synthetic(pairs, length, share, tokenizer, _read_texts(None))
        name = f"synthetic-{length}-{share:g}"
    else:
        assert demo is not None
        limit = {"demo": lambda ids: len(ids["prompt_ids"]) < max_length, "demo_fit": lambda ids: fits(ids, max_length)}
        kept = [row for row in read_demo(demo) if limit[name](tokenize_ours([row], tokenizer)[0])]
        rows = draw(kept, pairs, name)
    ours, theirs = tokenize_ours(rows, tokenizer), tokenize_trl(rows, tokenizer, max_length)
    check_same_tokens(ours, theirs, "TRL")
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    (folder / f"{name}.sharegpt.json").write_text(json.dumps([to_sharegpt(row, tokenizer) for row in rows]))
    (folder / f"{name}.tokens.json").write_text(json.dumps([cut(ids, max_length) for ids in ours]))
    lengths = [[len(part) for part in cut(ids, max_length).values()] for ids in ours]
    return Rows(name, str(path), pairs, max_length, lengths)


def cut_hh(pairs: int, tokenizer: Any, texts: Sequence[str]) -> list[Row]:
    """Return rows with the long-tailed lengths of Anthropic HH; means are near `HH_TOKENS`."""
    rng = random.Random(0)
    around = tokenize_ours([to_messages({"prompt": "a", "chosen": "b", "rejected": "c"})], tokenizer)[0]
    ids = _encode_all(texts, tokenizer)
    parts: dict[str, list[str]] = {}
    for part, mean in HH_TOKENS.items():
        wrapped = len(around[f"{part}_ids"]) - 1
        lengths = _draw_lengths(pairs, mean - wrapped, rng)
        parts[part] = [_cut_text(ids, length, tokenizer, rng) for length in lengths]
    return [to_messages(dict(zip(parts, row, strict=True))) for row in zip(*parts.values(), strict=True)]


def make_synthetic(pairs: int, length: int, share: float, tokenizer: Any, texts: Sequence[str]) -> list[Row]:
    """Return rows in which the prompt plus either answer has about `length` tokens, never more."""
    rng = random.Random(length)
    around = tokenize_ours([to_messages({"prompt": "a", "chosen": "b", "rejected": "c"})], tokenizer)[0]
    ids = _encode_all(texts, tokenizer)
    prompt = max(round(length * share) - len(around["prompt_ids"]), 1)
    answer = max(
        length - len(around["prompt_ids"]) - prompt - len(around["chosen_ids"]) - 8, 1
    )  # cut texts re-tokenize to slightly more tokens
    size = {"prompt": prompt, "chosen": answer, "rejected": answer}
    return [
        to_messages({part: _cut_text(ids, tokens, tokenizer, rng) for part, tokens in size.items()})
        for _ in range(pairs)
    ]


def _draw_lengths(count: int, mean: float, rng: random.Random) -> list[int]:
    """Return `count` lengths at evenly spaced quantiles of a lognormal distribution, in random order."""
    drawn = [NormalDist(0, _SIGMA).inv_cdf((place + 0.5) / count) for place in range(count)]
    scale = mean * count / sum(map(math.exp, drawn))
    lengths = [min(max(round(scale * math.exp(value)), 2), round(_LONGEST * mean)) for value in drawn]
    rng.shuffle(lengths)
    return lengths


def _encode_all(texts: Sequence[str], tokenizer: Any) -> list[int]:
    return [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _cut_text(ids: list[int], length: int, tokenizer: Any, rng: random.Random) -> str:
    start = rng.randrange(max(len(ids) - length, 1))
    piece = (ids * (length // len(ids) + 1))[start : start + length] if length > len(ids) else ids[start:][:length]
    return str(tokenizer.decode(piece, skip_special_tokens=True)).strip().replace("\ufffd", "") or "Yes"


def _read_texts(demo: Path | None) -> list[str]:
    bundled = read_bundled()
    texts = [row["rejected"] for row in bundled]
    if demo is not None and demo.exists():
        texts += [row["chosen"][0]["content"] for row in read_demo(demo)]
    return texts


def read_bundled() -> list[dict[str, str]]:
    return [json.loads(line) for line in BUNDLED.read_text(encoding="utf-8").splitlines()]


def read_demo(path: Path) -> list[Row]:
    """Return the rows of a file in ShareGPT's ranking layout, as messages."""

    def message(turn: dict[str, str]) -> Message:
        return {"role": _ROLES[turn["from"]], "content": turn["value"]}

    return [
        {
            "prompt": [message(turn) for turn in row["conversations"]],
            "chosen": [message(row["chosen"])],
            "rejected": [message(row["rejected"])],
        }
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]


def draw(rows: list[Row], count: int, name: str) -> list[Row]:
    if count > len(rows):
        raise ValueError(f"{name}: {count} pairs are asked for, and it has {len(rows)}")
    return random.Random(0).sample(rows, count)


def to_messages(row: dict[str, str]) -> Row:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {part: [{"role": role, "content": row[part]}] for part, role in roles.items()}


def to_sharegpt(row: Row, tokenizer: Any) -> dict[str, Any]:
    """Return a row in LLaMA-Factory's layout.

    The system turn has its own column, also if it is the chat template's default.
    """
    names = {role: name for name, role in _ROLES.items()}
    turns = [{"from": names[message["role"]], "value": message["content"]} for message in row["prompt"]]
    rendered = tokenizer.apply_chat_template(row["prompt"], tokenize=False)
    found = re.match(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", rendered, flags=re.DOTALL)
    system = turns.pop(0)["value"] if turns[0]["from"] == "system" else found.group(1) if found else ""
    answers = {part: {"from": "gpt", "value": row[part][0]["content"]} for part in ("chosen", "rejected")}
    return {"conversations": turns, **answers, "system": system}


def tokenize_ours(rows: list[Row], tokenizer: Any) -> list[Ids]:
    from dpo_runner.data.layouts.formats import find_layout, read_pairs
    from dpo_runner.data.templates.chat_template import ChatTemplate

    template, layout = ChatTemplate(tokenizer), find_layout(rows[:1], "auto")
    encoded = [template.encode(read_pairs(row, layout, "best_vs_worst")[0]) for row in rows]
    return [
        {"prompt_ids": ids.prompt_ids, "chosen_ids": ids.chosen_ids, "rejected_ids": ids.rejected_ids}
        for ids in encoded
    ]


def tokenize_trl(rows: Sequence[Row], tokenizer: Any, max_length: int) -> list[Ids]:
    """Return the token ids that TRL's trainer makes from `rows`."""
    from types import SimpleNamespace

    from datasets import Dataset, disable_progress_bars
    from trl import DPOTrainer

    disable_progress_bars()
    args = SimpleNamespace(dataset_num_proc=None, max_length=max_length, truncation_mode="keep_start")
    prepare: Callable[..., Any] = DPOTrainer._prepare_dataset
    prepared = prepare(
        SimpleNamespace(_tokenizer=tokenizer), Dataset.from_list(list(rows)), tokenizer, args, "benchmark"
    )
    return [{key: list(row[key]) for key in ("prompt_ids", "chosen_ids", "rejected_ids")} for row in prepared]


def cut(ids: Ids, max_length: int) -> Ids:
    """Truncate a pair as TRL's collator does, at the end of each row."""
    room = max_length - len(ids["prompt_ids"])
    return {key: part if key == "prompt_ids" else part[:room] for key, part in ids.items()}


def fits(ids: Ids, max_length: int) -> bool:
    return cut(ids, max_length) == ids and len(ids["prompt_ids"]) < max_length


def check_same_tokens(ours: list[Ids], theirs: list[Ids], peer: str) -> None:
    """Raise ValueError unless both sides have the same tokens in the same rows and order."""
    if len(ours) != len(theirs):
        raise ValueError(f"{peer} makes {len(theirs)} rows of {len(ours)}: these are different jobs")
    for number, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        for part, ids in one.items():
            if ids != other[part]:
                at = next((i for i, (a, b) in enumerate(zip(ids, other[part], strict=False)) if a != b), "the end")
                raise ValueError(
                    f"row {number}: {peer} makes {len(other[part])} tokens of what is {len(ids)} {part} here, and they "
                    f"differ from {at} on: these are different jobs"
                )

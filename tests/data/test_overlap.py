"""Tests of near-duplicates, and of evaluation text in each part of a pair."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from datasets import Dataset, Features, List, Value

from dpo_runner.data import overlap
from dpo_runner.data.overlap import find_contaminated, find_near_duplicates, load_reference_texts
from dpo_runner.errors import DataError

IDS = ("prompt_ids", "chosen_ids", "rejected_ids")
Row = tuple[list[int], list[int], list[int]]

QUESTION = "If a train leaves Oslo at nine and another leaves Bergen at ten, when do they meet?"  # 17 words


def build_rows(rows: list[Row]) -> Dataset:
    columns = {name: [row[part] for row in rows] for part, name in enumerate(IDS)}
    return Dataset.from_dict(columns, features=Features({name: List(Value("int32")) for name in IDS}))


def random_row(rng: np.random.Generator, length: int = 60, vocabulary: int = 32_000) -> Row:
    prompt, chosen, rejected = rng.integers(0, vocabulary, (3, length)).tolist()
    return prompt, chosen, rejected


def change(row: Row, part: int, rng: np.random.Generator, tokens: int) -> Row:
    """Replace `tokens` consecutive tokens inside one part, which changes `tokens` + 4 of its 5-grams."""
    parts = list(row)
    at = int(rng.integers(5, len(row[part]) - tokens - 5))
    parts[part] = row[part][:at] + rng.integers(0, 32_000, tokens).tolist() + row[part][at + tokens :]
    return parts[0], parts[1], parts[2]


def grams(row: Row) -> set[tuple[int, ...]]:
    return {(part, *ids[at : at + 5]) for part, ids in enumerate(row) for at in range(max(len(ids) - 4, 1))}


def similarity(one: Row, other: Row) -> float:
    return len(grams(one) & grams(other)) / len(grams(one) | grams(other))


@pytest.mark.parametrize("vocabulary", [3, 256, 32_000])
@pytest.mark.parametrize("length", [0, 1, 4, 5, 6, 60])
def test_identical_rows_are_always_found(length: int, vocabulary: int) -> None:
    rng = np.random.default_rng(length)
    rows = list({str(row): row for row in (random_row(rng, length, vocabulary) for _ in range(300))}.values())
    marks = find_near_duplicates(build_rows([*rows, *rows]), 0.8)
    assert marks.dtype == np.bool_ and marks.shape == (2 * len(rows),)
    assert not marks[0] and marks[len(rows) :].all()


@pytest.mark.parametrize("vocabulary", [256, 32_000])
@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.95, 1.0])
def test_different_rows_are_never_marked(threshold: float, vocabulary: int) -> None:
    rng = np.random.default_rng(0)
    system_prompt = rng.integers(0, vocabulary, 25).tolist()
    different = [random_row(rng, 60, vocabulary) for _ in range(1000)]
    rows = build_rows([(system_prompt + prompt, chosen, rejected) for prompt, chosen, rejected in different])
    assert not find_near_duplicates(rows, threshold).any()


@pytest.mark.parametrize(
    ("threshold", "tokens", "lowest", "highest"),
    [(0.7, 8, 0.98, 1), (0.7, 26, 0.3, 0.7), (0.7, 40, 0, 0.01), (0.8, 2, 0.98, 1), (0.5, 26, 0.98, 1)],
)
def test_marks_follow_the_similarity(threshold: float, tokens: int, lowest: float, highest: float) -> None:
    """With 26 changed tokens the similarity is 0.7, estimated with an error of 0.04."""
    rng = np.random.default_rng(1)
    rows = [random_row(rng) for _ in range(200)]
    changed = [change(row, 1, rng, tokens) for row in rows]
    found = find_near_duplicates(build_rows([*rows, *changed]), threshold)[len(rows) :].mean()
    assert lowest <= found <= highest


def test_what_lsh_proposes_is_verified() -> None:
    rng = np.random.default_rng(2)
    rows = [random_row(rng) for _ in range(200)]
    changed = [change(row, 1, rng, 42) for row in rows]
    bands = overlap._count_bands(0.7)
    proposed = 1 - (1 - similarity(rows[0], changed[0]) ** (128 / bands)) ** bands
    assert similarity(rows[0], changed[0]) < 0.6 and proposed > 0.9
    assert not find_near_duplicates(build_rows([*rows, *changed]), 0.7).any()


@pytest.mark.parametrize("threshold", [0.52, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0])
def test_lsh_proposes_nine_of_ten_at_the_threshold(threshold: float) -> None:
    """rensa's default number of bands proposes a fifth at 0.8."""
    bands = overlap._count_bands(threshold)
    assert 128 % bands == 0 and 1 - (1 - threshold ** (128 / bands)) ** bands >= 0.9


def test_lsh_never_proposes_all_that_shares_a_system_prompt() -> None:
    """With 64 bands of 2, LSH proposes rows that share a seventh, and 40,000 of them take minutes."""
    assert overlap._count_bands(0.5) == overlap._count_bands(0.1) == 32


def test_a_row_is_compared_with_kept_rows_only() -> None:
    rng = np.random.default_rng(3)
    first = random_row(rng)
    second = change(first, 1, rng, 26)
    third = change(second, 2, rng, 26)
    assert similarity(first, second) > 0.69 and similarity(second, third) > 0.69 and similarity(first, third) < 0.5
    assert find_near_duplicates(build_rows([first, second, third]), 0.6).tolist() == [False, True, False]
    assert find_near_duplicates(build_rows([second, first, third]), 0.6).tolist() == [False, True, True]


def test_swapped_answers_are_another_pair() -> None:
    prompt, chosen, rejected = random_row(np.random.default_rng(4))
    assert not find_near_duplicates(build_rows([(prompt, chosen, rejected), (prompt, rejected, chosen)]), 0.5).any()


def test_order_and_batches_of_a_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    rows = build_rows([random_row(rng) for _ in range(20)])
    order = [7, 3, 7, 19, 0, 3, 3, 12]
    expected = [False, False, True, False, False, True, True, False]
    assert find_near_duplicates(rows.select(order), 0.8).tolist() == expected
    monkeypatch.setattr(overlap, "_BATCH", 3)
    assert find_near_duplicates(rows.select(order), 0.8).tolist() == expected
    assert find_near_duplicates(datasets.concatenate_datasets([rows, rows]), 0.8).tolist() == [False] * 20 + [True] * 20
    assert find_near_duplicates(rows.select([]), 0.8).shape == (0,)


def test_grams_stay_inside_of_their_row() -> None:
    rng = np.random.default_rng(6)
    ids = [rng.integers(0, 100, length).tolist() for length in (7, 0, 3, 5, 4, 12, 0, 1)]
    column = build_rows([(row, [], []) for row in ids]).with_format("arrow")[1:]["prompt_ids"].combine_chunks()
    expected = [
        [[9, *row[at : at + 5], *[-1] * (5 - len(row))] for at in range(max(len(row) - 4, 1))] for row in ids[1:]
    ]
    found = [[np.frombuffer(gram, np.int32).tolist() for gram in row] for row in overlap._row_grams(column, 9)]
    assert found == expected


@pytest.fixture
def find(tokenizer: Any) -> Callable[..., list[bool]]:
    """Return a function of pairs (messages or question, chosen, rejected) and references; it marks pairs."""

    def find(pairs: list[tuple[Any, str, str]], references: list[str], ngram: int = 13) -> list[bool]:
        rows = []
        for prompt, chosen, rejected in pairs:
            messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            ids = tokenizer([text, chosen, rejected], add_special_tokens=False)["input_ids"]
            rows.append({**dict(zip(IDS, ids, strict=True)), "prompt": json.dumps(messages, ensure_ascii=False)})
        marks = find_contaminated(Dataset.from_list(rows), tokenizer, iter(references), ngram)
        assert marks.dtype == np.bool_ and marks.shape == (len(pairs),)
        return marks.tolist()

    return find


def test_shared_words_are_found_in_each_part(find: Callable[..., list[bool]]) -> None:
    pairs = [
        ("Hello there", "yes", "no"),
        (f"Answer me: {QUESTION} Think!", "yes", "no"),
        ("Hello there", f"You ask “{QUESTION.upper()}”", "no"),
        ("Hello there", "yes", "well…\n\n" + QUESTION.replace(" ", "\n").replace(",", " –") + "\nno idea"),
        ("Hello there", " ".join(QUESTION.split()[:12]), " ".join(QUESTION.split()[5:])),
        ("Hello there", "", " ".join(QUESTION.split()[2:15])),
    ]
    assert find(pairs, ["Something else.", QUESTION]) == [False, True, True, True, False, True]
    assert find(pairs, []) == [False] * 6


def test_ngrams_stay_inside_of_their_text(find: Callable[..., list[bool]]) -> None:
    words = QUESTION.split()
    assert find([("Hello there", " ".join(words[:8]), " ".join(words[8:]))], [QUESTION]) == [False]
    assert find([("Hello there", QUESTION, "no")], [" ".join(words[:8]), " ".join(words[8:])]) == [False]
    assert find([("Hello there", QUESTION, "no")], [" ".join(words[:8])], ngram=8) == [True]
    assert find([("Hello there", "one", "two")], ["three two"], ngram=1) == [True]


def test_words_of_any_writing(find: Callable[..., list[bool]]) -> None:
    chinese = "一列火车九点离开奥斯陆，另一列十点离开卑尔根"
    assert find([("Hello there", f"他问：{chinese}。", "no")], [chinese]) == [True]
    greek = "Ένα τρένο φεύγει από το Όσλο στις εννέα και ένα άλλο από το Μπέργκεν στις δέκα ΣΑΣ"
    assert find([("Hello there", greek.lower(), "no")], [greek]) == [True]
    assert overlap._words("Straße ﬁne ＡＢＣ１２ snake_case don't") == [
        *("strasse", "fine", "abc12", "snake_case", "don", "t")
    ]
    assert overlap._words("Plain ASCII, don't_you 2") == overlap._WORD.findall("plain ascii, don't_you 2")


def test_short_reference_counts_as_the_whole_last_question(find: Callable[..., list[bool]]) -> None:
    talk = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "Thank you"},
    ]
    pairs = [
        ("what is 2+2", "4", "5"),
        ("What is 2 + 2, please?", "4", "5"),
        ("Hello there", "What is 2 + 2?", "5"),
        (talk, "Gladly.", "No."),
        ([{"role": "system", "content": "Be brief."}, talk[0]], "4", "5"),
    ]
    assert find(pairs, ["What is 2 + 2?", "Thank you", "4"]) == [True, False, False, False, True]


def test_marks_belong_to_their_rows_over_batches(
    find: Callable[..., list[bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "_BATCH", 2)
    pairs = [("Hello there", QUESTION if at in (1, 4) else "yes", "no") for at in range(5)]
    assert find(pairs, [QUESTION]) == [False, True, False, False, True]


def test_references_are_every_string_of_a_file(tmp_path: Path) -> None:
    rows = [{"id": 1, "question": QUESTION, "turns": [{"text": "nested"}, ["deep", 3, None]]}, {"question": " "}]
    flat = [{"question": QUESTION, "answer": "ten"}, {"question": "Why?", "answer": ""}]
    Path("a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("a.json").write_text(json.dumps(rows))
    with Path("a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(flat)
    Dataset.from_list(flat).to_parquet("a.parquet")
    Dataset.from_list(flat).save_to_disk("saved")
    Path("A.TXT").write_text(f"\ufeff{QUESTION}\n\n  \nWhy?\n", encoding="utf-8")
    for name in ("a.jsonl", "a.json", str(tmp_path / "a.jsonl")):
        assert list(load_reference_texts([name])) == [QUESTION, "nested", "deep"]
    for name in ("a.csv", "a.parquet", "saved"):
        assert list(load_reference_texts([name])) == [QUESTION, "ten", "Why?"]
    texts = [text.strip() for text in load_reference_texts(["eval", "A.TXT", "a.js*l"])]
    assert texts == [QUESTION, "Why?", QUESTION, "nested", "deep"]
    assert list(load_reference_texts(["eval"])) == []
    assert len(list(load_reference_texts(["bundled:concise"]))) > 10


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("openai/gsm8k", ("openai/gsm8k", None, "test")),
        ("openai/gsm8k:train[:10]", ("openai/gsm8k", None, "train[:10]")),
        ("openai/gsm8k/main", ("openai/gsm8k", "main", "test")),
        ("cais/mmlu/abstract_algebra:dev", ("cais/mmlu", "abstract_algebra", "dev")),
        ("squad:validation", ("squad", None, "validation")),
    ],
)
def test_references_of_the_hub(
    name: str, arguments: tuple[str, str | None, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(path: str, subset: str | None, *, split: str, revision: str | None) -> Dataset:
        assert (path, subset, split, revision) == (*arguments, None)
        return Dataset.from_list([{"question": QUESTION, "label": 3}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(load_reference_texts([name])) == [QUESTION]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("missing.jsonl", "`data.decontaminate=missing.jsonl`: no such file"),
        ("missing.txt", "`data.decontaminate=missing.txt`: cannot be read; No such file or directory"),
        ("latin.txt", "`data.decontaminate=latin.txt`: is not UTF-8; save it as UTF-8"),
        ("blank.txt", "`data.decontaminate=blank.txt`: holds no text"),
        ("numbers.jsonl", "`data.decontaminate=numbers.jsonl`: holds no text"),
        ("blank.jsonl", "`data.decontaminate=blank.jsonl`: holds no rows"),
        ("broken.jsonl", "`data.decontaminate=broken.jsonl`: broken.jsonl:2: broken JSON: "),
        ("broken.json", "`data.decontaminate=broken.json`: cannot be read; line 1, column "),
        ("page.html", "`data.decontaminate=page.html`: no such format `.html`"),
        ("folder", "`data.decontaminate=folder`: is a folder; name its files, such as folder/*.jsonl"),
        ("example/missing:dev", "`data.decontaminate=example/missing:dev` (split dev): neither a local file nor a"),
    ],
)
def test_what_cannot_be_read_is_an_error(name: str, text: str) -> None:
    Path("latin.txt").write_bytes("Straße\n".encode("latin-1"))
    Path("blank.txt").write_text("\n \n")
    Path("blank.jsonl").write_text("\n")
    Path("numbers.jsonl").write_text('{"a": 1}\n')
    Path("broken.jsonl").write_text('{"a": "b"}\n{"a": \n')
    Path("broken.json").write_text('[{"a": "b"}, {"a" 3}]')
    Path("page.html").write_text("<p>")
    Path("folder").mkdir()
    with pytest.raises(DataError) as error:
        list(load_reference_texts([name]))
    assert str(error.value).startswith(text) and "\n" not in str(error.value)

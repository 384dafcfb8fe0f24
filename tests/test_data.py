"""Rows in every accepted form, exact templating, sources, and the account of what was dropped."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dpo_runner.config import load_conf
from dpo_runner.data import apply_chat_template, load_preferences
from dpo_runner.data.chat_template import resolve_chat_template
from dpo_runner.data.formats import to_messages
from dpo_runner.data.sources import load_rows
from dpo_runner.errors import ConfigError

SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "Why is the sky blue?"}
GOOD = {"role": "assistant", "content": "Air scatters blue light most."}
BAD = {"role": "assistant", "content": "It just is."}
MESSAGES = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER["content"], "chosen": GOOD["content"], "rejected": BAD["content"]},
        MESSAGES,
        {"prompt": USER["content"], "chosen": [GOOD], "rejected": BAD["content"]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": USER["content"], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {
            "chosen": "\n\nHuman: Why is the sky blue?\n\nAssistant: Air scatters blue light most.",
            "rejected": "\n\nHuman: Why is the sky blue?\n\nAssistant: It just is.",
        },
    ],
    ids=["texts", "messages", "mixed", "implicit prompt", "ultrafeedback", "hh"],
)
def test_accepted_forms_mean_the_same(row: dict) -> None:
    assert to_messages(row) == MESSAGES


def test_conversations_split_at_the_last_shared_user_turn() -> None:
    turns = [USER, GOOD, {"role": "user", "content": "And red?"}]
    row = {"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}
    assert to_messages(row) == {"prompt": turns, "chosen": [GOOD], "rejected": [BAD]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": "b"}, "no `rejected`"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "no `rejected`"),
        ({"chosen": "b", "rejected": "c"}, "no `prompt`"),
        ({"prompt": "a", "chosen": 3, "rejected": "c"}, "`chosen`: must be a text or a list of messages"),
        ({"prompt": "a", "chosen": [{"role": "bot", "content": "x"}], "rejected": "c"}, "no such role `bot`"),
        ({"prompt": "a", "chosen": [{"text": "x"}], "rejected": "c"}, "a message needs `role`"),
        ({"prompt": [GOOD], "chosen": "b", "rejected": "c"}, "ends with a turn of `assistant`"),
        ({"chosen": [USER, GOOD], "rejected": [BAD | {"role": "user"}, BAD]}, "no common prompt"),
        ({"prompt": "a", "chosen": [GOOD, USER], "rejected": "c"}, "must end with an assistant turn"),
        (
            {"chosen": [USER, GOOD, USER, GOOD], "rejected": [USER, BAD, USER, GOOD]},
            "not the assistant's after the prompt",
        ),
        (
            {"prompt": "Other?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
            "differs from the beginning of `chosen`",
        ),
        ({"prompt": [SYSTEM, USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "differs from the beginning"),
    ],
)
def test_other_forms_are_refused_with_the_column(row: dict, expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        to_messages(row)


def whole(tokenizer, messages: list[dict]) -> list[int]:
    return tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "prompt",
    [
        [USER],
        [{"role": "system", "content": "Be brief."}, USER],
        [USER, GOOD, {"role": "user", "content": "And red?"}],
        [USER | {"content": "naïve 🙂 text\n\nwith  spaces "}],
    ],
    ids=["single turn", "system turn", "multi-turn", "odd characters"],
)
def test_templating_is_exact(tokenizer, prompt: list[dict]) -> None:
    ids = apply_chat_template({"prompt": prompt, "chosen": [GOOD], "rejected": [BAD]}, tokenizer)
    assert ids["prompt_ids"] + ids["chosen_ids"] == whole(tokenizer, [*prompt, GOOD])
    assert ids["prompt_ids"] + ids["rejected_ids"] == whole(tokenizer, [*prompt, BAD])
    generation_prompt = tokenizer("<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
    assert ids["prompt_ids"][-len(generation_prompt) :] == generation_prompt
    assert ids["chosen_ids"].count(tokenizer.eos_token_id) == 1
    assert ids["chosen_ids"][0] not in tokenizer.all_special_ids  # the generation prompt is not repeated


def with_bos(tokenizer_path: str, template: str):
    """A Llama-like tokenizer: BOS <s>-style token added by the tokenizer itself, and other turn markers."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_path)
    tokenizer.bos_token = "<|endoftext|>"
    bos = ("<|endoftext|>", tokenizer.bos_token_id)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[bos])
    tokenizer.chat_template = template
    return tokenizer


def test_a_bos_that_only_the_tokenizer_adds_is_there_once(tiny_model: str) -> None:
    tokenizer = with_bos(tiny_model, resolve_chat_template("chatml"))
    ids = apply_chat_template(MESSAGES, tokenizer)
    assert ids["prompt_ids"].count(tokenizer.bos_token_id) == 1
    assert ids["prompt_ids"][0] == tokenizer.bos_token_id


def test_a_bos_that_the_template_writes_is_there_once(tiny_model: str) -> None:
    tokenizer = with_bos(tiny_model, "{{ bos_token }}" + resolve_chat_template("chatml"))
    ids = apply_chat_template(MESSAGES, tokenizer)
    assert ids["prompt_ids"].count(tokenizer.bos_token_id) == 1


def test_a_doubled_bos_is_an_error(tiny_model: str) -> None:
    tokenizer = with_bos(tiny_model, "{{ bos_token + bos_token }}" + resolve_chat_template("chatml"))
    with pytest.raises(ConfigError, match="twice"):
        apply_chat_template(MESSAGES, tokenizer)


def test_an_eos_in_the_text_is_an_error(tokenizer) -> None:
    with pytest.raises(ConfigError, match="holds the end-of-turn token"):
        apply_chat_template({**MESSAGES, "chosen": "Done.<|im_end|>"}, tokenizer)


def test_a_template_that_leaves_the_turn_open_is_closed(tiny_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    )
    ids = apply_chat_template(MESSAGES, tokenizer)
    assert ids["chosen_ids"][-1] == tokenizer.eos_token_id
    assert ids["chosen_ids"].count(tokenizer.eos_token_id) == 1


def test_a_template_that_renders_the_prompt_two_ways_is_an_error(tiny_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    with pytest.raises(ConfigError, match=r"other tokens before an answer than alone.*<think>"):
        apply_chat_template(MESSAGES, tokenizer)


def test_without_a_template_single_turns_are_plain_text(tiny_model: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    ids = apply_chat_template({"prompt": "2+2=", "chosen": " four", "rejected": " five"}, tokenizer)
    assert tokenizer.decode(ids["prompt_ids"] + ids["chosen_ids"]) == "2+2= four<|im_end|>"
    with pytest.raises(ConfigError, match=r"model\.chat_template"):
        apply_chat_template({**MESSAGES, "prompt": [USER, GOOD, USER]}, tokenizer)


def test_named_templates_and_files(tmp_path: Path) -> None:
    assert "<|im_start|>" in resolve_chat_template("chatml")
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert resolve_chat_template(str(tmp_path / "t.jinja")) == "{{ messages }}"
    with pytest.raises(ConfigError, match=r"model\.chat_template=zepyhr"):
        resolve_chat_template("zepyhr")


def write(path: Path, rows: list[dict]) -> Path:
    import pandas

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    elif path.suffix == ".csv":
        pandas.DataFrame(rows).to_csv(path, index=False)
    else:
        pandas.DataFrame(rows).to_parquet(path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_local_files_of_every_format_give_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(4)]
    path = write(tmp_path / f"data{suffix}", rows)
    conf = load_conf([f"data.path={path}", "data.eval_fraction=0", "training.eval_strategy=no"])
    train, evaluation = load_rows(conf.data, seed=0)
    assert list(train) == rows
    assert evaluation is None


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_local_files_of_messages(tmp_path: Path, tokenizer, suffix: str) -> None:
    path = write(tmp_path / f"data{suffix}", [MESSAGES, MESSAGES | {"rejected": [GOOD | {"content": "No."}]}])
    conf = load_conf([f"data.path={path}", "data.eval_fraction=0", "training.eval_strategy=no"])
    data = load_preferences(conf, tokenizer)
    assert data.train[0]["chosen_ids"] == apply_chat_template(MESSAGES, tokenizer)["chosen_ids"]


def test_evaluation_rows_are_held_out_by_whole_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{n % 10}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(40)]
    path = write(tmp_path / "data.jsonl", rows)
    conf = load_conf([f"data.path={path}", "data.eval_fraction=0.2"])
    train, evaluation = load_rows(conf.data, seed=0)
    assert (len(train), len(evaluation)) == (32, 8)
    assert not set(train["prompt"]) & set(evaluation["prompt"])
    assert list(load_rows(conf.data, seed=0)[1]) == list(evaluation)
    assert list(load_rows(conf.data, seed=1)[1]) != list(evaluation)


def test_bundled_data_is_there_in_size_and_shape() -> None:
    conf = load_conf(["data.max_train_samples=null", "data.max_eval_samples=null"])
    train, evaluation = load_rows(conf.data, seed=0)
    assert len(train) >= 400 and len(evaluation) >= 100
    assert not set(train["prompt"]) & set(evaluation["prompt"])
    for row in [*train, *evaluation]:
        assert len(row["rejected"].split()) > len(row["chosen"].split())
        assert row["chosen"][-1] in ".!"


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": \n', "line 2"),
        ("a.json", '[{"prompt": "a"},]', "line 1"),
        ("a.jsonl", "", "the file is empty"),
        ("a.txt", "x", "no such format `.txt`"),
    ],
)
def test_unreadable_files_name_file_and_line(tmp_path: Path, name: str, content: str, expected: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=expected):
        load_rows(load_conf([f"data.path={tmp_path / name}"]).data, seed=0)


def test_a_mistyped_file_suggests_the_right_one(tmp_path: Path, pairs: str) -> None:
    with pytest.raises(ConfigError, match=r"did you mean `pairs\.jsonl`"):
        load_rows(load_conf([f"data.path={tmp_path / 'pair.jsonl'}"]).data, seed=0)


def test_unknown_bundled_data_and_unreachable_hub_data() -> None:
    with pytest.raises(ConfigError, match="did you mean `concise`"):
        load_rows(load_conf(["data.path=bundled:concice"]).data, seed=0)
    with pytest.raises(ConfigError, match="neither a file here nor a hub dataset in reach"):
        load_rows(load_conf(["data=ultrafeedback"]).data, seed=0)


def test_the_report_counts_what_was_dropped_and_cut(tmp_path: Path, tokenizer) -> None:
    rows = [
        {"prompt": "fine", "chosen": "yes", "rejected": "no"},
        {"prompt": "same", "chosen": "yes", "rejected": "yes"},
        {"prompt": "long " * 200, "chosen": "yes", "rejected": "no"},
        {"prompt": "cut", "chosen": "yes " * 60, "rejected": "no"},
    ]
    path = write(tmp_path / "data.jsonl", rows)
    overrides = [f"data.path={path}", "data.eval_fraction=0", "training.eval_strategy=no", "training.max_length=64"]
    data = load_preferences(load_conf(overrides), tokenizer)
    report = data.reports["train"]
    assert (report.rows, report.kept, report.cut) == (4, 2, 1)
    assert report.dropped == {"chosen equals rejected": 1, "the prompt alone fills training.max_length": 1}
    assert report.tokens["chosen"] == sum(len(row["chosen_ids"]) for row in data.train)
    assert "1 lose the end of an answer" in str(report)


def test_a_bad_row_is_named_and_no_rows_left_is_an_error(tmp_path: Path, tokenizer) -> None:
    path = write(
        tmp_path / "a.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}]
    )
    overrides = ["data.eval_fraction=0", "training.eval_strategy=no"]
    with pytest.raises(ConfigError, match="data, train row 2: no `rejected`"):
        load_preferences(load_conf([f"data.path={path}", *overrides]), tokenizer)
    path = write(tmp_path / "b.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "b"}])
    with pytest.raises(ConfigError, match="no row is left; 1 dropped: chosen equals rejected"):
        load_preferences(load_conf([f"data.path={path}", *overrides]), tokenizer)

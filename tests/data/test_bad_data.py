"""Tests of bad data: a bad row is left out and reported; a bad file is a one-line error that names it."""

import copy
import gzip
import io
import itertools
import json
import os
import pickle
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_runner.config.compose import load_conf
from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.data import SourceConf
from dpo_runner.data.preferences import PreferenceData, load_preferences
from dpo_runner.errors import ConfigError, DataError
from tests.support.common import children_seconds
from tests.support.programs import run_python

Load = Callable[..., PreferenceData]
Row = dict[str, Any]


@pytest.fixture(scope="module")
def blank() -> RunConf:
    return load_conf(
        [
            "model=tiny_random",
            "data=local_file",
            "data.path=x.jsonl",
            "data.eval_fraction=0",
            "training.eval_strategy=no",
        ]
    )


@pytest.fixture
def load(blank: RunConf, tokenizer: Any) -> Load:
    """Return a function that loads a file with the given fields of the data section."""

    def load(path: str | None, tokenizer: Any = tokenizer, **fields: Any) -> PreferenceData:
        conf = copy.deepcopy(blank)
        for name, value in {"path": path, **fields}.items():
            assert hasattr(conf.data, name)
            setattr(conf.data, name, value)
        return load_preferences(conf, tokenizer)

    return load


def error_of(load: Load, path: str | None, **fields: Any) -> str:
    """Return the error message of a load that must fail; it must be ours, one printable line."""
    with pytest.raises(ConfigError) as caught:
        load(path, **fields)
    message = str(caught.value)
    assert caught.value.mistakes == [message] and "\n" not in message and "\r" not in message
    assert message.encode() and len(message) < 600
    return message


def user(content: Any) -> Row:
    return {"role": "user", "content": content}


def bot(content: Any) -> Row:
    return {"role": "assistant", "content": content}


SYSTEM, TOOL = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "dry"}
DEEP = "[" * 100_000 + "]" * 100_000
HH = "\n\nHuman: q\n\nAssistant: "


def pair(**columns: Any) -> Row:
    return {"prompt": "Why?", "chosen": "So.", "rejected": "No.", **columns}


def without(row: Row, column: str) -> Row:
    return {name: value for name, value in row.items() if name != column}


def scores(*values: Any, **columns: Any) -> Row:
    return {"prompt": "Why?", "responses": ["So.", "No.", "Eh."][: len(values)], "scores": list(values), **columns}


def alpaca(**columns: Any) -> Row:
    return {"instruction": "Why?", "input": "", "chosen": "So.", "rejected": "No.", **columns}


def sharegpt(**columns: Any) -> Row:
    answers = {"chosen": {"from": "gpt", "value": "So."}, "rejected": {"from": "gpt", "value": "No."}}
    return {"conversations": [{"from": "human", "value": "Why?"}], **answers, **columns}


def steer(**columns: Any) -> Row:
    return {"context": [user("Why?")], "response1": "So.", "response2": "No.", "overall_preference": -2, **columns}


GOOD: dict[str, list[Row]] = {
    "preference": [{"prompt": f"q{n}", "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(24)],
    "hh": [
        {"chosen": f"\n\nHuman: q{n}\n\nAssistant: so", "rejected": f"{HH}no".replace("q", f"q{n}")} for n in range(24)
    ],
    "sharegpt": [sharegpt(conversations=[{"from": "human", "value": f"q{n}"}]) for n in range(24)],
    "alpaca": [alpaca(instruction=f"q{n}") for n in range(24)],
    "orca": [{"system": "Be brief.", "question": f"q{n}", "chosen": "so", "rejected": "no"} for n in range(24)],
    "scored": [scores(1, 2, prompt=f"q{n}") for n in range(24)],
    "helpsteer": [steer(context=[user(f"q{n}")]) for n in range(24)],
}

# layout of the good rows, the bad row (or its JSON line), the reason, and part of the detail
BAD_ROWS: dict[str, tuple[str, Row | str, str, str]] = {
    "empty prompt": ("preference", pair(prompt=""), "empty prompt", ""),
    "blank prompt": ("preference", pair(prompt=" \n\t"), "empty prompt", ""),
    "blank prompt message": ("preference", pair(prompt=[user(" ")]), "empty prompt", ""),
    "blank last turn": ("preference", pair(prompt=[user("a"), bot("b"), user("")]), "empty prompt", ""),
    "empty prompt list": ("preference", pair(prompt=[]), "empty prompt", "an empty list of messages"),
    "empty chosen": ("preference", pair(chosen=""), "empty chosen", ""),
    "blank chosen": ("preference", pair(chosen="\n"), "empty chosen", ""),
    "empty chosen list": ("preference", pair(chosen=[]), "empty chosen", "an empty list of messages"),
    "empty chosen message": ("preference", pair(chosen=[bot("")]), "empty chosen", ""),
    "chosen ends with nothing": ("preference", pair(chosen=[bot("a"), TOOL, bot("")]), "empty chosen", ""),
    "no tool calls": ("preference", pair(chosen=[bot("") | {"tool_calls": []}]), "empty chosen", ""),
    "empty rejected": ("preference", pair(rejected=""), "empty rejected", ""),
    "blank rejected": ("preference", pair(rejected="  "), "empty rejected", ""),
    "no prompt": ("preference", without(pair(), "prompt"), "missing column", "`prompt`; the row has: chosen, rejected"),
    "no chosen": ("preference", without(pair(), "chosen"), "missing column", "`chosen`; the row has: prompt, rejected"),
    "no rejected": ("preference", without(pair(), "rejected"), "missing column", "`rejected`; the row has: prompt, "),
    "null prompt": ("preference", pair(prompt=None), "missing column", "`prompt`"),
    "null chosen": ("preference", pair(chosen=None), "missing column", "`chosen`"),
    "null rejected": ("preference", pair(rejected=None), "missing column", "`rejected`"),
    "no column": ("preference", {}, "missing column", "`chosen`; the row has: nothing"),
    "odd column": ("preference", {"half \ud83d\n": 1}, "missing column", r"the row has: 'half \ud83d\n'"),
    "other layout": ("preference", {"question": "q", "answer": "a"}, "missing column", "the row has: question, answer"),
    "number for prompt": ("preference", pair(prompt=3), "not a text", "`prompt` is a number 3; expected a text or"),
    "number for chosen": ("preference", pair(chosen=0.5), "not a text", "`chosen` is a number 0.5"),
    "NaN for prompt": ("preference", pair(prompt=float("nan")), "not a text", "`prompt` is a number nan"),
    "bool for rejected": ("preference", pair(rejected=False), "not a text", "`rejected` is a boolean False"),
    "list of numbers": ("preference", pair(chosen=[1, 2]), "not a message", "`chosen` holds a number 1"),
    "list of texts": ("preference", pair(prompt=["Why?"]), "not a message", "`prompt` holds str 'Why?'"),
    "list of null": ("preference", pair(prompt=[None]), "not a message", "`prompt` holds"),
    "list of lists": ("preference", pair(rejected=[[bot("a")]]), "not a message", "`rejected` holds a list"),
    "object": (
        "preference",
        pair(prompt={"text": {"en": "q"}}),
        "not a message",
        "needs `role` and `content`; got {'te",
    ),
    "object for content": ("preference", pair(prompt=[user({"a": 1})]), "not a text", "`prompt`: content is an object"),
    "number for content": ("preference", pair(chosen=[bot(3)]), "not a text", "`chosen`: content is a number 3"),
    "number for system": ("preference", pair(system=3), "not a text", "`system` holds 3; expected a text"),
    "equal texts": ("preference", pair(chosen="No."), "chosen equals rejected", ""),
    "equal messages": ("preference", pair(chosen=[bot("a")], rejected=[bot("a")]), "chosen equals rejected", ""),
    "equal text and message": ("preference", pair(chosen=[bot("No.")]), "chosen equals rejected", ""),
    "equal conversations": (
        "preference",
        {"chosen": [user("a"), bot("b")], "rejected": [user("a"), bot("b")]},
        "chosen equals rejected",
        "",
    ),
    "equal when rendered": (
        "preference",
        pair(chosen=[bot("a") | {"id": 1}], rejected=[bot("a") | {"id": 2}]),
        "chosen equals rejected",
        "once they are rendered",
    ),
    "unknown role": (
        "preference",
        pair(prompt=[{"role": "narrator", "content": "a"}]),
        "unknown role",
        "'narrator'; known are system, user, assistant, tool, human and gpt; \"data.roles={narrator: user}\" takes it",
    ),
    "role that is no text": (
        "preference",
        pair(prompt=[{"role": ["user"], "content": "a"}]),
        "unknown role",
        "['user']",
    ),
    "no role": (
        "preference",
        pair(prompt=[{"content": "a"}]),
        "not a message",
        "needs `role` and `content`; got {'con",
    ),
    "no content": ("preference", pair(chosen=[{"role": "assistant"}]), "not a message", "needs `role` and `content`"),
    "null content": ("preference", pair(chosen=[bot(None)]), "not a message", "needs `role` and `content`"),
    "system in the middle": (
        "preference",
        pair(prompt=[user("a"), SYSTEM, user("b")]),
        "roles out of order",
        "`prompt`: turn 2 is system after user; expected assistant",
    ),
    "system at the end": (
        "preference",
        pair(prompt=[user("a"), bot("b"), SYSTEM]),
        "roles out of order",
        "turn 3 is sys",
    ),
    "system alone": ("preference", pair(prompt=[SYSTEM]), "ends on the wrong turn", "`prompt` ends with system; exp"),
    "two user turns": ("preference", pair(prompt=[user("a"), user("b")]), "roles out of order", "turn 2 is user after"),
    "two assistant turns": (
        "preference",
        pair(prompt=[user("a"), bot("b"), bot("c"), user("d")]),
        "roles out of order",
        "`prompt`: turn 3 is assistant after assistant; expected user or tool",
    ),
    "two answers at once": (
        "preference",
        pair(chosen=[bot("a"), bot("b")]),
        "roles out of order",
        "`chosen`: turn 3 is",
    ),
    "assistant first": (
        "preference",
        pair(prompt=[bot("a"), user("b")]),
        "roles out of order",
        "turn 1 is assistant aft",
    ),
    "conversation of the assistant": (
        "preference",
        {"chosen": [bot("a"), user("b"), bot("c")], "rejected": [bot("a"), user("b"), bot("d")]},
        "missing column",
        "`prompt`; the row has: chosen, rejected",
    ),
    "tool first": (
        "preference",
        pair(prompt=[TOOL]),
        "roles out of order",
        "turn 1 is tool after nothing; expected system or user",
    ),
    "tool answers nobody": (
        "preference",
        pair(chosen=[TOOL, bot("a")]),
        "roles out of order",
        "turn 2 is tool after user",
    ),
    "prompt ends with the answer": (
        "preference",
        pair(prompt=[user("a"), bot("b")]),
        "ends on the wrong turn",
        "`prompt` ends with assistant; expected user or tool",
    ),
    "completion ends with user": (
        "preference",
        pair(chosen=[bot("a"), user("b")]),
        "completion with a foreign turn",
        "`cho",
    ),
    "completion with a user turn": (
        "preference",
        pair(rejected=[bot("a"), user("b"), bot("c")]),
        "completion with a foreign turn",
        "`rejected` has a user or system turn after",
    ),
    "completion with a system turn": (
        "preference",
        pair(chosen=[bot("a"), SYSTEM, bot("c")]),
        "completion with a foreign turn",
        "`chosen`",
    ),
    "completion ends with a tool": (
        "preference",
        pair(chosen=[bot("a"), TOOL]),
        "ends on the wrong turn",
        "`chosen` must",
    ),
    "histories that part early": (
        "preference",
        {"chosen": [user("a"), bot("b"), user("c"), bot("d")], "rejected": [user("a"), bot("x"), user("c"), bot("d")]},
        "completion with a foreign turn",
        "`chosen` has a user or system turn after the prompt; it would be trained on",
    ),
    "no common prompt": (
        "preference",
        {"chosen": [user("a"), bot("b")], "rejected": [user("x"), bot("c")]},
        "no common prompt",
        "do not begin alike",
    ),
    "conversation and answer": (
        "preference",
        pair(chosen=[user("Why?"), bot("a")]),
        "no common prompt",
        "do not begin",
    ),
    "two different prompts": (
        "preference",
        pair(prompt="x", chosen=[user("a"), bot("b")], rejected=[user("a"), bot("c")]),
        "two different prompts",
        "`prompt` differs from the beginning of `chosen`",
    ),
    "two different lists": (
        "preference",
        pair(prompt=[SYSTEM, user("a")], chosen=[user("a"), bot("b")], rejected=[user("a"), bot("c")]),
        "two different prompts",
        "",
    ),
    "image": (
        "preference",
        pair(prompt=[user([{"type": "image_url", "image_url": {"url": "x"}}, {"type": "text", "text": "a"}])]),
        "not a text",
        "`prompt`: content part {'type': 'image_url'",
    ),
    "content part without text": (
        "preference",
        pair(chosen=[bot([{"type": "text"}])]),
        "not a text",
        "content part {'type",
    ),
    "content part that is a text": ("preference", pair(chosen=[bot(["a"])]), "not a text", "content part 'a'"),
    "tools that are no JSON": (
        "preference",
        pair(tools="[weather"),
        "no usable tools",
        "`tools` is not JSON: Expecting val",
    ),
    "tools that are an object": (
        "preference",
        pair(tools={"a": 1}),
        "no usable tools",
        "`tools` is an object; expected a list or",
    ),
    "tools of JSON that are a text": (
        "preference",
        pair(tools='"a"'),
        "no usable tools",
        "`tools` is not JSON",
    ),
    "tools that are a number": ("preference", pair(tools=3), "no usable tools", "`tools` is a number"),
    "tools nested deeply": ("preference", pair(tools=DEEP), "no usable tools", "maximum recursion depth"),
    "tools of texts": ("preference", pair(tools=["weather"]), "no usable tools", "'weather' is not the JSON of"),
    "kwargs that are a list": (
        "preference",
        pair(chat_template_kwargs=[1]),
        "no usable chat_template_kwargs",
        "an object",
    ),
    "kwargs that are no JSON": (
        "preference",
        pair(chat_template_kwargs="x"),
        "no usable chat_template_kwargs",
        "is not JSON",
    ),
    "kwargs of our own": (
        "preference",
        pair(chat_template_kwargs={"tokenize": True}),
        "the chat template refuses the row",
        "'tokenize'",
    ),
    "control token in prompt": (
        "preference",
        pair(prompt="a<|im_start|>b"),
        "control token in the text",
        "`prompt` holds '<|im_start|>'",
    ),
    "control token in chosen": (
        "preference",
        pair(chosen="a<|im_end|>"),
        "control token in the text",
        "`chosen` holds",
    ),
    "control token in rejected": (
        "preference",
        pair(rejected="<|endoftext|>"),
        "control token in the text",
        "`rejected` holds '<|endoftext|>'",
    ),
    "control token in a system turn": (
        "preference",
        pair(system="<|im_end|>"),
        "control token in the text",
        "`prompt`",
    ),
    "control token in a tool call": (
        "preference",
        pair(prompt=[user("a"), bot("") | {"tool_calls": [{"function": {"arguments": {"q": ["<|im_end|>"]}}}]}, TOOL]),
        "control token in the text",
        "`prompt` holds '<|im_end|>'",
    ),
    "control token in reasoning": (
        "preference",
        pair(chosen=[bot("a") | {"reasoning_content": "<|im_start|>"}]),
        "control token in the text",
        "`chosen` holds '<|im_start|>'",
    ),
    "control token in tools": (
        "preference",
        pair(tools=json.dumps([{"function": {"parameters": {"<|im_end|>": 1}}}])),
        "control token in the text",
        "`tools` holds '<|im_end|>'",
    ),
    "control token in kwargs": (
        "preference",
        pair(chat_template_kwargs={"date": "<|im_end|>"}),
        "control token in the text",
        "`chat_template_kwargs` holds '<|im_end|>'",
    ),
    "images": (
        "preference",
        pair(images=["a.png"]),
        "not a text",
        "`images` holds ['a.png']; only text can be trained on, and \"data.drop_columns=[images]\" trains on the text",
    ),
    "an image beside a blank in the header": (
        "preference",
        pair(**{" image": "a.png", "video": None}),
        "not a text",
        "` image` holds 'a.png'; only text can be trained on, and \"data.drop_columns=[' image', video]\" trains on",
    ),
    "an image as Parquet has it": (
        "sharegpt",
        sharegpt(Image={"bytes": None, "path": "a.png"}),
        "not a text",
        "`Image` holds {'bytes': None",
    ),
    "a place for an image": (
        "preference",
        pair(prompt="<image>Where?", images=None),
        "not a text",
        "`prompt` holds <image>, and `images` nothing; only text",
    ),
    "image in a message": (
        "preference",
        pair(prompt=[user("a") | {"images": ["x"]}]),
        "not a text",
        "a message holds `images`; only text",
    ),
    "history of another kind": (
        "preference",
        pair(history=["a", "b"]),
        "not a text",
        "`history` holds 'a'; expected pairs",
    ),
    "several answers": (
        "preference",
        pair(rejected=["No.", "Eh."]),
        "several answers",
        "`rejected` holds 2 texts without scores; data.pairing=all_pairs pairs",
    ),
    "scores and ranks": (
        "scored",
        {"prompt": "q", "answers": [{"text": "a", "rank": 1}, {"text": "b", "score": 2}]},
        "scores do not match the answers",
        "`answers` holds both scores and ranks",
    ),
    "answer of another dialogue": (
        "hh",
        {"prompt": HH, "chosen": "\n\nHuman: x\n\nAssistant: so", "rejected": "no"},
        "two different prompts",
        "`prompt` differs from the beginning of `chosen`",
    ),
    "half a surrogate in prompt": ("preference", pair(prompt="a\ud800"), "invalid UTF-8", "`prompt` holds bytes"),
    "half a surrogate in chosen": ("preference", pair(chosen=[bot("\udfff")]), "invalid UTF-8", "`chosen` holds bytes"),
    "half a surrogate beside a text": (
        "preference",
        pair(prompt=[user("a") | {"name": "\ud800"}]),
        "invalid UTF-8",
        "`prompt`",
    ),
    "half a surrogate in tools": ("preference", pair(tools=[{"a": "\ud800"}]), "invalid UTF-8", "`tools` holds bytes"),
    "messages as Python prints them": (
        "preference",
        pair(chosen=str([bot("So.")])),
        "not a text",
        "`chosen` holds messages that are not JSON",
    ),
    "tools of chosen alone": (
        "preference",
        pair(
            chosen=json.dumps({"messages": [bot("So.")], "tools": [{"name": "a"}]}),
            rejected=json.dumps({"messages": [bot("No.")]}),
        ),
        "two different tools",
        "`chosen` and `rejected` bring different tools",
    ),
    "arguments that are no JSON": (
        "preference",
        pair(chosen=[{**bot(""), "tool_calls": [{"function": {"name": "a", "arguments": "b"}}]}]),
        "no usable arguments",
        "`chosen`: 'b' is not the JSON of an object",
    ),
    "broken JSON": ("preference", '{"prompt": "a", "chosen": }', "broken JSON", ""),
    "no JSON": ("preference", "prompt: a", "broken JSON", ""),
    "Python instead of JSON": ("preference", "{'prompt': 'a'}", "broken JSON", ""),
    "comma at the end": ("preference", '{"prompt": "a", "chosen": "b", "rejected": "c",}', "broken JSON", ""),
    "comma after the row": ("preference", json.dumps(pair()) + ",", "broken JSON", "Extra data"),
    "two rows on a line": ("preference", json.dumps(pair()) * 2, "broken JSON", "Extra data"),
    "cut in a text": ("preference", '{"prompt": "a', "broken JSON", "Unterminated string"),
    "control character": (
        "preference",
        '{"prompt": "a\tb", "chosen": "b", "rejected": "c"}',
        "broken JSON",
        "Invalid con",
    ),
    "list": ("preference", '["a", "b", "c"]', "not an object", "a list"),
    "text": ("preference", '"a"', "not an object", "a text"),
    "number": ("preference", "3", "not an object", "a number"),
    "null": ("preference", "null", "not an object", "null"),
    "duplicate key": (
        "preference",
        '{"prompt": "a", "prompt": "b", "chosen": "c", "rejected": "d"}',
        "duplicate key",
        "`prompt` appears twice",
    ),
    "duplicate key in a message": (
        "preference",
        '{"prompt": [{"role": "user", "content": "a", "content": "b"}], "chosen": "c", "rejected": "d"}',
        "duplicate key",
        "`content` appears twice",
    ),
    "odd duplicate key": ("preference", r'{"\ud800\n": 1, "\ud800\n": 2}', "duplicate key", "appears twice"),
    "nested deeply": ("preference", f'{{"prompt": {DEEP}}}', "broken JSON", "nested too deeply"),
    "number without end": ("preference", '{"prompt": ' + "9" * 10_000 + "}", "broken JSON", "more than 4300 digits"),
    "transcript without Human": (
        "hh",
        {"chosen": "q: a", "rejected": HH + "no"},
        "not a transcript",
        "`chosen` must begin",
    ),
    "one transcript": ("hh", {"chosen": HH + "so", "rejected": "no"}, "not a transcript", "`rejected` must begin with"),
    "transcript that is no text": ("hh", {"chosen": HH + "so", "rejected": 3}, "not a transcript", "got 3"),
    "transcript of the assistant": (
        "hh",
        {"chosen": "\n\nAssistant: a", "rejected": "\n\nAssistant: b"},
        "no common prompt",
        "",
    ),
    "transcript without answer": ("hh", {"chosen": HH, "rejected": HH + "no"}, "empty chosen", ""),
    "transcripts of other prompts": (
        "hh",
        {"chosen": HH + "so", "rejected": "\n\nHuman: x\n\nAssistant: no"},
        "no common prompt",
        "",
    ),
    "two Humans in a row": (
        "hh",
        {"chosen": "\n\nHuman: x" + HH + "so", "rejected": "\n\nHuman: x" + HH + "no"},
        "roles out of order",
        "turn 2 is user after user",
    ),
    "empty conversation": ("sharegpt", sharegpt(conversations=[]), "empty conversations", "an empty list of messages"),
    "conversation with the answer": (
        "sharegpt",
        sharegpt(conversations=[{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]),
        "ends on the wrong turn",
        "",
    ),
    "turn of nobody": ("sharegpt", sharegpt(conversations=[{"value": "a"}]), "not a message", "needs `role`"),
    "turn of somebody": ("sharegpt", sharegpt(chosen={"from": "alien", "value": "a"}), "unknown role", "'alien'"),
    "no conversations": ("sharegpt", without(sharegpt(), "conversations"), "missing column", "`conversations`"),
    "answer of the human": (
        "sharegpt",
        sharegpt(chosen={"from": "human", "value": "a"}),
        "completion with a foreign turn",
        "",
    ),
    "no instruction": ("alpaca", without(alpaca(), "instruction"), "missing column", "`instruction`"),
    "blank instruction": ("alpaca", alpaca(instruction="", input=" "), "empty prompt", ""),
    "instruction that is no text": (
        "alpaca",
        alpaca(instruction=["a"]),
        "not a text",
        "`instruction` and `input` must",
    ),
    "output of three": (
        "alpaca",
        {"instruction": "a", "output": ["b", "c", "d"]},
        "not two answers",
        "`output` holds 3",
    ),
    "output of one": ("alpaca", {"instruction": "a", "output": ["b"]}, "not two answers", "`output` holds 1"),
    "output that is a text": ("alpaca", {"instruction": "a", "output": "b"}, "missing column", "`chosen`; the row has"),
    "history of texts": ("alpaca", alpaca(history=["a", "b"]), "not a text", "`history` holds 'a'; expected pairs"),
    "history of three": ("alpaca", alpaca(history=[["a", "b", "c"]]), "not a text", "`history` holds ['a', 'b', 'c']"),
    "history that is a number": ("alpaca", alpaca(history=3), "not a text", "`history` holds 3; expected pairs"),
    "history that is a text": ("alpaca", alpaca(history="a"), "not a text", "`history` holds 'a'"),
    "history with null": ("alpaca", alpaca(history=[["a", None]]), "missing column", "`history`"),
    "no question": ("orca", pair(prompt=None), "missing column", "`question`; the row has: chosen, rejected"),
    "question that is a number": ("orca", pair(question=3), "not a text", "`question` is a number 3"),
    "score that is NaN": ("scored", scores(1, float("nan")), "score is not finite", "`scores`: nan"),
    "score that is Infinity": ("scored", scores(1, float("inf")), "score is not finite", "`scores`: inf"),
    "score that is huge": ("scored", scores(1, 10**400), "score is not finite", "`scores`: inf"),
    "score that is a word": ("scored", scores(1, "good"), "score is not a number", "`scores`: 'good'"),
    "score that is a bool": ("scored", scores(1, True), "score is not a number", "`scores`: True"),
    "score that is null": ("scored", scores(1, None), "score is not a number", "`scores`: None"),
    "score that is a list": ("scored", scores(1, [2]), "score is not a number", "`scores`: [2]"),
    "fewer scores": (
        "scored",
        scores(1, 2) | {"scores": [1]},
        "scores do not match the answers",
        "2 answers, 1 scores",
    ),
    "more scores": (
        "scored",
        scores(1, 2) | {"scores": [1, 2, 3]},
        "scores do not match the answers",
        "2 answers, 3 sco",
    ),
    "one number as scores": (
        "scored",
        scores(1, 2) | {"scores": 1},
        "scores do not match the answers",
        "no list of scores",
    ),
    "no scores": ("scored", without(scores(1, 2), "scores"), "scores do not match the answers", "no list of scores"),
    "one response": ("scored", scores(1), "fewer than two answers", "1; a pair needs two"),
    "no response": ("scored", scores(), "fewer than two answers", "0; a pair needs two"),
    "responses that are a text": ("scored", scores(1, 2) | {"responses": "a"}, "fewer than two answers", ""),
    "no responses": (
        "scored",
        without(scores(1, 2), "responses"),
        "missing column",
        "`responses`; the row has: prompt",
    ),
    "null response": ("scored", scores(1, 2) | {"responses": ["a", None]}, "missing column", ""),
    "response that is a number": ("scored", scores(1, 2) | {"responses": ["a", 3]}, "not a text", "is a number 3"),
    "equal responses": ("scored", scores(1, 2) | {"responses": ["a", "a"]}, "chosen equals rejected", ""),
    "no preference": ("helpsteer", without(steer(), "overall_preference"), "missing column", "`overall_preference`"),
    "preference that is a text": ("helpsteer", steer(overall_preference="first"), "score is not a number", "'first'"),
    "no second response": ("helpsteer", without(steer(), "response2"), "missing column", "`response2`; the row has"),
    "no first response": ("helpsteer", without(steer(), "response1"), "missing column", "`response1`; the row has"),
    "no context": ("helpsteer", without(steer(), "context"), "missing column", "`context`; the row has: response1"),
    "a response alone": (
        "helpsteer",
        {"prompt": "a", "response": "b", "helpfulness": 3},
        "fewer than two answers",
        "1; a pair needs two",
    ),
    "a response without score": ("helpsteer", {"prompt": "a", "response": "b"}, "fewer than two answers", ""),
}
FILES = ("rows.jsonl.gz", "rows.json", "rows.ndjson.zst", "rows.json.gz")


def write_rows(name: str, good: list[Row], bad: list[Row | str]) -> int:
    """Write good rows with bad ones in the middle, and return the line of the first bad one."""
    half = len(good) // 2
    lines = [row if isinstance(row, str) else json.dumps(row) for row in [*good[:half], *bad, *good[half:]]]
    as_list = name.startswith("rows.json.") or name.endswith(".json")
    write(name, "[\n" + ",\n".join(lines) + "\n]" if as_list else "\n".join(lines) + "\n")
    return half + 1 + as_list


def write(name: str, content: str | bytes) -> str:
    data = content.encode() if isinstance(content, str) else content
    if name.endswith(".gz"):
        data = gzip.compress(data)
    if name.endswith(".zst"):
        data = pa.compress(data, codec="zstd", asbytes=True)
    Path(name).write_bytes(data)
    return name


def check_costs_one_row(
    load: Load, path: str, number: int, reason: str, detail: str, has_lines: bool = True, **fields: Any
) -> None:
    """Check that one bad row of 25 stops a run with on_bad_row=error, else is dropped and reported."""
    place = f"{path}:{number}" if has_lines else f"{path}, row {number}"
    first = error_of(load, path, on_bad_row="error", **fields)
    assert re.match(re.escape(f"{place}: {reason}") + "(: |$)", first) and detail in first
    data = load(path, **fields)
    (source,) = data.report.sources
    assert (source.rows, source.pairs, source.bad, source.left_out) == (25, 24, {reason: 1}, {})
    assert len(data.train) == data.report.splits["train"].kept == 24
    (dropped,) = data.dropped()
    place_of_it = {"source": "data", "split": "train", "file": path, "line" if has_lines else "row": number}
    assert dropped == {**place_of_it, "reason": reason, "detail": dropped["detail"]}
    assert detail in dropped["detail"] and "\n" not in dropped["detail"]
    assert json.dumps(dropped, ensure_ascii=False).encode()  # as written to dropped_rows.jsonl
    assert error_of(load, path, on_bad_row="error", **fields) == first  # from the cache, with the same message


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_costs_itself(load: Load, name: str) -> None:
    layout, row, reason, detail = BAD_ROWS[name]
    line = write_rows("rows.jsonl", GOOD[layout], [row])
    check_costs_one_row(load, "rows.jsonl", line, reason, detail)


ELSEWHERE = list(
    zip((name for name, (_, row, *_) in BAD_ROWS.items() if isinstance(row, dict)), itertools.cycle(FILES))
)


@pytest.mark.parametrize(("name", "path"), ELSEWHERE[::3] + ELSEWHERE[1::3][:4])
def test_a_bad_row_costs_itself_in_other_files(load: Load, name: str, path: str) -> None:
    layout, row, reason, detail = BAD_ROWS[name]
    line = write_rows(path, GOOD[layout], [row])
    check_costs_one_row(load, path, line, reason, detail)


@pytest.mark.parametrize(
    "name", ["unknown role", "no column", "broken JSON", "score that is a word", "score that is NaN"]
)
@pytest.mark.parametrize("at", [0, 24])
def test_a_bad_row_may_be_the_first_or_the_last(load: Load, name: str, at: int) -> None:
    layout, row, reason, detail = BAD_ROWS[name]
    lines = [json.dumps(row) for row in GOOD[layout]]
    lines.insert(at, row if isinstance(row, str) else json.dumps(row))
    write("rows.jsonl", "\n".join(lines))
    check_costs_one_row(load, "rows.jsonl", at + 1, reason, detail)


TABLE = "prompt,chosen,rejected\n" + "".join(f"q{n},good {n},bad {n}\n" for n in range(24))


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b",a,b", "empty prompt", ""),
        (b"q,,b", "empty chosen", ""),
        (b"q,a,  ", "empty rejected", ""),
        (b"q,a,a", "chosen equals rejected", ""),
        (b"q,a", "wrong number of cells", "2 instead of 3"),
        (b"q,a,b,c", "wrong number of cells", "4 instead of 3"),
        (b"q,a,b,", "wrong number of cells", "4 instead of 3"),
        (b'q,"a"b,c', "broken quoting", "double each quote inside quotes"),
        (b"q,a<|im_end|>,b", "control token in the text", "`chosen` holds '<|im_end|>'"),
        (b"q\xff,a,b", "invalid UTF-8", "`prompt` holds bytes that are not text"),
    ],
)
def test_a_bad_line_of_a_table_costs_itself(load: Load, line: bytes, reason: str, detail: str) -> None:
    write("rows.csv", TABLE.encode() + line + b"\n")
    check_costs_one_row(load, "rows.csv", 26, reason, detail)


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}', "invalid UTF-8", "byte 13 of the line"),
        (b'{"prompt": "a", "chosen": "b"', "broken JSON", ""),
        (b'{"prompt": "a", "chosen": "b", "reje', "broken JSON", "Unterminated string"),
        (b"\x00\x00\x00", "broken JSON", ""),
    ],
    ids=["invalid UTF-8", "cut off", "cut off in a text", "zeros"],
)
def test_a_bad_last_line_costs_itself(load: Load, line: bytes, reason: str, detail: str) -> None:
    good = "".join(json.dumps(row) + "\n" for row in GOOD["preference"])
    write("rows.jsonl", good.encode() + line)  # no newline at the end
    check_costs_one_row(load, "rows.jsonl", 25, reason, detail)


def of_bytes(good: list[str], bad: bytes) -> pa.Array:
    """Return an Arrow string array with one item of invalid UTF-8; Arrow does not check this on writing."""
    return pa.Array.from_buffers(
        pa.string(), len(good) + 1, pa.array([*map(str.encode, good), bad], pa.binary()).buffers()
    )


@pytest.mark.parametrize(
    ("columns", "reason", "detail"),
    [
        ({"prompt": None}, "missing column", "`prompt`; the row has: chosen, rejected"),
        ({"chosen": ""}, "empty chosen", ""),
        ({"chosen": "No."}, "chosen equals rejected", ""),
        ({"rejected": "<|im_end|>"}, "control token in the text", "`rejected` holds '<|im_end|>'"),
        ({"prompt": b"\xff"}, "invalid UTF-8", "byte 1 of a text"),
    ],
)
@pytest.mark.parametrize("path", ["rows.parquet", "rows.arrow"])
def test_a_bad_row_of_arrow_costs_itself(
    load: Load, path: str, columns: dict[str, Any], reason: str, detail: str
) -> None:
    rows = [*GOOD["preference"], pair(**columns)]
    arrays = {
        name: of_bytes([row[name] for row in rows[:-1]], columns[name])
        if isinstance(columns.get(name), bytes)
        else pa.array([row[name] for row in rows], pa.string())
        for name in ("prompt", "chosen", "rejected")
    }
    table = pa.table(arrays)
    if path == "rows.parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    check_costs_one_row(load, path, 25, reason, detail, has_lines=False)


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        ([], "empty prompt", "an empty list of messages"),
        ([user(None)], "not a message", "needs `role` and `content`"),
        ([{"role": None, "content": "a"}], "not a message", "needs `role` and `content`"),
        ([user("a"), user("b")], "roles out of order", "turn 2 is user after user"),
        ([None], "not a message", "`prompt` holds"),
    ],
)
def test_a_bad_list_of_parquet_costs_itself(load: Load, bad: list[Any], reason: str, detail: str) -> None:
    rows = [row | {"prompt": [user(row["prompt"])]} for row in GOOD["preference"]]
    pq.write_table(pa.Table.from_pylist([*rows, pair(prompt=bad)]), "rows.parquet")
    check_costs_one_row(load, "rows.parquet", 25, reason, detail, has_lines=False)


def test_answers_that_a_template_makes_equal_cost_their_row(load: Load, tokenizer: Any) -> None:
    trimming = copy.deepcopy(tokenizer)
    trimming.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | trim")
    assert trimming.chat_template != tokenizer.chat_template
    line = write_rows("rows.jsonl", GOOD["preference"], [pair(chosen="No.\n")])
    assert len(load("rows.jsonl").train) == 25
    reason, detail = "chosen equals rejected", "once they are rendered"
    check_costs_one_row(load, "rows.jsonl", line, reason, detail, tokenizer=trimming)


def test_a_conversation_without_a_template_costs_its_row(load: Load, tokenizer: Any) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    line = write_rows("rows.jsonl", GOOD["preference"], [pair(prompt=[user("a"), bot("b"), user("c")])])
    check_costs_one_row(load, "rows.jsonl", line, "no chat template", "set model.chat_template=", tokenizer=plain)


def test_what_a_template_says_of_a_row_is_one_line(load: Load, tokenizer: Any) -> None:
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages|length > 2 %}{{ raise_exception('One question only.\\nNo more.') }}{% endif %}"
        + tokenizer.chat_template
    )
    line = write_rows("rows.jsonl", GOOD["preference"], [pair(prompt=[user("a"), bot("b"), user("c")])])
    reason = "the chat template refuses the row"
    check_costs_one_row(load, "rows.jsonl", line, reason, "One question only.", tokenizer=strict)


FORMATTERS = """
def fail(row):
    if row["prompt"] == "Why?":
        raise LookupError("this one\\nis not for me")
    return row

def text(row):
    return row if row["prompt"] != "Why?" else "Why?"

def half(row):
    return row if row["prompt"] != "Why?" else [row, row | {"chosen": ""}]

def endless(row):
    return row if row["prompt"] != "Why?" else endless(row)
"""


@pytest.mark.parametrize(
    ("name", "reason", "detail"),
    [
        ("fail", "data.formatter failed", "LookupError: this one is not for me"),
        ("text", "data.formatter failed", "returned 'Why?'; expected a row (dict), a list of rows or None"),
        ("endless", "data.formatter failed", "RecursionError: maximum recursion depth exceeded"),
        ("half", "empty chosen", ""),  # one bad pair makes the whole row bad
    ],
)
def test_a_row_on_which_the_formatter_fails_costs_itself(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str, detail: str
) -> None:
    (tmp_path / "formatters_of_bad_data.py").write_text(FORMATTERS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "formatters_of_bad_data", raising=False)
    line = write_rows("rows.jsonl", GOOD["preference"], [pair()])
    check_costs_one_row(load, "rows.jsonl", line, reason, detail, formatter=f"formatters_of_bad_data:{name}")


def test_a_row_without_a_renamed_column_costs_itself(load: Load) -> None:
    rows: list[Row] = [
        {"ask" if key == "prompt" else key: value for key, value in row.items()} for row in GOOD["preference"]
    ]
    line = write_rows("rows.jsonl", rows, [pair()])
    detail = "`ask` of data.columns; choose from chosen, prompt, rejected"
    check_costs_one_row(load, "rows.jsonl", line, "missing column", detail, columns={"ask": "prompt"})


def test_one_bad_pair_of_several_costs_the_whole_row(load: Load) -> None:
    line = write_rows("rows.jsonl", GOOD["scored"], [scores(3, 2, 1) | {"responses": ["a", "b", "c<|im_end|>"]}])
    reason, detail = "control token in the text", "`rejected` holds '<|im_end|>'"
    check_costs_one_row(load, "rows.jsonl", line, reason, detail, pairing="all_pairs")


@pytest.mark.parametrize("name", ["control token in chosen", "equal when rendered", "unknown role", "duplicate key"])
def test_a_bad_row_costs_itself_where_all_stand_on_one_line(load: Load, name: str) -> None:
    _, row, reason, detail = BAD_ROWS[name]
    lines = [*map(json.dumps, GOOD["preference"]), row if isinstance(row, str) else json.dumps(row)]
    write("rows.json", f"[{', '.join(lines)}]")
    check_costs_one_row(load, "rows.json", 25, reason, detail, has_lines=False)


def test_bad_rows_of_every_reason_are_counted(load: Load) -> None:
    bad = [(row, reason) for layout, row, reason, _ in BAD_ROWS.values() if layout == "preference"]
    write_rows("rows.jsonl", GOOD["preference"], [row for row, _ in bad])
    data = load("rows.jsonl", max_bad_fraction=0.9)
    expected = {reason: [r for _, r in bad].count(reason) for _, reason in bad}
    (source,) = data.report.sources
    assert source.bad == expected and source.rows == 24 + len(bad)
    assert list(source.bad.values()) == sorted(expected.values(), reverse=True)
    dropped = list(data.dropped())
    assert [row["line"] for row in dropped] == list(range(13, 13 + len(bad)))
    assert [row["reason"] for row in dropped] == [reason for _, reason in bad]


def test_ratings_that_are_no_numbers_are_counted_but_cost_nothing(load: Load) -> None:
    bad = [
        pair(chosen_rating="N/A", rejected_rating=1),
        pair(score_chosen=2, score_rejected=float("nan"), prompt="Oh?"),
    ]
    line = write_rows("rows.jsonl", GOOD["preference"], bad)
    (source,) = load("rows.jsonl").report.sources
    assert (source.pairs, source.bad, source.unscored) == (26, {}, 2)
    assert "2 with scores that are no finite numbers, used without them" in str(source)
    dropped = list(load("rows.jsonl", min_score_gap=0.5, max_bad_fraction=0.2).dropped())
    assert [(row["line"], row["reason"]) for row in dropped] == [
        (line, "score is not a number"),
        (line + 1, "score is not finite"),
    ]


def test_bad_rows_for_evaluation_are_accounted_for_too(load: Load) -> None:
    write_rows("rows.jsonl", GOOD["preference"], [])
    line = write_rows("held_out.jsonl", GOOD["preference"], [pair(prompt="")])
    data = load("rows.jsonl", eval_path="held_out.jsonl")
    (dropped,) = data.dropped()
    assert (dropped["split"], dropped["file"], dropped["line"]) == ("eval", "held_out.jsonl", line)
    assert [(source.split, source.bad) for source in data.report.sources] == [
        ("train", {}),
        ("eval", {"empty prompt": 1}),
    ]
    assert error_of(load, "rows.jsonl", eval_path="held_out.jsonl", on_bad_row="error").startswith(
        "held_out.jsonl:13: "
    )


def test_the_bad_source_of_a_mixture_is_named(load: Load) -> None:
    write_rows("fine.jsonl", GOOD["preference"], [])
    write_rows("bad.jsonl", GOOD["scored"], [scores(1)] * 2)
    sources = {"fine": SourceConf(path="fine.jsonl"), "bad": SourceConf(path="bad.jsonl")}
    message = error_of(load, None, sources=sources)
    assert message == (
        "`data.sources.bad`: 2 of 26 rows cannot be used, more than data.max_bad_fraction=0.05 "
        "(2 fewer than two answers); the first is bad.jsonl:13: fewer than two answers: 1; a pair needs two"
    )
    data = load(None, sources=sources, max_bad_fraction=0.1)
    assert [row["source"] for row in data.dropped()] == ["bad", "bad"]
    sources["bad"] = SourceConf(path="nowhere.jsonl")
    assert error_of(load, None, sources=sources).startswith("`data.sources.bad.path=nowhere.jsonl`: no such file")


@pytest.mark.parametrize(
    ("bad", "rows", "fraction", "enough"),
    [
        (1, 20, 0.05, True),
        (1, 19, 0.05, False),
        (2, 40, 0.05, True),
        (2, 39, 0.05, False),
        (1, 1000, 0.0, False),
        (12, 24, 0.5, True),
        (13, 24, 0.5, False),
        (23, 24, 1.0, True),
        (29, 100, 0.29, True),
    ],
)
def test_so_many_bad_rows_are_borne(load: Load, bad: int, rows: int, fraction: float, enough: bool) -> None:
    good = [pair(prompt=f"q{n}") for n in range(rows - bad)]
    write("rows.jsonl", "".join(json.dumps(row) + "\n" for row in [*good, *[pair(chosen="")] * bad]))
    if enough:
        assert len(load("rows.jsonl", max_bad_fraction=fraction).train) == rows - bad
        return
    assert error_of(load, "rows.jsonl", max_bad_fraction=fraction) == (
        f"`data`: {bad} of {rows:,} rows cannot be used, more than data.max_bad_fraction={fraction:g} "
        f"({bad} empty chosen); the first is rows.jsonl:{rows - bad + 1}: empty chosen"
    )


def test_only_bad_rows_are_counted_by_reason(load: Load) -> None:
    bad: list[Row | str] = [pair(prompt=""), pair(chosen="a<|im_end|>"), "{", pair(prompt=""), pair(chosen="No.")]
    write_rows("rows.jsonl", [], bad)
    assert error_of(load, "rows.jsonl") == (
        "`data`: 5 of 5 rows cannot be used, more than data.max_bad_fraction=0.05 (2 empty prompt, "
        "1 control token in the text, 1 broken JSON, 1 chosen equals rejected); the first is rows.jsonl:1: empty prompt"
    )
    assert error_of(load, "rows.jsonl", max_bad_fraction=1.0).startswith("data, train: no pair is left of 0")


def test_rows_of_which_none_can_be_read_name_the_first(load: Load) -> None:
    write("rows.jsonl", '\n{"prompt": "a"\n["b"]\n')
    message = error_of(load, "rows.jsonl", max_bad_fraction=1.0)
    assert message.startswith("`data`: none of the first rows can be used; rows.jsonl:2: broken JSON: Expecting ")


LIST = json.dumps(GOOD["preference"], indent=1)
LINES = "".join(json.dumps(row) + "\n" for row in GOOD["preference"])
BOMBS = {  # 255 MiB each, compressed to about 1 MiB
    start: gzip.compress((start[-1:] * 2**20).encode(), 1) * 255 for start in ("x", "\n", " ")
}
BOMBS['["x'] = gzip.compress(b'["') + BOMBS["x"]
WRAPPED = json.dumps({"a": GOOD["preference"], "b": GOOD["preference"]})
PARQUET, ARROW = io.BytesIO(), io.BytesIO()
pq.write_table(pa.Table.from_pylist(GOOD["preference"]), PARQUET, write_page_checksum=True)
with pa.ipc.new_file(ARROW, pa.Table.from_pylist(GOOD["preference"]).schema) as arrow_writer:
    arrow_writer.write_table(pa.Table.from_pylist(GOOD["preference"]))
PACKED = gzip.compress(LINES.encode())


def changed(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


def to_parquet(table: pa.Table) -> bytes:
    pq.write_table(table, sink := io.BytesIO())
    return sink.getvalue()


BAD_FILES: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("rows.jsonl", "", "the file is empty"),
    "empty list": ("rows.json", " [ ]\n", "holds no rows"),
    "blank lines": ("rows.jsonl", "\n \n", "holds no rows"),
    "blank": ("rows.json", " \n", "holds no rows"),
    "header alone": ("rows.csv", "prompt,chosen,rejected\n", "holds no rows"),
    "packed nothing": ("rows.jsonl.gz", gzip.compress(b""), "holds no rows"),
    "text file": ("rows.txt", "a", "no such format `.txt`; use .json, .jsonl"),
    "workbook": ("rows.xlsx", b"PK\x03\x04", "no such format `.xlsx`"),
    "no suffix": ("rows", "a", "its name has no suffix"),
    "zip": ("rows.jsonl.zip", b"PK\x03\x04", "no such format `.zip`"),
    "bzip2": ("rows.jsonl.bz2", b"BZh9", "cannot be read; it ends in the middle"),
    "no bzip2": ("rows.jsonl.bz2", LINES.encode(), "cannot be read; Invalid data stream"),
    "no xz": ("rows.jsonl.xz", LINES.encode(), "cannot be read; Input format not supported"),
    "broken list": ("rows.json", LIST.replace('"chosen"', "chosen", 1), "cannot be read; line 4, column 3: Expecting"),
    "row left open": ("rows.json", LIST.replace(" },\n", ",\n", 1), "cannot be read; line 7, column 2: "),
    "list never closed": ("rows.json", LIST[:-2], "cannot be read; line 121, column 3: the list never closes"),
    "list cut in a row": ("rows.json", LIST[:-20], "cannot be read; line 120, column 3: Unterminated string"),
    "list with a comma at the end": ("rows.json", LIST[:-2] + ",]", "cannot be read; line 121, column 4: "),
    "list and more": ("rows.json", LIST + "\n[]", "cannot be read; line 123, column 1: Extra data"),
    "a text as JSON": (
        "rows.json",
        '"a"',
        "cannot be read; line 1, column 1: Expecting an object, or one list of them",
    ),
    "a list of lists never closed": ("rows.json", "[" * 100_000, "cannot be read; line 1, column 2: nested too deeply"),
    "UTF-16": ("rows.jsonl", LINES.encode("utf-16"), "cannot be read; it is UTF-16; save it as UTF-8"),
    "UTF-16 in a list": ("rows.json", LIST.encode("utf-16"), "cannot be read; it is UTF-16; save it as UTF-8"),
    "UTF-16 in a table": ("rows.csv", TABLE.encode("utf-16"), "cannot be read; it is UTF-16; save it as UTF-8"),
    "UTF-32": ("rows.jsonl", LINES.encode("utf-32"), "cannot be read; it is UTF-32; save it as UTF-8"),
    "UTF-16 that is packed": (
        "rows.jsonl.gz",
        gzip.compress(LINES.encode("utf-16")),
        "cannot be read; it is UTF-16; save it as UTF-8",
    ),
    "UTF-16 without a mark": (
        "rows.jsonl",
        LINES.encode("utf-16-le"),
        "none of the first rows can be used; rows.jsonl:1: broken JSON",
    ),
    "gzip without its suffix": ("rows.jsonl", PACKED, "cannot be read; it is compressed with gzip; add .gz to its"),
    "gzip in gzip": ("rows.jsonl.gz", gzip.compress(PACKED), "cannot be read; it is compressed with gzip; add .gz"),
    "zstd without its suffix": (
        "rows.json",
        pa.compress(LIST.encode(), codec="zstd", asbytes=True),
        "cannot be read; it is compressed with zstd; add .zst to its name",
    ),
    "Parquet called JSON": ("rows.jsonl", PARQUET.getvalue(), "cannot be read; it is Parquet; rename it"),
    "Arrow called CSV": ("rows.csv", ARROW.getvalue(), "cannot be read; it is Arrow; rename it"),
    "zip called JSON": ("rows.json", b"PK\x03\x04" + bytes(40), "cannot be read; it is a zip archive; unpack it"),
    "a table called JSON": ("rows.jsonl", TABLE, "none of the first rows can be used; rows.jsonl:1: broken JSON"),
    "a table called a list": ("rows.json", TABLE, "cannot be read; line 1, column 1: Expecting an object"),
    "JSON called a table": ("rows.csv", LINES, 'unknown layout; columns: {"prompt": "q0"'),
    "a web page": ("rows.json", "<!DOCTYPE html>\n<html>", "cannot be read; line 1, column 1: Expecting an object"),
    "a pickle": ("rows.jsonl", pickle.dumps(GOOD["preference"]), "none of the first rows can be used; rows.jsonl:1: "),
    "a pickle by name": ("rows.pkl", pickle.dumps(GOOD), "no such format `.pkl`"),
    "zeros": ("rows.json", bytes(1000), "cannot be read; line 1, column 1: Expecting an object"),
    "lines that end as on old Macs": (
        "rows.jsonl",
        LINES.replace("\n", "\r"),
        "none of the first rows can be used; rows.jsonl:1: broken JSON: Extra data",
    ),
    "rows in two lists": ("rows.json", WRAPPED, "cannot be read; one object with several lists of objects (`a`, `b`)"),
    "a list of lists": (
        "rows.json",
        "[[], []]",
        "none of the first rows can be used; rows.json:1: not an object: a list",
    ),
    "a number as JSON": ("rows.json", "3", "cannot be read; line 1, column 1: Expecting an object"),
    "null as JSON": ("rows.json", "null", "cannot be read; line 1, column 1: Expecting an object"),
    "a comment": ("rows.json", "// pairs\n" + LIST, "cannot be read; line 1, column 1: Expecting an object"),
    "quotes of Python": ("rows.json", "[{'prompt': 'a'}]", "cannot be read; line 1, column 3: Expecting property name"),
    "an object never closed": ("rows.json", '{"prompt": "a"', "cannot be read; line 1, column 15: "),
    "a list in a list never closed": ("rows.json", '[{"prompt": [', "cannot be read; line 1, column 14: "),
    "gzip with a wrong checksum": (
        "rows.jsonl.gz",
        changed(PACKED, len(PACKED) - 6),
        "cannot be read; CRC check failed",
    ),
    "gzip with damage": ("rows.jsonl.gz", changed(PACKED, len(PACKED) // 2), "cannot be read; "),
    "gzip and rubbish": ("rows.jsonl.gz", PACKED + b"rubbish", "cannot be read; Not a gzipped file"),
    "Parquet cut off": ("rows.parquet", PARQUET.getvalue()[:-30], "cannot be read; "),
    "Parquet without its end": ("rows.parquet", PARQUET.getvalue()[: len(PARQUET.getvalue()) // 2], "cannot be read; "),
    "Parquet with damage": ("rows.parquet", changed(PARQUET.getvalue(), 60), "cannot be read; "),
    "Parquet of no rows": (
        "rows.parquet",
        to_parquet(pa.table({"prompt": pa.array([], pa.string())})),
        "holds no rows",
    ),
    "Parquet of no columns": ("rows.parquet", to_parquet(pa.table({})), "holds no rows"),
    "Parquet of numbers": (
        "rows.parquet",
        to_parquet(pa.table({"a": [1, 2]})),
        "unknown layout; columns: a; needed are",
    ),
    "Arrow cut off": ("rows.arrow", ARROW.getvalue()[: len(ARROW.getvalue()) // 2], "cannot be read; "),
    "one line without end": ("rows.jsonl.gz", BOMBS["x"], "cannot be read; line 1: longer than 67,108,864 bytes"),
    "one cell without end": ("rows.csv.gz", BOMBS["x"], "cannot be read; line 1: longer than 67,108,864 characters"),
    "one text without end": ("rows.json.gz", BOMBS['["x'], "cannot be read; line 1, column 2: longer than 67,108,864"),
    "blank lines without end": ("rows.jsonl.gz", BOMBS["\n"], "cannot be read; line 1048577: the last 1,048,577 lines"),
    "blank cells without end": ("rows.csv.gz", BOMBS["\n"], "cannot be read; line 1048577: the last 1,048,577 lines"),
    "blanks without end": ("rows.json.gz", BOMBS[" "], "cannot be read; line 1, column "),
    "no gzip": ("rows.jsonl.gz", LINES.encode(), "cannot be read; Not a gzipped file"),
    "cut gzip": ("rows.jsonl.gz", gzip.compress(LINES.encode())[:-20], "cannot be read; Compressed file ended before"),
    "no zstd": ("rows.jsonl.zst", LINES.encode(), "cannot be read; ZSTD decompress failed"),
    "cut zstd": (
        "rows.jsonl.zst",
        pa.compress(LINES.encode(), codec="zstd", asbytes=True)[:-20],
        "cannot be read; ",
    ),
    "no Parquet": ("rows.parquet", LINES.encode(), "cannot be read; Parquet magic bytes not found"),
    "short Parquet": ("rows.parquet", b"PAR1", "cannot be read; "),
    "no Arrow": ("rows.arrow", b"PK\x03\x04 and more", "cannot be read; "),
    "cell that never closes": (
        "rows.csv",
        TABLE + '"q,a,b\n',
        "cannot be read; line 26: a quote is never closed",
    ),
    "column without name": ("rows.csv", ",prompt,chosen,rejected\n0,a,b,c\n", "line 1: column 1 has no name (with"),
    "column that stands twice": ("rows.csv", "prompt,chosen,chosen\na,b,c\n", "line 1: column `chosen` appears twice"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_one_line_that_names_it(load: Load, name: str) -> None:
    path, content, problem = BAD_FILES[name]
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    for policy in ("drop", "error"):
        began = time.process_time()
        message = error_of(load, path, on_bad_row=policy, max_bad_fraction=1.0)
        assert time.process_time() - began < 2
        assert re.match(rf"`data(\.path={re.escape(path)})?`: ", message) and problem in message


def test_there_are_enough_of_them() -> None:
    assert len(BAD_FILES) >= 60 and len(BAD_ROWS) >= 100


@pytest.mark.parametrize("name", ["empty", "broken list", "cut gzip", "short Parquet", "column that stands twice"])
def test_a_bad_file_of_several_is_named(load: Load, name: str) -> None:
    path, content, problem = BAD_FILES[name]
    Path("folder").mkdir()
    Path("folder/fine.jsonl").write_text(LINES)
    Path("folder", path).write_bytes(content.encode() if isinstance(content, str) else content)
    message = error_of(load, "folder")
    assert message.startswith(f"`data.path=folder`: folder/{path}: ") and problem in message


@pytest.mark.parametrize("name", ["empty list", "broken list", "no Parquet"])
def test_a_bad_file_for_evaluation_is_named(load: Load, name: str) -> None:
    path, content, problem = BAD_FILES[name]
    Path("fine.jsonl").write_text(LINES)
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    message = error_of(load, "fine.jsonl", eval_path=path)
    assert message.startswith(f"`data.eval_path={path}`: ") and problem in message


def test_a_file_that_breaks_off_late_leaves_nothing_behind(load: Load) -> None:
    rows = [row | {"prompt": f"{row['prompt']} of {n}"} for n in range(100) for row in GOOD["preference"]]
    write("rows.json", json.dumps(rows, indent=1)[:-2])
    assert "the list never closes" in error_of(load, "rows.json")
    assert "the list never closes" in error_of(load, "rows.json")  # no half-written entry in the cache
    write("rows.json", json.dumps(rows, indent=1))
    assert len(load("rows.json").train) == 2400


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("row.jsonl", "no such file; did you mean `rows.jsonl`?"),
        ("nowhere/rows.jsonl", "no such file"),
        ("empty", "the folder holds no file of a known format; use .json, .jsonl"),
        ("pictures", "the folder holds no file of a known format; use .json, .jsonl"),
        ("folder.jsonl", "the folder holds no file of a known format"),
        ("only_test", "holds evaluation files only; rename one of them to train.jsonl"),
        ("*.parquet", "no file matches"),
        ("bundled:concice", "no such bundled data; did you mean `concise`?"),
        ("bundled:", "no such bundled data; choose from concise, reviews"),
        ("~nobody-of-that-name/rows.jsonl", "no such file"),
    ],
)
def test_what_is_not_there_is_one_line(load: Load, path: str, problem: str) -> None:
    Path("rows.jsonl").write_text(LINES)
    for folder in ("empty", "pictures", "folder.jsonl", "only_test"):
        Path(folder).mkdir()
    Path("pictures/cat.png").write_bytes(b"\x89PNG")
    Path("only_test/test.jsonl").write_text(LINES)
    message = error_of(load, path)
    assert message.startswith(f"`data.path={path}`: ") and problem in message


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_nothing(path: Path) -> None:
    path.symlink_to("gone.jsonl")


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_its_folder(path: Path) -> None:
    path.symlink_to(path.parent, target_is_directory=True)


@pytest.mark.parametrize(
    ("make", "problem"),
    [
        (make_pipe, "no such regular file"),
        (make_socket, "no such regular file"),
        (link_to_zeros, "no such regular file"),
        (link_to_itself, "is a broken symlink"),
        (link_to_nothing, "is a broken symlink"),
    ],
)
def test_what_is_no_file_is_one_line_and_never_waited_for(
    load: Load, make: Callable[[Path], None], problem: str
) -> None:
    Path("folder").mkdir()
    make(Path("folder/rows.jsonl"))
    for path in ("folder/rows.jsonl", "folder"):
        message = error_of(load, path)
        assert message.startswith(f"`data.path={path}`: ") and problem in message
    assert error_of(load, "folder/*.jsonl") == "`data.path=folder/*.jsonl`: no file matches"
    Path("folder/rows.jsonl").unlink()
    Path("fine.jsonl").write_text(LINES)
    make(Path("held_out.jsonl"))
    assert error_of(load, "fine.jsonl", eval_path="held_out.jsonl").startswith("`data.eval_path=held_out.jsonl`: ")


@pytest.mark.parametrize(
    "path", ["/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem", "a\0b.jsonl", "x" * 256 + ".csv"]
)
def test_paths_that_are_no_files_of_rows(load: Load, path: str) -> None:
    error_of(load, path)


def test_a_folder_that_holds_itself_is_walked_once(load: Load) -> None:
    Path("folder").mkdir()
    Path("folder/rows.jsonl").write_text(LINES)
    link_to_its_folder(Path("folder/again"))
    assert len(load("folder").train) == 24


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("path", ["rows.jsonl", "folder"])
def test_what_may_not_be_read_is_one_line(load: Load, path: str) -> None:
    Path("folder").mkdir()
    Path("rows.jsonl").write_text(LINES)
    Path(path).chmod(0)
    assert "Permission denied" in error_of(load, path)


def test_a_mark_of_UTF8_in_the_middle_costs_its_row(load: Load) -> None:
    Path("rows.jsonl").write_text(LINES + "\ufeff" + json.dumps(pair()) + "\n")
    check_costs_one_row(load, "rows.jsonl", 25, "broken JSON", "")


COMMAND = ("model=tiny_random", "data=local_file", "wandb=disabled", "run_dir=r")


@pytest.mark.parametrize("name", ["empty", "text file", "pipe", "missing"])
def test_the_command_ends_within_a_second_where_no_tokenizer_is_needed(name: str) -> None:
    path, content, problem = BAD_FILES.get(name, ("rows.jsonl", b"", "no such"))
    if name == "pipe":
        os.mkfifo(path)
    elif name != "missing":
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    before = children_seconds()
    command = [sys.executable, "-m", "dpo_runner", *COMMAND, f"data.path={path}"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert children_seconds() - before < 2
    assert result.returncode == 2 and result.stdout == "" and not Path("r").exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: `data.path={path}`: ") and problem in line


@pytest.mark.parametrize("name", ["cut gzip", "Parquet with damage", "UTF-16", "blank lines without end"])
def test_the_command_ends_in_one_line_where_a_tokenizer_is_needed(name: str) -> None:
    path, content, problem = BAD_FILES[name]
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)
    result = run_python("-m", "dpo_runner", *COMMAND, f"data.path={path}", timeout=60)
    assert result.returncode == 2 and not Path("r").exists()
    (line,) = result.stderr.splitlines()
    assert line.startswith(f"error: `data.path={path}`: ") and problem in line


def test_a_hub_out_of_reach_is_one_line(load: Load) -> None:
    message = error_of(load, "someone/something")
    assert message.startswith("`data.path=someone/something` (split train): neither a local file nor a reachable hub")


@pytest.mark.parametrize(
    ("content", "fields", "problem"),
    [
        ("q0,good,bad\nq1,good,bad\n", {}, "unknown layout; columns: q0, good, bad; needed are"),
        (
            "prompt;chosen;rejected\na;b;c\n",
            {},
            "unknown layout; columns: prompt;chosen;rejected; needed",
        ),
        ("prompt,question,chosen,rejected\np,q,a,b\n", {}, "could be preference ("),
        (TABLE, {"format": "hh"}, "`data.format=hh`: needs chosen, rejected: transcripts"),
        (TABLE, {"columns": {"promt": "prompt"}}, "rows.csv:2: missing column: `promt` of data.columns; did you mean"),
        (TABLE, {"columns": {"prompt": "question"}, "format": "alpaca"}, "`data.format=alpaca`: needs instruction"),
        (
            TABLE,
            {"formatter": "nowhere:f"},
            "`data.formatter=nowhere:f`: ModuleNotFoundError: No module named 'nowhere'",
        ),
        (TABLE, {"formatter": "json:loads"}, "`data.formatter=json:loads`: is in Python's standard library; name"),
    ],
)
def test_a_file_of_rows_that_mean_nothing_is_one_line(
    load: Load, content: str, fields: dict[str, Any], problem: str
) -> None:
    write("rows.csv", content)
    assert problem in error_of(load, "rows.csv", **fields)


def test_an_error_in_a_file_is_an_error_of_the_data(load: Load) -> None:
    with pytest.raises(DataError) as caught:
        load("nowhere.jsonl")
    assert caught.value.exit_code == 2

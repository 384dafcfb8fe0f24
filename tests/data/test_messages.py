"""Tests of messages: conversion to role/content, splitting of conversations, checks on pairs."""

import json
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_runner.config.sections.data import SourceFields
from dpo_runner.data.layouts.formats import find_layout, read_pairs
from dpo_runner.data.layouts.messages import Message, Pair, check_pair, parse_json, split_conversations, to_messages
from dpo_runner.data.rows.decoding import decode_rows
from dpo_runner.data.rows.sources import open_sources
from dpo_runner.errors import RowError


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def bot(content: str) -> Message:
    return {"role": "assistant", "content": content}


@pytest.mark.parametrize(
    ("role", "ours"),
    [
        *((role, role) for role in ("system", "user", "assistant", "tool")),
        *(("human", "user"), ("prompter", "user"), ("gpt", "assistant"), ("bot", "assistant"), ("model", "assistant")),
        *(("chatgpt", "assistant"), ("function_call", "assistant"), ("observation", "tool"), ("function", "tool")),
        *(("ipython", "tool"), ("Human", "user"), ("USER", "user")),
    ],
)
def test_roles_have_many_names(role: str, ours: str) -> None:
    expected = [{"role": ours, "content": "a"}]
    assert to_messages([{"role": role, "content": "a"}], "user", "prompt") == expected
    assert to_messages([{"from": role, "value": "a"}], "user", "prompt") == expected
    assert to_messages([{"from": role, "content": "a"}], "user", "prompt") == expected


def test_a_text_is_one_turn_of_the_role_that_is_due() -> None:
    assert to_messages("a", "user", "prompt") == [user("a")]
    assert to_messages("a", "assistant", "chosen") == [bot("a")]
    assert to_messages("", "assistant", "chosen") == [bot("")]  # `check_pair` refuses empty ones


def test_what_a_message_holds_beside_its_text_stays() -> None:
    calls = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
    message = {"role": "assistant", "reasoning_content": "hm", "content": "", "tool_calls": calls, "weight": 0.5}
    assert to_messages([message], "assistant", "chosen") == [message]


def test_what_parquet_adds_to_a_message_goes() -> None:
    calls = [{"function": {"name": "a", "arguments": {"city": "Oslo", "days": None}}, "id": None}]
    message = {"role": "assistant", "content": "", "tool_calls": calls, "name": None}
    plain = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "a", "arguments": {"city": "Oslo"}}}],
    }
    assert to_messages([message], "assistant", "chosen") == [plain]


def test_what_json_cannot_hold_becomes_text_beside_a_text_but_not_in_its_place() -> None:
    when = datetime(2026, 1, 2, tzinfo=UTC)
    message = {**user("a"), "timestamp": when, "more": [{"when": when}]}
    read = to_messages([message], "user", "prompt")
    assert json.loads(json.dumps(read)) == read
    assert read == [{**user("a"), "timestamp": str(when), "more": [{"when": str(when)}]}]
    for content in (when, b"a", 3, {"a": 1}):
        with pytest.raises(RowError, match="not a text: `prompt`: content is"):
            to_messages([{"role": "user", "content": content}], "user", "prompt")


def test_messages_of_parquet_may_hold_times() -> None:
    when = datetime(2026, 1, 2, tzinfo=UTC)
    row = {"prompt": [{**user("a"), "timestamp": when}], "chosen": [bot("b")], "rejected": [bot("c")]}
    pq.write_table(pa.Table.from_pylist([row]), "rows.parquet")
    source, _ = open_sources(SourceFields(path="rows.parquet"), "data")
    ((_, stored),) = decode_rows(next(source.batches(1)))
    assert isinstance(stored, dict)
    (pair,) = read_pairs(stored, find_layout([stored], "auto"), "best_vs_worst")
    assert json.dumps(pair.prompt)


@pytest.mark.parametrize(
    ("chosen", "rejected", "shared"),
    [
        ([user("a"), bot("b")], [user("a"), bot("c")], 1),
        ([user("a"), bot("b"), user("c"), bot("d")], [user("a"), bot("b"), user("c"), bot("e")], 3),
        ([user("a"), bot("b")], [user("a"), bot("b"), user("c"), bot("d")], 1),
        ([user("a"), bot("b"), user("c"), bot("d")], [user("a"), bot("x"), user("c"), bot("d")], 1),
        ([user("a"), bot("b")], [user("a"), bot("b")], 1),
        ([{"role": "system", "content": "s"}, user("a"), bot("b")], [{"role": "system", "content": "s"}, user("a")], 1),
    ],
)
def test_conversations_are_split_where_they_part(chosen: Any, rejected: Any, shared: int) -> None:
    assert split_conversations(chosen, rejected) == (chosen[:shared], chosen[shared:], rejected[shared:])


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ([user("a"), bot("b")], [user("x"), bot("b")]),
        ([user("a")], [user("a")]),
        ([user("a"), bot("b")], [bot("b")]),
        ([bot("a"), user("b")], [bot("a"), user("c")]),
    ],
)
def test_conversations_that_share_no_prompt(chosen: Any, rejected: Any) -> None:
    with pytest.raises(RowError, match="no common prompt: `chosen` and `rejected` do not begin alike"):
        split_conversations(chosen, rejected)


def test_tools_are_a_list_or_its_json() -> None:
    assert parse_json([{"a": 1, "b": None}], list, "tools") == [{"a": 1}]  # Parquet: None is an absent field
    assert parse_json('[{"a": 1, "b": null}]', list, "tools") == [{"a": 1, "b": None}]  # JSON text: null is kept
    for nothing in (None, "", " ", [], "[]", "null"):
        assert parse_json(nothing, list, "tools") is None
    for wrong in (3, b"[]", {"a": 1}, '{"a": 1}', "3", "[1", "[" * 100_000):
        with pytest.raises(RowError) as caught:
            parse_json(wrong, list, "tools")
        assert caught.value.reason == "no usable tools" and len(str(caught.value)) < 200


def test_a_pair_must_be_writable() -> None:
    check_pair(Pair([user("a")], [bot("b")], [bot("c")]))
    for odd in ({(1, 2): 3}, [b"a"]):
        with pytest.raises(RowError, match=r"^not JSON: `prompt`: "):
            check_pair(Pair([{**user("a"), "odd": odd}], [bot("b")], [bot("c")]))


def test_messages_written_as_text_are_messages_and_never_learned_literally() -> None:
    messages = [{"role": "user", "content": "Why?"}]
    assert to_messages(json.dumps(messages), "user", "prompt") == messages
    with pytest.raises(RowError, match="not a text: `prompt` holds messages that are not JSON"):
        to_messages(str(messages), "user", "prompt")
    assert to_messages("[{'a': 1}] is a list", "user", "prompt")[0]["content"] == "[{'a': 1}] is a list"

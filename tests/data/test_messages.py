"""Tests of messages: conversion to role/content, splitting of conversations, checks on pairs."""

import json
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_runner.config.sections.data import SourceFields
from dpo_runner.data.layouts.conversations import split_conversations
from dpo_runner.data.layouts.formats import find_layout, read_pairs
from dpo_runner.data.layouts.messages import Message, Pair, check_pair, parse_json, to_messages
from dpo_runner.data.layouts.serialized import render_calls
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
        *(("developer", "system"), ("tool_call", "assistant"), ("tool_response", "tool")),
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


def test_conversations_are_compared_by_what_a_template_writes() -> None:
    one, other = (
        [
            {**bot(""), "uuid": name, "tool_calls": [{"id": name, "function": {"name": "look_up"}}]},
            {"role": "tool", "tool_call_id": name, "content": "t"},
        ]
        for name in ("c1", "r1")
    )
    chosen = [user("a "), *one, bot("b")]
    rejected = [{**user("a"), "index": 0}, *other, bot("c")]
    assert split_conversations(chosen, rejected) == (chosen[:3], chosen[3:], rejected[3:])
    rejected[1] = {**rejected[1], "tool_calls": [{"id": "c1", "function": {"name": "look_down"}}]}
    assert split_conversations(chosen, rejected) == (chosen[:1], chosen[1:], rejected[1:])
    rejected[1] = {**one[0], "reasoning_content": "hm"}
    assert split_conversations(chosen, rejected) == (chosen[:1], chosen[1:], rejected[1:])


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


ONE = bot("Rome.")
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ([user("Why?")], [user("Why?")]),
        ([user("Why?"), bot("So."), user("Oh?")], [user("Why?"), bot("So."), user("Oh?")]),
        ([{"id": 1, "lang": "en", **ONE}], [{"id": 1, "lang": "en", **ONE}]),
        (ONE, [ONE]),
        ({"content": "Rome.", "id": 1, "role": "Assistant"}, [{"id": 1, **ONE}]),
        ({"from": "gpt", "value": "Rome."}, [ONE]),
        ({"role": "assistant", "tool_calls": [CALL]}, [{**bot(""), "tool_calls": [CALL]}]),
    ],
)
@pytest.mark.parametrize("times", [1, 2, 3])
def test_messages_written_as_json_are_messages(value: Any, expected: Any, times: int) -> None:
    text = f" {json.dumps(value)}\n"
    for _ in range(times - 1):
        text = json.dumps(text)
    assert to_messages(text, "assistant", "chosen") == expected


@pytest.mark.parametrize(
    "text",
    [
        *(
            '{"name": "x"}',
            "[1, 2]",
            '"quoted"',
            "12",
            "null",
            '"',
            "[",
            "{",
            "(see above)",
            "[link](http://a.b)",
            "[]",
        ),
        *('{"role": "admin"}', '{"content": "x"}', '{"from": "USD", "to": "EUR", "value": 1.5}', "{}", "[{}]", '["a"]'),
        *('[{"from": "USD", "to": "EUR", "value": 1.5}]', '{"role": "editor", "content": "x", "since": 2020}'),
        '{"model": "m", "messages": [{"role": "user", "content": "Why?"}]}',  # a request, as an answer about an API
        'Like this: [{"role": "user", "content": "Why?"}]',
        "[{'a': 1}] is a list",
        "{'role': 'admin', 'content': 'x'}",
        "[{'name': 'Ann', 'role': 'user'}]",
        "array([1, 2])",
        "Message(text='x')",
        "[" * 100_000,
        "9" * 5000,
    ],
)
def test_other_texts_stay_texts_even_if_they_are_json(text: str) -> None:
    assert to_messages(text, "assistant", "chosen") == [bot(text)]


@pytest.mark.parametrize(
    "text",
    [
        *(str([user("Why?")]), str(ONE), str([{"id": 1, **ONE}]), f"[{{'role': 'user'}}, {ONE}]", f"({ONE},)"),
        f"array([{ONE}], dtype=object)",
        f"np.array([\n {ONE}\n])",
        "[OrderedDict([('role', 'user'), ('content', 'Why?')])]",
        "[ChatMessage(role='user', content='Why?')]",
        "HumanMessage(content='Why?', id=3)",
        json.dumps(str([ONE])),
        json.dumps([ONE])[:-9],  # cut short, as spreadsheets do
    ],
)
def test_messages_in_another_form_are_refused(text: str) -> None:
    with pytest.raises(RowError) as caught:
        to_messages(text, "assistant", "chosen")
    message = str(caught.value)
    assert message.startswith("not a text: `chosen` holds messages that are not JSON: ")
    assert message.endswith("; write them with json.dumps, or decode them in a data.formatter")


@pytest.mark.parametrize(
    "text",
    [
        '[{"role": "narrator", "content": "x"}]',
        '{"from": "me", "value": "x"}',
        '[{"id": 1, "role": "narrator", "content": "x"}]',
    ],
)
def test_messages_of_an_unknown_role_are_no_text(text: str) -> None:
    with pytest.raises(RowError, match="unknown role: `chosen`"):
        to_messages(text, "assistant", "chosen")


TEMPLATES = {
    "tojson": "{{ call.arguments | tojson }}",
    "string or tojson": "{{ call.arguments if call.arguments is string else call.arguments | tojson }}",
    "joined": "{{ '' + call.name + '\n' + call.arguments + '\n' }}",
    "printed": "{{ call.arguments }}",
    "items": "{% for name, value in call.arguments.items() %}{{ name }}={{ value }}{% endfor %}",
}


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("text", ['{"city": "Zürich \\"4\\""}', '{"city":"Z\\u00fcrich \\"4\\""}', None])
def test_templates_of_every_kind_see_the_arguments_of_a_call_unescaped(
    text: str | None, template: str, flat: bool
) -> None:
    from transformers.utils.chat_template_utils import render_jinja_template

    given = {"name": "look", "arguments": {"city": 'Zürich "4"'} if text is None else text}
    message = {"role": "assistant", "content": "", "tool_calls": [given if flat else {"function": given}]}
    (made,) = to_messages([message], "assistant", "chosen")
    call = "tool_calls[0]" + ("" if flat else ".function")
    jinja = f"{{% set call = messages[0].{call} %}}{TEMPLATES[template]}"
    shown = render_calls(lambda messages: render_jinja_template([messages], chat_template=jinja)[0][0], [made])
    canonical = '{"city": "Zürich \\"4\\""}'
    as_given = canonical if text is None else text
    assert (
        shown
        == {
            "tojson": canonical,
            "string or tojson": canonical,
            "joined": f"look\n{as_given}\n",
            "printed": as_given,
            "items": 'city=Zürich "4"',
        }[template]
    )
    assert json.loads(json.dumps(made))["tool_calls"][0] == (
        {"name": "look", "arguments": {"city": 'Zürich "4"'}}
        if flat
        else {"function": {**given, "arguments": {"city": 'Zürich "4"'}}}
    )


def test_a_template_that_refuses_both_forms_says_why_it_refuses_the_object() -> None:
    (made,) = to_messages([{**bot(""), "tool_calls": [CALL]}], "assistant", "chosen")

    def refuse(messages: list[Message]) -> str:
        raise ValueError(type(messages[0]["tool_calls"][0]["function"]["arguments"]).__name__)

    with pytest.raises(ValueError, match="Arguments"):
        render_calls(refuse, [made])


def test_calls_may_be_json_as_a_whole_and_without_arguments() -> None:
    calls = [{"name": "a", "arguments": ""}, {"name": "b"}]
    (message,) = to_messages([{**bot(""), "tool_calls": json.dumps(calls)}], "assistant", "chosen")
    assert message["tool_calls"] == [{"name": "a", "arguments": {}}, {"name": "b"}]
    (message,) = to_messages([{**bot(""), "function_call": {"name": "a", "arguments": '{"b": 1}'}}], "user", "prompt")
    assert message["function_call"] == {"name": "a", "arguments": {"b": 1}}


@pytest.mark.parametrize("arguments", ["Oslo", "{'city': 'Oslo'}", '["Oslo"]', "null", "{"])
def test_arguments_that_are_no_json_object_cost_the_row(arguments: str) -> None:
    calls = [{"function": {"name": "a", "arguments": arguments}}]
    for value in (calls, json.dumps(calls), [json.dumps(calls[0])]):
        with pytest.raises(RowError, match=r"no usable arguments: `chosen`: .* is not the JSON of an object"):
            to_messages([{**bot(""), "tool_calls": value}], "assistant", "chosen")
    with pytest.raises(RowError, match="no usable tool_calls: `chosen`: 'x' is not the JSON of a list"):
        to_messages([{**bot(""), "tool_calls": "x"}], "assistant", "chosen")


TOOL = {"type": "function", "function": {"name": "a", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "value",
    [
        [TOOL],
        [json.dumps(TOOL)],
        json.dumps([json.dumps(TOOL)]),
        json.dumps(json.dumps([TOOL])),
        [{**TOOL, "function": {"name": "a", "parameters": '{"type": "object"}'}}],
        [{**TOOL, "function": json.dumps({"name": "a", "parameters": {"type": "object"}})}],
    ],
)
def test_a_tool_may_be_json_inside_of_the_list(value: Any) -> None:
    assert parse_json(value, list, "tools") == [TOOL]


@pytest.mark.parametrize("value", [["weather"], [{"name": "a", "parameters": "{city}"}], ["[1]"]])
def test_a_tool_that_is_a_text_costs_the_row(value: Any) -> None:
    with pytest.raises(RowError, match=r"^no usable tools: `tools`: .* is not the JSON of an object"):
        parse_json(value, list, "tools")

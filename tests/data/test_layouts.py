"""Tests of every known layout of preference rows: detection and the exact pairs of a row."""

import copy
import functools
import itertools
import json
import math
import operator
import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo_runner.config.sections.data import FORMATS, SourceConf
from dpo_runner.data.layouts.cells import decode_cells
from dpo_runner.data.layouts.formats import (
    find_layout,
    find_unread,
    format_row,
    load_formatter,
    read_pairs,
    rename_columns,
)
from dpo_runner.data.layouts.known import LAYOUTS
from dpo_runner.data.layouts.messages import Message, Pair
from dpo_runner.data.layouts.scored import group_responses
from dpo_runner.data.prepare.recipe import Recipe
from dpo_runner.data.prepare.workers import process_all
from dpo_runner.data.rows.decoding import decode_rows
from dpo_runner.data.rows.sources import open_sources
from dpo_runner.errors import DataError, LeftOut, RowError


def user(content: str) -> Message:
    return {"role": "user", "content": content}


def bot(content: str) -> Message:
    return {"role": "assistant", "content": content}


def tool(content: str) -> Message:
    return {"role": "tool", "content": content}


def human(value: str) -> Message:
    return {"from": "human", "value": value}


def gpt(value: str) -> Message:
    return {"from": "gpt", "value": value}


WHY, SCATTERS, JUST_IS, AND_RED = "Why is the sky blue?", "Air scatters blue light most.", "It just is.", "And red?"
BRIEF: Message = {"role": "system", "content": "Be brief."}
PLAIN = Pair([user(WHY)], [bot(SCATTERS)], [bot(JUST_IS)])
WITH_SYSTEM = Pair([BRIEF, user(WHY)], [bot(SCATTERS)], [bot(JUST_IS)])
TURNS = [user(WHY), bot(SCATTERS), user(AND_RED)]
SECOND_TURN = Pair(TURNS, [bot("Dust lets red through.")], [bot("Who knows.")])
HUMAN, ASSISTANT = f"\n\nHuman: {WHY}", "\n\nAssistant:"
WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}]
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'


def scored(pair: Pair, gap: float) -> Pair:
    return Pair(pair.prompt, pair.chosen, pair.rejected, score_gap=gap)


ROWS: dict[str, tuple[dict[str, Any], str, list[Pair]]] = {
    "texts": (
        {"prompt": WHY, "chosen": SCATTERS, "rejected": JUST_IS},
        "preference (texts)",
        [PLAIN],
    ),
    "texts with a system column": (
        {"prompt": WHY, "chosen": SCATTERS, "rejected": JUST_IS, "system": "Be brief."},
        "preference (texts)",
        [WITH_SYSTEM],
    ),
    "texts with a blank system column": (
        {"prompt": WHY, "chosen": SCATTERS, "rejected": JUST_IS, "system": " "},
        "preference (texts)",
        [PLAIN],
    ),
    "texts with scores as texts": (
        {"prompt": WHY, "chosen": SCATTERS, "rejected": JUST_IS, "score_chosen": "7.5", "score_rejected": "2"},
        "preference (texts, scores)",
        [scored(PLAIN, 5.5)],
    ),
    "messages": (
        {"prompt": [user(WHY)], "chosen": [bot(SCATTERS)], "rejected": [bot(JUST_IS)]},
        "preference (messages)",
        [PLAIN],
    ),
    "one message instead of a list": (
        {"prompt": user(WHY), "chosen": bot(SCATTERS), "rejected": bot(JUST_IS)},
        "preference (messages)",
        [PLAIN],
    ),
    "text, messages, text": (
        {"prompt": WHY, "chosen": [bot(SCATTERS)], "rejected": JUST_IS},
        "preference (messages)",
        [PLAIN],
    ),
    "messages, texts": (
        {"prompt": [BRIEF, user(WHY)], "chosen": SCATTERS, "rejected": JUST_IS},
        "preference (messages)",
        [WITH_SYSTEM],
    ),
    "a system turn comes before a system column": (
        {"prompt": [BRIEF, user(WHY)], "chosen": [bot(SCATTERS)], "rejected": [bot(JUST_IS)], "system": "Be long."},
        "preference (messages)",
        [WITH_SYSTEM],
    ),
    "implicit prompt": (
        {"chosen": [user(WHY), bot(SCATTERS)], "rejected": [user(WHY), bot(JUST_IS)]},
        "preference (messages, implicit prompt)",
        [PLAIN],
    ),
    "implicit prompt of several turns": (
        {"chosen": [*TURNS, bot("Dust lets red through.")], "rejected": [*TURNS, bot("Who knows.")]},
        "preference (messages, implicit prompt)",
        [SECOND_TURN],
    ),
    "implicit prompt that ends with a tool's answer": (
        {
            "chosen": [user("Rain?"), bot(CALL), tool("dry"), bot("No.")],
            "rejected": [user("Rain?"), bot(CALL), tool("dry"), bot("Yes.")],
        },
        "preference (messages, implicit prompt)",
        [Pair([user("Rain?"), bot(CALL), tool("dry")], [bot("No.")], [bot("Yes.")])],
    ),
    "implicit prompt, tools called on both sides": (
        {
            "chosen": [user("Rain?"), bot("I look."), tool("dry"), bot("No.")],
            "rejected": [user("Rain?"), bot("I look twice."), tool("dry"), bot("No.")],
        },
        "preference (messages, implicit prompt)",
        [
            Pair(
                [user("Rain?")],
                [bot("I look."), tool("dry"), bot("No.")],
                [bot("I look twice."), tool("dry"), bot("No.")],
            )
        ],
    ),
    "an answer that begins like the other": (
        {
            "chosen": [user("Rain?"), bot("I look."), tool("dry"), bot("No.")],
            "rejected": [user("Rain?"), bot("I look.")],
        },
        "preference (messages, implicit prompt)",
        [Pair([user("Rain?")], [bot("I look."), tool("dry"), bot("No.")], [bot("I look.")])],
    ),
    "UltraFeedback binarized": (
        {
            "prompt": WHY,
            "prompt_id": "f0e37e9f7800261167ce91143f98f511f768847236f133f2d0aed60b444ebe57",
            "chosen": [user(WHY), bot(SCATTERS)],
            "rejected": [user(WHY), bot(JUST_IS)],
            "messages": [user(WHY), bot(SCATTERS)],
            "score_chosen": 8.5,
            "score_rejected": 6.0,
        },
        "preference (messages, scores)",
        [scored(PLAIN, 2.5)],
    ),
    "explicit messages and the conversation": (
        {"prompt": TURNS, "chosen": [*TURNS, bot("Dust lets red through.")], "rejected": [*TURNS, bot("Who knows.")]},
        "preference (messages)",
        [SECOND_TURN],
    ),
    "the last question and the conversation": (
        {"prompt": AND_RED, "chosen": [*TURNS, bot("Dust lets red through.")], "rejected": [*TURNS, bot("Who knows.")]},
        "preference (messages)",
        [SECOND_TURN],
    ),
    "argilla dpo-mix-7k": (
        {
            "dataset": "argilla/distilabel-capybara-dpo-7k-binarized",
            "chosen": [*TURNS, bot("Dust lets red through.")],
            "rejected": [*TURNS, bot("Who knows.")],
            "chosen_rating": 5.0,
            "rejected_rating": 3.5,
        },
        "preference (messages, implicit prompt, scores)",
        [scored(SECOND_TURN, 1.5)],
    ),
    "argilla, named otherwise": (
        {"prompt": WHY, "chosen": SCATTERS, "rejected": JUST_IS, "chosen_avg_rating": 4, "rejected_avg_rating": 5},
        "preference (texts, scores)",
        [scored(PLAIN, -1.0)],
    ),
    "OpenAI's content parts": (
        {
            "prompt": [
                {"role": "user", "content": [{"type": "text", "text": "Why is "}, {"type": "text", "text": WHY}]}
            ],
            "chosen": [{"role": "assistant", "content": [{"type": "text", "text": SCATTERS}]}],
            "rejected": [{"role": "assistant", "content": [{"text": JUST_IS}]}],
        },
        "preference (messages)",
        [Pair([user(f"Why is {WHY}")], [bot(SCATTERS)], [bot(JUST_IS)])],
    ),
    "fields that are None, as Parquet gives them": (
        {
            "prompt": [{**user(WHY), "name": None, "tool_calls": None, "from": None, "value": None}],
            "chosen": [{"role": None, "content": None, "from": "gpt", "value": SCATTERS, "weight": 1}],
            "rejected": [{"role": None, "content": None, "from": "gpt", "value": JUST_IS, "weight": None}],
            "system": None,
            "tools": None,
            "score_chosen": None,
            "score_rejected": None,
        },
        "preference (messages)",
        [Pair([user(WHY)], [{**bot(SCATTERS), "weight": 1}], [bot(JUST_IS)])],
    ),
    "tool calls without content": (
        {
            "prompt": [user("Rain?")],
            "chosen": [
                {"role": "assistant", "content": None, "tool_calls": [{"name": "weather"}]},
                {"role": "tool", "name": "weather", "content": "dry"},
                bot("No."),
            ],
            "rejected": [{"role": "assistant", "tool_calls": [{"name": "radio"}]}],
        },
        "preference (messages)",
        [
            Pair(
                [user("Rain?")],
                [{**bot(""), "tool_calls": [{"name": "weather"}]}, {**tool("dry"), "name": "weather"}, bot("No.")],
                [{**bot(""), "tool_calls": [{"name": "radio"}]}],
            )
        ],
    ),
    "roles by other names": (
        {
            "prompt": [{"role": "System", "content": "Be brief."}, {"role": "prompter", "content": WHY}],
            "chosen": [{"role": "model", "content": SCATTERS}],
            "rejected": [{"role": "Bot", "content": JUST_IS}],
        },
        "preference (messages)",
        [WITH_SYSTEM],
    ),
    "tools and template variables": (
        {
            "prompt": "Rain?",
            "chosen": "No.",
            "rejected": "Yes.",
            "tools": WEATHER,
            "chat_template_kwargs": {"enable_thinking": False},
        },
        "preference (texts)",
        [Pair([user("Rain?")], [bot("No.")], [bot("Yes.")], WEATHER, {"enable_thinking": False})],
    ),
    "tools and template variables as JSON": (
        {
            "prompt": "Rain?",
            "chosen": "No.",
            "rejected": "Yes.",
            "tools": json.dumps(WEATHER),
            "chat_template_kwargs": '{"enable_thinking": false}',
        },
        "preference (texts)",
        [Pair([user("Rain?")], [bot("No.")], [bot("Yes.")], WEATHER, {"enable_thinking": False})],
    ),
    "no tools, said in several ways": (
        {"prompt": WHY, "chosen": SCATTERS, "rejected": JUST_IS, "tools": " ", "chat_template_kwargs": "{}"},
        "preference (texts)",
        [PLAIN],
    ),
    "Anthropic HH": (
        {
            "chosen": f"{HUMAN}{ASSISTANT} {SCATTERS}",
            "rejected": f"{HUMAN}{ASSISTANT} {JUST_IS}",
        },
        "hh",
        [PLAIN],
    ),
    "Anthropic HH of several turns": (
        {
            "chosen": f"{HUMAN}{ASSISTANT} {SCATTERS}\n\nHuman: {AND_RED}{ASSISTANT} Dust lets red through.",
            "rejected": f"{HUMAN}{ASSISTANT} {SCATTERS}\n\nHuman: {AND_RED}{ASSISTANT} Who knows.",
        },
        "hh",
        [SECOND_TURN],
    ),
    "HH with the words elsewhere in a text": (
        {
            "chosen": f"{HUMAN}{ASSISTANT} {SCATTERS}\n\nThe Human: never looks up.",
            "rejected": f"{HUMAN}{ASSISTANT} {JUST_IS}\nAssistant: yes.",
        },
        "hh",
        [Pair([user(WHY)], [bot(f"{SCATTERS}\n\nThe Human: never looks up.")], [bot(f"{JUST_IS}\nAssistant: yes.")])],
    ),
    "HH with the prompt apart": (
        {
            "prompt": f"{HUMAN}{ASSISTANT} {SCATTERS}\n\nHuman: {AND_RED}{ASSISTANT}",
            "response": " Dust lets red through.",
            "chosen": "Dust lets red through.",
            "rejected": "Who knows.",
        },
        "hh",
        [SECOND_TURN],
    ),
    "ShareGPT": (
        {"conversations": [human(WHY)], "chosen": gpt(SCATTERS), "rejected": gpt(JUST_IS)},
        "sharegpt",
        [PLAIN],
    ),
    "ShareGPT with a system turn, answers as lists": (
        {
            "conversations": [{"from": "system", "value": "Be brief."}, human(WHY)],
            "chosen": [gpt(SCATTERS)],
            "rejected": [gpt(JUST_IS)],
        },
        "sharegpt",
        [WITH_SYSTEM],
    ),
    "ShareGPT with a system column": (
        {"conversations": [human(WHY)], "chosen": gpt(SCATTERS), "rejected": gpt(JUST_IS), "system": "Be brief."},
        "sharegpt",
        [WITH_SYSTEM],
    ),
    "ShareGPT with texts, several turns and scores": (
        {
            "conversations": [human(WHY), gpt(SCATTERS), human(AND_RED)],
            "chosen": "Dust lets red through.",
            "rejected": "Who knows.",
            "score_chosen": 3,
            "score_rejected": 1,
        },
        "sharegpt",
        [scored(SECOND_TURN, 2.0)],
    ),
    "ShareGPT with tools": (
        {
            "conversations": [
                human("Rain?"),
                {"from": "function_call", "value": CALL},
                {"from": "observation", "value": "dry"},
            ],
            "chosen": gpt("No."),
            "rejected": gpt("Yes."),
            "tools": json.dumps(WEATHER),
        },
        "sharegpt",
        [Pair([user("Rain?"), bot(CALL), tool("dry")], [bot("No.")], [bot("Yes.")], WEATHER)],
    ),
    "ShareGPT whose answers call a tool": (
        {
            "conversations": [human("Rain?")],
            "chosen": {"from": "function_call", "value": CALL},
            "rejected": gpt("Yes."),
        },
        "sharegpt",
        [Pair([user("Rain?")], [bot(CALL)], [bot("Yes.")])],
    ),
    "Alpaca": (
        {"instruction": WHY, "input": "", "chosen": SCATTERS, "rejected": JUST_IS},
        "alpaca",
        [PLAIN],
    ),
    "Alpaca with an input": (
        {"instruction": "Translate.", "input": "hei", "chosen": "hi", "rejected": "hey"},
        "alpaca",
        [Pair([user("Translate.\nhei")], [bot("hi")], [bot("hey")])],
    ),
    "Alpaca with an output of two": (
        {"instruction": WHY, "input": None, "output": [SCATTERS, JUST_IS]},
        "alpaca",
        [PLAIN],
    ),
    "Alpaca with history and system": (
        {
            "instruction": AND_RED,
            "history": [[WHY, SCATTERS]],
            "system": "Be brief.",
            "chosen": "Dust lets red through.",
            "rejected": "Who knows.",
        },
        "alpaca",
        [Pair([BRIEF, *TURNS], SECOND_TURN.chosen, SECOND_TURN.rejected)],
    ),
    "Alpaca without history": (
        {"instruction": WHY, "history": [], "system": "", "chosen": SCATTERS, "rejected": JUST_IS},
        "alpaca",
        [PLAIN],
    ),
    "Alpaca with scores": (
        {"instruction": WHY, "chosen": SCATTERS, "rejected": JUST_IS, "chosen_score": 9, "rejected_score": 2},
        "alpaca",
        [scored(PLAIN, 7.0)],
    ),
    "an instruction beside whole conversations": (
        {"instruction": WHY, "chosen": [user(WHY), bot(SCATTERS)], "rejected": [user(WHY), bot(JUST_IS)]},
        "preference (messages, implicit prompt)",
        [PLAIN],
    ),
    "Orca": (
        {"system": "Be brief.", "question": WHY, "chosen": SCATTERS, "rejected": JUST_IS},
        "orca",
        [WITH_SYSTEM],
    ),
    "Orca without a system text": (
        {"system": "", "question": WHY, "chosen": SCATTERS, "rejected": JUST_IS},
        "orca",
        [PLAIN],
    ),
    "distilabel's Orca": (
        {"system": "Be brief.", "input": WHY, "chosen": SCATTERS, "rejected": JUST_IS, "status": "unchanged"},
        "orca",
        [WITH_SYSTEM],
    ),
    "a question with answers as messages": (
        {"question": WHY, "chosen": [{"role": "model", "content": SCATTERS}], "rejected": [gpt(JUST_IS)]},
        "orca",
        [PLAIN],
    ),
    "distilabel, scored": (
        {"instruction": WHY, "generations": [JUST_IS, SCATTERS], "ratings": [2.0, 4.5], "model_name": "x"},
        "scored",
        [scored(PLAIN, 2.5)],
    ),
    "distilabel, its older names": (
        {"input": WHY, "generations": [SCATTERS, JUST_IS], "rating": [9, 3]},
        "scored",
        [scored(PLAIN, 6.0)],
    ),
    "openbmb/UltraFeedback": (
        {
            "source": "evol_instruct",
            "instruction": WHY,
            "models": ["a", "b"],
            "completions": [
                {"model": "a", "response": JUST_IS, "overall_score": 3.5, "fine-grained_score": 5.0},
                {"model": "b", "response": SCATTERS, "overall_score": 8.0, "fine-grained_score": 1.0},
            ],
            "correct_answers": ["None"],
        },
        "scored",
        [scored(PLAIN, 4.5)],
    ),
    "candidates with their rewards": (
        {"question": WHY, "candidates": [{"text": SCATTERS, "reward": 1}, {"text": JUST_IS, "reward": -1}]},
        "scored",
        [scored(PLAIN, 2.0)],
    ),
    "prompt, responses, scores": (
        {"prompt": WHY, "responses": [SCATTERS, "So?", JUST_IS], "scores": [3, 2, 1], "system": "Be brief."},
        "scored",
        [scored(WITH_SYSTEM, 2.0)],
    ),
    "responses as messages": (
        {"prompt": [BRIEF, user(WHY)], "answers": [[bot(SCATTERS)], [bot(JUST_IS)]], "scores": [1, 0]},
        "scored",
        [scored(WITH_SYSTEM, 1.0)],
    ),
    "responses that score the same": (
        {"prompt": WHY, "responses": [SCATTERS, JUST_IS], "scores": [3, 3.0]},
        "scored",
        [],
    ),
    "HelpSteer3, the first is better": (
        {"domain": "general", "context": TURNS, "response1": "Dust.", "response2": "Who?", "overall_preference": -2},
        "helpsteer",
        [Pair(TURNS, [bot("Dust.")], [bot("Who?")], score_gap=2.0)],
    ),
    "HelpSteer3, the second is better": (
        {"domain": "code", "context": [user(WHY)], "response1": "So.", "response2": SCATTERS, "overall_preference": 3},
        "helpsteer",
        [Pair([user(WHY)], [bot(SCATTERS)], [bot("So.")], score_gap=3.0)],
    ),
    "HelpSteer3, none is better": (
        {"context": [user(WHY)], "response1": "So.", "response2": SCATTERS, "overall_preference": 0},
        "helpsteer",
        [],
    ),
    "texts that speak of transcripts": (
        {"prompt": "Human: or\n\nAssistant?", "chosen": "Human: I.\n\nAssistant: You.", "rejected": "Neither Human:"},
        "preference (texts)",
        [Pair([user("Human: or\n\nAssistant?")], [bot("Human: I.\n\nAssistant: You.")], [bot("Neither Human:")])],
    ),
    "one text in a list": (
        {"prompt": WHY, "chosen": [SCATTERS], "rejected": [JUST_IS]},
        "preference (messages)",
        [PLAIN],
    ),
    "columns in another spelling": (
        {"User Prompt": WHY, " Chosen": SCATTERS, "rejected.response": JUST_IS, "System": "Be brief."},
        "preference (texts); reads User Prompt as prompt, ' Chosen' as chosen, rejected.response as rejected, "
        "System as system",
        [WITH_SYSTEM],
    ),
    "a system_prompt column": (
        {"prompt": WHY, "chosen": SCATTERS, "rejected": JUST_IS, "system_prompt": "Be brief.", "system": None},
        "preference (texts)",
        [WITH_SYSTEM],
    ),
    "a history beside a text": (
        {"prompt": AND_RED, "history": [[WHY, SCATTERS]], "chosen": "Dust lets red through.", "rejected": "Who knows."},
        "preference (texts)",
        [SECOND_TURN],
    ),
    "a history of messages": (
        {"question": AND_RED, "history": TURNS[:2], "chosen": "Dust lets red through.", "rejected": "Who knows."},
        "orca",
        [SECOND_TURN],
    ),
    "a history beside the conversation that holds it": (
        {"prompt": TURNS, "history": [[WHY, SCATTERS]], "chosen": "Dust lets red through.", "rejected": "Who knows."},
        "preference (messages)",
        [SECOND_TURN],
    ),
    "ids that differ": (
        {
            "chosen": [{**user(WHY), "id": "c0", "created_at": 1}, {**bot(SCATTERS), "id": "c1"}],
            "rejected": [{**user(WHY), "id": "r0", "created_at": 2}, {**bot(JUST_IS), "id": "r1"}],
        },
        "preference (messages, implicit prompt)",
        [
            Pair(
                [{**user(WHY), "id": "c0", "created_at": 1}],
                [{**bot(SCATTERS), "id": "c1"}],
                [{**bot(JUST_IS), "id": "r1"}],
            )
        ],
    ),
    "blanks around a prompt": (
        {"prompt": f" {WHY}\n", "chosen": [user(WHY), bot(SCATTERS)], "rejected": [user(f"{WHY} "), bot(JUST_IS)]},
        "preference (messages)",
        [PLAIN],
    ),
    "messages with blanks around a prompt": (
        {"prompt": [user(f"{WHY} ")], "chosen": [user(WHY), bot(SCATTERS)], "rejected": [user(WHY), bot(JUST_IS)]},
        "preference (messages)",
        [PLAIN],
    ),
    "a rendered prompt beside messages": (
        {
            "prompt": f"<|system|>\nBe brief.</s>\n<|user|>\n{WHY}</s>\n<|assistant|>\n",
            "chosen": [BRIEF, user(WHY), bot(SCATTERS)],
            "rejected": [BRIEF, user(WHY), bot(JUST_IS)],
        },
        "preference (messages)",
        [WITH_SYSTEM],
    ),
    "a transcript beside messages": (
        {
            "prompt": f"{HUMAN}{ASSISTANT}",
            "chosen": [user(WHY), bot(SCATTERS)],
            "rejected": [user(WHY), bot(JUST_IS)],
        },
        "preference (messages)",
        [PLAIN],
    ),
    "the role developer": (
        {"prompt": [{"role": "developer", "content": "Be brief."}, user(WHY)], "chosen": SCATTERS, "rejected": JUST_IS},
        "preference (messages)",
        [WITH_SYSTEM],
    ),
    "HH without its leading line breaks": (
        {"chosen": f"Human: {WHY}{ASSISTANT} {SCATTERS}", "rejected": f" Human: {WHY}{ASSISTANT} {JUST_IS}"},
        "hh",
        [PLAIN],
    ),
    "HH with line breaks of Windows": (
        {
            "chosen": f"{HUMAN}{ASSISTANT} {SCATTERS}".replace("\n", "\r\n"),
            "rejected": f"Human: {WHY}{ASSISTANT} {JUST_IS}".replace("\n", "\r\n"),
        },
        "hh",
        [PLAIN],
    ),
    "HH with a prompt without its leading line breaks": (
        {
            "prompt": f"Human: {WHY}{ASSISTANT} {SCATTERS}\n\nHuman: {AND_RED}{ASSISTANT}",
            "chosen": " Dust lets red through.",
            "rejected": "Who knows.",
        },
        "hh",
        [SECOND_TURN],
    ),
    "HH with a prompt and the whole dialogue": (
        {
            "prompt": f"{HUMAN}{ASSISTANT}",
            "chosen": f"{HUMAN}{ASSISTANT} {SCATTERS}",
            "rejected": f"{HUMAN}{ASSISTANT} {JUST_IS}",
        },
        "hh",
        [PLAIN],
    ),
    "HH with a prompt and answers that name their speaker": (
        {"prompt": HUMAN, "chosen": f"{ASSISTANT} {SCATTERS}", "rejected": f"{ASSISTANT} {JUST_IS}"},
        "hh",
        [PLAIN],
    ),
    "messages and answers": (
        {"messages": [BRIEF, user(WHY)], "chosen": bot(SCATTERS), "rejected": bot(JUST_IS)},
        "sharegpt",
        [WITH_SYSTEM],
    ),
    "messages that end with the chosen answer, and answers": (
        {"messages": [user(WHY), bot(SCATTERS)], "chosen": SCATTERS, "rejected": JUST_IS},
        "sharegpt",
        [PLAIN],
    ),
    "messages and answers in another spelling": (
        {"messages": [user(WHY)], "chosen_response": SCATTERS, "rejected_response": JUST_IS},
        "sharegpt; reads chosen_response as chosen, rejected_response as rejected",
        [PLAIN],
    ),
    "ShareGPT with parallel calls": (
        {
            "conversations": [
                human("Rain?"),
                {"from": "function_call", "value": CALL},
                {"from": "function_call", "value": '{"name": "time"}'},
                {"from": "observation", "value": "dry"},
                {"from": "observation", "value": "noon"},
            ],
            "chosen": gpt("No."),
            "rejected": gpt("Yes."),
        },
        "sharegpt",
        [
            Pair(
                [user("Rain?"), bot(f'{CALL}\n{{"name": "time"}}'), tool("dry"), tool("noon")],
                [bot("No.")],
                [bot("Yes.")],
            )
        ],
    ),
    "ms-swift": (
        {"messages": [*TURNS, bot("Dust lets red through.")], "rejected_response": "Who knows."},
        "swift",
        [SECOND_TURN],
    ),
    "ms-swift with a list of messages": (
        {"messages": [user(WHY), bot(SCATTERS)], "rejected_response": [bot(JUST_IS)], "system": "Be brief."},
        "swift",
        [WITH_SYSTEM],
    ),
    "ms-swift with a list of texts": (
        {"messages": [user(WHY), bot(SCATTERS)], "rejected_response": [JUST_IS]},
        "swift",
        [PLAIN],
    ),
    "ms-swift with two conversations": (
        {"messages": [*TURNS, bot("Dust lets red through.")], "rejected_messages": [*TURNS, bot("Who knows.")]},
        "swift",
        [SECOND_TURN],
    ),
    "ms-swift after a tool": (
        {
            "messages": [
                user("Rain?"),
                {"role": "tool_call", "content": CALL},
                {"role": "tool_response", "content": "dry"},
                bot("No."),
            ],
            "rejected_response": "Yes.",
        },
        "swift",
        [Pair([user("Rain?"), bot(CALL), tool("dry")], [bot("No.")], [bot("Yes.")])],
    ),
    "Nectar": (
        {
            "prompt": f"{HUMAN}{ASSISTANT} ",
            "answers": [
                {"answer": JUST_IS, "model": "a", "rank": 3.0},
                {"answer": SCATTERS, "model": "b", "rank": 1.0},
            ],
        },
        "scored",
        [scored(PLAIN, 2.0)],
    ),
    "ranks in a column": (
        {"prompt": WHY, "responses": [JUST_IS, SCATTERS], "ranks": [2, 1]},
        "scored",
        [scored(PLAIN, 1.0)],
    ),
    "a pair beside the ranked answers that it comes from": (
        {
            "prompt": WHY,
            "chosen": SCATTERS,
            "rejected": JUST_IS,
            "answers": [{"answer": SCATTERS, "rank": 1}, {"answer": JUST_IS, "rank": 2}],
        },
        "preference (texts)",
        [PLAIN],
    ),
    "HelpSteer3 with a system text": (
        {
            "context": WHY,
            "response1": SCATTERS,
            "response2": JUST_IS,
            "overall_preference": -1,
            "system": "Be brief.",
        },
        "helpsteer",
        [scored(WITH_SYSTEM, 1.0)],
    ),
}


def describe(row: dict[str, Any]) -> str:
    return find_layout([row], "auto").describe(row)


def read(row: dict[str, Any], pairing: str = "best_vs_worst", name: str = "auto") -> list[Pair]:
    return read_pairs(row, find_layout([row], name), pairing)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_becomes_exactly_these_pairs(name: str) -> None:
    row, layout, pairs = ROWS[name]
    assert (describe(row), read(row)) == (layout, pairs)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_of_parquet_becomes_the_same_pairs(name: str) -> None:
    row, layout, pairs = ROWS[name]
    # a file has one schema: its messages have the union of all fields, most of them None
    like = [{key: [*value, {"extra": "x"}] if _is_messages(value) else value for key, value in row.items()}, row]
    pq.write_table(pa.Table.from_pylist(like), "rows.parquet")
    source, _ = open_sources(SourceConf(path="rows.parquet"), "data")
    stored = [row for batch in source.batches(10) for _, row in decode_rows(batch)][1]
    assert isinstance(stored, dict)
    assert (describe(stored), read(stored)) == (layout, pairs)


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def test_no_layout_is_left_out() -> None:
    names = {layout.partition(" ")[0] for _, layout, _ in ROWS.values()}
    names.add("kto")  # one answer a row: see the groups below
    names = {name.rstrip(";") for name in names}
    assert {"auto", *names} == set(FORMATS) == {"auto", *(layout.name for layout in LAYOUTS)}


@pytest.mark.parametrize("name", ROWS)
def test_the_layout_may_be_named(name: str) -> None:
    row, layout, pairs = ROWS[name]
    assert read(row, name=re.split("[ ;]", layout)[0]) == pairs


DEEP: list[Any] = []
for _ in range(100_000):
    DEEP = [DEEP]
ODD: list[Any] = [
    *(None, "", " ", 3, -1.5, True, math.nan, math.inf, 10**400, b"x", (1, 2), datetime(2026, 1, 1), DEEP),
    *([], {}, [None], [[]], [""], [3], [{}], {"a": 1}, {1: 2}, {(1,): 2}, {"x": DEEP}, "\ud800", "[", '{"a": 1}'),
    *([{"role": "user"}], [user("")], [{"role": ["x"], "content": "a"}], [{"role": {}, "content": "a"}]),
    *("\n\nHuman:", "\n\nAssistant:", "\n\nHuman: a\n\nAssistant: b"),
]


def places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*at, key)
        yield from places(item, (*at, key))


@pytest.mark.parametrize("name", ROWS)
def test_whatever_stands_in_a_row_makes_sound_pairs_or_a_bad_row(name: str) -> None:
    row, layout_name, _ = ROWS[name]
    layout = next(layout for layout in LAYOUTS if layout.name == re.split("[ ;]", layout_name)[0])
    for at, odd in itertools.product(places(row), ODD):
        changed = copy.deepcopy(row)
        functools.reduce(operator.getitem, at[:-1], changed)[at[-1]] = odd
        try:
            for pair in read_pairs(changed, layout, "all_pairs"):
                assert json.dumps(vars(pair), ensure_ascii=False).encode()
        except RowError as error:
            message = str(error)
            assert len(message) < 300 and message.encode() and "\n" not in message
        with suppress(DataError):
            describe(changed)


def texts(pairs: list[Pair]) -> list[tuple[str, str, float | None]]:
    return [(pair.chosen[0]["content"], pair.rejected[0]["content"], pair.score_gap) for pair in pairs]


@pytest.mark.parametrize(
    ("pairing", "scores", "expected"),
    [
        ("best_vs_worst", [2, 4, 1], [("b", "c", 3.0)]),
        ("best_vs_rest", [2, 4, 1], [("b", "a", 2.0), ("b", "c", 3.0)]),
        ("all_pairs", [2, 4, 1], [("b", "a", 2.0), ("b", "c", 3.0), ("a", "c", 1.0)]),
        # the first of equal scores is used
        ("best_vs_worst", [4, 4, 1], [("a", "c", 3.0)]),
        ("best_vs_worst", [4, 1, 1], [("a", "c", 3.0)]),
        ("best_vs_rest", [4, 4, 1], [("a", "c", 3.0)]),
        ("best_vs_rest", [4, 1, 1], [("a", "b", 3.0), ("a", "c", 3.0)]),
        ("all_pairs", [4, 4, 1], [("a", "c", 3.0), ("b", "c", 3.0)]),
        ("all_pairs", [4, 1, 1], [("a", "b", 3.0), ("a", "c", 3.0)]),
        ("best_vs_worst", [2, 2, 2], []),
        ("best_vs_rest", [2, 2, 2], []),
        ("all_pairs", [2, 2, 2], []),
        ("all_pairs", [-1, -0.5, -3], [("b", "a", 0.5), ("b", "c", 2.5), ("a", "c", 2.0)]),
    ],
)
def test_pairings(pairing: str, scores: list[float], expected: list[tuple[str, str, float]]) -> None:
    assert texts(read({"prompt": "q", "responses": ["a", "b", "c"], "scores": scores}, pairing)) == expected


def test_the_pairs_of_a_row_share_no_messages() -> None:
    one, other = read({"prompt": "q", "responses": ["a", "b", "c"], "scores": [1, 2, 3]}, "best_vs_rest")
    assert one.prompt == other.prompt and one.prompt is not other.prompt


def steer(prompt: Any, response: Any, helpfulness: Any) -> dict[str, Any]:
    return {"prompt": prompt, "response": response, "helpfulness": helpfulness, "verbosity": 2}


def grouped(rows: list[Any]) -> list[tuple[int, Any]]:
    """Return the pairs of each group, or the reason for none, with the number of its first row."""
    layout = find_layout([row for row in rows if isinstance(row, dict)], "auto")
    found: list[tuple[int, Any]] = []
    for number, row in group_responses(enumerate(rows, start=1)):
        try:
            if isinstance(row, RowError):
                raise row
            found.append((number, texts(read_pairs(row, layout, "best_vs_worst"))))
        except RowError as error:
            found.append((number, error.reason))
    return sorted(found, key=lambda item: item[0])


def test_neighbours_with_the_same_prompt_are_one_row() -> None:
    rows = [
        steer("q1", "a", 3),
        steer("q1", "b", 4),
        steer("q2", "c", 1),
        RowError("broken JSON"),
        steer("q2", "d", 0),
        steer("q3", "e", 2),
        steer("q1", "f", 2),
        steer("q1", "g", 2),
        steer([user("q4")], "h", 1),
        steer([user("q4")], "i", 4),
        steer([user("q4")], "j", 3),
    ]
    assert grouped(rows) == [
        (1, [("b", "a", 1.0)]),
        (3, [("c", "d", 1.0)]),
        (4, "broken JSON"),
        (6, "fewer than two answers"),
        (7, []),  # not adjacent to the first q1, so a separate row; its scores are equal
        (9, [("i", "h", 3.0)]),
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"response": "x", "helpfulness": 1}, "missing column"),
        ({"prompt": "q", "helpfulness": 1}, "missing column"),
        (steer(None, "x", 1), "missing column"),
        (steer("q", None, 1), "missing column"),
        ({}, "missing column"),
        ({"context": "q", "response1": "x"}, "missing column"),
        ({"response2": "x", "overall_preference": 1}, "missing column"),
    ],
)
def test_a_row_without_a_part_stands_alone_and_parts_no_neighbours(row: dict[str, Any], reason: str) -> None:
    assert grouped([row, steer("q", "a", 3), row, steer("q", "b", 4), row]) == [
        (1, reason),
        (2, [("b", "a", 1.0)]),
        (3, reason),
        (5, reason),
    ]


def test_a_group_with_a_bad_score_is_one_bad_row() -> None:
    rows = [steer("q", "a", 3), steer("q", "b", None), steer("r", "a", 3), steer("r", "b", "high"), steer("s", "a", 1)]
    rows += [steer("s", "b", 2)]
    assert grouped(rows) == [(1, "score is not a number"), (3, "score is not a number"), (5, [("b", "a", 1.0)])]


def test_responses_may_be_grouped_by_another_score() -> None:
    rows: list[Any] = [{"prompt": "q", "response": text, "score": score} for text, score in (("a", 0.5), ("b", 0.25))]
    assert grouped(rows) == [(1, [("a", "b", 0.25)])]
    assert grouped([row | {"helpfulness": 1} for row in rows]) == [(1, [("a", "b", 0.25)])]
    assert grouped([steer("q", text, n) | {"score": None} for n, text in enumerate("ab")]) == [(1, [("b", "a", 1.0)])]


def kto(prompt: str, completion: str, label: Any, **columns: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label, **columns}


def test_good_and_bad_answers_of_neighbours_are_pairs() -> None:
    rows = [
        kto("q1", "bad", False),
        kto("q1", "good", True),
        kto("q2", "good", "True"),  # as in CSV
        kto("q2", "bad", "0"),
        kto("q3", "alone", True),
        kto("q4", "good", True, system="Be brief."),
        kto("q4", "bad", False),  # another prompt, without the system text
        kto("q5", "good", 1),
        kto("q5", "better", 1),
        kto("q6", "odd", "maybe"),
    ]
    assert grouped(rows) == [
        (1, [("good", "bad", 1.0)]),
        (3, [("good", "bad", 1.0)]),
        (5, "fewer than two answers"),
        (6, "fewer than two answers"),
        (7, "fewer than two answers"),
        (8, []),
        (10, "score is not a number"),
    ]
    with pytest.raises(RowError, match=r"1 to this prompt; a pair needs .*; sort the rows by prompt"):
        read_pairs(rows[0] | {"responses": ["bad"], "scores": [False]}, find_layout(rows, "auto"), "all_pairs")


def test_answers_without_an_order_are_all_paired_or_refused() -> None:
    row = {"prompt": "q", "chosen": ["a", "b"], "rejected": ["c", "d"]}
    assert texts(read(row, "all_pairs")) == [("a", "c", None), ("a", "d", None), ("b", "c", None), ("b", "d", None)]
    swift = {"messages": [user("q"), bot("a")], "rejected_response": ["b", "c"]}
    assert texts(read(swift, "all_pairs")) == [("a", "b", None), ("a", "c", None)]
    for pairing in ("best_vs_worst", "best_vs_rest"):
        with pytest.raises(RowError, match=r"several answers: `chosen` holds 2 texts .*; data\.pairing=all_pairs"):
            read(row, pairing)


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "margin": 2, "id": 0, "weight": None, "images": []},
            "margin id",
        ),
        ({"Prompt": "q", "Chosen": "a", "Rejected": "b", "Source": "x"}, "Source"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "system": "s", "tools": WEATHER, "history": [["x", "y"]]}, ""),
        ({"instruction": "q", "output": ["a", "b"], "system": "s", "prompt_id": "x"}, "prompt_id"),
        (ROWS["UltraFeedback binarized"][0], "prompt_id messages"),
        (ROWS["Nectar"][0] | {"turns": 1}, "turns"),
        (steer("q", "a", 3) | {"system": "s"}, "verbosity"),
        (kto("q", "a", True) | {"source": "x"}, "source"),
    ],
)
def test_columns_that_are_not_read_are_named(row: dict[str, Any], unread: str) -> None:
    layout = find_layout([row], "auto")
    assert find_unread([layout.respell(row)] * 2, layout) == unread.split()


def test_roles_are_mapped() -> None:
    turns = [{"role": "narrator", "content": "Be brief."}, {"from": "child", "value": WHY}]
    roles = {"narrator": "system", "child": "user"}
    for prompt in (turns, json.dumps(turns), [json.dumps(turn) for turn in turns], json.dumps({"messages": turns})):
        row = {"prompt": prompt, "chosen": SCATTERS, "rejected": JUST_IS}
        assert recipe(roles=roles).rows(row)[0]["prompt"] == [
            {"role": "system", "content": "Be brief."},
            {"from": "user", "value": WHY},
        ]
        assert made(row, roles=roles)[0] == [(SCATTERS, JUST_IS, None)]
    text = {"prompt": '[1, {"role": 2}] is a list', "chosen": "[1]", "rejected": '{"a": "child"}'}
    assert recipe(roles=roles).rows(text) == [text]
    answer = {"role": "assistant", "content": json.dumps({"role": "child", "content": "a"})}
    assert recipe(roles=roles).rows({"chosen": [answer]}) == [{"chosen": [answer]}]
    scored = {"prompt": WHY, "responses": [json.dumps([turns[1], bot(SCATTERS)]), JUST_IS], "scores": [2, 1]}
    assert recipe(roles=roles).rows(scored)[0]["responses"] == [
        [{"from": "user", "value": WHY}, bot(SCATTERS)],
        JUST_IS,
    ]
    assert recipe(roles=roles).rows({"chosen": '{"id": 1, "role": "child", "content": "a"}'}) == [
        {"chosen": {"id": 1, "role": "user", "content": "a"}}
    ]


@pytest.mark.parametrize(
    ("columns", "unlike"),
    [
        ({"Prompt": "q", "PROMPT": "q", "Chosen": "a", "Rejected": "b"}, "Prompt, PROMPT, Chosen, Rejected"),
        ({"Prompt": "q", "good": "a", "bad": "b"}, "Prompt, good, bad"),
    ],
)
def test_no_spelling_is_guessed(columns: dict[str, Any], unlike: str) -> None:
    with pytest.raises(DataError, match=f"unknown layout; columns: {unlike};"):
        find_layout([columns], "auto")


def recipe(**fields: Any) -> Recipe:
    return Recipe(SourceConf(path="rows.jsonl", **fields), None, [], "data")


def made(row: dict[str, Any], **fields: Any) -> tuple[list[tuple[str, str, float | None]], str]:
    """Return the pairs of a row in a source with these fields, and the reason if there are none."""
    Path("rows.jsonl").write_text(json.dumps(row))
    mine = recipe(**fields)
    source, _ = open_sources(mine.conf, "data")
    mine.find_layout(next(source.batches(1)), source)
    try:
        return texts(mine.pairs(row)), ""
    except LeftOut as why_none:
        return [], str(why_none)


WHOLE, OTHER = [user(WHY), bot(SCATTERS)], [user(WHY), bot(JUST_IS)]


@pytest.mark.parametrize(
    ("row", "layout", "pairs"),
    [
        (
            {
                "prompt": json.dumps(TURNS),
                "chosen": json.dumps(bot("a")),
                "rejected": json.dumps([{"id": 1, **bot("b")}]),
            },
            "preference (messages)",
            [Pair(TURNS, [bot("a")], [{"id": 1, **bot("b")}])],
        ),
        (
            {"chosen": json.dumps(WHOLE), "rejected": json.dumps(OTHER)},
            "preference (messages, implicit prompt)",
            [PLAIN],
        ),
        (
            {
                name: json.dumps({"messages": m, "tools": WEATHER})
                for name, m in (("chosen", WHOLE), ("rejected", OTHER))
            },
            "preference (messages, implicit prompt)",
            [Pair(PLAIN.prompt, PLAIN.chosen, PLAIN.rejected, WEATHER)],
        ),
        (
            {" Chosen": json.dumps(WHOLE), "REJECTED": [json.dumps(message) for message in OTHER]},
            "preference (messages, implicit prompt); reads ' Chosen' as chosen, REJECTED as rejected",
            [PLAIN],
        ),
        ({"messages": json.dumps(WHOLE), "rejected_messages": json.dumps(OTHER)}, "swift", [PLAIN]),
        ({"messages": json.dumps(WHOLE), "rejected_response": json.dumps(bot(JUST_IS))}, "swift", [PLAIN]),
        (
            {"chosen": {"messages": WHOLE, "tools": None}, "rejected": {"tools": None, "messages": OTHER}},
            "preference (messages, implicit prompt)",
            [PLAIN],
        ),
        (
            {"prompt": json.dumps({"conversations": [human(WHY)]}), "chosen": SCATTERS, "rejected": JUST_IS},
            "preference (messages)",
            [PLAIN],
        ),
        (
            {"conversations": json.dumps([human(WHY)]), "chosen": json.dumps(gpt(SCATTERS)), "rejected": JUST_IS},
            "sharegpt",
            [PLAIN],
        ),
        (
            {
                "instruction": AND_RED,
                "input": "",
                "history": json.dumps([[WHY, SCATTERS]]),
                "chosen": "a",
                "rejected": "b",
            },
            "alpaca",
            [Pair(TURNS, [bot("a")], [bot("b")])],
        ),
        ({"instruction": WHY, "history": "", "output": json.dumps([SCATTERS, JUST_IS])}, "alpaca", [PLAIN]),
        (
            {"prompt": WHY, "responses": json.dumps([SCATTERS, JUST_IS]), "scores": "[5, 1]"},
            "scored",
            [scored(PLAIN, 4.0)],
        ),
        (
            {
                "instruction": WHY,
                "completions": json.dumps([{"response": JUST_IS, "score": 1}, {"text": SCATTERS, "score": 2}]),
            },
            "scored",
            [scored(PLAIN, 1.0)],
        ),
        (
            {
                "context": json.dumps([user(WHY)]),
                "response1": SCATTERS,
                "response2": JUST_IS,
                "overall_preference": "-1",
            },
            "helpsteer",
            [scored(PLAIN, 1.0)],
        ),
        # texts that are JSON, and lists beside a pair, stay what they are
        (
            {"prompt": "[1, 2]", "chosen": '{"a": 1}', "rejected": '["x"]', "answers": "['a']", "scores": "[1, 2]"},
            "preference (texts)",
            [Pair([user("[1, 2]")], [bot('{"a": 1}')], [bot('["x"]')])],
        ),
        (
            {"instruction": WHY, "chosen": SCATTERS, "rejected": JUST_IS, "output": '["a", "b"]'},
            "alpaca",
            [PLAIN],
        ),
        (
            {"instruction": WHY, "Chosen": SCATTERS, "Rejected": JUST_IS, "output": '["a", "b"]'},
            "alpaca; reads Chosen as chosen, Rejected as rejected",
            [PLAIN],
        ),
    ],
)
def test_cells_of_json_text_are_what_they_hold(row: dict[str, Any], layout: str, pairs: list[Pair]) -> None:
    decoded = decode_cells(row)
    assert (describe(decoded), read(decoded), decode_cells(decoded)) == (layout, pairs, decoded)


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"chosen": str(WHOLE)}, "not a text: `chosen` holds messages that are not JSON: "),
        ({"prompt": "", "responses": str([SCATTERS, JUST_IS])}, "not JSON: `responses` is a list that is not JSON: "),
        ({"scores": "[5 1]"}, "not JSON: `scores` is a list that is not JSON: '[5 1]'; write it with json.dumps"),
        (
            {
                "chosen": json.dumps({"messages": WHOLE, "tools": WEATHER}),
                "rejected": json.dumps({"messages": OTHER, "tools": []}),
            },
            "two different tools: `chosen` and `rejected` bring different tools; a pair has one list",
        ),
        (
            {"chosen": json.dumps({"messages": WHOLE, "tools": WEATHER}), "tools": '[{"name": "x"}]'},
            "two different tools: `chosen` and `tools` bring different tools",
        ),
        ({"chosen": {"messages": WHOLE, "tools": "x"}}, "no usable tools: `tools` is not JSON"),
        ({"chosen": {"messages": [], "tools": DEEP}}, "not JSON: nested too deeply"),
    ],
)
def test_cells_that_cannot_be_decoded_cost_the_row(columns: dict[str, Any], problem: str) -> None:
    with pytest.raises(RowError) as caught:
        decode_cells(columns)
    assert str(caught.value).startswith(problem)


def test_a_list_of_another_form_is_named_in_place_of_an_unknown_layout() -> None:
    with pytest.raises(DataError, match=r"none of the first rows can be used; rows\.jsonl:1: not JSON: `responses` is"):
        made({"prompt": "q", "responses": "['a', 'b']", "scores": "[1, 2]"})


@pytest.mark.parametrize("score", ["N/A", "", math.nan, math.inf, [1], True])
def test_ratings_that_are_no_numbers_count_as_none_unless_they_are_needed(score: Any) -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b", "chosen_rating": score, "rejected_rating": 3}
    ((chosen, rejected, gap),) = made(row)[0]
    assert (chosen, rejected) == ("a", "b") and gap is not None and math.isnan(gap)
    with pytest.raises(RowError, match=r"score is not (a number|finite): `chosen_rating`: "):
        made(row, min_score_gap=0.1)
    for named in ("Score Chosen", "score_chosen"), ("Chosen Rating", "chosen_rating"):
        spelled = {
            "Prompt": "q",
            "Chosen": "a",
            "Rejected": "b",
            named[0]: score,
            named[1].replace("chosen", "rejected"): 3,
        }
        with pytest.raises(RowError, match=rf"score is not (a number|finite): `{named[1]}`: "):
            made(spelled, min_score_gap=1)
    with pytest.raises(RowError, match=r"score is not (a number|finite): `scores`: "):
        made({"prompt": "q", "responses": ["a", "b"], "scores": [score, 1]})


def test_columns_may_be_dropped() -> None:
    row = {
        "prompt": "rendered",
        "question": "q",
        "chosen": "a",
        "rejected": "b",
        "score_chosen": 1,
        "score_rejected": 2,
    }
    with pytest.raises(DataError, match="could be preference"):
        made(row)
    assert made(row, drop_columns=["prompt"]) == ([], "rejected scores higher than chosen")
    assert made(row, drop_columns=["prompt", "score_chosen"])[0] == [("a", "b", None)]
    assert made(row, drop_columns=["prompt"], columns={"question": "prompt", "score_chosen": "x"})[0] == [
        ("a", "b", None)
    ]
    with pytest.raises(DataError) as caught:
        made(row, drop_columns=["prompt", "score_chosn"])
    assert str(caught.value) == (
        "`data.drop_columns=[score_chosn]`: none of the first rows has this column; did you mean `score_chosen`?"
    )


def test_pairs_whose_scores_are_near_are_left_out() -> None:
    row = {"prompt": "q", "responses": ["a", "b", "c"], "scores": [3, 2.5, 1]}
    assert made(row, pairing="all_pairs", min_score_gap=1.5)[0] == [("a", "c", 2.0), ("b", "c", 1.5)]
    assert made(row, min_score_gap=2.5) == ([], "the scores differ by less than 2.5")
    assert made(row | {"scores": [1, 1, 1]}, min_score_gap=2.5) == ([], "all answers score the same")
    assert made(row | {"scores": [1, 1, 1]}) == ([], "all answers score the same")


def test_pairs_whose_answers_differ_too_much_in_length_or_too_little_in_words_are_left_out() -> None:
    long, near = "one two three four five", "one two three four six"
    row = {"prompt": "q", "responses": [long, near, "seven"], "scores": [3, 2, 1]}
    assert [pair[:2] for pair in made(row, max_length_difference=18)[0]] == [(long, "seven")]
    assert made(row, max_length_difference=17) == ([], "the answers differ by more than 17 characters")
    rest = {"pairing": "best_vs_rest"}
    assert [pair[:2] for pair in made(row, **rest, max_length_difference=17)[0]] == [(long, near)]
    assert [pair[:2] for pair in made(row, **rest, max_similarity=0.49)[0]] == [(long, "seven")]  # 2 of 4 in common
    assert len(made(row, **rest, max_similarity=0.5)[0]) == 2
    same = {"prompt": "q", "chosen": "Yes, it is.", "rejected": "yes, it  is."}
    assert made(same, max_similarity=0.99) == ([], "the answers are more alike than 0.99")


def test_the_random_answer_scores_lower_and_is_the_same_each_time() -> None:
    rows = [{"prompt": f"q{n}", "responses": ["a", "b", "c", "d"], "scores": [4, 4, 2, 1]} for n in range(40)]
    drawn = [texts(read(row, "best_vs_random")) for row in rows]
    assert drawn == [texts(read(row, "best_vs_random")) for row in rows]
    assert {pair for [pair] in drawn} == {("a", "c", 2.0), ("a", "d", 3.0)}
    assert texts(read({"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]}, "best_vs_random")) == []


def test_the_gap_of_scores_of_a_pair_counts_too() -> None:
    row = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert made(row, min_score_gap=9)[0] == [("a", "b", None)]  # kept: the row has no scores
    scores = {"score_chosen": 3, "score_rejected": 2.5}
    assert made(row | scores, min_score_gap=0.5)[0] == [("a", "b", 0.5)]
    assert made(row | scores, min_score_gap=0.6) == ([], "the scores differ by less than 0.6")


def test_columns_are_renamed() -> None:
    row = {"q": WHY, "good": SCATTERS, "bad": JUST_IS, "id": 3}
    columns = {"q": "prompt", "good": "chosen", "bad": "rejected"}
    assert rename_columns(row, columns) == {"id": 3, "prompt": WHY, "chosen": SCATTERS, "rejected": JUST_IS}
    assert made(row, columns=columns)[0] == [(SCATTERS, JUST_IS, None)]


def test_a_renamed_column_takes_the_place_of_another() -> None:
    row = {"prompt": "formatted: q", "raw": "q", "chosen": "a", "rejected": "b"}
    assert rename_columns(row, {"raw": "prompt"}) == {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert rename_columns(row, {"chosen": "rejected", "rejected": "chosen"}) == row | {"chosen": "b", "rejected": "a"}


def test_a_column_that_is_not_there_is_missed_with_the_nearest_name() -> None:
    row = {"question": "q", "good": "a", "bad": "b"}
    with pytest.raises(RowError, match=r"missing column: `qestion` of data\.columns; did you mean `question`\?"):
        rename_columns(row, {"qestion": "prompt"})
    with pytest.raises(DataError, match=r"none of the first rows can be used; rows\.jsonl:1: missing column: `God`"):
        made(row, columns={"God": "chosen"})


def test_responses_of_renamed_columns_are_grouped() -> None:
    rows = [{"q": "why", "answer": answer, "quality": n} for n, answer in enumerate("ab")]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = recipe(columns={"q": "prompt", "answer": "response", "quality": "helpfulness"})
    source, _ = open_sources(mine.conf, "data")
    mine.find_layout(next(source.batches(9)), source)
    mine.template = type(
        "Template", (), {"encode_batch": staticmethod(lambda pairs: [RowError("seen")] * len(pairs))}
    )()
    outcomes = list(process_all(source.batches(9), mine, 1))
    assert [bad[2] for outcome in outcomes for bad in outcome.bad] == ["seen"]


FORMATTERS = """
def keep(row):
    return {"prompt": row["q"], "chosen": row["a"], "rejected": row["b"]}

def both(row):
    return [keep(row), {"prompt": row["q"], "chosen": row["b"], "rejected": row["a"]}]

def only_short(row):
    return keep(row) if len(row["q"]) < 5 else None

def nothing(row):
    return []

def scored(row):
    return {"prompt": row["q"], "responses": [row["a"], row["b"]], "scores": [1, 2]}

def mine(row):
    return {"p": row["q"], "chosen": row["a"], "rejected": row["b"]}

def text(row):
    return row["q"]

def texts(row):
    return [keep(row), row["q"]]

def fails(row):
    raise ValueError("no such\\n  thing")

def misses(row):
    return row["nowhere"]

def numbered(row):
    return {1: row["q"]}

constant = 3
"""


@pytest.fixture
def formatters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_formatters.py").write_text(FORMATTERS)
    (tmp_path / "my_broken_formatters.py").write_text("def f(row:\n    return row\n")
    (tmp_path / "my_failing_formatters.py").write_text("raise RuntimeError('not\\ntoday')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_formatters", raising=False)


ROW = {"q": "why", "a": "so", "b": "no"}


@pytest.mark.usefixtures("formatters")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("keep", [("so", "no", None)]),
        ("both", [("so", "no", None), ("no", "so", None)]),
        ("only_short", [("so", "no", None)]),
        ("scored", [("no", "so", 1.0)]),
    ],
)
def test_a_formatter_makes_rows_of_a_known_layout(name: str, expected: list[Any]) -> None:
    assert made(ROW, formatter=f"my_formatters:{name}")[0] == expected


@pytest.mark.usefixtures("formatters")
def test_columns_are_renamed_after_the_formatter() -> None:
    assert made(ROW, formatter="my_formatters:mine", columns={"p": "prompt"})[0] == [("so", "no", None)]


@pytest.mark.usefixtures("formatters")
def test_columns_are_dropped_after_the_formatter() -> None:
    fields = {"formatter": "my_formatters:scored", "drop_columns": ["scores"]}
    with pytest.raises(DataError, match="unknown layout; columns: prompt, responses; needed"):
        made(ROW, **fields)


@pytest.mark.usefixtures("formatters")
def test_a_formatter_leaves_rows_out() -> None:
    mine = recipe(formatter="my_formatters:only_short")
    mine.layout = find_layout(mine.rows(ROW), "auto")
    with pytest.raises(LeftOut, match=r"data\.formatter returned nothing"):
        mine.pairs(ROW | {"q": "why, oh why"})
    assert format_row(ROW, load_formatter("my_formatters:nothing")) == []
    for name in ("only_short", "nothing"):
        with pytest.raises(DataError, match=r"^`data`: none of the first rows can be used; data\.formatter leaves out"):
            made(ROW | {"q": "why, oh why"}, formatter=f"my_formatters:{name}")


@pytest.mark.usefixtures("formatters")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("text", "returned 'why'; expected a row (dict), a list of rows or None"),
        ("texts", "; expected a row (dict), a list of rows or None"),
        ("fails", "ValueError: no such thing"),
        ("misses", "KeyError: 'nowhere'"),
    ],
)
def test_a_formatter_that_fails_costs_the_row(name: str, problem: str) -> None:
    with pytest.raises(RowError) as caught:
        recipe(formatter=f"my_formatters:{name}").rows(ROW)
    assert caught.value.reason == "data.formatter failed"
    assert problem in caught.value.detail and "\n" not in str(caught.value)


@pytest.mark.usefixtures("formatters")
def test_a_formatter_that_makes_no_known_layout() -> None:
    with pytest.raises(DataError, match="unknown layout; columns: 1; needed are"):
        made(ROW, formatter="my_formatters:numbered")


@pytest.mark.usefixtures("formatters")
@pytest.mark.parametrize(
    ("name", "problem"),
    [
        (
            "my_formaters:keep",
            "ModuleNotFoundError: No module named 'my_formaters'; name it as package.module:function",
        ),
        ("my_formatters:kep", "AttributeError: module 'my_formatters' has no attribute 'kep'"),
        ("my_formatters:constant", "is not a function"),
        ("my_broken_formatters:f", "SyntaxError: "),
        ("my_failing_formatters:f", "RuntimeError: not today"),
        ("os:system", "is in Python's standard library; name your own function"),
        ("builtins:eval", "is in Python's standard library"),
        ("os.path:join", "is in Python's standard library"),
    ],
)
def test_a_formatter_that_is_not_there(name: str, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        recipe(formatter=name)
    assert str(caught.value).startswith(f"`data.formatter={name}`: ") and problem in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("row", "layouts"),
    [
        # as in argilla/distilabel-intel-orca-dpo-pairs: the pair, and the answers it was chosen from
        (
            {"input": "q", "chosen": "a", "rejected": "b", "generations": ["a", "b"], "rating": [9, 3]},
            ["orca", "scored"],
        ),
        (
            {"instruction": "q", "chosen": "a", "rejected": "b", "generations": ["a", "b"], "ratings": [5, 1]},
            ["alpaca", "scored"],
        ),
        ({"prompt": "p", "question": "q", "chosen": "a", "rejected": "b"}, ["preference", "orca"]),
        ({"prompt": "p", "instruction": "q", "chosen": "a", "rejected": "b"}, ["preference", "alpaca"]),
        ({"instruction": "p", "question": "q", "chosen": "a", "rejected": "b"}, ["alpaca", "orca"]),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "responses": ["a", "b"], "scores": [1, 0]},
            ["preference", "scored"],
        ),
        (
            {"instruction": "q", "output": ["a", "b"], "responses": ["a", "b"], "scores": [1, 0]},
            ["alpaca", "scored"],
        ),
        (
            {"prompt": "q", "response": "a", "helpfulness": 4, "chosen": "a", "rejected": "b"},
            ["preference", "helpsteer"],
        ),
    ],
)
def test_what_could_be_two_layouts_is_an_error(row: dict[str, Any], layouts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        find_layout([row], "auto", "data.sources.mine", "data.sources.mine.path=a.csv")
    message = str(caught.value)
    needs = {layout.name: layout.needs for layout in LAYOUTS}
    assert message == (
        "`data.sources.mine.format=auto`: the rows of data.sources.mine.path=a.csv could be "
        + ", ".join(f"{name} ({needs[name]})" for name in layouts)
        + f"; set data.sources.mine.format={layouts[0]} or another of them"
    )
    for name in layouts:
        assert find_layout([row], name).name == name


def test_most_rows_decide() -> None:
    odd = {"input": "q", "chosen": "a", "rejected": "b"}
    both = odd | {"generations": ["a", "b"], "rating": [9, 3]}
    assert find_layout([odd, both, {"broken": 1}], "auto").name == "orca"
    assert find_layout([{"broken": 1}, {"other": 2}, both | {"rating": None}], "auto").name == "orca"


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"q": "why", "a": "so"}, "q, a"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "prompt, chosen"),
        ({"chosen": "a", "rejected": "b"}, "chosen, rejected"),
        ({"prompt": "q", "completion": "a", "label": "positive"}, "prompt, completion, label"),
        ({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]}, "prompt, completions, labels"),
        ({"messages": [user("q"), bot("a")]}, "messages"),
        ({}, "nothing"),
        # a table without header: its first row is read as the header
        ({"What is\n1 plus 1?": "q", "It is " + "very " * 99: "a"}, f"'What is\\n1 plus 1?', It is {'very ' * 6}very"),
        ({f"c{n}": n for n in range(99)}, ", ".join(f"c{n}" for n in range(25)) + ", …"),
        ({"half \ud83d": 1}, "'half \\ud83d'"),
        ({"prompt": "q", " good": "a", "bad\t": "b"}, "prompt, ' good', 'bad\\t'"),
    ],
)
def test_an_unknown_layout_names_the_columns(row: dict[str, Any], columns: str) -> None:
    with pytest.raises(DataError) as caught:
        find_layout([row], "auto", "data.sources.mine", "data.sources.mine.path=a.csv")
    assert str(caught.value) == (
        f"`data.sources.mine.path=a.csv`: unknown layout; columns: {columns}; needed are prompt, chosen "
        "and rejected (or another layout of docs/data.md); name yours with data.sources.mine.columns or "
        "data.sources.mine.formatter"
    )


@pytest.mark.parametrize(("name", "needs"), [(layout.name, layout.needs) for layout in LAYOUTS])
def test_a_layout_that_is_named_must_fit(name: str, needs: str) -> None:
    with pytest.raises(DataError) as caught:
        find_layout([{"q": "why"}, {"a": "so", "b": None}], name)
    assert str(caught.value) == f"`data.format={name}`: needs {needs}; the rows of data have: q, a"


def test_a_transcript_is_never_taken_for_a_text() -> None:
    transcript = f"{HUMAN}{ASSISTANT} so"
    row = {"prompt": WHY, "chosen": transcript, "rejected": f"{HUMAN}{ASSISTANT} no"}
    with pytest.raises(RowError, match=r"not a transcript: `prompt` must begin with \\n\\nHuman:"):
        read(row)
    with pytest.raises(DataError, match=r"`data\.format=preference`: needs prompt, chosen, rejected: texts"):
        read(row, name="preference")

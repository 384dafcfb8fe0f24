"""The known layouts of preference rows: how each is detected and converted to pairs."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dpo_runner.data.layouts.columns import (
    PROMPTS,
    SCORE_PAIRS,
    Row,
    find_scores,
    first,
    has,
    name_columns,
    read_answers,
    read_history,
    require,
    with_history,
    with_system,
)
from dpo_runner.data.layouts.conversations import is_alike, split_conversations
from dpo_runner.data.layouts.messages import ALIASES, Message, Pair, to_messages
from dpo_runner.data.layouts.scored import is_kto, is_scored, read_helpsteer, read_kto, read_scored
from dpo_runner.data.layouts.spelling import respell
from dpo_runner.data.layouts.transcripts import (
    is_transcript,
    is_unstripped,
    parse_prompt,
    parse_transcript,
    read_prompt,
    unfold_answer,
)
from dpo_runner.errors import RowError


@dataclass(frozen=True)
class Layout:
    """A layout of preference rows.

    Attributes:
        name: value of `data.format`.
        needs: the required columns, in words.
        matches: returns whether a row has this layout.
        read: returns a row's pairs, given `data.pairing`.
        grouped: whether adjacent rows with one prompt become one row, by `group_responses`.
        spelling: names of a source's columns that differ from ours in spelling alone, theirs to ours.
    """

    name: str
    needs: str
    matches: Callable[[Row], bool]
    read: Callable[[Row, str], list[Pair]]
    grouped: bool = False
    spelling: dict[str, str] = field(default_factory=dict)

    def respell(self, row: Row) -> Row:
        """Return a row with its columns under our names."""
        return respell(row, self.spelling)

    def describe(self, row: Row) -> str:
        """Return the name, with the variant that `row` has and the columns that were respelled."""
        kind = self._describe_kind(self.respell(row))
        names = ", ".join(f"{name_columns([theirs])} as {ours}" for theirs, ours in self.spelling.items())
        return f"{kind}; reads {names}" if names else kind

    def _describe_kind(self, row: Row) -> str:
        if self.name != "preference":
            return self.name
        texts = all(isinstance(row.get(key) or "", str) for key in ("prompt", "chosen", "rejected"))
        kind = "texts" if texts else "messages"
        parts = [kind, "implicit prompt"] if row.get("prompt") is None else [kind]
        parts += ["scores"] if any(has(row, *columns) for columns in SCORE_PAIRS) else []
        return f"preference ({', '.join(parts)})"


def _read_preference(row: Row, pairing: str) -> list[Pair]:
    return [_read_pair(row, chosen, rejected) for chosen, rejected in read_answers(row, pairing)]


def _read_pair(row: Row, chosen: list[Message], rejected: list[Message]) -> Pair:
    prompt = row.get("prompt")
    if all(answer[0]["role"] in ("assistant", "tool") for answer in (chosen, rejected)):
        require(row, "prompt")
        messages = with_history(row, to_messages(prompt, "user", "prompt"))
        return _pair(row, messages, chosen, rejected)
    shared, chosen, rejected = split_conversations(chosen, rejected)
    if prompt is not None and not _is_same_prompt(prompt, shared):
        raise RowError("two different prompts", "`prompt` differs from the beginning of `chosen`; give one of them")
    return _pair(row, shared, chosen, rejected)


def _pair(row: Row, prompt: list[Message], chosen: list[Message], rejected: list[Message]) -> Pair:
    return Pair([*with_system(row, prompt)], chosen, rejected, score_gap=find_scores(row))


def _is_same_prompt(prompt: Any, shared: list[Message]) -> bool:
    """Return whether an explicit prompt equals the shared turns, or is a text of one user turn or around the last."""
    messages = to_messages(prompt, "user", "prompt")
    if not isinstance(prompt, str) or messages != [{"role": "user", "content": prompt}]:
        return is_alike(messages, shared)
    questions = [content for message in shared if message["role"] == "user" if (content := message["content"].strip())]
    if not questions or prompt.strip() in questions:
        return bool(questions)
    # a prompt that is already rendered, or has an instruction beside the question; not a part of a longer word
    return re.search(rf"(?<!\w){re.escape(questions[-1])}(?!\w)", prompt) is not None


def _read_hh(row: Row, pairing: str) -> list[Pair]:
    require(row, "chosen", "rejected")
    if row.get("prompt") is None:
        both = (parse_transcript(row[column], column) for column in ("chosen", "rejected"))
        return [_pair(row, *split_conversations(*both))]
    prompt = parse_prompt(row["prompt"], "prompt")
    return [
        _pair(row, prompt, unfold_answer(chosen, prompt, "chosen"), unfold_answer(rejected, prompt, "rejected"))
        for chosen, rejected in read_answers(row, pairing)
    ]


def _read_sharegpt(row: Row, pairing: str) -> list[Pair]:
    column = first(row, ("conversations", "messages")) or "conversations"
    require(row, column, "chosen", "rejected")
    prompt = to_messages(row[column], "user", column)
    pairs = []
    for chosen, rejected in read_answers(row, pairing):
        ends_with_it = len(prompt) > len(chosen) and is_alike(prompt[-len(chosen) :], chosen)
        pairs.append(_pair(row, prompt[: -len(chosen)] if ends_with_it else prompt, chosen, rejected))
    return pairs


def _read_swift(row: Row, pairing: str) -> list[Pair]:
    require(row, "messages")
    messages = to_messages(row["messages"], "user", "messages")
    if has(row, "rejected_messages"):
        rejected = to_messages(row["rejected_messages"], "user", "rejected_messages")
        return [_pair(row, *split_conversations(messages, rejected))]
    require(row, "rejected_response")
    answers = read_answers({"chosen": [messages[-1]], "rejected": row["rejected_response"]}, pairing)
    return [_pair(row, messages[:-1] or messages, chosen, rejected) for chosen, rejected in answers]


def _read_alpaca(row: Row, pairing: str) -> list[Pair]:
    require(row, "instruction")
    answers = row.get("output")
    if isinstance(answers, list):
        if len(answers) != 2:
            raise RowError("not two answers", f"`output` holds {len(answers)}; expected chosen and rejected")
        row = row | {"chosen": answers[0], "rejected": answers[1]}
    require(row, "chosen", "rejected")
    prompt = read_history(row)
    texts = [row["instruction"], row.get("input")]
    if not all(text is None or isinstance(text, str) for text in texts):
        raise RowError("not a text", f"`instruction` and `input` must be texts; got {texts!r:.80}")
    prompt.append({"role": "user", "content": "\n".join(text for text in texts if text)})
    return [_pair(row, prompt, chosen, rejected) for chosen, rejected in read_answers(row, pairing)]


def _read_orca(row: Row, pairing: str) -> list[Pair]:
    question = first(row, ("question", "input")) or "question"
    require(row, question, "chosen", "rejected")
    prompt = with_history(row, read_prompt(row[question], question))
    return [_pair(row, prompt, chosen, rejected) for chosen, rejected in read_answers(row, pairing)]


def _is_pair(row: Row) -> bool:
    return has(row, "chosen", "rejected") and not has(row, "conversations")


def _is_pair_of_transcripts(row: Row) -> bool:
    """Return whether a row holds transcripts; without leading line breaks, in the prompt or in both answers."""
    if not _is_pair(row) or _is_conversation(row["chosen"]):
        return False
    prompt, answers = row.get("prompt"), [row["chosen"], row["rejected"]]
    return is_transcript(prompt) or is_unstripped(answers[0]) or (prompt is None and all(map(is_transcript, answers)))


def _is_pair_of_answers(row: Row) -> bool:
    return _is_pair(row) and not _is_conversation(row["chosen"])


def _is_conversation(value: Any) -> bool:
    """Return whether a value is a list of messages that does not begin with an assistant turn."""
    begin = value[0] if isinstance(value, list) and value else None
    role = (begin.get("role") or begin.get("from")) if isinstance(begin, dict) else "assistant"
    return not isinstance(role, str) or ALIASES.get(role.lower()) != "assistant"


def _is_sharegpt(row: Row) -> bool:
    if has(row, "conversations", "chosen", "rejected"):
        return True
    alone = first(row, PROMPTS) is None and not _is_conversation(row.get("chosen"))
    return alone and has(row, "messages", "chosen", "rejected")


def _is_swift(row: Row) -> bool:
    return (
        has(row, "messages")
        and first(row, ("rejected_response", "rejected_messages")) is not None
        and first(row, ("chosen", "chosen_response")) is None
    )


LAYOUTS = (
    Layout(
        "preference",
        "prompt, chosen, rejected: texts or messages; without prompt, chosen and rejected hold the conversation",
        lambda row: (
            _is_pair(row)
            and not _is_pair_of_transcripts(row)
            and (has(row, "prompt") or _is_conversation(row["chosen"]))
        ),
        _read_preference,
    ),
    Layout(
        "hh",
        "chosen, rejected: transcripts of \\n\\nHuman: and \\n\\nAssistant: turns; or answers to a prompt that is one",
        _is_pair_of_transcripts,
        _read_hh,
    ),
    Layout(
        "sharegpt",
        "conversations (or messages), chosen, rejected: messages of from and value",
        _is_sharegpt,
        _read_sharegpt,
    ),
    Layout(
        "swift",
        "messages that end with the chosen answer, and rejected_response or rejected_messages",
        _is_swift,
        _read_swift,
    ),
    Layout(
        "alpaca",
        "instruction, with chosen and rejected or an output of two; perhaps input, system, history",
        lambda row: has(row, "instruction") and (_is_pair_of_answers(row) or isinstance(row.get("output"), list)),
        _read_alpaca,
    ),
    Layout(
        "orca",
        "question or input, chosen, rejected; perhaps system",
        lambda row: (
            _is_pair_of_answers(row) and (has(row, "question") or (has(row, "input") and not has(row, "instruction")))
        ),
        _read_orca,
    ),
    Layout("scored", "a prompt, a list of responses and a list of scores", is_scored, read_scored),
    Layout(
        "helpsteer",
        "prompt, response, helpfulness, a row per response; or context, response1, response2, overall_preference",
        lambda row: (
            (has(row, "prompt", "response") and (has(row, "helpfulness") or has(row, "score")))
            or has(row, "context", "response1", "response2", "overall_preference")
        ),
        read_helpsteer,
        grouped=True,
    ),
    Layout(
        "kto",
        "prompt, completion, label: a row per answer, label true for a good one; rows of one prompt adjacent",
        is_kto,
        read_kto,
        grouped=True,
    ),
)

"""Answers to the questions of AlpacaEval 2, MT-Bench and Arena-Hard, in the files that their judges read."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_runner.config.sections.benchmarks import BenchmarksConf
from dpo_runner.errors import ConfigError, reason_of
from dpo_runner.evaluate.scoring import Compared
from dpo_runner.evaluate.work import Task, remaining_batches
from dpo_runner.io.files import JsonLines, write_json, write_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SIDES = ("policy", "reference")


@dataclass(frozen=True)
class Questions:
    """A project's questions.

    Attributes:
        records: the rows of its file.
        turns: the user's turns of each.
        digest: of the file.
    """

    records: list[dict[str, Any]]
    turns: list[list[str]]
    digest: str


def read_questions(conf: BenchmarksConf) -> Questions:
    """Read `benchmarks.questions`: a JSON list, or JSON Lines.

    Raises:
        ConfigError: the file cannot be read, or is not of the project that `benchmarks.answers` names.
    """
    assert conf.questions is not None and conf.answers is not None
    where = f"`benchmarks.questions={conf.questions}`"
    try:
        text = Path(conf.questions).expanduser().read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip()]
        records = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{where}: cannot be read; {reason_of(error)}") from None
    turns = []
    for number, record in enumerate(records, 1):
        try:
            turns.append(_READERS[conf.answers](record))
            assert all(isinstance(turn, str) for turn in turns[-1]) and turns[-1]
        except (KeyError, TypeError, AssertionError):
            needs = _NEEDED[conf.answers]
            raise ConfigError(f"{where}: row {number} is not of {conf.answers}, whose rows have {needs}") from None
    if not records:
        raise ConfigError(f"{where}: has no questions")
    return Questions(records, turns, hashlib.sha256(text.encode()).hexdigest()[:8])


_READERS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "alpaca_eval": lambda record: [record["instruction"]],
    "mt_bench": lambda record: list(record["turns"]) if record["question_id"] is not None else [],
    "arena_hard": lambda record: [record["prompt"]] if record["uid"] is not None else [],
}
_NEEDED = {"alpaca_eval": "instruction", "mt_bench": "question_id and turns", "arena_hard": "uid and prompt"}


def write_answers(
    compared: Compared,
    task: Task,
    tokenizer: "PreTrainedTokenizerBase",
    questions: Questions,
    progress: Callable[[int], None],
) -> dict[str, Any]:
    """Answer each question greedily with policy and reference, turn by turn, and write a file for each.

    Returns:
        The project, the digest of its questions, and the files.
    """
    project = str(task.conf.benchmarks.answers)
    done = JsonLines(task.folder / f"{project}-{questions.digest}.jsonl")
    size = task.conf.training.per_device_eval_batch_size
    for start in remaining_batches(done, len(questions.turns), size, progress):
        batch = questions.turns[start : start + size]
        answers = {"policy": _answer(compared.policy, task, tokenizer, batch)}
        with compared.reference() as model:
            answers["reference"] = _answer(model, task, tokenizer, batch)
        done.append([{side: answers[side][index] for side in _SIDES} for index in range(len(batch))])
        progress(len(batch))
    files = []
    for side in _SIDES:
        name = task.conf.run_name + ("-reference" if side == "reference" else "")
        path = task.folder / project / f"{name}.json{'' if project == 'alpaca_eval' else 'l'}"
        path.parent.mkdir(exist_ok=True)
        rows = [
            _WRITERS[project](record, turns, answer[side], name)
            for record, turns, answer in zip(questions.records, questions.turns, done.records, strict=True)
        ]
        if project == "alpaca_eval":
            write_json(path, rows)
        else:
            write_lines(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        files.append(str(path.relative_to(task.folder)))
    return {"project": project, "questions": questions.digest, "files": files}


def _answer(
    model: Any, task: Task, tokenizer: "PreTrainedTokenizerBase", questions: Sequence[list[str]]
) -> list[list[dict[str, Any]]]:
    """Return each question's answers, one for each turn, with their numbers of tokens."""
    from dpo_runner.data.prompts import SamplePrompt
    from dpo_runner.data.templates.chat_template import ChatTemplate
    from dpo_runner.training.answers.measuring import generate_answers

    data, length = task.conf.data, task.conf.samples.max_new_tokens
    template = ChatTemplate(tokenizer, data.system_prompt, data.on_no_system_role)
    told: list[list[dict[str, Any]]] = [[] for _ in questions]
    for turn in range(max(map(len, questions))):
        open_ones = [number for number, turns in enumerate(questions) if len(turns) > turn]
        prompts = []
        for number in open_ones:
            messages = []
            for asked, answer in zip(questions[number], told[number], strict=False):
                messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer["text"]}]
            messages.append({"role": "user", "content": questions[number][turn]})
            prompts.append(SamplePrompt(messages, template.render_prompt(messages)))
        answers = generate_answers(model, tokenizer, prompts, length, len(prompts), task.data.stop_id)
        for number, answer in zip(open_ones, answers, strict=True):
            told[number].append({"text": answer["text"], "tokens": answer["tokens"]})
    return told


def _identify(*parts: Any) -> str:
    """Return an id for an answer, the same for the same one."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:22]


def _to_alpaca_eval(record: dict[str, Any], turns: list[str], answers: list[Any], name: str) -> dict[str, Any]:
    return {**record, "output": answers[0]["text"], "generator": name}


def _to_mt_bench(record: dict[str, Any], turns: list[str], answers: list[Any], name: str) -> dict[str, Any]:
    texts = [answer["text"] for answer in answers]
    return {
        "question_id": record["question_id"],
        "answer_id": _identify(name, record["question_id"], texts),
        "model_id": name,
        "choices": [{"index": 0, "turns": texts}],
        "tstamp": time.time(),
    }


def _to_arena_hard(record: dict[str, Any], turns: list[str], answers: list[Any], name: str) -> dict[str, Any]:
    answer = answers[0]
    return {
        "uid": record["uid"],
        "ans_id": _identify(name, record["uid"], answer["text"]),
        "model": name,
        "messages": [
            {"role": "user", "content": turns[0]},
            {"role": "assistant", "content": {"answer": answer["text"]}},
        ],
        "tstamp": time.time(),
        "metadata": {"token_len": answer["tokens"]},
    }


_WRITERS: dict[str, Callable[[dict[str, Any], list[str], list[Any], str], dict[str, Any]]] = {
    "alpaca_eval": _to_alpaca_eval,
    "mt_bench": _to_mt_bench,
    "arena_hard": _to_arena_hard,
}

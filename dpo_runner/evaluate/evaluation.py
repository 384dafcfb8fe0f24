"""Evaluate a finished run against its reference: `python -m dpo_runner.evaluate RUN_DIR [KEY=VALUE ...]`."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape

from dpo_runner.config.metrics import METRICS, describe_difference, label_of, list_benchmarks
from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import ConfigError
from dpo_runner.evaluate.answers import Questions, read_questions, write_answers
from dpo_runner.evaluate.benchmarks import check_gate, describe_benchmarks, score_benchmarks
from dpo_runner.evaluate.intervals import summarize_pairs, summarize_samples
from dpo_runner.evaluate.judge import judge_answers, name_judge, summarize_verdicts
from dpo_runner.evaluate.rewards import score_answers
from dpo_runner.evaluate.scoring import Compared
from dpo_runner.evaluate.settings import compose, is_foreign
from dpo_runner.evaluate.work import Task, answer_prompts, load_compared, name_autocast, score_pairs
from dpo_runner.io.console import FoldingTable, RunConsole, count_progress, open_terminal, visible
from dpo_runner.io.files import JsonLines, write_json
from dpo_runner.training.answers.benchmarks.tasks import load_tasks
from dpo_runner.training.answers.rewards.reward import describe_reward
from dpo_runner.training.memory.device import BENCHMARKS, EVALUATION, watch_memory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_VERSION = 3  # part of a result's name: increase it if the same settings give other figures


def evaluate(
    run_dir: Path, overrides: Sequence[str] = (), console: Console | None = None, gate: bool = False
) -> dict[str, Any]:
    """Evaluate a finished run, or continue an evaluation that was stopped.

    Args:
        run_dir: the run's directory. Results are written to its evaluations/<name>/, with a digest of what is
            evaluated as <name>: evaluation.json, pairs.jsonl, answers.jsonl and, with a judge, verdicts.jsonl.
        overrides: overrides of the sections data, samples, judge, reward and benchmarks, and of a few keys of training.
        console: the output for progress and results; None for the terminal.
        gate: whether to check that no benchmark fell by more than benchmarks.max_drop, of the bundled ones if neither
            the run nor `overrides` name others.

    Returns:
        The content of evaluation.json.

    Raises:
        ConfigError: the run is not finished, or an override or the data cannot be used.
        RunError: the judge's endpoint refuses or cannot be reached, or the policy does not pass the gate.
    """
    from dpo_runner.io.logs import route_library_logs
    from dpo_runner.records.reading import check_finished, read_run_conf

    check_finished(run_dir)
    run = read_run_conf(run_dir)
    conf = compose(run, overrides)
    if gate and not conf.benchmarks.tasks:
        conf = compose(run, ["benchmarks=basics", *overrides])
    console = console or open_terminal(soft_wrap=True)
    with route_library_logs(None):
        task, tokenizer = _prepare(run_dir, conf, is_foreign(conf, run), console)
        target = task.folder / "evaluation.json"
        result: dict[str, Any] = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
        questions = read_questions(conf.benchmarks) if conf.benchmarks.answers else None
        if _is_finished(result, task, questions):
            console.print(escape(visible(f"{task.folder} is finished")))
        else:
            result = _measure(run_dir, task, tokenizer, questions, console)
            write_json(target, result)
        answers = JsonLines(task.folder / "answers.jsonl").records
        RunConsole(console).show_samples(answers[: conf.samples.show], ("reference", "policy"))
        show_result(result, console)
        for file in result.get("answers", {}).get("files", ()) if questions is not None else ():
            console.print(escape(visible(f"answers in {task.folder / file}")))
        console.print(escape(visible(f"results in {target}")))
    if gate:
        console.print(check_gate(result["benchmarks"], conf.benchmarks.max_drop))
    return result


def _is_finished(result: dict[str, Any], task: Task, questions: Questions | None) -> bool:
    """Return whether an evaluation's results have everything that is asked for."""
    conf = task.conf
    parts: list[tuple[str, str, Any]] = [
        ("judge", "name", name_judge(conf.judge) if conf.judge.base_url is not None else None),
        ("reward", "name", describe_reward(conf.reward) if task.data.prompts else None),
        ("benchmarks", "settings", describe_benchmarks(conf.benchmarks)),
        ("answers", "questions", None if questions is None else questions.digest),
    ]
    return bool(result) and all(not asked or result.get(part, {}).get(key) == asked for part, key, asked in parts)


def _prepare(run_dir: Path, conf: RunConf, foreign: bool, console: Console) -> "tuple[Task, PreTrainedTokenizerBase]":
    """Load tokenizer and data, and build the task, named by a digest of everything it depends on."""
    from dpo_runner.data.preferences import load_preferences
    from dpo_runner.model.blueprint import Blueprint

    blueprint = Blueprint.of_run(conf)
    tokenizer = blueprint.tokenizer
    data = load_preferences(conf, tokenizer, blueprint.template_origin, RunConsole(console).show_preparing)
    if data.eval is None and not foreign:
        raise ConfigError(
            "`data`: the run held out no evaluation pairs, and its training pairs would flatter it; name other data "
            "(data=local_file data.path=FILE)"
        )
    split, rows = ("train", data.train) if data.eval is None else ("eval", data.eval)
    limit = conf.data.max_eval_samples
    if limit is not None and len(rows) > limit:
        rows = rows.select(range(limit))
    depends_on = [
        *(_VERSION, (run_dir / "summary.json").read_text(encoding="utf-8"), data.fingerprint(split), len(rows)),
        *([prompt.ids for prompt in data.prompts], conf.samples.max_new_tokens, conf.training.beta, conf.seed),
        *(conf.training.max_length, conf.training.truncation_mode, name_autocast(conf)),
    ]
    name = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:12]
    return Task(conf, data, split, rows, run_dir / "evaluations" / name), tokenizer


def _measure(
    run_dir: Path, task: Task, tokenizer: "PreTrainedTokenizerBase", questions: Questions | None, console: Console
) -> dict[str, Any]:
    """Do the remaining work of an evaluation and summarize the results."""
    try:
        task.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{task.folder}: cannot be written to; {error.strerror}") from None
    pairs, answers = JsonLines(task.folder / "pairs.jsonl"), JsonLines(task.folder / "answers.jsonl")
    conf, prompts, further = task.conf, task.data.prompts, dict[str, Any]()
    if conf.benchmarks.tasks or questions or len(pairs.records) < len(task.rows) or len(answers.records) < len(prompts):
        with watch_memory(EVALUATION, advice=_advise_on_memory(conf)):
            compared = load_compared(run_dir, conf)
            with count_progress(console, "scoring pairs", len(task.rows)) as progress:
                score_pairs(compared, task, pairs, tokenizer.pad_token_id, progress)
            with count_progress(console, "answering prompts", len(prompts)) as progress:
                answer_prompts(compared, task, answers, tokenizer, progress)
            if conf.benchmarks.tasks:
                further["benchmarks"] = _score_benchmarks(compared, task, tokenizer, console)
            if questions is not None:
                with count_progress(console, "answering questions", len(questions.turns)) as progress:
                    further["answers"] = write_answers(compared, task, tokenizer, questions, progress)
    result = {
        "evaluated": task.describe(),
        **summarize_pairs(pairs.records, conf.training.beta, conf.seed),
        **summarize_samples(answers.records, conf.seed),
    }
    if conf.judge.base_url is not None:
        with count_progress(console, "judging answers", len(prompts)) as progress:
            done = JsonLines(task.folder / "verdicts.jsonl")
            verdicts = judge_answers(conf.judge, answers.records, done, progress)
        summary = summarize_verdicts(verdicts, answers.records, conf.seed)
        result["judge"] = {"name": name_judge(conf.judge), **summary}
    if describe_reward(conf.reward) and prompts:
        with count_progress(console, "scoring answers", 2 * len(prompts)) as progress:
            result["reward"] = score_answers(conf, answers.records, progress)
    return result | further


def _score_benchmarks(
    compared: Compared, task: Task, tokenizer: "PreTrainedTokenizerBase", console: Console
) -> dict[str, Any]:
    conf = task.conf.benchmarks
    count = 2 * len(load_tasks(conf).tasks)
    advice = f"try benchmarks.batch_size={max(conf.batch_size // 2, 1)}"
    watching, bar = watch_memory(BENCHMARKS, advice=advice), count_progress(console, "scoring benchmarks", count)
    with watching, bar as progress:
        return score_benchmarks(compared, tokenizer, task.data.stop_id, conf, progress)


def _advise_on_memory(conf: RunConf) -> str:
    size, length = conf.training.per_device_eval_batch_size, conf.samples.max_new_tokens
    ways = [f"training.per_device_eval_batch_size={size // 2}"] if size > 1 else []
    return f"try {', or '.join([*ways, f'samples.max_new_tokens={max(length // 2, 1)}'])}; what is done stays done"


def _show_benchmarks(benchmarks: dict[str, Any], console: Console) -> None:
    policy, reference = benchmarks["policy"], benchmarks["reference"]
    table = FoldingTable("benchmark", "reference", "policy", "difference, 95 % interval")
    for name in list_benchmarks(policy):
        values = [f"{side[name]:.4g}" if name in side else "" for side in (reference, policy)]
        table.add_row(escape(label_of(name)), *values, describe_difference(name, policy))
    console.print(table)


def show_result(result: dict[str, Any], console: Console) -> None:
    """Print the content of evaluation.json as a table."""
    evaluated, judge, reward = result["evaluated"], result.get("judge", {}), result.get("reward", {})
    which = "all pairs" if evaluated["split"] == "all" else "evaluation pairs"
    title = f"{evaluated['pairs']:,} {which} of {', '.join(evaluated['data'])}"
    table = FoldingTable("", title=escape(visible(title)), title_justify="left")
    table.add_column("estimate", justify="right")
    table.add_column("95 % interval", justify="right")
    for metric in METRICS:
        key, label = metric.key.removeprefix("evaluation/"), metric.label
        estimate = result.get(key) or judge.get(key) or reward.get(key)
        if estimate is not None:
            known = estimate["low"] is not None
            bounds = f"{estimate['low']:.4g} to {estimate['high']:.4g}" if known else "one prompt: none"
            table.add_row(label, f"{estimate['mean']:.4g}", bounds)
    console.print(table)
    if "benchmarks" in result:
        _show_benchmarks(result["benchmarks"], console)
    if judge:
        counts = f"{judge['judged']} pairs of answers judged, {judge['ties']} ties, {judge['unparsable']} unparsable"
        text = f"judge {judge['name']['model']}: {counts}" + (f"; {judge['note']}" if "note" in judge else "")
        console.print(escape(visible(text)))

"""Evaluate a finished run against its reference: `python -m dpo_runner.evaluate RUN_DIR [KEY=VALUE ...]`."""

import argparse
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from dpo_runner.artifacts import write_json
from dpo_runner.config import RunConf, config_keys, load_conf
from dpo_runner.config_files import SCHEMA, ConfigFiles, schema_key
from dpo_runner.console import RunConsole, visible
from dpo_runner.data_config import resolve_sources
from dpo_runner.errors import ConfigError, DpoRunnerError
from dpo_runner.judge import check_judge, judge_answers, name_judge, summarize_verdicts
from dpo_runner.measures import (
    Compared,
    JsonLines,
    derive_seed,
    sample_completions,
    score_completions,
    summarize_pairs,
    summarize_samples,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from dpo_runner.data import PreferenceData

SECTIONS = ("data", "samples", "judge")
TRAINING_KEYS = ("training.max_length", "training.per_device_eval_batch_size")
ALLOWED = "data.…, samples.…, judge.…, " + ", ".join(TRAINING_KEYS)
_LOCATION = ("path", "eval_path", "subset", "revision", "split", "eval_split")
_VERSION = 1  # part of a result's name: raise it where the same settings begin to give other figures

_ROWS = (
    ("reward_accuracy", "reward accuracy"),
    ("reward_margin", "reward margin"),
    ("chosen_shift", "log-prob shift, chosen (nats)"),
    ("rejected_shift", "log-prob shift, rejected (nats)"),
    ("kl_per_answer", "KL to the reference (nats per answer)"),
    ("kl_per_token", "KL to the reference (nats per token)"),
    ("policy_tokens", "tokens per answer, policy"),
    ("policy_cut_off", "share of answers cut off, policy"),
    ("reference_tokens", "tokens per answer, reference"),
    ("reference_cut_off", "share of answers cut off, reference"),
    ("win_rate", "win rate"),
    ("length_controlled_win_rate", "win rate, length-controlled"),
)


@dataclass
class Task:
    """What is evaluated.

    Attributes:
        conf: the run's configuration with the evaluation's own settings.
        data: the preference data, of which `split` is evaluated.
        rows: the pairs, with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        folder: where the results are written.
    """

    conf: RunConf
    data: "PreferenceData"
    split: str
    rows: "Dataset"
    folder: Path

    def describe(self) -> dict[str, Any]:
        """Return what an evaluation depends on, for evaluation.json."""
        return {
            "data": [str(source.path) for source in resolve_sources(self.conf.data).values()],
            "split": self.split if self.split == "eval" else "all",
            "pairs": len(self.rows),
            "prompts_answered": len(self.data.prompts),
            "max_new_tokens": self.conf.samples.max_new_tokens,
            "beta": self.conf.training.beta,
            "seed": self.conf.seed,
        }


def compose(run: RunConf, overrides: Sequence[str]) -> RunConf:
    """Return a run's configuration with an evaluation's overrides, checked as a run's own are.

    An option of the `data` group replaces the run's data section; anything else is set on top of it. Of data that the
    run did not have all pairs are evaluated: eval_fraction and max_train_samples count only where they are set here.

    Args:
        run: the run's own configuration.
        overrides: as on the command line.

    Raises:
        ConfigError: with a line for each mistake, such as a key that an evaluation cannot change.
    """
    keys = [re.split("=", text.lstrip("+~"), maxsplit=1)[0].partition("@")[0] for text in overrides]
    groups = ConfigFiles.over(None).groups()
    refused = [
        f"`{text}`: is the run's own and cannot be changed for an evaluation; these can: {ALLOWED}"
        for text, key in zip(overrides, keys, strict=True)
        if (key in groups or schema_key(key) in SCHEMA)
        and key.partition(".")[0] not in SECTIONS
        and key not in TRAINING_KEYS
    ]
    if refused:
        raise ConfigError(refused)
    base = config_keys(run)
    # An evaluation trains nothing, so the rules of evaluating and saving during training do not apply.
    base["training"] |= {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False}
    if "data" in keys:
        del base["data"]
    with tempfile.TemporaryDirectory() as folder:
        # as an experiment, the run's settings stand over the defaults and beneath the overrides
        (Path(folder) / "experiment").mkdir()
        text = "# @package _global_\n" + yaml.safe_dump(base, sort_keys=False, allow_unicode=True)
        (Path(folder) / "experiment" / "evaluated_run.yaml").write_text(text, encoding="utf-8")
        conf = load_conf(["experiment=evaluated_run", *overrides], folder)
    if _is_foreign(conf, run):
        if "data.eval_fraction" not in keys:
            conf.data.eval_fraction = 0.0
        if "data.max_train_samples" not in keys:
            conf.data.max_train_samples = None
    if conf.judge.base_url is not None:
        check_judge(conf.judge)
        if conf.samples.num_prompts == 0:
            raise ConfigError("`samples.num_prompts=0`: leaves judge.base_url nothing to judge; must be above 0")
    elif any(key.startswith("judge.") and key != "judge.base_url" for key in keys):
        raise ConfigError("`judge`: has no effect without an endpoint; set judge.base_url, or leave the others out")
    return conf


def _is_foreign(conf: RunConf, run: RunConf) -> bool:
    """Whether the data are others than those that the run was trained and evaluated on."""

    def locations(conf: RunConf) -> list[list[Any]]:
        return [[getattr(source, key) for key in _LOCATION] for source in resolve_sources(conf.data).values()]

    return locations(conf) != locations(run)


def evaluate(run_dir: Path, overrides: Sequence[str] = (), console: Console | None = None) -> dict[str, Any]:
    """Evaluate a finished run, or go on where an earlier call was stopped.

    Args:
        run_dir: the run's directory; results go into its evaluations/<name>/, where <name> is a digest of what is
            evaluated: evaluation.json, pairs.jsonl, answers.jsonl and, with a judge, verdicts.jsonl.
        overrides: of the sections data, samples and judge, and of a few keys of training.
        console: where progress and results are shown.

    Returns:
        What evaluation.json holds.

    Raises:
        ConfigError: there is no finished run, or an override or the data cannot be used.
        RunError: the judge's endpoint refuses, or is not there.
    """
    from dpo_runner.logs import quiet_imports
    from dpo_runner.tuned import check_finished, read_run_conf

    check_finished(run_dir)
    run = read_run_conf(run_dir)
    conf = compose(run, overrides)
    with quiet_imports():
        from dpo_runner.logs import route_library_logs

    console = console or Console(highlight=False, soft_wrap=True)
    with route_library_logs(None):
        task, tokenizer = _prepare(run_dir, conf, _is_foreign(conf, run), console)
        target = task.folder / "evaluation.json"
        result: dict[str, Any] = json.loads(target.read_text(encoding="utf-8")) if target.exists() else {}
        judge = name_judge(conf.judge) if conf.judge.base_url is not None else None
        finished = bool(result) and (judge is None or result.get("judge", {}).get("name") == judge)
        if finished:
            console.print(escape(visible(f"{task.folder} is finished")))
        else:
            result = _measure(run_dir, task, tokenizer, console)
            write_json(target, result)
        answers = JsonLines(task.folder / "answers.jsonl").records
        RunConsole(console).show_samples(answers[: conf.samples.show])
        show_result(result, console)
        console.print(escape(visible(f"results in {target}")))
    return result


def _prepare(run_dir: Path, conf: RunConf, foreign: bool, console: Console) -> "tuple[Task, PreTrainedTokenizerBase]":
    """Load tokenizer and data, and name the evaluation after what it depends on."""
    from dpo_runner.data import load_preferences
    from dpo_runner.tokenizer import describe_chat_template, load_tokenizer

    tokenizer = load_tokenizer(conf.model)
    origin = describe_chat_template(conf.model, tokenizer)
    data = load_preferences(conf, tokenizer, origin, RunConsole(console).show_preparing)
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
        *(conf.training.max_length, conf.training.truncation_mode),
    ]
    name = hashlib.sha256(json.dumps(depends_on).encode()).hexdigest()[:12]
    return Task(conf, data, split, rows, run_dir / "evaluations" / name), tokenizer


def _measure(run_dir: Path, task: Task, tokenizer: "PreTrainedTokenizerBase", console: Console) -> dict[str, Any]:
    """Do what is left to do of an evaluation, and sum it up."""
    try:
        task.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{task.folder}: cannot be written to; {error.strerror}") from None
    pairs, answers = JsonLines(task.folder / "pairs.jsonl"), JsonLines(task.folder / "answers.jsonl")
    conf, prompts = task.conf, task.data.prompts
    if len(pairs.records) < len(task.rows) or len(answers.records) < len(prompts):
        compared = load_compared(run_dir, conf)
        with _bar(console, "scoring pairs", len(task.rows)) as progress:
            score_pairs(compared, task, pairs, tokenizer.pad_token_id, progress)
        with _bar(console, "answering prompts", len(prompts)) as progress:
            answer_prompts(compared, task, answers, tokenizer, progress)
    result = {
        "evaluated": task.describe(),
        **summarize_pairs(pairs.records, conf.training.beta, conf.seed),
        **summarize_samples(answers.records, conf.seed),
    }
    if conf.judge.base_url is not None:
        with _bar(console, "judging answers", len(prompts)) as progress:
            done = JsonLines(task.folder / "verdicts.jsonl")
            verdicts = judge_answers(conf.judge, answers.records, done, progress)
        summary = summarize_verdicts(verdicts, answers.records, conf.seed)
        result["judge"] = {"name": name_judge(conf.judge), **summary}
    return result


@contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def load_compared(run_dir: Path, conf: RunConf) -> Compared:
    """Load a run's policy and reference, in evaluation mode, on the GPU where there is one.

    Raises:
        ConfigError: the run's reference was another model than the one that training started from.
    """
    if conf.model.reference != "initial":
        raise ConfigError(
            f"`model.reference={conf.model.reference}`: only runs whose reference is the model that training started "
            "from (initial) can be evaluated so far"
        )
    import torch

    from dpo_runner.allocator import keep_freed_memory
    from dpo_runner.model import load_base_model
    from dpo_runner.tuned import load_tuned_model

    keep_freed_memory()
    policy, base = load_tuned_model(run_dir)[0], None
    if (run_dir / "model").is_dir():
        model = conf.model
        # as training has it: all weights are trained in float32, whatever the checkpoint's own dtype
        base = load_base_model(replace(model, dtype="float32") if model.dtype == "auto" else model, None)[0].eval()
    if torch.cuda.is_available() and not conf.training.use_cpu and conf.quant is None:
        policy, base = policy.to("cuda"), base and base.to("cuda")
    return Compared(policy, base)


def score_pairs(compared: Compared, task: Task, done: JsonLines, pad_id: int, progress: Callable[[int], None]) -> None:
    """Score each pair with policy and reference, going on after the pairs in `done`."""
    size = task.conf.training.per_device_eval_batch_size
    for start in _batches(done, len(task.rows), size, progress):
        rows = [task.rows[index] for index in range(start, min(start + size, len(task.rows)))]
        completions = [
            _cut(row["prompt_ids"], row[f"{part}_ids"], task.conf) for row in rows for part in ("chosen", "rejected")
        ]
        policy = score_completions(compared.policy, completions, pad_id)
        with compared.reference() as model:
            reference = score_completions(model, completions, pad_id)
        scores = [
            {"tokens": len(completion), "policy_logp": tuned, "reference_logp": before}
            for (_, completion), tuned, before in zip(completions, policy, reference, strict=True)
        ]
        records = [
            {
                "pair": start + index,
                "where": task.data.locate(task.split, start + index),
                "prompt": hashlib.sha256(json.dumps(row["prompt_ids"]).encode()).hexdigest()[:16],
                "chosen": scores[2 * index],
                "rejected": scores[2 * index + 1],
            }
            for index, row in enumerate(rows)
        ]
        done.append(records)
        progress(len(records))


def _batches(done: JsonLines, total: int, size: int, progress: Callable[[int], None]) -> range:
    """Return where the batches begin that are left to do; one that a kill has cut in two is done again whole.

    A batch's rounding depends on its rows, and a resumed evaluation is to give the very same figures.
    """
    whole = len(done.records) if len(done.records) == total else len(done.records) // size * size
    if whole < len(done.records):
        done.keep(whole)
    progress(whole)
    return range(whole, total, size)


def _cut(prompt: list[int], completion: list[int], conf: RunConf) -> tuple[list[int], list[int]]:
    """Cut a pair that `data.on_overlong=trl` has left too long, as TRL's collator does in training."""
    limit, ids = conf.training.max_length, prompt + completion
    if limit is None or len(ids) <= limit:
        return prompt, completion
    if conf.training.truncation_mode == "keep_start":
        return prompt, completion[: limit - len(prompt)]
    kept = min(len(completion), limit - 1)  # the first token of all is not predicted from anything
    return ids[-limit : len(ids) - kept], completion[-kept:]


def answer_prompts(
    compared: Compared,
    task: Task,
    done: JsonLines,
    tokenizer: "PreTrainedTokenizerBase",
    progress: Callable[[int], None],
) -> None:
    """Let policy and reference answer each prompt greedily, and score a sample of the policy's with both."""
    from dpo_runner.samples import find_stop_ids, generate_answers

    conf, stop_id = task.conf, task.data.stop_id
    size, length, pad_id = conf.training.per_device_eval_batch_size, conf.samples.max_new_tokens, tokenizer.pad_token_id
    stop_ids = find_stop_ids(compared.policy, tokenizer, stop_id)
    for start in _batches(done, len(task.data.prompts), size, progress):
        prompts = task.data.prompts[start : start + size]
        ids = [prompt.ids for prompt in prompts]
        seeds = [derive_seed(conf.seed, start + index) for index in range(len(prompts))]
        policy = generate_answers(compared.policy, tokenizer, prompts, length, size, stop_id)
        samples = sample_completions(compared.policy, ids, seeds, length, stop_ids, pad_id)
        rows = list(zip(ids, samples, strict=True))
        policy_logps = score_completions(compared.policy, rows, pad_id)
        with compared.reference() as model:
            reference = generate_answers(model, tokenizer, prompts, length, size, stop_id)
            reference_logps = score_completions(model, rows, pad_id)
        records = [
            {
                "prompt": prompt.messages,
                "policy": policy[index],
                "reference": reference[index],
                "sample": {
                    "text": tokenizer.decode(samples[index], skip_special_tokens=True).strip(),
                    "tokens": len(samples[index]),
                    "complete": samples[index][-1] in stop_ids,
                    "policy_logp": policy_logps[index],
                    "reference_logp": reference_logps[index],
                },
            }
            for index, prompt in enumerate(prompts)
        ]
        done.append(records)
        progress(len(records))


def show_result(result: dict[str, Any], console: Console) -> None:
    """Print what evaluation.json holds as a table."""
    evaluated, judge = result["evaluated"], result.get("judge", {})
    which = "all pairs" if evaluated["split"] == "all" else "evaluation pairs"
    title = f"{evaluated['pairs']:,} {which} of {', '.join(evaluated['data'])}"
    table = Table("", title=escape(visible(title)), title_justify="left")
    table.add_column("estimate", justify="right")
    table.add_column("95 % interval", justify="right")
    for key, label in _ROWS:
        estimate = result.get(key) or judge.get(key)
        if estimate is not None:
            known = estimate["low"] is not None
            bounds = f"{estimate['low']:.4g} to {estimate['high']:.4g}" if known else "one prompt: none"
            table.add_row(label, f"{estimate['mean']:.4g}", bounds)
    console.print(table)
    if judge:
        counts = f"{judge['judged']} pairs of answers judged, {judge['ties']} ties, {judge['unparsable']} unparsable"
        text = f"judge {judge['name']['model']}: {counts}" + (f"; {judge['note']}" if "note" in judge else "")
        console.print(escape(visible(text)))


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exit codes: 0 done, 1 failed, 2 the configuration or data are of no use, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m dpo_runner.evaluate", description=__doc__, allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, help="a finished run's directory")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help=f"what to evaluate, and how: {ALLOWED}")
    args = parser.parse_args(argv)
    try:
        evaluate(args.run_dir, args.overrides)
    except DpoRunnerError as error:
        for line in error.mistakes if isinstance(error, ConfigError) else [str(error)]:
            print(f"error: {visible(line)}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from there", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

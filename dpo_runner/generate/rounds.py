"""Rounds of on-policy pairs: sample answers, score them, train on the pairs, measure, and again from the new policy.

prompts -> split -> plan | lock -> (answers -> run -> figures) x N -> the best round's result
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from dpo_runner.config.metrics import BENCHMARKS, OF_SAMPLES
from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.prompts import Prompts, read_file_of_prompts, read_split_prompts, write_prompts
from dpo_runner.errors import ConfigError, RunError, RunInterrupted
from dpo_runner.generate.generation import generate
from dpo_runner.generate.schedule import (
    ANSWERS_SCORED,
    HELD_OUT,
    PROMPTS,
    Round,
    choose_shared,
    name_group,
    plan_rounds,
)
from dpo_runner.io.console import RunConsole
from dpo_runner.io.files import JsonLines, lock, write_folder
from dpo_runner.model.card.facts import PROVENANCE
from dpo_runner.records.directory import RunDirectory, resolve_run_dir
from dpo_runner.records.reading import read_metrics, read_object
from dpo_runner.records.tracking import Tracker, track
from dpo_runner.train import run
from dpo_runner.training.answers.rewards.reward import build_reward
from dpo_runner.training.callbacks.stopping import Stopping
from dpo_runner.training.session import read_finished, recorded

_MEASURED = (*OF_SAMPLES, "eval_reward_ci95", "response_tokens")


def run_rounds(
    conf: RunConf, overrides: Sequence[str] = (), console: RunConsole | None = None, shared: Path | None = None
) -> dict[str, Any] | None:
    """Run `conf.rounds` rounds to their end, or continue the interrupted ones in the run directory.

    Args:
        conf: the configuration of all rounds; see `load_conf`.
        overrides: the overrides `conf` was composed from, recorded in overrides.yaml.
        console: progress output; the terminal by default.
        shared: folder for answers of the first round, which runs of the same model, prompts and reward share.

    Returns:
        The contents of summary.json, or None after `dry_run=true`: `rounds`, the figures of each round; `best_round`,
        whose result the run directory has; `before`, those before the first round; `after`, those of the best one.

    Raises:
        ConfigError: the configuration, the prompts, the model or the reward is unusable.
        RunError: a round failed.
        RunInterrupted: a signal came. The same command with run_dir set continues.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError(f"`rounds={conf.rounds}`: starts its processes itself; use launch.processes=N, no launcher")
    console, path = console or RunConsole(), resolve_run_dir(conf).absolute()
    if (summary := read_finished(path, conf, console)) is not None:
        return summary
    build_reward(conf.reward)  # refuses what cannot score before anything starts
    given = None if conf.samples.prompts is None else read_file_of_prompts(conf.samples.prompts)
    trained, held_out = read_split_prompts(conf.data, given)
    rounds = list(plan_rounds(conf, path, choose_shared(conf, trained, shared)))
    console.show_plan(_describe_plan(conf, trained, held_out, path))
    if conf.dry_run:
        generate(rounds[0].conf, console.console, trained)
        return None
    directory, stopping = RunDirectory(path), Stopping()
    with directory.claim(), recorded(directory, conf, overrides, console, stopping, _without_tracker(console)):
        _write_or_check(path / PROMPTS, trained)
        _write_or_check(path / HELD_OUT, held_out)
        done: list[dict[str, Any]] = []
        for one in rounds:
            console.say(f"round {len(done) + 1} of {len(rounds)}")
            done.append(_run_round(one, len(done) + 1, trained, overrides, console))
            if len(done) == len(rounds):
                break
            if conf.rounds_patience is not None and len(done) - _find_best(done) >= conf.rounds_patience:
                console.say(f"the held-out reward has not risen for {conf.rounds_patience} rounds: ending here")
                break
            _record(directory, conf, done, None, console)
        summary = _conclude(directory, conf, rounds, done, console)
    directory.write_status("finished", adapter=summary["weights"])
    return summary


def _describe_plan(conf: RunConf, trained: Prompts, held_out: Prompts, path: Path) -> dict[str, str]:
    measured = min(conf.samples.num_prompts, len(held_out.prompts))
    patience = "" if conf.rounds_patience is None else f"; ends after {conf.rounds_patience} without a higher reward"
    return {
        "rounds": f"{conf.rounds}, each from the policy of the last one" + patience,
        "reference": "the policy that a round starts from"
        if conf.rounds_reference == "previous"
        else "the model that the first round starts from",
        "prompts": f"{len(trained.prompts):,} to train on; {measured:,} of {len(held_out.prompts):,} held out are "
        f"measured, {conf.samples.reward or ANSWERS_SCORED} answers each",
        "directory": str(path),
    }


# ---- One round


def _run_round(
    one: Round, number: int, prompts: Prompts, overrides: Sequence[str], console: RunConsole
) -> dict[str, Any]:
    """Sample, score, train and measure, or read what an earlier command has done; return the round's figures."""
    read_by_run = [text for text in overrides if not text.lstrip("+").startswith(("generate", "rounds"))]
    try:
        with _in_turn(one.answers):
            if not (one.answers / PROVENANCE).exists():
                generate(one.conf, console.console, prompts)
        counts = read_object(one.answers / PROVENANCE)["counts"]
        if not counts["pairs"]:
            raise RunError(
                f"round {number}: all answers to each prompt have the same reward, which makes no pair; try a larger "
                "generate.num_answers or generate.temperature, or a smaller data.min_score_gap"
            )
        summary = run(one.conf, read_by_run, RunConsole(console.console))
    except RunInterrupted as error:
        raise KeyboardInterrupt(error.exit_code - 128) from None
    assert summary is not None
    return {
        "round": number,
        **_select(summary["after"]),
        "pairs": counts["pairs"],
        "steps": summary["steps"],
        "summary": summary,
    }


def _select(figures: dict[str, Any]) -> dict[str, Any]:
    """Return the figures by which rounds are compared."""
    return {key: value for key, value in figures.items() if key in _MEASURED or key.startswith(BENCHMARKS)}


@contextmanager
def _in_turn(answers: Path) -> Iterator[None]:
    """Wait until no other run of a sweep is at work on the same answers."""
    answers.parent.mkdir(parents=True, exist_ok=True)
    with answers.with_name(f".{answers.name}.lock").open("a") as file:
        lock(file.fileno(), wait=True)
        yield


def _find_best(done: Sequence[dict[str, Any]]) -> int:
    """Return the number of the round with the highest held-out reward; 0 if none is above that before all rounds."""
    rewards = [done[0]["summary"]["before"]["eval_reward"], *(one["eval_reward"] for one in done)]
    return max(range(len(rewards)), key=rewards.__getitem__)


def _record(
    directory: RunDirectory,
    conf: RunConf,
    done: Sequence[dict[str, Any]],
    summary: dict[str, Any] | None,
    console: RunConsole,
) -> dict[str, str]:
    """Add what metrics.jsonl lacks to it and to W&B, each round at its last step, and the summary to W&B.

    Returns:
        The commands that show the rounds in W&B.
    """
    before, steps = done[0]["summary"]["before"], accumulate((one["steps"] for one in done), initial=0)
    known = {event["step"] for event in read_metrics(directory.path)}
    grouped = replace(conf, wandb=replace(conf.wandb, group=name_group(conf, directory.path)))
    with track(grouped, directory, console.warn) as tracker:
        for number, (step, figures) in enumerate(zip(steps, [before, *done], strict=True)):
            if step not in known:
                event = {"step": step, "round": number, **_select(figures)}
                tracker.log(event)
                directory.append_metrics(event)
        if summary is not None:
            tracker.log_summary(summary, conf.sweep.search.objective)
        return tracker.commands()


# ---- The end


def _conclude(
    directory: RunDirectory,
    conf: RunConf,
    rounds: Sequence[Round],
    done: Sequence[dict[str, Any]],
    console: RunConsole,
) -> dict[str, Any]:
    """Take over the best round's result, and write and show the summary."""
    raised = _find_best(done)
    if not raised:
        console.warn("no round has raised the held-out reward")
    best = raised or max(range(1, len(done) + 1), key=lambda number: done[number - 1]["eval_reward"])
    source, first = rounds[best - 1].run_dir, done[0]["summary"]
    kind = "adapter" if (source / "adapter").is_dir() else "model"
    write_folder(directory.path / kind, lambda staging: _link_all(source / kind, staging))
    starts, ends = (JsonLines(each / "samples.jsonl").records for each in (rounds[0].run_dir, source))
    samples = [{**start, "after": end["after"]} for start, end in zip(starts, ends, strict=True)]
    directory.write_samples(samples)
    summary = {
        **done[best - 1]["summary"],
        "before": first["before"],
        "rounds": [{key: value for key, value in one.items() if key != "summary"} for one in done],
        "best_round": best,
        "steps": sum(one["steps"] for one in done[:best]),
        "train_runtime": sum(one["summary"]["train_runtime"] for one in done),
        "peak_memory_gb": max(one["summary"]["peak_memory_gb"] for one in done),
    }
    directory.write_summary(summary)
    commands = _record(directory, conf, done, summary, console)
    console.show_rounds(first["before"], summary["rounds"], best)
    console.show_next_steps(directory.path, directory.path / kind, commands)
    return summary


def _link_all(source: Path, target: Path) -> None:
    """Copy a folder by links to its files, which are not written again; by copies where there are no links."""

    def link(one: str, other: str) -> None:
        try:
            os.link(one, other)
        except OSError:
            shutil.copy2(one, other)

    shutil.copytree(source, target, copy_function=link, dirs_exist_ok=True)


def _write_or_check(path: Path, prompts: Prompts) -> None:
    """Write the prompts, or check that they are those that the rounds began with.

    Raises:
        ConfigError: they are others.
    """
    new = path.with_name(f".{path.name}.new")
    write_prompts(new, prompts.prompts)
    if path.exists() and path.read_bytes() != new.read_bytes():
        new.unlink()
        cure = "put them back, or use another run_dir"
        raise ConfigError(f"`data`: its prompts have changed since {path} was written; {cure}")
    new.replace(path)


@contextmanager
def _without_tracker(console: RunConsole) -> Iterator[Tracker]:
    yield Tracker(None, console.warn)

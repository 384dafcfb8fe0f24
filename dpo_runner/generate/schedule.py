"""The configurations of rounds: each round's model, data, sampling and places."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from dpo_runner.config.run_conf import RunConf, config_keys
from dpo_runner.config.sections.data import DataConf
from dpo_runner.config.sections.model import ModelConf
from dpo_runner.config.sections.sweep import SweepConf
from dpo_runner.data.prompts import Prompts
from dpo_runner.generate.generation import OUTPUT
from dpo_runner.io.files import lock
from dpo_runner.records.wandb_run import is_under_agent

PROMPTS, HELD_OUT = "prompts.jsonl", "held_out.jsonl"
ANSWERS_SCORED = 4
"""`samples.reward` of the rounds if it is not set."""


@dataclass(frozen=True)
class Round:
    """One round: its configuration, the folder of its answers, and its run directory."""

    conf: RunConf
    answers: Path
    run_dir: Path


def plan_rounds(conf: RunConf, path: Path, first_answers: Path | None) -> Iterator[Round]:
    """Yield all rounds; their configurations are checked as those of runs are.

    Raises:
        ConfigError: one line for each mistake.
    """
    for number in range(1, (conf.rounds or 0) + 1):
        folder, previous = path / f"round-{number}", path / f"round-{number - 1}" / "run"
        answers = first_answers if number == 1 and first_answers is not None else folder / "answers"
        name = conf.wandb.name or f"{conf.run_name}/{path.name}"
        model, lora = (conf.model, conf.lora) if number == 1 else (_continue_from(previous, conf), None)
        yield Round(
            replace(
                conf,
                model=model,
                lora=lora,
                data=_build_data(conf.data, answers / OUTPUT),
                samples=replace(
                    conf.samples, prompts=str(path / HELD_OUT), reward=conf.samples.reward or ANSWERS_SCORED
                ),
                generate=replace(
                    conf.generate,
                    models=[] if number == 1 else [str(previous)],
                    dir=str(answers),
                    seed=conf.generate.seed + number - 1,
                ),
                wandb=replace(
                    conf.wandb,
                    mode="disabled" if is_under_agent() else conf.wandb.mode,  # the agent's one run is that of all
                    group=name_group(conf, path),
                    name=f"{name} round {number}",
                    job_type="round",
                    dir=conf.wandb.dir or str(path),
                ),
                sweep=SweepConf(),
                rounds=None,
                rounds_patience=None,
                rounds_reference="previous",
                run_dir=str(folder / "run"),
            ),
            answers,
            folder / "run",
        )


def name_group(conf: RunConf, path: Path) -> str:
    """Return the W&B group of all rounds and of the run that has curves over them."""
    return conf.wandb.group or path.name


def _continue_from(previous: Path, conf: RunConf) -> ModelConf:
    """Return the model of a round that goes on from the result of the run in `previous`."""
    model, is_full = conf.model, conf.lora is None and conf.model.adapter is None
    start = "initial"
    if conf.rounds_reference == "initial":
        start = model.model_name_or_path if is_full else model.adapter or "base"
        start = start if model.starts_as_reference else model.reference
    if is_full:
        weights = str(previous / "model")
        return replace(model, model_name_or_path=weights, revision=None, gguf_file=None, reference=start)
    return replace(
        model, adapter=str(previous / "adapter"), adapter_revision=None, adapter_mode="continue", reference=start
    )


def _build_data(data: DataConf, rows: Path) -> DataConf:
    """Return `data` with scored rows in place of its sources; how pairs are made and cleaned stays."""
    blank = DataConf()
    of_prompts = (
        *("sources", "eval_path", "subset", "revision", "split", "eval_split", "columns", "formatter", "drop_columns"),
        *("roles", "max_train_samples", "max_eval_samples"),
    )
    default = {name: getattr(blank, name) for name in of_prompts}
    return replace(data, **default, path=str(rows), format="scored", eval_fraction=0.0)


def choose_shared(conf: RunConf, prompts: Prompts, shared: Path | None) -> Path | None:
    """Return the folder of the first round's answers in `shared`, or None if the file system has no file locks."""
    if shared is None:
        return None
    sections = (conf.model, conf.quant, conf.data, conf.generate, conf.reward)
    told = [[config_keys(section) if section else None for section in sections], [one.key for one in prompts.prompts]]
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
    shared.mkdir(parents=True, exist_ok=True)
    with (shared / ".locks").open("a") as file:
        return None if lock(file.fileno()) is None else shared.absolute() / digest

"""Tolerant reading of run directories, including unfinished, failed and foreign ones."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dpo_runner.config.keys import split_removed
from dpo_runner.config.metrics import find_first_update, is_untrained_accuracy, list_benchmarks
from dpo_runner.config.sections.model import is_start
from dpo_runner.io.masking import mask_secrets
from dpo_runner.records.figures import Curve, collect_curves, collect_results, read_numbers, to_number
from dpo_runner.records.find import RUN_FILES, find_runs, name_runs
from dpo_runner.records.status import find_death

_MOST_NODES = 20_000
_SCORED_ON = ("limit", "num_fewshot")  # of the section `benchmarks`
_Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, if PyYAML was built with libyaml


@dataclass
class RunRecord:
    """One run, read from its directory.

    Attributes:
        path: the directory.
        name: a name unique among the runs read together.
        state: the state in status.json; `died` if it is running but its process is gone, `unknown` if there is none.
        error: why the run failed or died, or "".
        config: the configuration by dotted key; empty if unknown.
        fingerprints: of `model` and `data`, independent of their paths, of the evaluated data (`evaluation`), and of
            what `benchmarks` are scored on.
        metrics: results by name: those after training, or the newest ones if the run has not ended.
        curves: logged values over optimizer steps, by name.
        published: a line that counts its figures inside and outside published bands, or "".
        samples: `prompt`, `before` and `after` as texts.
        notes: a line for each thing that could not be read, with the reason.
        folder: the path relative to the common parent of the runs read together.
    """

    path: Path
    name: str = ""
    state: str = "unknown"
    error: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    published: str = ""
    samples: list[dict[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    folder: str = ""

    @property
    def finished(self) -> bool:
        return self.state == "finished"

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file; {} if the file is missing or unusable, the latter with a note."""
        text = self.read(name)
        if text is None:
            return {}
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            self.notes.append(f"{name}: is no JSON; {error}")
            return {}
        if not isinstance(value, dict):
            self.notes.append(f"{name}: holds no object")
            return {}
        return value

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """Return the objects in a JSON Lines file; a note reports the lines that are not objects."""
        lines = (self.read(name) or "").split("\n")
        found: list[dict[str, Any]] = []
        bad = []
        for number, line in enumerate(lines, 1):
            try:
                value = json.loads(line) if line.strip() else {}
            except (ValueError, RecursionError):
                value = None
            if isinstance(value, dict):
                found += [value] if value else []
            elif number == len(lines):
                self.notes.append(f"{name}: the last line is cut off")
            else:
                bad.append(number)
        if bad:
            self.notes.append(f"{name}:{bad[0]}: is no JSON object, {len(bad)} such lines are left out")
        return found

    def has(self, name: str) -> bool:
        try:
            return (self.path / name).is_file()
        except OSError:
            return False

    def read(self, name: str) -> str | None:
        """Return a file's text; None if it is missing or unreadable, the latter with a note."""
        try:
            return (self.path / name).read_text(encoding="utf-8") if self.has(name) else None
        except (OSError, UnicodeDecodeError) as error:
            self.notes.append(f"{name}: cannot be read; {error}")
            return None


def read_runs(folders: Sequence[Path]) -> tuple[list[RunRecord], list[str]]:
    """Read every run in or below some folders.

    Args:
        folders: run directories, sweep directories, or folders that contain them at any depth.

    Returns:
        The runs sorted by path, and a line for each thing that could not be read, with the reason.

    Raises:
        ConfigError: a folder does not exist.
    """
    found, notes = find_runs(folders)
    runs = [_read_run(path) for path in found.values()]
    for run, (folder, name) in zip(runs, name_runs(list(found)), strict=True):
        run.folder, run.name = folder, name
    runs.sort(key=lambda run: [int(part) if part.isdecimal() else part for part in re.split(r"([0-9]+)", run.folder)])
    notes += [f"{run.path}: {note}" for run in runs for note in run.notes]
    return runs, notes


def _read_run(path: Path) -> RunRecord:
    run = RunRecord(path)
    status, summary = run.read_json("status.json"), run.read_json("summary.json")
    own = any(run.has(name) for name in RUN_FILES)
    events = run.read_lines("metrics.jsonl") if own else _read_trainer_state(run)
    run.curves = collect_curves(events)
    if own:
        _read_state(run, status, summary)
        run.config = _read_config(run)
        run.fingerprints = _read_fingerprints(run.read_json("environment.json"))
        run.samples = [sample for line in run.read_lines("samples.jsonl") if (sample := _read_sample(line))]
    results = collect_results(run.curves, summary, to_number(run.config.get("training.beta")))
    run.metrics = results | _read_evaluation(run)
    if list_benchmarks(run.metrics):
        told = [run.config.get(f"benchmarks.{name}") for name in _SCORED_ON]
        run.fingerprints.setdefault("benchmarks", json.dumps(told))
    if isinstance(expected := summary.get("expected"), dict) and isinstance(expected.get("told"), list):
        run.published = str(mask_secrets(str(expected["told"][-1]))) if expected["told"] else ""
    reference = run.config.get("model.reference", "initial")  # the first versions had no other
    if run.config and is_start(reference, run.config.get("model.adapter")):
        run.curves = dict(_leave_out_ties(run.curves, find_first_update(events)))
    return run


def _leave_out_ties(curves: dict[str, Curve], first_update: int) -> Iterator[tuple[str, Curve]]:
    """Yield the curves without reward accuracies of a policy that still equals its reference."""
    for name, curve in curves.items():
        points = [
            point for point in zip(*curve, strict=True) if not is_untrained_accuracy(name, point[0], first_update)
        ]
        if points:
            yield name, ([step for step, _ in points], [value for _, value in points])


def _read_state(run: RunRecord, status: dict[str, Any], summary: dict[str, Any]) -> None:
    run.state = str(status.get("state") or ("finished" if summary and not status else "unknown"))
    run.error = str(mask_secrets(str(status.get("error") or "")))
    if run.state == "running" and (death := find_death(run.path, status)) is not None:
        steps = [to_number(status.get("step")) or 0, *(points[0][-1] for points in run.curves.values() if points[0])]
        run.state, run.error = "died", str(mask_secrets(f"{death}; step {max(steps):.0f} is the last that is known of"))
    if run.finished and not summary:
        run.notes.append("summary.json is missing; figures are the last ones of metrics.jsonl")


def _read_config(run: RunRecord) -> dict[str, Any]:
    text = run.read("config.yaml")
    if text is None:
        if run.state != "pending":
            run.notes.append("config.yaml is missing; its settings are not known")
        return {}
    try:
        written = yaml.load(text, _Loader)
        if not isinstance(written, dict):
            raise ValueError("holds no mapping")
        kept, active = split_removed(written)
        settings = [*flatten(kept), *flatten(active)]
        return {key: mask_secrets(value, key.rpartition(".")[2]) for key, value in settings}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        run.notes.append(f"config.yaml: {' '.join(str(error).split())}; its settings are not known")
        return {}


def flatten(nested: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and plain values of nested mappings; lists and empty mappings are values.

    Raises:
        ValueError: there are too many values, for instance in a hostile file that repeats YAML aliases.
    """
    seen = 0

    def plain(value: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen > _MOST_NODES:
            raise ValueError(f"holds more than {_MOST_NODES:,} values")
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        if isinstance(value, dict):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)  # JSON has no infinities or NaN
        return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)

    def walk(mapping: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in mapping.items():
            if isinstance(value, dict) and value:
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    yield from walk(plain(nested), "")


def _read_fingerprints(environment: dict[str, Any]) -> dict[str, str]:
    found = {}
    model, data = environment.get("model"), environment.get("data")
    if isinstance(model, dict) and (model.get("fingerprint") or model.get("commit")):
        found["model"] = json.dumps([model.get("fingerprint"), model.get("commit")])
    if isinstance(data, dict) and data:
        found["data"] = json.dumps(data, sort_keys=True)
    return found


def _read_trainer_state(run: RunRecord) -> list[dict[str, Any]]:
    """Return the log events of a plain Trainer's output directory, from its newest trainer_state.json."""
    places = [path for path in run.path.glob("checkpoint-*") if path.name.partition("-")[2].isdecimal()]
    places.sort(key=lambda path: int(path.name.partition("-")[2]))
    names = ["trainer_state.json", *(f"{path.name}/trainer_state.json" for path in reversed(places))]
    name = next((name for name in names if (run.path / name).is_file()), None)
    if name is None:
        run.notes.append("no trainer_state.json in its checkpoints; no figures")
        return []
    state = run.read_json(name)
    run.notes.append("is no run of this program: curves are its trainer_state.json's, its settings are not known")
    done, steps = to_number(state.get("global_step")), to_number(state.get("max_steps"))
    if done is not None and steps:
        run.state = "finished" if done >= steps else "unknown"
    history = state.get("log_history")
    return [event for event in history if isinstance(event, dict)] if isinstance(history, list) else []


def _read_evaluation(run: RunRecord) -> dict[str, float]:
    """Return the estimates of the newest evaluation.json, as `evaluation/<name>`."""
    try:
        files = sorted(run.path.glob("evaluations/*/evaluation.json"), key=lambda path: path.stat().st_mtime)
    except OSError as error:
        run.notes.append(f"evaluations: cannot be read; {error.strerror}")
        return {}
    if not files:
        return {}
    written = run.read_json(str(files[-1].relative_to(run.path)))
    benchmarks = written.get("benchmarks")
    scored: dict[str, float] = {}
    if isinstance(benchmarks, dict) and isinstance(settings := benchmarks.get("settings"), dict):
        scored = read_numbers(benchmarks.get("policy"))
        run.fingerprints["benchmarks"] = json.dumps([settings.get(name) for name in _SCORED_ON])
    further, evaluated = [written.get(name) for name in ("judge", "reward")], written.get("evaluated")
    if isinstance(evaluated, dict):
        on = {key: evaluated.get(key) for key in ("data", "split", "pairs", "prompts_answered", "max_new_tokens")}
        run.fingerprints["evaluation"] = json.dumps(on)
    estimates = dict(written)
    for part in further:
        estimates |= part if isinstance(part, dict) else {}
    means = {key: to_number(value.get("mean")) for key, value in estimates.items() if isinstance(value, dict)}
    return {f"evaluation/{key}": mean for key, mean in means.items() if mean is not None} | scored


def _read_sample(line: dict[str, Any]) -> dict[str, str] | None:
    answers = {who: line.get(who) for who in ("before", "after")}
    texts = {who: answer.get("text") if isinstance(answer, dict) else answer for who, answer in answers.items()}
    prompt = line.get("prompt")
    if isinstance(prompt, list):
        turns = [turn for turn in prompt if isinstance(turn, dict)]
        prompt = "\n\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns)
        if len(turns) == 1:
            prompt = str(turns[0].get("content"))
    if not isinstance(prompt, str) or not any(isinstance(text, str) for text in texts.values()):
        return None
    return {"prompt": prompt, **{who: text for who, text in texts.items() if isinstance(text, str)}}

"""Find and delete checkpoints that are not needed any more. Does not import torch."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dpo_runner.errors import ConfigError
from dpo_runner.records.checkpoints import find_last_checkpoint
from dpo_runner.records.directory import RunDirectory
from dpo_runner.records.find import find_runs
from dpo_runner.records.reading import read_status, read_summary
from dpo_runner.records.status import find_death

_LEFT_BEHIND = ("checkpoint-", "damaged-checkpoint-", ".saving-")


@dataclass
class RunCheckpoints:
    """The content of one run's `checkpoints/`.

    Attributes:
        run_dir: the run's directory.
        state: the run's state from status.json, or `died`.
        old: deletable checkpoints: neither the run's result nor its continuation depends on them.
        kept: checkpoints to keep, each with the reason.
    """

    run_dir: Path
    state: str
    old: list[Path] = field(default_factory=list)
    kept: dict[Path, str] = field(default_factory=dict)


def find_checkpoints(folders: Sequence[Path]) -> tuple[list[RunCheckpoints], list[str]]:
    """Find the checkpoints of all runs in or below some folders.

    Finished run: all are old, except the best or the last one if the run's result has other weights. Unfinished run:
    none is old, unless its own directory is among `folders`; then all are old except the best one and the newest
    whole one, from which the run continues. Running run: none is old.

    Returns:
        The runs with checkpoints, sorted by path, and one line for each run that cannot be read.

    Raises:
        ConfigError: a folder does not exist.
    """
    found, notes = find_runs(folders)
    named = {folder.resolve() for folder in folders}
    runs = []
    for resolved, path in sorted(found.items()):
        try:
            run = _classify(path, resolved in named)
        except (OSError, ValueError, KeyError, TypeError, ConfigError) as error:
            notes.append(f"{path}: cannot be read, so its checkpoints stay; {type(error).__name__}: {error}")
        else:
            runs += [run] if run.old or run.kept else []
    return runs, notes


def clear_checkpoints(run: RunCheckpoints) -> None:
    """Delete a run's old checkpoints, holding the run's lock.

    Raises:
        ConfigError: another process is using the run's directory.
        OSError: a checkpoint cannot be deleted.
    """
    with RunDirectory(run.run_dir).claim():
        for path in run.old:
            shutil.rmtree(path)


def _classify(path: Path, named: bool) -> RunCheckpoints:
    status = read_status(path)
    folder = path / "checkpoints"
    if status is None or not folder.is_dir():  # not a run of this program, or without checkpoints
        return RunCheckpoints(path, "unknown")
    state = str(status["state"])
    if state == "running" and find_death(path, status) is not None:
        state = "died"
    run = RunCheckpoints(path, state)
    there = [each for each in sorted(folder.iterdir()) if each.is_dir() and each.name.startswith(_LEFT_BEHIND)]
    last = find_last_checkpoint(folder)
    best = None if last is None else _find_best(last)
    if state == "finished":
        spare = (best, "the best weights") if read_summary(path)["weights"] == "last" else (last, "the last weights")
        if spare[0] is not None and best != last:  # the result has the other weights
            run.kept[spare[0]] = spare[1]
    elif state == "running" or not named:
        run.kept = dict.fromkeys(there, "the run is going on" if state == "running" else "the run is not finished")
    else:
        run.kept |= {best: "the best weights"} if best is not None else {}
        run.kept |= {last: "the run continues from it"} if last is not None else {}
    run.old = [each for each in there if each not in run.kept]
    return run


def _find_best(checkpoint: Path) -> Path | None:
    """Return the checkpoint with the best weights; None if the run recorded none or it is gone."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    name = state.get("best_model_checkpoint")
    best = None if name is None else checkpoint.with_name(Path(name).name)
    return best if best is not None and best.is_dir() else None

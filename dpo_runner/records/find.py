"""Search for run directories at any depth, those of this program and of a plain Trainer, and their names."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from dpo_runner.config.schema import ONLY_POINT, label_point
from dpo_runner.errors import ConfigError

RUN_FILES = ("status.json", "summary.json")
"""A folder with either file is a run of this program."""


def find_runs(folders: Sequence[Path]) -> tuple[dict[Path, Path], list[str]]:
    """Find the run directories in or below some folders.

    Returns:
        The path through which each run was found, by its resolved path, so that each run appears once; and a line for
        each unreadable folder.

    Raises:
        ConfigError: a folder does not exist.
    """
    if missing := [f"{folder}: no such folder" for folder in folders if not folder.is_dir()]:
        raise ConfigError(missing)
    notes: list[str] = []
    return {path.resolve(): path for folder in folders for path in _find_run_folders(folder, notes)}, notes


def _find_run_folders(folder: Path, notes: list[str]) -> Iterator[Path]:
    """Yield the run directories in or below a folder; a run directory is not searched further.

    Args:
        folder: searched at any depth, without hidden folders and links.
        notes: receives a line for each unreadable folder.
    """
    below: dict[str, list[Path]] = {}

    def refuse(error: OSError) -> None:
        notes.append(f"{error.filename}: cannot be read; {error.strerror}")

    for name, folders, files in os.walk(folder, onerror=refuse):
        path, present = Path(name), set(files)
        folders[:] = sorted(child for child in folders if not child.startswith("."))
        is_run = not present.isdisjoint(RUN_FILES)
        # A sweep may have its own status.json: search the folders below first if a run's other files are missing.
        if is_run and ("config.yaml" in present or "metrics.jsonl" in present or not folders):
            folders.clear()
            yield path
        elif is_run:
            below[name] = []
        elif "trainer_state.json" in present or any(child.startswith("checkpoint-") for child in folders):
            folders.clear()
            yield path
        else:
            continue
        for outer in below:
            if name != outer and path.is_relative_to(outer):
                below[outer].append(path)
    yield from (Path(outer) for outer, inner in below.items() if not inner)


def name_runs(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """Return the path of each run relative to the common parent of all, and its name, both unique.

    The name is the path too, but a sweep's job is called by what it varies: `grid/beta=0.1`, not `grid/0-1c5f8e2a`.
    """
    common = os.path.commonpath([path.parent for path in paths]) if paths else ""
    places = [os.path.relpath(path, common) for path in paths]
    labels = {parent: _read_labels(parent / "sweep.json") for parent in {path.parent for path in paths}}
    named = [
        place.removesuffix(path.name) + labels[path.parent].get(path.name, path.name)
        for path, place in zip(paths, places, strict=True)
    ]
    counts = Counter(named)
    return [
        (place, name if counts[name] == 1 else f"{name} ({path.name})")
        for path, place, name in zip(paths, places, named, strict=True)
    ]


def _read_labels(record: Path) -> dict[str, str]:
    """Return what each job of a sweep varies, by the name of its directory; nothing if sweep.json is unusable."""
    try:
        jobs = json.loads(record.read_text(encoding="utf-8"))["jobs"]
        labels = {str(name): label_point(job["varied"]) for name, job in jobs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}
    return {name: label for name, label in labels.items() if label != ONLY_POINT}

"""Where rows come from: the bundled pairs, a local file, or the hub. Rows stay memory-mapped on disk."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_runner.config import DataConf
from dpo_runner.config_checks import suggest
from dpo_runner.data.formats import to_messages
from dpo_runner.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset

BUNDLED_PREFIX = "bundled:"
_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_rows(conf: DataConf, seed: int) -> tuple["Dataset", "Dataset | None"]:
    """Return the training rows and the evaluation rows, as they stand in the source.

    Raises:
        ConfigError: the source is missing, cannot be read, or has no rows.
    """
    if conf.path.startswith(BUNDLED_PREFIX):
        folder = _find_bundled(conf.path)
        train, evaluation = _load_file(folder / "train.jsonl", conf.path), _load_file(folder / "eval.jsonl", conf.path)
    elif Path(conf.path).suffix in _LOADERS or Path(conf.path).exists():
        train, evaluation = _load_file(Path(conf.path).expanduser(), f"data.path={conf.path}"), None
    else:
        train = _load_hub(conf, conf.split)
        evaluation = _load_hub(conf, conf.eval_split) if conf.eval_split else None
    if conf.eval_path:
        evaluation = _load_file(Path(conf.eval_path).expanduser(), f"data.eval_path={conf.eval_path}")
    if evaluation is None and conf.eval_fraction > 0:
        train, evaluation = _hold_out(train, conf.eval_fraction, seed)
    if conf.max_train_samples is not None:
        train = train.select(range(min(conf.max_train_samples, len(train))))
    if evaluation is not None and conf.max_eval_samples is not None:
        evaluation = evaluation.select(range(min(conf.max_eval_samples, len(evaluation))))
    return train, evaluation


def _find_bundled(path: str) -> Path:
    names = [folder.name for folder in Path(__file__).parent.iterdir() if (folder / "train.jsonl").exists()]
    name = path.removeprefix(BUNDLED_PREFIX)
    if name not in names:
        raise ConfigError(f"`data.path={path}`: no such bundled data; {suggest(name, names)}")
    return Path(__file__).parent / name


def _load_file(path: Path, key: str) -> "Dataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    if not path.is_file():
        near = suggest(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [])
        raise ConfigError(f"`{key}`: no such file" + (f"; {near}" if near.startswith("did") else ""))
    if path.suffix not in _LOADERS:
        raise ConfigError(f"`{key}`: no such format `{path.suffix}`; use {', '.join(_LOADERS)}")
    if path.stat().st_size == 0:
        raise ConfigError(f"`{key}`: the file is empty")
    try:
        rows = load_dataset(_LOADERS[path.suffix], data_files=str(path), split="train")
    except (DatasetGenerationError, ValueError, OSError) as error:
        reason = _find_broken_line(path) or str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"`{key}`: cannot be read; {reason}") from None
    if len(rows) == 0:
        raise ConfigError(f"`{key}`: holds no rows")
    return rows


def _find_broken_line(path: Path) -> str | None:
    """Name the first line that is no JSON, which the loader's own message does not."""
    if path.suffix == ".jsonl":
        with path.open(encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                try:
                    json.loads(line) if line.strip() else None
                except json.JSONDecodeError as error:
                    return f"line {number}: {error.msg} at column {error.colno}"
    if path.suffix == ".json":
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            return f"line {error.lineno}: {error.msg} at column {error.colno}"
    return None


def _load_hub(conf: DataConf, split: str) -> "Dataset":
    from datasets import load_dataset

    try:
        return load_dataset(conf.path, conf.subset, split=split, revision=conf.revision)
    except (OSError, ValueError, RuntimeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(
            f"`data.path={conf.path}` (split {split}): neither a file here nor a hub dataset in reach; {reason}"
        ) from None


def _hold_out(rows: "Dataset", fraction: float, seed: int) -> tuple["Dataset", "Dataset"]:
    """Split off whole prompts, so that no prompt is in both parts (at least one row stays in each)."""
    import random

    keys = [json.dumps(to_messages(row)["prompt"]) for row in rows]
    prompts = sorted(set(keys))
    if len(prompts) < 2:
        raise ConfigError(f"`data.eval_fraction={fraction}`: needs rows with at least 2 different prompts; set it to 0")
    random.Random(seed).shuffle(prompts)
    held_out = set(prompts[: max(1, min(round(fraction * len(prompts)), len(prompts) - 1))])
    train = [i for i, key in enumerate(keys) if key not in held_out]
    evaluation = [i for i, key in enumerate(keys) if key in held_out]
    return rows.select(train), rows.select(evaluation)

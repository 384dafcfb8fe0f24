"""The configurations that a dataset's README.md declares for `datasets`."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_runner.errors import DataError, reason_of

_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Config:
    """One of the `configs` of a README.md.

    Attributes:
        default: whether `datasets` takes it if none is named.
        data_dir: folder of its files, relative to that of the README.
        splits: glob patterns of each split's files, relative to `data_dir`; None if only their names tell.
    """

    default: bool
    data_dir: str
    splits: dict[str, list[str]] | None


def read_card(path: Path, setting: str) -> dict[str, Config]:
    """Return the configurations in the YAML header of a README.md by name, none if it has no `configs` or is missing.

    Raises:
        DataError: they are not as `datasets` reads them.
    """
    header = _FRONT_MATTER.match(path.read_text(encoding="utf-8", errors="replace")) if path.is_file() else None
    if header is None or not re.search(r"^[\"']?configs[\"']?\s*:", header.group(1), re.MULTILINE):
        return {}
    import yaml

    try:
        configs = {config["config_name"]: _read_config(config) for config in yaml.safe_load(header.group(1))["configs"]}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)  # counts from 0, below the line of dashes
        where = f", line {mark.line + 2}" if mark else ""
        problem = getattr(error, "problem", None) or reason_of(error)
        raise DataError(
            f"`{setting}`: {path}{where}: its header is no YAML ({problem}); correct or delete it"
        ) from None
    except (LookupError, TypeError, ValueError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else reason_of(error)
        raise DataError(
            f"`{setting}`: {path}: its `configs` must be a list of config_name and data_files (a file, a list of "
            f"files, or a list of split and path); {reason}; correct or delete them"
        ) from None
    return configs


def _read_config(config: dict[str, Any]) -> Config:
    files = config.get("data_files")
    splits: dict[str, list[str]] = {}
    for item in files if isinstance(files, list) else [] if files is None else [files]:
        split, path = ("train", item) if isinstance(item, str) else (item["split"], item["path"])
        patterns = path if isinstance(path, list) else [path]
        if not all(isinstance(text, str) for text in (split, *patterns)):
            raise ValueError(f"{item!r:.60} is none")
        splits.setdefault(split, []).extend(patterns)
    is_default = bool(config.get("default")) or config["config_name"] == "default"
    return Config(is_default, str(config.get("data_dir") or ""), splits or None)

"""Jobs: points of a sweep with their directories, passed to Hydra's launchers as overrides."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dpo_runner.config.compose import compose_point
from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.schema import ONLY_POINT, label_point
from dpo_runner.sweep.directory import read_record

_DIR, _SUBDIR = "hydra.sweep.dir=", "hydra.sweep.subdir="


@dataclass(frozen=True)
class Job:
    """One run of a sweep.

    Attributes:
        conf: the configuration, with `run_dir` set.
        overrides: the overrides that it was composed from.
        label: what it varies, for display.
    """

    conf: RunConf
    overrides: Sequence[str]
    label: str

    @property
    def path(self) -> Path:
        assert self.conf.run_dir is not None
        return Path(self.conf.run_dir)


@dataclass(frozen=True)
class Outcome:
    """The end of a job: `state` (finished, pruned, failed, interrupted), duration in seconds, and error."""

    job: Job
    state: str
    seconds: float
    error: str | None = None


def write_place(path: Path, name: str) -> list[str]:
    """Return the overrides that make any Hydra launcher put a job into the directory `name` of `path`."""
    return [_DIR + _quote(str(path)), _SUBDIR + _quote(name)]


def read_place(overrides: Sequence[str]) -> tuple[Path, str]:
    """Return the path and name that `write_place` put into a job's overrides."""
    values = [next(text for text in overrides if text.startswith(key)).removeprefix(key) for key in (_DIR, _SUBDIR)]
    return Path(_unquote(values[0])), _unquote(values[1])


def build_job(overrides: Sequence[str], config_dir: str | None, labels: Mapping[str, str]) -> Job:
    """Compose a job from the overrides of its point and its directory.

    Args:
        overrides: those of the point, and those of `write_place`.
        config_dir: the user's folder of config groups.
        labels: each job's label by the name of its directory.
    """
    path, name = read_place(overrides)
    point = tuple(text for text in overrides if not text.startswith("hydra."))
    label = labels.get(name, " ".join(point))
    return Job(place_conf(compose_point(point, config_dir), path / name, label), point, label)


def read_labels(path: Path) -> dict[str, str]:
    """Return the label of each job of the sweep in `path`, by the name of its directory."""
    record = read_record(path)
    return {} if record is None else {name: label_point(job["varied"]) for name, job in record.jobs.items()}


def place_conf(conf: RunConf, run_dir: Path, label: str) -> RunConf:
    """Return a job's configuration, with its directory and its sweep's W&B group.

    Args:
        conf: the point's configuration.
        run_dir: the job's directory, inside the sweep's.
        label: what it varies; its name in W&B.
    """
    given = conf.wandb
    wandb = dataclasses.replace(
        given,
        group=given.group or run_dir.parent.name,
        name=given.name or (label if label not in ("", ONLY_POINT) else None),
        job_type=given.job_type or ("search" if conf.sweep.search.sampler else "sweep"),
        dir=given.dir or str(run_dir.parent),
    )
    return dataclasses.replace(conf, run_dir=str(run_dir), wandb=wandb)


def _quote(text: str) -> str:
    """Return a text as a quoted string of Hydra, where only quotes and backslashes before them are special."""
    escaped = re.sub(r"(\\*)(\"|$)", lambda match: match[1] * 2 + ("\\" + match[2] if match[2] else ""), text)
    return f'"{escaped}"'


def _unquote(text: str) -> str:
    return re.sub(r"(\\+)(\"|$)", lambda match: "\\" * (len(match[1]) // 2) + match[2], text[1:-1])

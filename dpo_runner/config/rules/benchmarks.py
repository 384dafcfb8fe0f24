"""Rules of the section `benchmarks`. Imports neither torch nor lm-evaluation-harness."""

import dataclasses
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version

from dpo_runner.config.sections.benchmarks import BenchmarksConf
from dpo_runner.config.sections.run import RunFields

_HARNESS = "lm-eval>=0.4.13,<0.5"
_OF_EVALUATE = ("answers", "questions", "max_drop")


def check_benchmarks(conf: RunFields) -> Iterator[str]:
    """Yield one line per broken rule of `conf.benchmarks`."""
    benchmarks, unset = conf.benchmarks, BenchmarksConf()
    if (benchmarks.answers is None) != (benchmarks.questions is None):
        missing = "questions" if benchmarks.questions is None else "answers"
        yield f"`benchmarks.{missing}`: must be set too (a project, and the file with its questions)"
    if not benchmarks.tasks:
        names = [field.name for field in dataclasses.fields(unset) if field.name not in _OF_EVALUATE]
        for name in names:
            if (value := getattr(benchmarks, name)) != getattr(unset, name):
                yield f"`benchmarks.{name}={value}`: has no effect without benchmarks.tasks, such as benchmarks=basics"
        return
    if len(set(benchmarks.tasks)) < len(benchmarks.tasks):
        yield f"`benchmarks.tasks={benchmarks.tasks}`: names a task twice"
    if benchmarks.limit is not None and benchmarks.limit > 1 and benchmarks.limit % 1:
        yield f"`benchmarks.limit={benchmarks.limit}`: must be a whole number of documents, or a share below 1"
    for step in benchmarks.steps:
        if step < 1:
            yield f"`benchmarks.steps={benchmarks.steps}`: must be numbers of optimizer steps, at least 1"
    if conf.training.fsdp:
        yield (
            "`benchmarks.tasks`: training.fsdp divides the model, and the harness needs all of it in one process; "
            "leave the tasks out here and score the finished run: python -m dpo_runner.evaluate RUN_DIR benchmarks=…"
        )
    yield from _check_installation()


def _check_installation() -> Iterator[str]:
    try:
        found = tuple(int(part) for part in version("lm-eval").split(".")[:3])
    except PackageNotFoundError:
        found = ()
    if not (0, 4, 13) <= found < (0, 5):
        told = ".".join(map(str, found)) or "none"
        yield (
            f"`benchmarks.tasks`: needs lm-evaluation-harness 0.4.13 or a later 0.4, and {told} is installed; "
            f"pip install '{_HARNESS}' (or the extra: pip install 'dpo-runner[benchmarks]')"
        )

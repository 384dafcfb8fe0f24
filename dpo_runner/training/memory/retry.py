"""Retries with smaller batches after running out of memory, and advice if no retry is left.

Retries keep the number of pairs per optimizer step, so the run equals one started with the smaller batches. If
micro-batches are limited by tokens, the limit is halved; if rows are counted, a batch has fewer rows and a step
correspondingly more batches.
"""

import gc
import logging
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from dpo_runner.config.run_conf import count_processes
from dpo_runner.errors import ConfigError
from dpo_runner.records.directory import update_status
from dpo_runner.records.reading import read_status
from dpo_runner.training.memory.device import (
    OutOfMemory,
    format_bytes,
    is_out_of_memory,
)
from dpo_runner.training.memory.smaller import Settings, find_smaller, join_settings, list_ways
from dpo_runner.training.ranks.group import count, is_launched
from dpo_runner.training.ranks.launch import launch
from dpo_runner.training.ranks.watch import find_cause

if TYPE_CHECKING:
    from dpo_runner.model.blueprint import Blueprint
    from dpo_runner.training.memory.settle import Settled
    from dpo_runner.training.session import Session

logger = logging.getLogger(__name__)


class Attempt:
    """One attempt at a run: a context manager that catches `OutOfMemory`.

    Attributes:
        settled: the run with the settings of this attempt.
        failure: the caught error, or None.
    """

    def __init__(self, settled: "Settled") -> None:
        self.settled = settled
        self.failure: OutOfMemory | None = None

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None and not isinstance(error, OutOfMemory):
            error = find_cause(error)  # another process of the run may have run out of memory
        if not isinstance(error, OutOfMemory):
            return False
        logger.error("memory ran out\n%s", "".join(traceback.format_exception(error)))
        self.failure = error
        return True


def attempts(settled: "Settled", blueprint: "Blueprint", session: "Session") -> Iterator[Attempt]:
    """Yield attempts at a run, each with smaller batches; only one unless `conf.checks` allows retries.

    Args:
        settled: the run as first attempted.
        blueprint: the model's blueprint.
        session: has the records of batch reductions by an earlier process, and receives new ones.

    Raises:
        OutOfMemory: batches cannot, or must not, be reduced further; has sizes and settings that need less memory.
    """
    records = session.out_of_memory
    settings = {key: value for record in records for key, value in record["settings"].items()}
    if records:
        session.warn(f"memory ran out before; this run goes on with {join_settings(settings)}")
        session.note_out_of_memory(records)
    largest = sum(settled.shape.cut(settled.asked.training.max_length).largest)
    while True:
        now = settled.with_settings(settings)
        session.begin_attempt()
        yield (attempt := Attempt(now))
        if (failure := attempt.failure) is None:
            return
        session.console.stop_training()
        _release(failure)
        smaller = find_smaller(now.conf, failure.part, failure.tokens, largest)
        if smaller and count() > 1 and now.conf.checks.on_out_of_memory == "smaller_batch":
            # The others wait for this process in a collective operation, so all end; `launch_attempts` starts again.
            if not is_launched():
                session.note_out_of_memory([*records, _record(failure, smaller)])
            raise failure.advised("the same command continues the run with smaller batches")
        if not smaller or now.conf.checks.on_out_of_memory == "stop":
            advice = f"try {', or '.join(list_ways(now.conf, failure.part, smaller))}"
            if smaller:
                advice += "; checks.on_out_of_memory=smaller_batch tries smaller batches by itself"
            raise failure.advised(f"{_describe_estimate(now, blueprint)}{advice}")
        settings |= smaller
        records = [*records, _record(failure, smaller)]
        session.warn(f"{failure}; going on with {join_settings(smaller)}")
        session.note_out_of_memory(records)


def launch_attempts(job: Callable[[], Any], settled: "Settled", path: Path, warn: Callable[[str], None]) -> None:
    """Start the run's processes; if memory runs out in one, start them again with smaller batches, as `attempts` does.

    Args:
        job: what each process does.
        settled: the run as first attempted.
        path: the run's directory.
        warn: shows one line as a warning.

    Raises:
        DpoRunnerError: the first failure of any process.
    """
    largest = sum(settled.shape.cut(settled.asked.training.max_length).largest)
    while True:
        try:
            return launch(job, count_processes(settled.asked), path)
        except OutOfMemory as failure:
            records = list((read_status(path) or {}).get("out_of_memory", []))
            now = settled.with_settings({key: value for record in records for key, value in record["settings"].items()})
            smaller = find_smaller(now.conf, failure.part, failure.tokens, largest)
            if not smaller or now.conf.checks.on_out_of_memory == "stop":
                raise
            update_status(path, out_of_memory=[*records, _record(failure, smaller)])
            warn(f"out of memory in {failure.part}: {failure.sizes}; starting again with {join_settings(smaller)}")


def _record(failure: OutOfMemory, smaller: Settings) -> dict[str, Any]:
    return {"part": failure.part, "sizes": failure.sizes, "settings": smaller}


def _release(error: BaseException | None) -> None:
    """Free the objects held by the tracebacks of a failure, above all the model."""
    import torch

    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _describe_estimate(settled: "Settled", blueprint: "Blueprint") -> str:
    try:
        estimate = settled.estimate(blueprint)
    except ConfigError:
        return ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return ""  # too little memory even for the estimate
    return f"by the estimate the run takes {format_bytes(estimate.total)} at its peak, in its {estimate.phase}; "

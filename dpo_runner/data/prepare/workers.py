"""Processing of batches in order, in one process or several."""

import itertools
import os
import signal
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any

from dpo_runner.data.layouts.columns import Row
from dpo_runner.data.layouts.scored import group_responses
from dpo_runner.data.prepare.batches import Outcome, process_batch
from dpo_runner.data.prepare.recipe import Recipe
from dpo_runner.data.rows.decoding import Batch, decode_rows
from dpo_runner.errors import RowError, RunError
from dpo_runner.io.processes import setting_variable

ROWS_PER_BATCH = 500
BATCHES_BEFORE_WORKERS = 8
"""Number of batches processed before starting workers pays off."""


def process_all(batches: Iterator[Batch], recipe: Recipe, num_proc: int | None) -> Iterator[Outcome]:
    """Process batches in order, in this process at first, in several if there are many batches.

    Args:
        batches: of one source.
        recipe: with its layout set.
        num_proc: processes to use; None uses all cores.

    Raises:
        RunError: a worker process died.
    """
    assert recipe.layout is not None
    if recipe.layout.grouped:
        batches, recipe = _group(batches, recipe), recipe.without_mapping()
    workers = num_proc or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])
    for count, batch in enumerate(batches, start=1):
        yield process_batch(batch, recipe)
        if count == BATCHES_BEFORE_WORKERS and workers > 1:
            break
    else:
        return
    # The tokenizer's threads would deadlock in a forked child on inherited locks.
    with setting_variable("TOKENIZERS_PARALLELISM", "false"):
        context = get_context("fork" if sys.platform == "linux" else "spawn")
        pool = ProcessPoolExecutor(workers, context, _start_worker, (recipe,))
        try:
            waiting: deque[Future[Outcome]] = deque()
            for batch in batches:
                waiting.append(pool.submit(_process_in_worker, batch))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise RunError(
                f"`{recipe.key}`: a worker process died while preparing the data, perhaps out of memory; "
                "try training.dataset_num_proc=1"
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _group(batches: Iterator[Batch], recipe: Recipe) -> Iterator[Batch]:
    """Group rows of one response each, in this process, because adjacent rows belong together."""
    for file, rows in _by_file(batches, recipe):
        numbers: list[int] = []
        grouped: list[Any] = []
        for number, row in group_responses(rows):
            numbers.append(number)
            grouped.append(row)
            if len(grouped) == ROWS_PER_BATCH:
                yield Batch(file, numbers, grouped)
                numbers, grouped = [], []
        if grouped:
            yield Batch(file, numbers, grouped)


def _by_file(batches: Iterator[Batch], recipe: Recipe) -> Iterator[tuple[int, Iterator[tuple[int, Row | RowError]]]]:
    for file, group in itertools.groupby(batches, key=lambda batch: batch.file):
        decoded = (item for batch in group for item in decode_rows(batch))
        yield file, ((number, made) for number, row in decoded for made in _map(row, recipe))


def _map(row: Row | RowError, recipe: Recipe) -> list[Row] | list[RowError]:
    try:
        assert recipe.layout is not None
        return [recipe.layout.respell(made) for made in recipe.rows(row)]
    except RowError as error:
        return [error]


_recipe: Recipe
"""The recipe of a worker process, set once when it starts."""


def _start_worker(recipe: Recipe) -> None:
    global _recipe
    _recipe = recipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent stops the workers


def _process_in_worker(batch: Batch) -> Outcome:
    return process_batch(batch, _recipe)

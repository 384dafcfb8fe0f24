"""Library logs redirected to run.log, and quiet, fast imports."""

import contextlib
import functools
import gc
import logging
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpo_runner.errors import RunError, reason_of
from dpo_runner.io.masking import mask_text
from dpo_runner.io.upstream import list_newer


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Suppress library warnings and log messages during imports, and speed the imports up.

    Raises:
        RunError: a name is gone, and there are libraries newer than tested.
    """
    previous, collects = logging.root.manager.disable, gc.isenabled()
    logging.disable(logging.WARNING)
    gc.disable()  # a collection would scan half a million live objects and free nothing
    try:
        with warnings.catch_warnings(), _compiling_later():
            warnings.simplefilter("ignore")
            yield
    except ImportError as error:
        if newer := list_newer():
            raise RunError("; ".join([reason_of(error), *newer])) from error
        raise
    finally:
        logging.disable(previous)
        if collects:  # otherwise an outer block or the program disabled it, and will enable it again
            gc.enable()


@contextlib.contextmanager
def _compiling_later() -> Iterator[None]:
    """Delay `torch.compile` of decorated functions to their first call.

    bitsandbytes decorates four functions, and the first makes torch import inductor, which takes most of a second.
    """
    import torch

    module: Any = torch
    compile_now: Callable[..., Any] = torch.compile

    def compile_later(function: Any = None, **settings: Any) -> Any:
        if function is None:
            return functools.partial(compile_later, **settings)
        compiled = functools.cache(lambda: compile_now(function, **settings))
        return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))

    module.compile = compile_later
    try:
        yield
    finally:
        module.compile = compile_now


_CHATTY = ("transformers", "datasets", "trl", "peft", "accelerate", "bitsandbytes", "wandb", "huggingface_hub")


class _LogFile(logging.FileHandler):
    """Ignore write errors on a full disk; the run's own writes will fail and report it."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _Once(logging.Filter):
    """Pass each message of a library once, and count it. Messages of this package and tracebacks always pass."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: Counter[tuple[str, int, str]] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info or record.name.startswith(f"{__package__.partition('.')[0]}."):
            return True
        key = record.name, record.levelno, record.getMessage()
        self._counts[key] += 1
        return self._counts[key] == 1

    def report(self, handler: logging.Handler) -> None:
        """Hand the handler one record for each message that was repeated."""
        for (name, level, message), count in self._counts.items():
            if count > 1:
                told = "logged %d times in all: %s"
                handler.handle(logging.LogRecord(name, level, __file__, 0, told, (count, message), None))


class _Masking(logging.Formatter):
    """Mask secrets in every record, tracebacks included."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_text(super().format(record))


@contextlib.contextmanager
def route_library_logs(log: Path | None) -> Iterator[None]:
    """Redirect the libraries' log records and warnings to `log`, and disable their progress bars.

    Args:
        log: the file to append to, with repeated messages once and their counts at the end; None drops records below
            ERROR, and errors go to the terminal.
    """
    with quiet_imports():
        import datasets
        import transformers

    handler: logging.Handler = _LogFile(log, encoding="utf-8") if log else logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO if log else logging.ERROR)
    handler.setFormatter(_Masking("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    once = _Once()
    if log:
        handler.addFilter(once)
    loggers = [logging.getLogger(name) for name in _CHATTY]
    saved = [(logger, logger.handlers, logger.propagate) for logger in loggers]
    root = logging.getLogger()
    level = root.level
    bars = datasets.are_progress_bars_disabled()
    tqdm = os.environ.get("TQDM_DISABLE")
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    for logger in loggers:
        logger.handlers, logger.propagate = [], True
    logging.captureWarnings(True)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    os.environ["TQDM_DISABLE"] = "1"  # read by TRL's progress bars
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, handlers, propagate in saved:
            logger.handlers, logger.propagate = handlers, propagate
        root.setLevel(level)
        root.removeHandler(handler)
        handler.removeFilter(once)
        once.report(handler)
        handler.close()
        transformers.utils.logging.enable_progress_bar()
        if not bars:
            datasets.enable_progress_bars()
        if tqdm is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = tqdm

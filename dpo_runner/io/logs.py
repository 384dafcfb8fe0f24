"""Library messages go into run.log; quiet, fast imports."""

import contextlib
import functools
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpo_runner.io.masking import mask_text


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Keep what libraries print while they are imported away from the terminal, unless the import fails."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), _collecting_later(), _compiling_later():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def _collecting_later() -> Iterator[None]:
    """Let the garbage collector rest: it would go through half a million objects again and again, and find nothing."""
    if not gc.isenabled():  # whoever has switched it off, an import around this one too, switches it on
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def _compiling_later() -> Iterator[None]:
    """Let functions that are decorated with `torch.compile` import the compiler when they are first called.

    bitsandbytes has four of them, and torch imports its inductor, most of a second, for the first.
    """
    import torch

    module: Any = torch
    compile_now: Callable[..., Any] = torch.compile

    def compile_later(function: Any = None, **settings: Any) -> Any:
        if function is None:
            return functools.partial(compile_later, **settings)
        compiled: Any = None

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal compiled
            if compiled is None:
                compiled = compile_now(function, **settings)
            return compiled(*args, **kwargs)

        return call

    module.compile = compile_later
    try:
        yield
    finally:
        module.compile = compile_now


_CHATTY = ("transformers", "datasets", "trl", "peft", "accelerate", "bitsandbytes", "wandb", "huggingface_hub")


class _LogFile(logging.FileHandler):
    """Says nothing of lines that a full disk does not take: what the run lives by is about to fail of that too."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


class _Masking(logging.Formatter):
    """Writes no secret, whatever a library or a traceback says."""

    def format(self, record: logging.LogRecord) -> str:
        return mask_text(super().format(record))


@contextlib.contextmanager
def route_library_logs(log: Path | None) -> Iterator[None]:
    """Send log records, warnings and progress bars of the libraries to `log` instead of the terminal.

    Args:
        log: the file to add to; None drops all below errors, which go to the terminal.
    """
    with quiet_imports():
        import datasets
        import transformers

    handler: logging.Handler = _LogFile(log, encoding="utf-8") if log else logging.StreamHandler(sys.stderr)
    handler.setLevel(logging.INFO if log else logging.ERROR)
    handler.setFormatter(_Masking("%(asctime)s %(levelname)s %(name)s: %(message)s"))
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
    os.environ["TQDM_DISABLE"] = "1"  # TRL's own bars read it
    try:
        yield
    finally:
        logging.captureWarnings(False)
        for logger, handlers, propagate in saved:
            logger.handlers, logger.propagate = handlers, propagate
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()
        transformers.utils.logging.enable_progress_bar()
        if not bars:
            datasets.enable_progress_bars()
        if tqdm is None:
            del os.environ["TQDM_DISABLE"]
        else:
            os.environ["TQDM_DISABLE"] = tqdm

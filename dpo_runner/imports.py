"""How the libraries are imported: without a word, without what only compiled code needs, and without a collection."""

import contextlib
import functools
import gc
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Any


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

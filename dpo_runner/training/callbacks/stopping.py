"""Trainer callback: stop on a signal after the step, with a checkpoint; at once on a second Ctrl-C."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from dpo_runner.errors import DpoRunnerError
from dpo_runner.io.interrupts import SIGNALS, handles_ctrl_c
from dpo_runner.training.mixins.saving import EvaluationCut
from dpo_runner.training.ranks.group import count, gather
from dpo_runner.training.ranks.watch import ending_by_itself, note_progress

_NOTICE = b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n"


class Stopping(TrainerCallback):  # type: ignore[misc]
    """Ends training on a signal with a checkpoint of the current step; aborts a running evaluation.

    Before and after training a signal ends the run immediately, and so does SIGINT as a second signal.
    Other signals after the first are ignored: schedulers repeat them, or send SIGTERM after SIGUSR1; so do terminals.

    Raises:
        KeyboardInterrupt: with the first signal's number.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._training = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Handle signals inside this block; no-op outside the main thread, which alone receives them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        under_nohup = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        heeded = [number for number in SIGNALS if number != signal.SIGHUP or not under_nohup]
        previous = {number: signal.signal(number, self._heed) for number in heeded}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self._signal is not None and handles_ctrl_c():  # the exit code is that of the first signal
                for number in SIGNALS[1:]:
                    signal.signal(number, signal.SIG_IGN)

    @contextmanager
    def ending_right(self) -> Iterator[None]:
        """Raise KeyboardInterrupt again if torch's C++ code turned it into another error; see `ending_by_itself`."""
        with ending_by_itself():
            try:
                yield
            except Exception as error:
                if self._signal is None or self._training or isinstance(error, DpoRunnerError):
                    raise
                raise KeyboardInterrupt(self._signal) from error

    def _heed(self, number: int, frame: Any) -> None:
        is_first = self._signal is None
        if self._signal is None:
            self._signal = number
        if number == signal.SIGINT if not is_first else not self._training:
            raise KeyboardInterrupt(self._signal)
        if is_first:
            with contextlib.suppress(OSError):  # stderr may be closed
                os.write(2, _NOTICE)  # unbuffered: print is not reentrant

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        note_progress()
        self._agree()
        control.should_save |= self._signal is not None

    def _agree(self) -> None:
        """Let all processes stop for a signal to any of them: schedulers and agents may tell only one."""
        if count() > 1:
            received = [number for number in gather(self._signal) if number is not None]
            self._signal = self._signal or next(iter(received), None)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        note_progress()
        if self._training and self._signal is not None:
            raise EvaluationCut(self._signal)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agree()
        control.should_save |= self._signal is not None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._agree()
        self.end_training()

    def end_training(self) -> None:
        """Stop at once on later signals, and now if a signal came after the last save."""
        self._training = False
        self._stop()

    def _stop(self) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt(self._signal)

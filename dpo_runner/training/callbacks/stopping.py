"""Stopping a run from outside: after its step and with a checkpoint, or at once where Ctrl-C asks for it twice."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from dpo_runner.io.interrupts import handles_ctrl_c
from dpo_runner.training.mixins.saving import EvaluationCut

_NOTICE = b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n"


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, a scheduler that takes the machine back, and one that warns beforehand (Slurm's `--signal=USR1@120`)."""


class Stopping(TrainerCallback):  # type: ignore[misc]
    """Lets a signal end the training with a checkpoint of the step that it is in, and cuts an evaluation short.

    Before and after the training a signal ends the run where it stands, and so does a second one that is SIGINT.
    Other signals after the first change nothing: schedulers repeat them, or send SIGTERM after SIGUSR1.

    Raises:
        KeyboardInterrupt: with the first signal's number.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._training = False

    @contextmanager
    def on_signals(self) -> Iterator[None]:
        """Heed signals for as long as this lasts; they reach the main thread only, and elsewhere nothing is done."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._heed) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            if self._signal is not None and handles_ctrl_c():  # the command's exit code is the first signal's
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _heed(self, number: int, frame: Any) -> None:
        is_first = self._signal is None
        if self._signal is None:
            self._signal = number
        if number == signal.SIGINT if not is_first else not self._training:
            raise KeyboardInterrupt(self._signal)
        if is_first:
            with contextlib.suppress(OSError):  # nobody may be there to read it
                os.write(2, _NOTICE)  # what else prints may be in the midst of printing

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self._signal is not None

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._training and self._signal is not None:
            raise EvaluationCut(self._signal)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self._signal is not None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._stop()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.end_training()

    def end_training(self) -> None:
        """Stop at once from here on, and now where a signal has come after the last save."""
        self._training = False
        self._stop()

    def _stop(self) -> None:
        if self._signal is not None:
            raise KeyboardInterrupt(self._signal)

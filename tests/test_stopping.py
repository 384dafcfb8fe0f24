"""What signals do to a run, before, during and after its training."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest

from dpo_runner.stopping import SIGNALS, Stopping


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_in_the_training_the_step_ends_and_is_saved_first(number: int, capfd: pytest.CaptureFixture[str]) -> None:
    stopping, control = Stopping(), SimpleNamespace(should_save=False)
    with stopping.on_signals():
        stopping.on_train_begin(None, None, None)
        stopping.on_step_end(None, None, control)
        stopping.on_save(None, None, control)
        assert not control.should_save
        send(number)
        assert "stopping after this step, with a checkpoint" in capfd.readouterr().err
        stopping.on_step_end(None, None, control)
        assert control.should_save
        with pytest.raises(KeyboardInterrupt) as caught:
            stopping.on_save(None, None, control)
    assert caught.value.args == (number,)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_and_one_outside_the_training_end_the_run_where_it_stands(number: int) -> None:
    stopping = Stopping()
    with stopping.on_signals():
        with pytest.raises(KeyboardInterrupt):
            send(number)
        stopping.on_train_begin(None, None, None)
        send(number)
        with pytest.raises(KeyboardInterrupt) as caught:
            send(signal.SIGTERM)
    assert caught.value.args == (signal.SIGTERM,)
    finished = Stopping()
    with finished.on_signals():
        finished.on_train_begin(None, None, None)
        finished.on_train_end(None, None, None)
        with pytest.raises(KeyboardInterrupt):
            send(number)


def test_a_signal_after_the_last_save_is_not_forgotten() -> None:
    stopping = Stopping()
    with stopping.on_signals():
        stopping.on_train_begin(None, None, None)
        send(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            stopping.on_train_end(None, None, None)


def test_handlers_are_put_back_and_other_threads_set_none() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Stopping().on_signals():
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    seen = []

    def work() -> None:
        with Stopping().on_signals():
            seen.extend(signal.getsignal(number) for number in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == before

"""Signals before, during and after training."""

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import RunInterrupted
from dpo_runner.io.interrupts import SIGNALS
from dpo_runner.records.checkpoints import find_last_checkpoint, read_step
from dpo_runner.records.reading import read_metrics, read_summary
from dpo_runner.records.resume import read_logged
from dpo_runner.training.callbacks.stopping import Stopping
from dpo_runner.training.mixins.saving import EvaluationCut
from dpo_runner.training.trainer import RunTrainer


@pytest.fixture(autouse=True)
def not_under_nohup() -> Iterator[None]:
    previous = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, previous)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def test_under_nohup_a_run_outlives_its_terminal() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with Stopping().on_signals():
        send(signal.SIGHUP)


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


def test_what_torch_makes_of_a_signal_is_an_interruption_still() -> None:
    stopping = Stopping()
    with stopping.on_signals(), pytest.raises(KeyboardInterrupt) as caught, stopping.ending_right():
        try:
            send(signal.SIGTERM)
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'") from None
    assert caught.value.args == (signal.SIGTERM,)
    with pytest.raises(ValueError, match="a fault"), Stopping().ending_right():
        raise ValueError("a fault")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_outside_the_training_ends_the_run_where_it_stands(number: int) -> None:
    with Stopping().on_signals(), pytest.raises(KeyboardInterrupt) as caught:
        send(number)
    assert caught.value.args == (number,)
    finished = Stopping()
    with finished.on_signals():
        finished.on_train_begin(None, None, None)
        finished.on_train_end(None, None, None)
        with pytest.raises(KeyboardInterrupt):
            send(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_of_the_signals_after_the_first_only_ctrl_c_does_not_wait_for_the_checkpoint(number: int) -> None:
    stopping, control = Stopping(), SimpleNamespace(should_save=False)
    with stopping.on_signals():
        stopping.on_train_begin(None, None, None)
        for again in (number, *SIGNALS[1:]):
            if again != signal.SIGINT or again == number:
                send(again)
        stopping.on_step_end(None, None, control)
        assert control.should_save
        with pytest.raises(KeyboardInterrupt) as caught:
            send(signal.SIGINT)
        assert caught.value.args == (number,)
        send(signal.SIGTERM)  # while the run ends after the first signal


@pytest.mark.parametrize("number", SIGNALS)
def test_nobody_need_be_there_to_read_that_it_stops(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(os, "write", fail)
    stopping = Stopping()
    with stopping.on_signals():
        stopping.on_train_begin(None, None, None)
        send(number)


def test_an_evaluation_is_cut_short_in_the_training_alone() -> None:
    stopping = Stopping()
    with stopping.on_signals():
        stopping.on_train_begin(None, None, None)
        stopping.on_prediction_step(None, None, None)
        send(signal.SIGTERM)
        with pytest.raises(EvaluationCut) as caught:
            stopping.on_prediction_step(None, None, None)
        assert caught.value.args == (signal.SIGTERM,)


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


BEST = (
    *("training.load_best_model_at_end=true", "training.metric_for_best_model=rewards/margins"),
    *("training.greater_is_better=true", "training.save_steps=2"),
)
FIRST_IS_BEST = (
    *("training.load_best_model_at_end=true", "training.metric_for_best_model=rewards/margins"),
    *("training.greater_is_better=false", "training.save_strategy=best"),
)
EPOCHS = (
    "data.max_train_samples=4",
    "training.save_steps=1000",
    "training.logging_strategy=epoch",
)  # two steps per epoch


@pytest.mark.parametrize(
    ("extra", "step"),
    [
        (["training.save_steps=1000", "training.eval_steps=2", "lora.lora_dropout=0.2"], 2),
        (["training.eval_steps=2", *BEST], 4),
        (["training.eval_steps=2", *FIRST_IS_BEST], 2),
        ([*EPOCHS, "training.eval_strategy=epoch"], 2),
        ([*EPOCHS, "training.eval_steps=1"], 2),
        ([*EPOCHS, "training.eval_steps=1"], 4),
    ],
    ids=[
        "in an epoch",
        "the last, and the best",
        "the best, and the only one saved",
        "of an epoch",
        "before an epoch's event",
        "before the last event",
    ],
)
def test_an_evaluation_that_a_signal_has_cut_short_is_made_up(
    extra: list[str], step: int, tiny_run: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    predict, after = RunTrainer.prediction_step, []

    def signalled(self, *args, **kwargs):
        if self.is_in_train and self.state.global_step == step:
            after.append(step)
            if len(after) == 2:
                send(signal.SIGUSR1)
        return predict(self, *args, **kwargs)

    common = ["training.per_device_eval_batch_size=1", "samples.num_prompts=0"]
    overrides = [*tiny_run, *common, "data.eval_fraction=0.2", *extra]
    run(load_conf([*overrides, "run_dir=undisturbed"]))
    with monkeypatch.context() as patch:
        patch.setattr(RunTrainer, "prediction_step", signalled)
        with pytest.raises(RunInterrupted) as caught:
            run(load_conf([*overrides, "run_dir=r"]))
    assert caught.value.exit_code == 138 and len(after) == 2
    last = find_last_checkpoint(Path("r/checkpoints"))
    assert last is not None and read_step(last) == step and "eval_loss" not in read_logged(last)
    run(load_conf([*overrides, "run_dir=r"]))
    told, undisturbed = (
        [
            {key: value for key, value in event.items() if key != "time" and not key.endswith(("runtime", "second"))}
            for event in read_metrics(Path(folder))
        ]
        for folder in ("r", "undisturbed")
    )
    assert told == undisturbed
    weights = [Path(folder, "adapter/adapter_model.safetensors").read_bytes() for folder in ("r", "undisturbed")]
    assert weights[0] == weights[1]
    one, other = read_summary(Path("r")), read_summary(Path("undisturbed"))
    assert all(one[key] == other[key] for key in ("before", "after", "steps", "weights"))

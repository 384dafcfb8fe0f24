"""The session of a running run: the only writer of its directory, W&B run and console output."""

import logging
import os
import platform
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from dpo_runner.config.metrics import label_results, mark_ties
from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.preferences import PreferenceData
from dpo_runner.errors import ConfigError, DpoRunnerError, RunError, RunPruned, describe_failure
from dpo_runner.io.console import RunConsole
from dpo_runner.io.logs import route_library_logs
from dpo_runner.model.files.pickles import refuse_pickled_code
from dpo_runner.records.checkpoints import open_last_checkpoint, read_step
from dpo_runner.records.directory import RunDirectory
from dpo_runner.records.reading import read_metrics, read_status, read_summary
from dpo_runner.records.resume import (
    check_continuable,
    check_free,
    check_same_inputs,
    check_unused,
    interrupted,
    read_logged,
)
from dpo_runner.records.tracking import Tracker
from dpo_runner.training.callbacks.agreement import AgreementCheck
from dpo_runner.training.callbacks.events import RunEvents
from dpo_runner.training.callbacks.movement import MovementCheck
from dpo_runner.training.callbacks.stopping import Stopping
from dpo_runner.training.callbacks.trackers import follow
from dpo_runner.training.ranks.group import count, do_first, gather, is_first, rank, share
from dpo_runner.training.ranks.watch import write_into

logger = logging.getLogger(__name__)

Record = dict[str, Any]


class Session:
    """A run in progress.

    Attributes:
        console: the terminal output.
        say: shows one line.
        warn: shows one line as a warning.
        summary: the contents of summary.json, once the run has finished.
        weights: the folder of the result, once it is written.
        out_of_memory: one record per attempt that ran out of memory.
    """

    def __init__(
        self,
        directory: RunDirectory,
        conf: RunConf,
        tracker: Tracker,
        console: RunConsole,
        stopping: Stopping,
        callbacks: Sequence[TrainerCallback],
        out_of_memory: list[Record],
    ) -> None:
        self.directory, self.console, self.tracker = directory, console, tracker
        self.say, self.warn = console.say, console.warn
        self.summary: dict[str, Any] | None = None
        self.weights: Path | None = None
        self.out_of_memory = out_of_memory
        self._conf, self._stopping, self._further = conf, stopping, callbacks
        self._events = RunEvents(directory, tracker, console, conf)

    def begin_attempt(self) -> None:
        """Reset the training state for a new attempt after running out of memory."""
        self._stopping.end_training()
        self._events = RunEvents(self.directory, self.tracker, self.console, self._conf)

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """The trainer's callbacks: log events, movement check, the caller's callbacks, signal handling."""
        checks = self._conf.checks
        movement = [MovementCheck(checks.on_nonfinite == "skip_batch")] if checks.step0 else []
        own = [*([self._events] if is_first() else []), *movement, *([AgreementCheck()] if count() > 1 else [])]
        return [*own, *self._further, self._stopping]

    def open_checkpoint(self) -> Path | None:
        """Return the newest intact checkpoint, from which training continues, or None.

        Raises:
            ConfigError: the checkpoint contains a pickle that could run code.
        """
        return do_first(self._open_checkpoint)

    def _open_checkpoint(self) -> Path | None:
        training = self._conf.training
        checkpoint = open_last_checkpoint(
            self.directory.checkpoints,
            self.warn,
            needs_best=training.load_best_model_at_end,
            examine_all=training.save_total_limit is not None,
        )
        if checkpoint is not None:
            refuse_pickled_code(checkpoint)
        return checkpoint

    def record_inputs(self, environment: dict[str, Any], data: PreferenceData, checkpoint: Path | None) -> None:
        """Record environment, model and data; refuse to continue a checkpoint with different ones.

        Raises:
            ConfigError: the run began with another model or other data.
        """
        processes = gather({"host": platform.node(), "pid": os.getpid()})
        if not is_first():
            return
        if len(processes) > 1:
            self.directory.note(processes=processes)
        if checkpoint is not None:
            check_same_inputs(self.directory.path, environment, self.warn)
        self.directory.write_environment(environment)
        self.directory.write_data_report(data.report.to_dict(), data.dropped())
        self.tracker.log_data_report(data.report.to_dict(), data.report.histograms())

    def rewind_metrics(self, checkpoint: Path | None) -> None:
        """Drop the log events that training from `checkpoint`, or from the start, will log again.

        Raises:
            ConfigError: the run cannot be continued because its checkpoints lack the reference.
        """
        if checkpoint is not None and self._conf.training.sync_ref_model:
            raise ConfigError(
                "`training.sync_ref_model=True`: such a run cannot be continued, checkpoints lack its reference"
            )
        step, logged = (read_step(checkpoint), read_logged(checkpoint)) if checkpoint else (-1, set())
        if is_first():
            self.directory.keep_metrics_until(step, logged)

    @contextmanager
    def muted(self, is_muted: bool) -> Iterator[None]:
        """Suppress log events inside this block if `is_muted`."""
        self._events.silent = is_muted
        try:
            yield
        finally:
            self._events.silent = False

    def note_out_of_memory(self, records: list[Record]) -> None:
        """Record the settings that were reduced after running out of memory."""
        self.out_of_memory = records
        if not is_first():
            return
        self.directory.note(out_of_memory=records)
        self.tracker.log_out_of_memory(records)

    def further_records(self, after: dict[str, Any]) -> dict[str, Any]:
        """Return what summary.json holds beside metrics: attempts that ran out of memory, published figures."""
        expected = self._events.expected.conclude(read_metrics(self.directory.path), after)
        records = {"out_of_memory": self.out_of_memory, "expected": expected}
        return {key: record for key, record in records.items() if record}

    def write_samples(self, samples: list[dict[str, Any]]) -> None:
        """Save the answers before and after training."""
        self.directory.write_samples(samples)
        self.tracker.log_samples(samples)

    def show_next_steps(self) -> None:
        """Show the location of the results and the commands that use them."""
        assert self.weights is not None
        self.console.show_next_steps(self.directory.path, self.weights, self.tracker.commands())

    def conclude(self, summary: dict[str, Any], weights: Path, samples: list[dict[str, Any]]) -> None:
        """Save and show the run's results."""
        self.summary, self.weights = summary, weights
        self.directory.write_summary(summary)
        self.tracker.log_summary(summary, self._conf.sweep.search.objective)
        self.console.show_samples(samples[: self._conf.samples.show])
        shown = summary | {"before": mark_ties(summary["before"], 0, self._conf.model)}
        self.console.show_summary(shown, label_results(summary["after"]))
        for line in summary.get("expected", {}).get("told", ()):
            self.say(line)


@contextmanager
def open_session(
    path: Path,
    conf: RunConf,
    overrides: Sequence[str],
    console: RunConsole,
    callbacks: Sequence[TrainerCallback],
) -> Iterator[Session | None]:
    """Lock a run directory, and keep status.json, run.log and W&B correct however the run ends.

    Args:
        path: the run's directory.
        conf: the configuration as composed.
        overrides: the overrides it was composed from.
        console: the terminal output.
        callbacks: additional trainer callbacks.

    Yields:
        The session; None if another process has finished the run in the meantime.

    Raises:
        RunBusy: another process is running in the directory.
        RunError, RunInterrupted, RunPruned: raised by the block; recorded before they propagate.
    """
    stopping = Stopping()
    with RunDirectory(path).claim() if is_first() else nullcontext(RunDirectory(path)) as directory:
        if do_first(lambda: _is_finished(path, conf, console)):
            yield None
            return
        records: list[Record] = share((read_status(path) or {}).get("out_of_memory", []))
        records = records if conf.checks.on_out_of_memory == "smaller_batch" else []
        write_into(path / "ranks", lambda state, reason: directory.write_last_status(state, error=reason))
        first = recorded(directory, conf, overrides, console, stopping, follow(conf, directory, console.warn), records)
        with first if is_first() else _logged(path / "ranks", stopping, console) as opened:
            session = Session(directory, conf, opened, console, stopping, callbacks, records)
            yield session
        if is_first():
            assert session.summary is not None
            directory.write_status("finished", adapter=session.summary["weights"])  # only after W&B is closed


@contextmanager
def _logged(folder: Path, stopping: Stopping, console: RunConsole) -> Iterator[Tracker]:
    """Keep the log of a process other than the first, which writes nothing else."""
    with route_library_logs(folder / f"{rank()}.log"), stopping.on_signals(), stopping.ending_right():
        yield Tracker(None, console.warn, None)


@contextmanager
def recorded(
    directory: RunDirectory,
    conf: RunConf,
    overrides: Sequence[str],
    console: RunConsole,
    stopping: Stopping,
    tracker: AbstractContextManager[Tracker],
    out_of_memory: Sequence[Record] = (),
) -> Iterator[Tracker]:
    """Keep status.json, run.log and `tracker` correct however the block ends."""
    with ExitStack() as stack:
        stack.enter_context(route_library_logs(directory.log))
        console.note_trouble()
        stack.enter_context(stopping.on_signals())
        stack.callback(directory.stop_heartbeat)
        directory.write_config(conf, overrides)
        directory.write_status("running", **({"out_of_memory": out_of_memory} if out_of_memory else {}))
        directory.start_heartbeat()
        try:
            with tracker as opened, stopping.ending_right():
                yield opened
        except KeyboardInterrupt as error:
            console.stop_training()
            number = error.args[0] if error.args else signal.SIGINT
            directory.write_last_status("interrupted", error=signal.Signals(number).name)
            raise interrupted(directory.path, number) from None
        except RunPruned as error:
            console.stop_training()
            console.say(str(error))
            directory.write_last_status("pruned", step=error.step, steps=error.steps)
            directory.drop_checkpoints()  # a pruned run is not continued
            raise
        except (Exception, SystemExit) as error:
            console.stop_training()
            logger.error("the run failed\n%s", traceback.format_exc())
            told = describe_failure(error)
            directory.write_last_status("failed", error=told)
            if isinstance(error, DpoRunnerError):
                raise
            raise RunError(f"{told}; the traceback is in {directory.log}") from error


def read_finished(path: Path, conf: RunConf, console: RunConsole) -> dict[str, Any] | None:
    """Check that a run may write to its directory; return the summary if it has already finished.

    Raises:
        RunBusy: another process is running in the directory.
        ConfigError: the directory contains something else, or a run that cannot be continued.
    """
    if (status := read_status(path)) is not None:
        check_free(path, status)
    return read_summary(path) if _is_finished(path, conf, console) else None


def _is_finished(path: Path, conf: RunConf, console: RunConsole) -> bool:
    """Check that a directory may be written to; return whether its run has finished, and say so."""
    status = read_status(path)
    if status is None:
        check_unused(path)
        return False
    check_continuable(path, status, conf)
    if status["state"] != "finished":
        return False
    console.say(f"{path} is finished; its results are in {path / 'summary.json'}")
    return True

"""Weights & Biases logging. wandb is imported only when used, and its failures never fail a run."""

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_runner.config.metrics import BENCHMARKS
from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import RunPruned
from dpo_runner.io.masking import mask_secrets
from dpo_runner.records.directory import RunDirectory
from dpo_runner.records.wandb_files import find_folder, keep_data_in, list_commands, mark_sent
from dpo_runner.records.wandb_run import describe_error, has_lost_service, messages, open_run, stop_service

logger = logging.getLogger(__name__)

OBJECTIVE = "objective"
"""The name in W&B's summary of the metric that a sweep optimizes."""


class Tracker:
    """A run's W&B logger. No method does anything if W&B is disabled, and none raises if it fails.

    Args:
        wandb_run: the live `wandb.Run`, or None.
        warn: shows one line on the terminal.
        refused: why `wandb_run` differs from what the configuration asks for, if it does.
    """

    def __init__(self, wandb_run: Any, warn: Callable[[str], None], refused: str | None = None) -> None:
        self._run = wandb_run
        self._warn, self._warned = warn, False
        self._untold: str | None = None
        self._id: str | None = None if wandb_run is None else wandb_run.id
        self.further: Any = None
        """The run's other trackers, which get the same events (`training.callbacks.trackers`)."""
        self.folder: Path | None = None if wandb_run is None else Path(wandb_run.settings.sync_dir)
        self.url: str | None = None if wandb_run is None or wandb_run.offline else wandb_run.url
        self.state = "disabled" if wandb_run is None else f"online at {self.url}" if self.url else "offline"
        """The state of W&B in status.json."""
        if refused:
            self.state += f": {refused}"

    def log(self, metrics: dict[str, Any]) -> None:
        """Log one event under the names used by the Trainer's W&B callback: train/… and eval/…, and benchmarks/…"""
        step = metrics["step"]
        named = {
            _name(key): value
            for key, value in metrics.items()
            if key not in ("step", "time") and isinstance(value, (int, float))
        }
        self._attempt(lambda: self._run.log({**named, "train/global_step": step}))

    def log_data_report(self, report: dict[str, Any], lengths: Mapping[str, Any]) -> None:
        """Log the data report.

        Args:
            report: added to the W&B configuration.
            lengths: token-count histograms as (counts, edges), by `<split>/<part>`.
        """

        def log_report() -> None:
            import wandb

            self._run.config.update({"data_report": mask_secrets(report)}, allow_val_change=True)
            self._run.log(
                {f"data/{name}_tokens": wandb.Histogram(np_histogram=histogram) for name, histogram in lengths.items()}
            )

        self._attempt(log_report)

    def log_out_of_memory(self, records: list[dict[str, Any]]) -> None:
        """Add the reductions made after running out of memory to the W&B configuration."""
        self._attempt(lambda: self._run.config.update({"out_of_memory": records}, allow_val_change=True))

    def log_samples(self, samples: list[dict[str, Any]]) -> None:
        """Log the answers before and after training as a table, if there are any."""

        def log_table() -> None:
            import wandb

            columns = ["prompt", "before", "after", "before_tokens", "after_tokens"]
            rows = [
                [
                    "\n".join(f"{message['role']}: {message['content']}" for message in sample["prompt"]),
                    sample["before"]["text"],
                    sample["after"]["text"],
                    sample["before"]["tokens"],
                    sample["after"]["tokens"],
                ]
                for sample in samples
            ]
            try:
                self._run.log({"samples": wandb.Table(columns=columns, data=rows)})
            except Exception:
                # Online, W&B asks the server for a table's artifact before it records anything. A table bound to the
                # run is recorded without an artifact, so it is not lost if the server is unreachable.
                table = wandb.Table(columns=columns, data=rows)
                table.bind_to_run(self._run, "samples", self._run.step)
                self._run.log({"samples": table})
                raise

        if samples:
            self._attempt(log_table, say=False)  # `finish` soon reports the failure, with a cure

    def log_summary(self, summary: dict[str, Any], objective: str) -> None:
        """Add the run's figures to the W&B summary, which W&B compares runs by.

        Args:
            summary: the contents of summary.json.
            objective: the metric of the tuned model also logged as `OBJECTIVE`; skipped if it was not measured.
        """
        flat = {key: value for key, value in summary.items() if not isinstance(value, dict)}
        for phase in ("before", "after"):
            flat |= {f"{phase}/{key}": value for key, value in summary.get(phase, {}).items()}
        if objective in summary["after"]:
            flat[OBJECTIVE] = summary["after"][objective]
        self._attempt(lambda: self._run.summary.update(mask_secrets(flat)))

    def finish(self, state: str, exit_code: int, **figures: Any) -> None:
        """Close the W&B run, and warn if the server does not have all of it.

        Args:
            state: finished, pruned, failed or interrupted, as in status.json; added to the summary.
            exit_code: anything but 0 marks the W&B run as failed.
            figures: added to the summary.
        """
        if self._run is None or self.folder is None:
            return
        self._attempt(lambda: self._run.summary.update({"state": state, **figures}))
        failure = None
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            logger.exception("W&B failed")
            failure = describe_error(error)
            if has_lost_service(error):
                stop_service()  # else it would fail again at exit, and in the next run
        self._run = None
        if self.url is None:
            if failure := failure or self._untold:
                self._warn_once(failure)
            return
        failure = failure or messages.failure or self._untold
        if failure is None:
            mark_sent(self.folder)
        else:
            self.state += f", which does not have all of it: {failure}"
            command = self.commands().get("upload")
            upload = f"; the rest is uploaded by {command}" if command else ""
            if upload or not self._warned:
                self._warn(f"W&B does not have all of this run: {failure}{upload}")

    def add_tag(self, tag: str) -> None:
        def add() -> None:
            self._run.tags = (*(self._run.tags or ()), tag)

        self._attempt(add)

    def commands(self) -> dict[str, str]:
        """Return the commands that show this run, and upload it if the server lacks some of it, by their use."""
        return {} if self.folder is None else list_commands(self.folder.parent, self._id)

    def _attempt(self, call: Callable[[], Any], say: bool = True) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:  # no W&B failure may stop the training
            logger.exception("W&B failed")
            if say:
                self._warn_once(describe_error(error))
            else:
                self._untold = describe_error(error)

    def _warn_once(self, failure: str) -> None:
        """Report the first failure only: if W&B's process has died, every event fails."""
        if not self._warned:
            self._warn(f"W&B: {failure}; the run goes on without it, and metrics.jsonl has all figures")
        self._warned = True


def _name(key: str) -> str:
    """Return W&B's name of a figure; those of benchmarks begin with benchmarks/ already."""
    if key.startswith("eval_"):
        return f"eval/{key.removeprefix('eval_')}"
    return key if key.startswith(BENCHMARKS) else f"train/{key}"


@contextlib.contextmanager
def track(conf: RunConf, directory: RunDirectory, warn: Callable[[str], None]) -> Iterator[Tracker]:
    """Open the W&B run that `conf.wandb` asks for, and close it with the run's outcome.

    Args:
        conf: the run's configuration.
        directory: the run's directory, with the id of the W&B run, which a resumed run continues.
        warn: shows one line on the terminal.
    """
    with keep_data_in(find_folder(conf.wandb.dir, directory.path)):
        wandb_run, refused = open_run(conf, directory, warn)
        tracker = Tracker(wandb_run, warn, refused)
        directory.note(wandb=tracker.state)
        try:
            yield tracker
        except RunPruned as error:
            tracker.add_tag("pruned")
            tracker.finish("pruned", 0, steps=error.step)
            raise
        except KeyboardInterrupt as error:
            tracker.finish("interrupted", 128 + (error.args[0] if error.args else signal.SIGINT))
            raise
        except BaseException:
            tracker.finish("failed", 1)
            raise
        else:
            tracker.finish("finished", 0)
        finally:
            directory.note(wandb=tracker.state)

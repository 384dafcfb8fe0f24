"""What a run tells Weights & Biases, which is imported only when it is used. Trouble with it never fails a run."""

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import RunPruned
from dpo_runner.io.masking import mask_secrets
from dpo_runner.records.directory import RunDirectory
from dpo_runner.records.wandb_files import find_folder, keep_data_in, list_commands, mark_sent
from dpo_runner.records.wandb_run import describe_error, has_lost_service, messages, open_run, stop_service

logger = logging.getLogger(__name__)

OBJECTIVE = "objective"
"""What W&B's summary calls the metric that a sweep is judged by, whichever it is."""


class Tracker:
    """What a run tells W&B. Every method is harmless when W&B is disabled or has failed.

    Args:
        wandb_run: the live `wandb.Run`, or None.
        warn: shows one line to the person at the terminal.
        refused: why it is not what the configuration asks for, where it is not.
    """

    def __init__(self, wandb_run: Any, warn: Callable[[str], None], refused: str | None = None) -> None:
        self._run = wandb_run
        self._warn, self._warned = warn, False
        self._untold: str | None = None
        self._id: str | None = None if wandb_run is None else wandb_run.id
        self.folder: Path | None = None if wandb_run is None else Path(wandb_run.settings.sync_dir)
        self.url: str | None = None if wandb_run is None or wandb_run.offline else wandb_run.url
        self.state = "disabled" if wandb_run is None else f"online at {self.url}" if self.url else "offline"
        """What status.json says about W&B."""
        if refused:
            self.state += f": {refused}"

    def log(self, metrics: dict[str, Any]) -> None:
        """Log one event under the names that the Trainer's own W&B callback gives: train/… and eval/…"""
        step = metrics["step"]
        named = {
            f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": value
            for key, value in metrics.items()
            if key not in ("step", "time") and isinstance(value, (int, float))
        }
        self._attempt(lambda: self._run.log({**named, "train/global_step": step}))

    def log_data_report(self, report: dict[str, Any], lengths: Mapping[str, Any]) -> None:
        """Log the account of the data.

        Args:
            report: goes into the configuration.
            lengths: histograms of tokens as (counts, edges), by `<split>/<part>`.
        """

        def log_report() -> None:
            import wandb

            self._run.config.update({"data_report": mask_secrets(report)}, allow_val_change=True)
            self._run.log(
                {f"data/{name}_tokens": wandb.Histogram(np_histogram=histogram) for name, histogram in lengths.items()}
            )

        self._attempt(log_report)

    def log_out_of_memory(self, records: list[dict[str, Any]]) -> None:
        """Add to the configuration what was made smaller because memory ran out."""
        self._attempt(lambda: self._run.config.update({"out_of_memory": records}, allow_val_change=True))

    def log_samples(self, samples: list[dict[str, Any]]) -> None:
        """Log the answers before and after as a table, and nothing where there are none."""

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
                # Online, W&B asks the server about a table's artifact before it records anything. A table that is
                # bound to the run is recorded without one, so that it is not lost while the server is away.
                table = wandb.Table(columns=columns, data=rows)
                table.bind_to_run(self._run, "samples", self._run.step)
                self._run.log({"samples": table})
                raise

        if samples:
            self._attempt(log_table, say=False)  # `finish` does so in a moment, with what can be done about it

    def log_summary(self, summary: dict[str, Any], objective: str) -> None:
        """Put the run's figures into the W&B summary, by which runs are compared.

        Args:
            summary: what summary.json holds.
            objective: the metric of the tuned model that is `OBJECTIVE` too; left out where it was not measured.
        """
        flat = {key: value for key, value in summary.items() if not isinstance(value, dict)}
        for phase in ("before", "after"):
            flat |= {f"{phase}/{key}": value for key, value in summary.get(phase, {}).items()}
        if objective in summary["after"]:
            flat[OBJECTIVE] = summary["after"][objective]
        self._attempt(lambda: self._run.summary.update(mask_secrets(flat)))

    def finish(self, state: str, exit_code: int, **figures: Any) -> None:
        """Close the W&B run, and say so where the server does not have all of it.

        Args:
            state: finished, pruned, failed or interrupted, as in status.json; kept in the summary.
            exit_code: anything but 0 makes it a failed run.
            figures: for the summary.
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
                stop_service()  # which would fail once more when this process ends, and fail its next run
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
            upload = "".join(f"; the rest is uploaded by {command}" for command in self.commands()[1:])
            if upload or not self._warned:
                self._warn(f"W&B does not have all of this run: {failure}{upload}")

    def add_tag(self, tag: str) -> None:
        def add() -> None:
            self._run.tags = (*(self._run.tags or ()), tag)

        self._attempt(add)

    def commands(self) -> list[str]:
        """Return the commands that show this run: in the terminal, and on the web where the server lacks some of it."""
        return [] if self.folder is None else list_commands(self.folder.parent, self._id)

    def _attempt(self, call: Callable[[], Any], say: bool = True) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:  # whatever it is, the training is worth more than its curves
            logger.exception("W&B failed")
            if say:
                self._warn_once(describe_error(error))
            else:
                self._untold = describe_error(error)

    def _warn_once(self, failure: str) -> None:
        """Tell of a failure, but not again at every event, as where W&B's own process has died."""
        if not self._warned:
            self._warn(f"W&B: {failure}; the run goes on, metrics.jsonl has everything")
        self._warned = True


@contextlib.contextmanager
def track(conf: RunConf, directory: RunDirectory, warn: Callable[[str], None]) -> Iterator[Tracker]:
    """Open the W&B run that `conf.wandb` asks for, and close it with the run's outcome.

    Args:
        conf: the run.
        directory: holds the id of the W&B run, which a resumed run continues.
        warn: shows one line to the person at the terminal.
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

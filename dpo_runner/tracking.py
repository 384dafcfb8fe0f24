"""All of Weights & Biases, imported only when it is used. Trouble with it never fails a run."""

import contextlib
import logging
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from dpo_runner.artifacts import RunDirectory, mask_secrets, write_text
from dpo_runner.config import RunConf, config_keys
from dpo_runner.data.report import DataReport
from dpo_runner.errors import RunPruned

logger = logging.getLogger(__name__)

_TIMEOUT_SECONDS = 30


class Tracker:
    """What a run tells W&B. Every method is harmless when W&B is disabled or has failed.

    Args:
        wandb_run: the live `wandb.Run`, or None.
        warn: shows one line to the person at the terminal.
    """

    def __init__(self, wandb_run: Any, warn: Callable[[str], None]) -> None:
        self._run = wandb_run
        self._warn = warn
        self._id: str | None = None if wandb_run is None else wandb_run.id
        self.folder: Path | None = None if wandb_run is None else Path(wandb_run.settings.sync_dir)
        self.url: str | None = None if wandb_run is None or wandb_run.offline else wandb_run.url

    def log(self, metrics: dict[str, Any]) -> None:
        """Log one event under the names that the Trainer's own W&B callback gives: train/… and eval/…"""
        step = metrics["step"]
        named = {
            f"eval/{key.removeprefix('eval_')}" if key.startswith("eval_") else f"train/{key}": value
            for key, value in metrics.items()
            if key not in ("step", "time") and isinstance(value, (int, float))
        }
        self._attempt(lambda: self._run.log({**named, "train/global_step": step}))

    def log_data_report(self, report: DataReport) -> None:
        """Log the account of the data: whole into the configuration, lengths as histograms."""

        def log_report() -> None:
            import wandb

            self._run.config.update({"data_report": report.to_dict()}, allow_val_change=True)
            self._run.log(
                {
                    f"data/{split}/{part}_tokens": wandb.Histogram(np_histogram=(lengths.counts, lengths.edges))
                    for split, pairs in report.splits.items()
                    for part, lengths in pairs.lengths.items()
                }
            )

        self._attempt(log_report)

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
            self._run.log({"samples": wandb.Table(columns=columns, data=rows)})

        if samples:
            self._attempt(log_table)

    def log_summary(self, summary: dict[str, Any]) -> None:
        """Put the run's figures into the W&B summary, by which runs are compared."""
        flat = {key: value for key, value in summary.items() if not isinstance(value, dict)}
        for phase in ("before", "after"):
            flat |= {f"{phase}/{key}": value for key, value in summary.get(phase, {}).items()}
        self._attempt(lambda: self._run.summary.update(flat))

    def finish(self, exit_code: int) -> None:
        self._attempt(lambda: self._run.finish(exit_code=exit_code))
        self._run = None

    def commands(self) -> list[str]:
        """Return the commands that show this run: in the terminal, and on the web where it is still offline."""
        if self.folder is None:
            return []
        commands = [f"wandb leet {self.folder.parent}"]
        if self.url:
            return commands
        parts = sorted(self.folder.parent.glob(f"offline-run-*-{self._id}*"))  # a resumed run has one for each part
        return [*commands, f"wandb sync {' '.join(map(str, parts))}"]

    def _attempt(self, call: Callable[[], Any]) -> None:
        if self._run is None:
            return
        try:
            call()
        except Exception as error:  # whatever it is, the training is worth more than its curves
            logger.exception("W&B failed")
            self._warn(f"W&B: {_first_line(error)}; the run goes on, metrics.jsonl has everything")


@contextlib.contextmanager
def track(conf: RunConf, directory: RunDirectory, warn: Callable[[str], None]) -> Iterator[Tracker]:
    """Open the W&B run that `conf.wandb` asks for, and close it with the run's outcome.

    Args:
        conf: the run; its configuration is logged once, without secrets.
        directory: W&B's files go under its wandb/ folder, and a resumed run continues the W&B run found there.
        warn: shows one line to the person at the terminal.
    """
    tracker = Tracker(_open(conf, directory, warn), warn)
    try:
        yield tracker
    except RunPruned as error:
        tracker.log_summary({"state": "pruned", "steps": error.step})
        tracker.finish(exit_code=0)
        raise
    except BaseException:
        tracker.finish(exit_code=1)
        raise
    tracker.finish(exit_code=0)


def _open(conf: RunConf, directory: RunDirectory, warn: Callable[[str], None]) -> Any:
    if conf.wandb.mode == "disabled":
        return None
    modes: list[Literal["online", "offline"]] = ["online", "offline"] if conf.wandb.mode == "online" else ["offline"]
    for mode in modes:
        try:
            return _init(conf, directory, mode)
        except Exception as error:
            logger.exception("W&B did not start in mode %s", mode)
            _id_file(directory).unlink(missing_ok=True)  # W&B's service holds on to the id of the failed start
            then = "the run is recorded offline instead" if mode != modes[-1] else "the run goes on without it"
            warn(f"W&B did not start: {_first_line(error)}; {then}")
    return None


def _init(conf: RunConf, directory: RunDirectory, mode: Literal["online", "offline"]) -> Any:
    import wandb

    id_file = _id_file(directory)
    id_file.parent.mkdir(exist_ok=True)
    if not id_file.exists():
        write_text(id_file, secrets.token_hex(4))
    run = wandb.init(
        dir=directory.path.resolve(),  # W&B's service is a process with a working directory of its own
        mode=mode,
        id=id_file.read_text(encoding="utf-8"),
        resume="allow",
        reinit="finish_previous",  # one of several runs of this process that died must not receive our data
        project=conf.wandb.project,
        entity=conf.wandb.entity,
        group=conf.wandb.group,
        name=conf.wandb.name or f"{conf.run_name}/{directory.path.name}",
        tags=mask_secrets(conf.wandb.tags),
        notes=mask_secrets(conf.wandb.notes),
        config=mask_secrets({key: value for key, value in config_keys(conf).items() if key != "wandb"}),
        settings=wandb.Settings(
            quiet=True,
            silent=True,
            console="off",
            x_disable_meta=True,  # it would hold the command line as typed, secrets included
            disable_git=True,
            disable_code=True,
            init_timeout=_TIMEOUT_SECONDS,
            finish_timeout=_TIMEOUT_SECONDS,
            x_transaction_log_flush_interval=2,
        ),
    )
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step")
    return run


def _id_file(directory: RunDirectory) -> Path:
    return directory.path / "wandb" / "run_id.txt"


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def stop_service() -> None:
    """End the process in which W&B serves this one, if there is any; the next run starts another."""
    if "wandb" in sys.modules:
        import wandb

        wandb.teardown()

"""All of Weights & Biases, imported only when it is used. Trouble with it never fails a run."""

import contextlib
import logging
import secrets
import shlex
import shutil
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
_LONGEST_REASON = 200
"""Characters of an error that are shown; a server's answer may be a whole page."""


class Tracker:
    """What a run tells W&B. Every method is harmless when W&B is disabled or has failed.

    Args:
        wandb_run: the live `wandb.Run`, or None.
        warn: shows one line to the person at the terminal.
        refused: why it is not what the configuration asks for, where it is not.
    """

    def __init__(self, wandb_run: Any, warn: Callable[[str], None], refused: str | None = None) -> None:
        self._run = wandb_run
        self._warn = warn
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
            self._attempt(log_table)

    def log_summary(self, summary: dict[str, Any]) -> None:
        """Put the run's figures into the W&B summary, by which runs are compared."""
        flat = {key: value for key, value in summary.items() if not isinstance(value, dict)}
        for phase in ("before", "after"):
            flat |= {f"{phase}/{key}": value for key, value in summary.get(phase, {}).items()}
        self._attempt(lambda: self._run.summary.update(flat))

    def finish(self, exit_code: int) -> None:
        """Close the W&B run, and say so where the server does not have all of it."""
        if self._run is None:
            return
        failure = None
        try:
            self._run.finish(exit_code=exit_code)
        except Exception as error:
            logger.exception("W&B failed")
            failure = _first_line(error)
        self._run = None
        if self.url is None:
            if failure is not None:
                self._warn(f"W&B: {failure}; the run goes on, metrics.jsonl has everything")
            return
        failure = failure or _messages.failure
        if failure is None:
            for file in self._files():
                if file.parent == self.folder:
                    _mark(file).touch()
        else:
            self.state += f", which does not have all of it: {failure}"
            self._warn(f"W&B does not have all of this run: {failure}; the rest is uploaded by {self.commands()[-1]}")

    def commands(self) -> list[str]:
        """Return the commands that show this run: in the terminal, and on the web where the server lacks some of it."""
        if self.folder is None:
            return []
        commands = [["wandb", "leet", str(self.folder.parent)]]
        files = self._files()
        sent = [_mark(file).exists() for file in files]
        if not all(sent):
            # What came after the first that is missing is sent again, so that the newest figures stay the newest.
            files = files[sent.index(False) :]
            flags = ["--include-synced"] if True in sent[-len(files) :] else []
            flags += ["--include-online"] if any(file.parent.name.startswith("run-") for file in files) else []
            commands.append(["wandb", "sync", *flags, *(str(file.parent) for file in files)])
        return [shlex.join(command) for command in commands]

    def _files(self) -> list[Path]:
        """Return what W&B has recorded of this run, oldest first: a file for each time that it was started."""
        assert self.folder is not None
        files = self.folder.parent.glob(f"*run-*-{self._id}/*.wandb")
        return sorted(files, key=lambda file: file.parent.name.removeprefix("offline-"))

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
    wandb_run, refused = _open(conf, directory, warn)
    tracker = Tracker(wandb_run, warn, refused)
    directory.note(wandb=tracker.state)
    try:
        yield tracker
    except RunPruned as error:
        tracker.log_summary({"state": "pruned", "steps": error.step})
        tracker.finish(exit_code=0)
        raise
    except BaseException:
        tracker.finish(exit_code=1)
        raise
    else:
        tracker.finish(exit_code=0)
    finally:
        directory.note(wandb=tracker.state)


def _open(conf: RunConf, directory: RunDirectory, warn: Callable[[str], None]) -> tuple[Any, str | None]:
    """Return the W&B run, or None, and why it is not what the configuration asks for, where it is not."""
    if conf.wandb.mode == "disabled":
        return None, None
    refused = None
    modes: list[Literal["online", "offline"]] = ["online", "offline"] if conf.wandb.mode == "online" else ["offline"]
    for mode in modes:
        try:
            return _start(conf, directory, mode), refused
        except Exception as error:
            logger.exception("W&B did not start in mode %s", mode)
            then = "the run is recorded offline instead" if mode != modes[-1] else "the run goes on without it"
            refused = _first_line(error)
            warn(f"W&B did not start: {refused}; {then}")
    return None, refused


def _start(conf: RunConf, directory: RunDirectory, mode: Literal["online", "offline"]) -> Any:
    """Return the W&B run, or leave nothing of a start that failed: it would be uploaded as a part of the run."""
    before = _find_parts(directory)
    try:
        return _init(conf, directory, mode)
    except Exception:
        stop_service()  # which holds on to the run's id
        for part in _find_parts(directory) - before:
            shutil.rmtree(part)
        raise


def _find_parts(directory: RunDirectory) -> set[Path]:
    """Return the folders into which W&B has recorded the run, one for each time that it was started."""
    file = _id_file(directory)
    return set(file.parent.glob(f"*run-*-{file.read_text(encoding='utf-8')}")) if file.exists() else set()


def _init(conf: RunConf, directory: RunDirectory, mode: Literal["online", "offline"]) -> Any:
    import wandb

    id_file = _id_file(directory)
    id_file.parent.mkdir(exist_ok=True)
    if not id_file.exists():
        write_text(id_file, secrets.token_hex(4))
    _messages.failure = None
    wandb.setup()
    # Without a terminal of its own, W&B neither writes into the run's nor stops to ask there for a key.
    wandb.termsetup(wandb.Settings(silent=True), _messages)
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
            finish_timeout_raises=True,
            # A server that is back has to be noticed before the time is up.
            x_graphql_retry_wait_max_seconds=_TIMEOUT_SECONDS / 3,
            x_file_stream_retry_wait_max_seconds=_TIMEOUT_SECONDS / 3,
            x_file_transfer_retry_wait_max_seconds=_TIMEOUT_SECONDS / 3,
            x_transaction_log_flush_interval=2,
        ),
    )
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step")
    return run


def _id_file(directory: RunDirectory) -> Path:
    return directory.path / "wandb" / "run_id.txt"


def _mark(file: Path) -> Path:
    """Return the file by which `wandb sync` knows that a .wandb file has been uploaded."""
    return file.with_suffix(".wandb.synced")


def _first_line(error: Exception) -> str:
    line = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 1] + "…"


class _Messages:
    """Hears what W&B would print: it goes into run.log, and that an upload was given up is remembered."""

    def __init__(self) -> None:
        self.failure: str | None = None

    def info(self, text: str) -> None:
        logger.info("W&B: %s", text)

    def warning(self, text: str) -> None:
        logger.warning("W&B: %s", text)
        if "`wandb sync`" in text:
            self.failure = text.partition(". ")[0]

    error = warning


_messages = _Messages()


def stop_service() -> None:
    """End the process in which W&B serves this one, if there is any; the next run starts another."""
    if "wandb" in sys.modules:
        import wandb

        wandb.teardown()

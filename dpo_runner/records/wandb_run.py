"""Starting a W&B run: online, else offline, else not at all, with nothing left of a start that failed."""

import logging
import os
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from dpo_runner.config.keys import Effect, effect_of
from dpo_runner.config.run_conf import RunConf, config_keys
from dpo_runner.config.sections.run import WandbConf
from dpo_runner.errors import reason_of
from dpo_runner.io.files import write_text
from dpo_runner.io.masking import mask_secrets, mask_text
from dpo_runner.records.directory import RunDirectory
from dpo_runner.records.wandb_files import find_folder, find_parts

logger = logging.getLogger(__name__)

_Mode = Literal["online", "offline"]

_TIMEOUT_SECONDS = 30
_LONGEST_NAME = 128
"""Characters of a name or a group; W&B's server refuses a run with longer ones."""
_LONGEST_REASON = 200
"""Characters of an error that are shown; a server's answer may be a whole page."""


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


messages = _Messages()


def is_under_agent() -> bool:
    """Return whether this process is a run of a sweep of W&B's own, started by `wandb agent`."""
    return bool(os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"))


def open_run(conf: RunConf, directory: RunDirectory, warn: Callable[[str], None]) -> tuple[Any, str | None]:
    """Start the `wandb.Run` that `conf.wandb` asks for: a new one, or the one that `directory` holds the id of.

    Args:
        conf: the run; what it computes is logged once, without secrets and without names and places, which would
            seem to explain its results.
        directory: of the run.
        warn: shows one line to the person at the terminal.

    Returns:
        The run, or None; and why it is not what the configuration asks for, where it is not.
    """
    if is_under_agent() and conf.wandb.mode != "online":
        warn(f"wandb.mode={conf.wandb.mode}: W&B's sweep sees nothing of this run; add wandb=online to its command")
    if conf.wandb.mode == "disabled":
        return None, None
    reasons: list[str] = []
    modes: list[_Mode] = ["online", "offline"] if conf.wandb.mode == "online" else ["offline"]
    for mode in modes:
        try:
            wandb_run = _start(conf, directory, mode)
        except Exception as error:
            logger.exception("W&B did not start in mode %s", mode)
            reasons.append(describe_error(error))
        else:
            if reasons:
                warn(f"W&B did not start: {reasons[0]}; the run is recorded offline instead")
            return wandb_run, reasons[0] if reasons else None
    refused = ", nor offline: ".join(dict.fromkeys(reasons))
    warn(f"W&B did not start: {refused}; the run goes on without it")
    return None, refused


def _start(conf: RunConf, directory: RunDirectory, mode: _Mode) -> Any:
    """Return the W&B run, or leave nothing of a start that failed: it would be uploaded as a part of the run."""
    folder = find_folder(conf.wandb.dir, directory.path).resolve()  # W&B's service has a working directory of its own
    folder.mkdir(parents=True, exist_ok=True)
    run_id = _read_id(directory)
    before = find_parts(folder, run_id)
    try:
        return _init(conf, directory, mode, folder, run_id)
    except Exception:
        stop_service()  # which holds on to the run's id
        for part in find_parts(folder, run_id) - before:
            shutil.rmtree(part)
        raise


def _init(conf: RunConf, directory: RunDirectory, mode: _Mode, folder: Path, run_id: str) -> Any:
    import wandb

    service = os.environ.get("WANDB_SERVICE")
    if service is not None and f"-{os.getpid()}-" not in service:
        del os.environ["WANDB_SERVICE"]  # of the process that started this one: it keeps the ids of runs that died
    messages.failure = None
    wandb.setup()
    # Without a terminal of its own, W&B neither writes into the run's nor stops to ask there for a key.
    wandb.termsetup(wandb.Settings(silent=True), messages)
    agent = is_under_agent()  # which has made the run already: where, and with which id, is not ours to say
    told = WandbConf(**mask_secrets(vars(conf.wandb)))
    run = wandb.init(
        dir=folder.parent,
        mode=mode,
        id=None if agent else run_id,
        resume="allow",
        reinit="finish_previous",  # one of several runs of this process that died must not receive our data
        project=None if agent else told.project,
        entity=None if agent else told.entity,
        group=None if told.group is None else _shorten(told.group, _LONGEST_NAME),
        job_type=told.job_type,
        name=_shorten(told.name or mask_text(f"{conf.run_name}/{directory.path.name}"), _LONGEST_NAME),
        tags=told.tags,
        notes=told.notes,
        config=mask_secrets(
            {key: value for key, value in config_keys(conf).items() if effect_of(key) is not Effect.PLACES}
        ),
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
    run.summary["run_dir"] = mask_secrets(str(directory.path))
    run.define_metric("train/global_step")
    run.define_metric("*", step_metric="train/global_step")
    return run


def _shorten(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _read_id(directory: RunDirectory) -> str:
    """Return the id of the W&B run: the agent's, or one that is made once for a run directory."""
    file = directory.path / "wandb" / "run_id.txt"
    given = os.environ["WANDB_RUN_ID"] if is_under_agent() else None
    if given or not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_text(file, given or secrets.token_hex(4))
    return file.read_text(encoding="utf-8")


def describe_error(error: Exception) -> str:
    """Return why something failed, in a line that can be shown."""
    return _shorten(mask_text(reason_of(error)), _LONGEST_REASON)


def has_lost_service(error: Exception) -> bool:
    """Whether W&B fails because the process in which it serves this one has died."""
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    return isinstance(error, (ConnectionError, HandleAbandonedError, MailboxClosedError))


def stop_service() -> None:
    """End the process in which W&B serves this one, if there is any, or forget it; the next run starts another."""
    if "wandb" in sys.modules:
        import wandb

        try:
            wandb.teardown()
        except (Exception, SystemExit):  # SystemExit: so W&B tells of a process that has ended by itself
            logger.exception("W&B's process has not ended in order")

"""Start of a W&B run: online, else offline, else without W&B. A failed start leaves no files."""

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
"""Maximum characters of a run's name; W&B's server rejects longer ones, and a run directory may have one."""
_LONGEST_REASON = 200
"""Maximum characters shown of an error; a server's response may be a whole page."""


class _Messages:
    """Receiver of W&B's terminal messages: writes them to run.log and records an abandoned upload."""

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
    """Return whether this process is a run of a W&B sweep, started by `wandb agent`."""
    return bool(os.environ.get("WANDB_SWEEP_ID") and os.environ.get("WANDB_RUN_ID"))


def open_run(conf: RunConf, directory: RunDirectory, warn: Callable[[str], None]) -> tuple[Any, str | None]:
    """Start the `wandb.Run` that `conf.wandb` asks for: a new one, or the one whose id is in `directory`.

    Args:
        conf: the run's configuration; logged once, without secrets, and without names and paths, which would seem to
            explain the results.
        directory: the run's directory.
        warn: shows one line on the terminal.

    Returns:
        The W&B run, or None; and why it differs from what the configuration asks for, if it does.
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
    """Start a W&B run; delete the files of a failed start, which would be uploaded as a part of the run."""
    folder = find_folder(conf.wandb.dir, directory.path).resolve()  # W&B's service has another working directory
    folder.mkdir(parents=True, exist_ok=True)
    run_id = _read_id(directory)
    before = find_parts(folder, run_id)
    try:
        return _init(conf, directory, mode, folder, run_id)
    except Exception:
        stop_service()  # it keeps the run's id
        for part in find_parts(folder, run_id) - before:
            shutil.rmtree(part)
        raise


def _init(conf: RunConf, directory: RunDirectory, mode: _Mode, folder: Path, run_id: str) -> Any:
    import wandb

    service = os.environ.get("WANDB_SERVICE")
    if service is not None and f"-{os.getpid()}-" not in service:
        del os.environ["WANDB_SERVICE"]  # the parent process's service, which keeps the ids of dead runs
    messages.failure = None
    wandb.setup()
    # Without a terminal, W&B neither writes to the run's terminal nor waits there for a key.
    wandb.termsetup(wandb.Settings(silent=True), messages)
    agent = is_under_agent()  # the agent has created the run, with its project, entity and id
    told = WandbConf(**mask_secrets(vars(conf.wandb)))
    run = wandb.init(
        dir=folder.parent,
        mode=mode,
        id=None if agent else run_id,
        resume="allow",
        reinit="finish_previous",  # an earlier, dead run of this process must not receive our data
        project=None if agent else told.project,
        entity=None if agent else told.entity,
        group=told.group,
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
            x_disable_meta=True,  # it would contain the command line, secrets included
            disable_git=True,
            disable_code=True,
            init_timeout=_TIMEOUT_SECONDS,
            finish_timeout=_TIMEOUT_SECONDS,
            finish_timeout_raises=True,
            # Retry often enough to notice a recovered server before the timeout.
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
    """Return the id of the W&B run: the agent's, or one generated once per run directory."""
    file = directory.path / "wandb" / "run_id.txt"
    given = os.environ["WANDB_RUN_ID"] if is_under_agent() else None
    if given or not file.exists():
        file.parent.mkdir(exist_ok=True)
        write_text(file, given or secrets.token_hex(4))
    return file.read_text(encoding="utf-8")


def describe_error(error: Exception) -> str:
    """Return an error's reason as one short line without secrets."""
    return _shorten(mask_text(reason_of(error)), _LONGEST_REASON)


def has_lost_service(error: Exception) -> bool:
    """Return whether W&B failed because its service process has died."""
    from wandb.sdk.mailbox import HandleAbandonedError, MailboxClosedError

    return isinstance(error, (ConnectionError, HandleAbandonedError, MailboxClosedError))


def stop_service() -> None:
    """End W&B's service process if there is one, or forget it; the next run starts another."""
    if "wandb" in sys.modules:
        import wandb

        try:
            wandb.teardown()
        except (Exception, SystemExit):  # wandb raises SystemExit if its process has already ended
            logger.exception("W&B's process has not ended in order")

"""What is kept of a run while it goes on, and true however it ends: status.json, run.log, and W&B's record."""

import logging
import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import DpoRunnerError, RunError, RunInterrupted, RunPruned, describe_failure
from dpo_runner.io.console import RunConsole
from dpo_runner.io.logs import route_library_logs
from dpo_runner.records.directory import RunDirectory
from dpo_runner.records.tracking import Tracker, track
from dpo_runner.training.callbacks.stopping import Stopping

logger = logging.getLogger(__name__)


@contextmanager
def recorded(
    directory: RunDirectory,
    conf: RunConf,
    overrides: Sequence[str],
    console: RunConsole,
    stopping: Stopping,
    details: dict[str, Any],
) -> Iterator[Tracker]:
    """Keep status.json (`details` from the first), run.log and W&B true to what happens inside, however it ends."""
    with ExitStack() as stack:
        stack.enter_context(route_library_logs(directory.log))
        console.note_trouble()
        stack.enter_context(stopping.on_signals())
        stack.callback(directory.stop_heartbeat)
        directory.write_config(conf, overrides)
        directory.write_status("running", **details)
        directory.start_heartbeat()
        try:
            with track(conf, directory, console.warn) as tracker:
                yield tracker
        except KeyboardInterrupt as error:
            console.stop_training()
            number = error.args[0] if error.args else signal.SIGINT
            directory.write_last_status("interrupted", error=signal.Signals(number).name)
            raise RunInterrupted(
                f"interrupted; continue with the same command and run_dir={directory.path}", signal_number=number
            ) from None
        except RunPruned as error:
            console.stop_training()
            console.say(str(error))
            directory.write_last_status("pruned", step=error.step, steps=error.steps)
            directory.drop_checkpoints()  # nobody continues it
            raise
        except (Exception, SystemExit) as error:
            console.stop_training()
            logger.error("the run failed\n%s", traceback.format_exc())
            told = describe_failure(error)
            directory.write_last_status("failed", error=told)
            if isinstance(error, DpoRunnerError):
                raise
            raise RunError(f"{told}; the traceback is in {directory.log}") from error

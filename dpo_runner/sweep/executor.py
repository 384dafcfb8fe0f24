"""A sweep's worker process: runs the jobs sent to it, one after another.

`workers.py` starts it as `python -m dpo_runner.sweep.executor FD`, with its threads and its GPU set.
"""

import contextlib
import faulthandler
import gc
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import DpoRunnerError, RunBusy, RunInterrupted, RunPruned, describe_failure
from dpo_runner.io.exits import report
from dpo_runner.io.masking import mask_text
from dpo_runner.io.streams import put
from dpo_runner.records.directory import update_status
from dpo_runner.records.reading import read_status
from dpo_runner.sweep.directory import DONE
from dpo_runner.training.memory.device import OutOfMemory, is_out_of_memory

if TYPE_CHECKING:
    from dpo_runner.model.policy import LoadBase
    from dpo_runner.sweep.base_pool import BasePool


def perform(
    conf: RunConf, overrides: Sequence[str], log: Path | None = None, bases: "BasePool | None" = None
) -> dict[str, Any]:
    """Run one job and record in its status.json how it ended, however it ended.

    Args:
        conf: the job's configuration, with `run_dir` set.
        overrides: the overrides that it was composed from.
        log: the file with the job's output; recorded in its status.
        bases: keeps the base model from one job to the next.

    Returns:
        `state`; if the job did not finish also `error`, and possibly `out_of_memory`, `has_advice` or `signal`.
    """
    from dpo_runner.train import run

    assert conf.run_dir is not None
    path = Path(conf.run_dir)
    place = {} if log is None else {"log": str(log)}
    before = read_status(path)
    try:
        load_base = choose_loader(conf, bases)  # may free the base
        if conf.rounds:
            from dpo_runner.generate.rounds import run_rounds

            run_rounds(conf, overrides, shared=path.parent / "answers")
            return {"state": "finished"}
        held = bases.count_bytes(conf.training.use_cpu) if bases is not None else 0
        run(conf, overrides, callbacks=_build_callbacks(conf, path), load_base=load_base, held=held)
    except RunPruned as error:
        return {"state": "pruned", "error": str(error)}
    except (RunInterrupted, KeyboardInterrupt) as error:
        number = error.exit_code - 128 if isinstance(error, RunInterrupted) else error.args[0] if error.args else 2
        name = signal.Signals(number).name
        update_status(path, state="interrupted", error=name, **place)
        return {"state": "interrupted", "error": name, "signal": number}
    except RunBusy as error:  # another process owns the directory, status.json included
        return {"state": "failed", "error": str(error)}
    except BaseException as error:  # SystemExit too: code in the job may call sys.exit
        told = str(error).strip() if isinstance(error, DpoRunnerError) else describe_failure(error)
        if (status := read_status(path)) is not None and status != before and status["state"] == "failed":
            told = str(status["error"])  # the run's own description
        if isinstance(error, DpoRunnerError):
            report(error)  # run.log has the traceback, if any
        else:
            put(mask_text(traceback.format_exc()), to_stderr=True)
        update_status(path, state="failed", error=told, **place)
        of_memory = is_out_of_memory(error)
        return {"state": "failed", "error": told, "out_of_memory": of_memory, "has_advice": type(error) is OutOfMemory}
    return {"state": "finished"}


def choose_loader(conf: RunConf, bases: "BasePool | None") -> "LoadBase":
    """Return what loads the base model of a job: the pool, if `engine.keep_base_model`, `launch` and `rounds` allow."""
    from dpo_runner.model.policy import load_fresh

    if bases is not None and conf.engine.keep_base_model and conf.launch.processes in (None, 1) and not conf.rounds:
        return bases.load
    if bases is not None:
        bases.clear()
    return load_fresh


def _build_callbacks(conf: RunConf, path: Path) -> Sequence[Any]:
    if conf.sweep.search.pruner is None:
        return ()
    from dpo_runner.sweep.search.pruning import Pruning  # imports Optuna, which only a search needs

    return (Pruning(path, conf.sweep.search),)


def main() -> None:
    """Serve the connection whose file descriptor is the only command-line argument."""
    faulthandler.enable()
    connection = Connection(int(sys.argv[1]))
    signal.signal(signal.SIGTERM, _interrupt)
    jobs: queue.Queue[tuple[RunConf, Sequence[str]] | None] = queue.Queue()
    threading.Thread(target=_receive, args=(connection, jobs), name="receive", daemon=True).start()
    try:
        import torch

        from dpo_runner import train as _run  # slow imports, done once before the first job
        from dpo_runner.sweep.base_pool import BasePool

        del _run
        gc.freeze()  # exclude what was imported from all later collections, such as the one after each job
        bases = BasePool()
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        connection.send({"state": "ready"})
        while (job := jobs.get()) is not None:
            conf, overrides = job
            assert conf.run_dir is not None
            log = Path(conf.run_dir) / "job.log"
            with _output_to(log):
                outcome = perform(conf, overrides, log, bases)
                _clean_up(bases)
            connection.send(outcome)
            if outcome["state"] not in DONE:
                return  # this process may be in a bad state; a new one takes over
    except KeyboardInterrupt:
        return


def _interrupt(number: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt(number)


def _receive(connection: Connection, jobs: "queue.Queue[tuple[RunConf, Sequence[str]] | None]") -> None:
    """Pass jobs to the main thread; if the sweep's process is gone, end this one as Ctrl-C would."""
    try:
        while (job := connection.recv()) is not None:
            jobs.put(job)
        jobs.put(None)
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _output_to(log: Path) -> Iterator[None]:
    """Redirect all output of this process, that of C libraries included, to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    saved = [os.dup(1), os.dup(2)]
    with log.open("ab") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        for stream, number, handle in zip((sys.stdout, sys.stderr), (1, 2), saved, strict=True):
            with contextlib.suppress(OSError):  # the disk may be full
                stream.flush()
            os.dup2(handle, number)
            os.close(handle)


def _clean_up(bases: "BasePool") -> None:
    """Free everything of a job except the bare base model, and stop W&B's service process."""
    import torch

    from dpo_runner.records.wandb_run import stop_service

    stop_service()
    bases.put_back()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

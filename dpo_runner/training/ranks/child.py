"""One of the processes that `launch.processes` starts: `python -m dpo_runner.training.ranks.child PARENT < JOB`."""

import gc
import os
import pickle
import sys
import threading
import time

from dpo_runner.io.interrupts import end_at_once, exit_now, on_ctrl_c

with on_ctrl_c(end_at_once):
    from dpo_runner.errors import DpoRunnerError
    from dpo_runner.io.exits import honest_exit
    from dpo_runner.io.processes import take_gpu

_POLL_SECONDS = 0.5


def main() -> None:
    """Do the pickled job on standard input; the launcher shows a failure, so this process only exits with its code."""
    threading.Thread(target=_end_with_parent, args=(int(sys.argv[1]),), name="parent", daemon=True).start()
    with honest_exit("interrupted"):
        take_gpu()
        job = pickle.load(sys.stdin.buffer)  # imports torch
        gc.freeze()
        try:
            job()
        except DpoRunnerError as error:
            sys.exit(error.exit_code)


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    exit_now(1)


if __name__ == "__main__":
    main()

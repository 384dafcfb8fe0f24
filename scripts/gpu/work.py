"""Parts of the check, one after another in one process; `check` starts it.

    python -m scripts.gpu.work TASK PART=SECONDS …

Each result is one line of JSON on standard output. A part that raises an error is reported, and the next one runs; a
part that takes longer than its time ends the process.
"""

import faulthandler
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from scripts.gpu.inputs import Task

MARK = "RESULT "


class Tell(Protocol):
    """Reports a result at once.

    Args:
        text: one sentence.
        ok: whether the result is as it must be.
        figures: further fields of the result.
    """

    def __call__(self, text: str, ok: bool = True, **figures: Any) -> None: ...


Part = Callable[["Task", Tell], None]


def load_part(name: str) -> Part:
    """Return the function of a part: one of exactness, or `ours` or `trl` with a size, as in `ours:7b`."""
    from scripts.gpu import attention, benchmark, card, layers, processes, recovery, rounding, training

    kind, _, size = name.partition(":")
    sides: dict[str, Any] = {"ours": benchmark.measure_ours, "trl": benchmark.measure_trl}
    if kind in sides:
        return partial(sides[kind], size)
    parts: dict[str, Part] = {
        "card": card.describe_card,
        "attention": attention.check_attention,
        "layers": layers.check_layers,
        "training": training.check_training,
        "rounding": rounding.check_rounding,
        "resume": recovery.check_resume,
        "memory": recovery.check_out_of_memory,
        "processes": processes.check_processes,
    }
    return parts[name]


def perform(name: str, part: Part, task: "Task", say: Callable[[dict[str, Any]], None]) -> None:
    """Run one part and report its results, its error, if there is one, and its end."""
    start = time.monotonic()

    def tell(text: str, ok: bool = True, **figures: Any) -> None:
        say({"part": name, "text": text, "ok": ok, **figures})

    error = None
    try:
        part(task, tell)
    except BaseException as failure:
        traceback.print_exc()
        error = describe_error(failure)
    say({"part": name, "seconds": round(time.monotonic() - start, 1), "error": error})


def describe_error(error: BaseException) -> str:
    """Return the type and the last line of an error."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}".rstrip(": ")[:300]


def free_memory() -> None:
    """Give a GPU's cached memory back, so that what follows sees it as free."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    from scripts.gpu.inputs import Task

    task = json.loads(sys.argv[1])

    def say(result: dict[str, Any]) -> None:
        print(f"{MARK}{json.dumps(result)}", flush=True)

    for argument in sys.argv[2:]:
        name, _, seconds = argument.partition("=")
        part = load_part(name)  # imports, in no part's time
        say({"part": name, "started": True})
        faulthandler.dump_traceback_later(float(seconds), exit=True)
        perform(name, part, Task(**{**task, "seconds": float(seconds)}), say)
        faulthandler.cancel_dump_traceback_later()
        free_memory()


if __name__ == "__main__":
    main()

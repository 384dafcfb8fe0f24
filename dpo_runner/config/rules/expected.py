"""Rules of `expected`. Imports no torch."""

import math
from collections.abc import Iterator

from dpo_runner.config.metrics import OF_SAMPLES, evaluation_keys
from dpo_runner.config.rules.sweep import list_objectives
from dpo_runner.config.sections.expected import ExpectedConf
from dpo_runner.config.sections.run import RunFields
from dpo_runner.errors import suggest


def check_expected(conf: RunFields) -> Iterator[str]:
    """Yield one line per broken rule of `expected`."""
    if conf.expected and conf.rounds is not None:
        yield f"`rounds={conf.rounds}`: `expected` is of one run on published pairs; use expected=[], or no rounds"
    at_end = list_objectives(conf)
    at_steps = [*evaluation_keys(), "grad_norm", *(name for name in at_end if name.startswith("eval_"))]
    at_steps = [name for name in at_steps if name not in OF_SAMPLES]
    for index, entry in enumerate(conf.expected):
        where, known = f"expected[{index}]", at_end if entry.step == "end" else at_steps
        if entry.metric not in known:
            other = ", which only a step has" if entry.metric in at_steps else ""
            other = ", which is measured before and after training alone" if entry.metric in at_end else other
            near = suggest(entry.metric, known)
            yield f"`{where}.metric={entry.metric}`: no such metric at step={entry.step}{other or near}"
        if entry.step != "end" and (not isinstance(entry.step, int) or entry.step < 1):
            yield f"`{where}.step={entry.step}`: must be a step, at least 1, or `end`"
        elif entry.step != "end" and 0 < conf.training.max_steps < (last := find_last_step(entry)):
            yield (
                f"`{where}.step={last}`: training.max_steps={conf.training.max_steps} is the last step; expected=[] "
                "compares nothing"
            )
        yield from _check_band(entry, where)
        if not entry.source:
            yield f"`{where}.source`: must be set: the page, paper or file that has the figure"


def find_last_step(entry: ExpectedConf) -> int:
    """Return the last step of an entry that has one."""
    return int(entry.step) + max(len(entry.values) - 1, 0)


def _check_band(entry: ExpectedConf, where: str) -> Iterator[str]:
    low, high = entry.low, entry.high
    if not all(math.isfinite(each or 0) for each in (low, high, entry.tolerance, *entry.values)):
        yield f"`{where}`: must have finite numbers"
    if entry.values and (low is not None or high is not None):
        yield f"`{where}.values`: takes the place of low and high; leave these out, or values"
    elif not entry.values and low is None and high is None:
        yield f"`{where}`: must have low, high or both, or values and tolerance"
    elif low is not None and high is not None and low > high:
        yield f"`{where}.low={low:g}`: must be at most high={high:g}"
    if entry.values and entry.step == "end":
        yield f"`{where}.values`: are those of consecutive steps; set step to the first one"
    if entry.tolerance < 0 or (entry.tolerance and not entry.values):
        yield f"`{where}.tolerance={entry.tolerance:g}`: must be 0 or above, and is of `values` alone"

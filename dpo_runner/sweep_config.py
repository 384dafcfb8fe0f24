"""The section `sweep`: how the runs of a sweep are chosen and executed. Imports no torch."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dpo_runner.search_config import SearchConf


@dataclass
class SweepConf:
    """Many runs as one experiment, with `-m` or `sweep=NAME`."""

    workers: int | None = None
    """Processes that take jobs, one after another; null: one for each GPU, or one on the CPU."""
    threads_per_worker: int = 1
    """Threads of each worker on the CPU; results of different numbers of threads differ in their last bits."""
    on_error: str = field(default="continue", metadata={"choices": ("continue", "stop")})
    """After a job that fails: `continue` with the others, or `stop` starting new ones."""
    max_failures: int | None = None
    """Start no more jobs once so many have failed; null: never mind."""
    dir: str | None = None
    """The sweep's directory; null makes outputs/sweeps/<run_name>/<timestamp>. One that exists is continued."""
    resume: str | None = field(default=None, metadata={"choices": ("last",)})
    """`last` continues the newest directory under outputs/sweeps/<run_name>/."""
    paired: list[Any] = field(default_factory=list)
    """Keys of axes whose values move together, instead of in every combination; or several such lists."""
    sample: int | None = None
    """Run so many random points of the grid; null: all of them."""
    sample_seed: int = 0
    """Decides which points `sample` takes."""
    search: SearchConf = field(default_factory=SearchConf)
    """A search in the place of a grid."""


def check_sweep(sweep: SweepConf) -> Iterator[str]:
    """Yield one line for each rule between the fields of `sweep` that is broken."""
    if sweep.dir is not None and sweep.resume is not None:
        yield f"`sweep.resume={sweep.resume}`: sweep.dir={sweep.dir} says already what to continue; set one of them"
    if sweep.on_error == "stop" and sweep.max_failures is not None:
        yield f"`sweep.max_failures={sweep.max_failures}`: with sweep.on_error=stop it is 1; leave one of them out"
    groups = sweep.paired if all(isinstance(item, list) for item in sweep.paired) else [sweep.paired]
    keys = [key for group in groups for key in group]
    if any(not isinstance(key, str) for key in keys) or len(set(keys)) < len(keys) or any(len(g) == 1 for g in groups):
        yield (
            f"`sweep.paired={sweep.paired}`: must be a list of two or more keys, such as [training.beta,seed], or a "
            "list of such lists, and name each key once"
        )

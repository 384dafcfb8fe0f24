"""The section `sweep`, a grid or a search. Imports neither torch nor Optuna."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SearchConf:
    """A search, which chooses each point by what the ones before have shown. It uses Optuna."""

    sampler: str | None = field(default=None, metadata={"choices": ("tpe", "random")})
    """Who chooses: `tpe` (tree-structured Parzen estimator) or `random`; null: no search, a grid."""
    trials: int = 20
    """How many points are chosen."""
    seed: int = 0
    """Seeds the sampler."""
    objective: str = "eval_rewards/accuracies"
    """What is sought, a metric of the tuned model; the loss is not comparable across beta."""
    direction: str | None = field(default=None, metadata={"choices": ("maximize", "minimize")})
    """null: `minimize` for losses, `maximize` for accuracies, margins and rewards/chosen; others need it."""
    pruner: str | None = field(default=None, metadata={"choices": ("median", "successive_halving")})
    """Who stops a run by its evaluations: Optuna's `median` or `successive_halving`; null: nobody."""
    startup_trials: int = 5
    """So many trials come first: at random under `tpe`, and to their end under `median`."""
    warmup_steps: int = 0
    """Optimizer steps before which no run is stopped."""


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

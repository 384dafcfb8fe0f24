"""The section `sweep`: a grid or a search. Imports neither torch nor Optuna."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SearchConf:
    """A search with Optuna: each point is chosen from the results of the previous ones."""

    sampler: str | None = field(default=None, metadata={"choices": ("tpe", "random")})
    """`tpe` (tree-structured Parzen estimator) or `random`; null: a grid, no search."""
    trials: int = 20
    """Number of points."""
    seed: int = 0
    """Seed of the sampler."""
    objective: str = "eval_rewards/accuracies"
    """Metric of the tuned model to optimize; the loss is not comparable across beta."""
    guard: Any = field(default=None, metadata={"type": "dict[str, Any] | None"})
    """By a benchmark's metric the smallest difference to the reference, such as {benchmarks/arc_easy/acc: -0.01}; a
    point with less cannot win. Of a grid too; null: none."""
    direction: str | None = field(default=None, metadata={"choices": ("maximize", "minimize")})
    """null: `minimize` for losses, `maximize` for accuracies, margins and rewards/chosen; required for others."""
    pruner: str | None = field(default=None, metadata={"choices": ("median", "successive_halving")})
    """Stop bad runs early by their evaluations, with Optuna's `median` or `successive_halving`; null: never."""
    startup_trials: int = 5
    """Number of initial trials: sampled at random with `tpe`, never pruned with `median`."""
    warmup_steps: int = 0
    """Optimizer steps before a run may be stopped."""
    storage: str | None = None
    """URL of a PostgreSQL database for the study, which several commands can share; null: study.db in `sweep.dir`."""

    @property
    def guards(self) -> dict[str, float]:
        """The guard; {} if there is none."""
        return dict(self.guard or {})


@dataclass
class SweepConf:
    """Many runs as one experiment, started with `-m` or `sweep=NAME`."""

    workers: int | None = None
    """Worker processes; null: one per GPU, or one on the CPU."""
    threads_per_worker: int = 1
    """CPU threads per worker; results with different thread counts differ in the last bits."""
    on_error: str = field(default="continue", metadata={"choices": ("continue", "stop")})
    """After a failed job: `continue` with the others, or `stop` starting new ones."""
    max_failures: int | None = None
    """Start no more jobs after this many failures; null: no limit."""
    dir: str | None = None
    """The sweep's directory; an existing sweep is continued. null: outputs/sweeps/<run_name>/<timestamp>."""
    resume: str | None = field(default=None, metadata={"choices": ("last",)})
    """`last` continues the newest directory under outputs/sweeps/<run_name>/."""
    paired: list[Any] = field(default_factory=list)
    """Keys whose values are paired instead of combined, or several such lists."""
    sample: int | None = None
    """Number of random grid points to run; null: all."""
    sample_seed: int = 0
    """Seed of `sample`."""
    search: SearchConf = field(default_factory=SearchConf)
    """A search instead of a grid."""

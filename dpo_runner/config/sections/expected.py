"""The section `expected`: figures of a published run. Imports no torch."""

from dataclasses import dataclass, field


@dataclass
class ExpectedConf:
    """A published figure, or those of consecutive steps, and the band in which a run's own must lie."""

    metric: str = ""
    """A step's metric, such as `loss`, `grad_norm` or `eval_loss`, or one of summary.json."""
    step: int | str = "end"
    """Optimizer step after which it was logged, the first one of `values`; `end`: after training."""
    low: float | None = None
    """The band's lower end; null: none."""
    high: float | None = None
    """The band's upper end; null: none."""
    values: list[float] = field(default_factory=list)
    """In place of low and high: the figures of `step` and the steps after it."""
    tolerance: float = 0.0
    """Distance of the band's ends from each of `values`."""
    source: str = ""
    """Where it was published."""

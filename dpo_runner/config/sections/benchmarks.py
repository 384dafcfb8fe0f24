"""The section `benchmarks`: tasks of lm-evaluation-harness."""

from dataclasses import dataclass, field


@dataclass
class BenchmarksConf:
    """Tasks of lm-evaluation-harness, which score policy and reference."""

    tasks: list[str] = field(default_factory=list)
    """Names of the harness's tasks, groups and tags, of those in `include_path` and of the bundled `basics_…`. A run
    scores them before and after training, `python -m dpo_runner.evaluate` with policy and reference."""
    limit: float | None = None
    """Documents of each task that are used, the first ones, or their share if below 1; null: all."""
    num_fewshot: int | None = None
    """Solved examples in front of each document; null: what the task says."""
    include_path: str | None = None
    """Folder with YAML files of your own tasks, in the harness's format."""
    batch_size: int = 16
    """Requests in one forward. Those below 512 tokens may be more, `batch_size` × 512 tokens together."""
    steps: list[int] = field(default_factory=list)
    """Optimizer steps after which a run scores its policy too."""
    answers: str | None = field(default=None, metadata={"choices": ("alpaca_eval", "mt_bench", "arena_hard")})
    """`python -m dpo_runner.evaluate` also answers the questions of AlpacaEval 2, MT-Bench or Arena-Hard, in files for
    their judges."""
    questions: str | None = None
    """File with that project's questions."""
    max_drop: float = 0.1
    """With `python -m dpo_runner.evaluate RUN_DIR --gate`: how much worse than the reference the first metric of a task
    may be."""

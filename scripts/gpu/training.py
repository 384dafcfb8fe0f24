"""Short trainings with dpo_runner and with TRL's own script: the same steps and the same adapter."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from dpo_runner.io.console import RunConsole
from scripts.bench.peers.same_job import DifferentJobs, check_same_job
from scripts.bench.peers.sides import Job, build_ours, build_trl, read_history, read_state, vary
from scripts.gpu.inputs import Task, prepare_job
from scripts.gpu.work import Tell

LIMITS = {"loss": 1e-4, "rewards/margins": 2e-4, "logps/chosen": 2e-2, "logps/rejected": 2e-2}
"""Largest allowed difference of a step's metrics in fp32. Log-probabilities are sums over tokens."""
ADAPTER = 1e-4
"""Largest allowed distance of adapters in fp32, a relative L2 norm over all their weights."""
_SHARE = 1.5
"""Largest allowed distance from the same training in fp32, in units of that of TRL's forward.

Above 1 because rounding is random."""
_FIRST_LOSS = 2e-3
"""Largest allowed distance of a first loss from ln 2."""
PLAIN = ("engine.shared_prefix=false", "engine.lean_layers=false", "engine.reference_store=false")
PAIRS, STEP = 16, 2

FALLBACKS = ("TRL's own forward is taken", "engine.reference_store: not used", "out of memory")
"""Parts of lines that a run shows if it does not do what is to be measured."""

Adapter = dict[str, torch.Tensor]


class Ran(NamedTuple):
    """A run's summary, and the lines that it showed."""

    summary: dict[str, Any]
    lines: list[str]

    @property
    def fallbacks(self) -> list[str]:
        """The lines that say that something else was done than asked."""
        return [line for line in self.lines if any(words in line for words in FALLBACKS)]


class _Listening(RunConsole):
    """A console that keeps its lines."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)
        super().say(text)

    def warn(self, text: str) -> None:
        self.lines.append(text)
        super().warn(text)


def check_training(task: Task, tell: Tell) -> None:
    """Train a tiny model on both sides, in fp32, 16 bits, nf4 and int8, and compare steps and adapters."""
    job, _ = prepare_job(task, "tiny", PAIRS)
    with empty_cache(Path(task.work) / "cache-training"):
        _compare_trainings(task, job, tell)


@contextmanager
def empty_cache(folder: Path) -> Iterator[None]:
    """Let runs inside this block keep what they cache, such as stored references, in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    with patch.dict(os.environ, {"DPO_RUNNER_CACHE": str(folder)}):
        yield


def _compare_trainings(task: Task, job: Job, tell: Tell) -> None:
    job = vary(job, batch=STEP, accumulation=1, max_length=512)
    folder = Path(task.work) / "runs" / "training"
    full = vary(job, dtype="float32")
    exact = train_trl(full, folder / "trl-fp32")
    ours, again = (train_ours(full, folder / f"ours-fp32-{store}", tell) for store in ("cold", "warm"))
    try:
        tell(f"fp32, {ours[0]['steps']} steps beside TRL: {check_same_job(ours[0], exact[0], LIMITS)}")
    except DifferentJobs as error:
        tell(f"fp32 beside TRL: {error}", False)
    for name, one, other in (("TRL's", ours[1], exact[1]), ("that with a reference from the store", again[1], ours[1])):
        apart = measure_distance(one, other)
        tell(f"fp32: the adapter is {apart:.1e} from {name}, allowed {ADAPTER:.0e}", apart <= ADAPTER)
    theirs, mine = train_trl(job, folder / "trl-16"), train_ours(job, folder / "ours-16", tell)
    _compare_with_exact(tell, job.dtype, mine[1], theirs[1], exact[1])
    # TRL keeps adapters of a quantized base in 16 bits, where they hardly move; so run its forward on fp32 adapters.
    nf4 = vary(job, load_in_4bit=True)
    exact, theirs, mine = (
        train_ours(vary(nf4, dtype=dtype), folder / f"nf4-{number}", tell, further)
        for number, (dtype, further) in enumerate((("float32", PLAIN), (job.dtype, PLAIN), (job.dtype, ())))
    )
    _compare_with_exact(tell, "nf4", mine[1], theirs[1], exact[1])
    int8, moved = train_ours(job, folder / "int8", tell, ("quant=int8",), may_fall_back=True)
    for name, side in (("nf4", mine[0]), ("int8", int8)):
        away = abs(side["history"][0]["loss"] - torch.tensor(2.0).log().item())
        tell(f"{name}: the first loss is {away:.1e} from ln 2, allowed {_FIRST_LOSS:.0e}", away <= _FIRST_LOSS)
    is_moved = any(values.any() for name, values in moved.items() if "lora_B" in name)
    tell(f"int8: the adapter has {'moved' if is_moved else 'not moved'}", is_moved)


def _compare_with_exact(tell: Tell, name: str, ours: Adapter, theirs: Adapter, exact: Adapter) -> None:
    far = [measure_distance(adapter, exact) for adapter in (ours, theirs)]
    text = f"{name}: the adapter is {far[0]:.1e} from the same in fp32, with TRL's forward {far[1]:.1e}"
    tell(text, far[0] <= _SHARE * far[1])


def measure_distance(adapter: Adapter, other: Adapter) -> float:
    """Return the relative L2 distance of two adapters."""
    assert adapter.keys() == other.keys(), "the adapters have other layers"
    squares = [
        [(adapter[name].double() - values.double()).square().sum().item(), values.double().square().sum().item()]
        for name, values in other.items()
    ]
    difference, norm = map(sum, zip(*squares, strict=True))
    return float((difference / norm) ** 0.5)


def train_ours(
    job: Job, folder: Path, tell: Tell, further: Sequence[str] = (), may_fall_back: bool = False
) -> tuple[dict[str, Any], Adapter]:
    """Run dpo_runner in this process; a part of the engine that was not taken, and is not switched off, fails."""
    from safetensors.torch import load_file

    shutil.rmtree(folder, ignore_errors=True)
    ran = run_ours(job, folder, further)
    if not may_fall_back and further != PLAIN:
        for line in ran.fallbacks:
            tell(f"{folder.name} fell back: {line}", False)
    history = read_history(folder)
    steps = {"side": "dpo_runner", "steps": len(history), "pairs": job.pairs, "history": history}
    return steps, load_file(folder / "adapter" / "adapter_model.safetensors")


def run_ours(job: Job, folder: Path, further: Sequence[str] = (), callbacks: Sequence[Any] = ()) -> Ran:
    """Run dpo_runner in this process; what it shows goes to `FOLDER.log`."""
    from dpo_runner.config.compose import load_conf
    from dpo_runner.train import run

    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".log").open("a", encoding="utf-8") as file, redirect_stdout(file):
        console = _Listening()
        summary = run(load_conf(build_ours(job, folder, further)[3:]), console=console, callbacks=callbacks)
    assert summary is not None
    return Ran(summary, console.lines)


def train_trl(job: Job, folder: Path, flags: Sequence[str] = ()) -> tuple[dict[str, Any], Adapter]:
    """Run TRL's DPO script in this process."""
    from safetensors.torch import load_file
    from trl.scripts.dpo import main as train
    from trl.scripts.dpo import make_parser

    shutil.rmtree(folder, ignore_errors=True)
    train(*make_parser().parse_args_and_config(build_trl(job, folder, flags)[2:]))
    steps, history = read_state(folder)
    return (
        {"side": "trl", "steps": steps, "pairs": job.pairs, "history": history},
        load_file(folder / "adapter_model.safetensors"),
    )

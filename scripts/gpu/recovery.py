"""An interrupted run that continues, and a run that goes on in smaller batches after memory has run out."""

import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from dpo_runner.errors import RunInterrupted
from scripts.bench.peers.sides import read_history, vary
from scripts.gpu.inputs import Task, prepare_job
from scripts.gpu.training import ADAPTER, PAIRS, STEP, measure_distance, run_ours
from scripts.gpu.work import Tell

_RETRY = "checks.on_out_of_memory=smaller_batch"
_LENGTH = 256


class StopAfter(TrainerCallback):  # type: ignore[misc]
    """Sends SIGTERM to this process after an optimizer step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self._step:
            os.kill(os.getpid(), signal.SIGTERM)


def check_resume(task: Task, tell: Tell) -> None:
    """Stop a run with SIGTERM, repeat its command, and compare it with an undisturbed run, in fp32.

    On a CPU both are the same to the bit; on a GPU some sums are in varying order.
    """
    job, _ = prepare_job(task, "tiny", PAIRS)
    job = vary(job, batch=STEP, accumulation=1, dtype="float32")
    whole, stopped = (_fresh_folder(task, name) for name in ("resume-whole", "resume-stopped"))
    run_ours(job, whole)
    steps = len(read_history(whole))
    try:
        run_ours(job, stopped, callbacks=[StopAfter(steps // 2)])
        tell("SIGTERM did not stop a run", False)
    except RunInterrupted:
        before = len(read_history(stopped))
        run_ours(job, stopped)
    after, apart = len(read_history(stopped)), measure_distance(_load(stopped), _load(whole))
    allowed = ADAPTER if task.device == "cuda" else 0
    tell(
        f"a run stopped after {before} of {steps} steps and continued to {after}: the adapter is {apart:.1e} from the "
        f"undisturbed one, allowed {allowed:g}",
        before < steps == after and apart <= allowed,
    )


def check_out_of_memory(task: Task, tell: Tell) -> None:
    """Let memory run out in training; the run must go on in smaller batches, to the same adapter."""
    job, _ = prepare_job(task, task.small, PAIRS, "synthetic", _LENGTH)
    job = vary(job, batch=8, accumulation=1, dtype="float32")
    small, large, retried = (_fresh_folder(task, f"memory-{name}") for name in ("small", "large", "retried"))
    further = ("engine.reference_store=false", "engine.auto_gradient_checkpointing=false")
    one, many = f"engine.max_tokens_per_micro_batch={2 * _LENGTH}", f"engine.max_tokens_per_micro_batch={16 * _LENGTH}"
    budgets = ((small, one), (large, many))
    peaks = [run_ours(job, folder, (*further, tokens)).summary["peak_memory_gb"] for folder, tokens in budgets]
    with limited_memory(task.device, sum(peaks) / 2 * 1e9, 8 * _LENGTH):
        tries = run_ours(job, retried, (*further, many, _RETRY)).summary.get("out_of_memory", [])
    apart = max(measure_distance(_load(retried), _load(folder)) for folder in (small, large))
    how = f"of {sum(peaks) / 2:.2f} GB" if task.device == "cuda" else "(an error thrown by the forward, on a CPU)"
    tell(
        f"out of memory {how}, {len(tries)} times, and going on in smaller batches: the adapter is {apart:.1e} from "
        f"those of other batches, allowed {ADAPTER:.0e}",
        bool(tries) and apart <= ADAPTER,
    )


@contextmanager
def limited_memory(device: str, size: float, tokens: int) -> Iterator[None]:
    """Let a GPU have `size` bytes; on a CPU, let a forward with gradients of more than `tokens` fail for memory."""
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(0).total_memory)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def limited(self: Any, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and input_ids is not None and input_ids.numel() > tokens:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1000000000 bytes")
        return forward(self, input_ids, *args, **kwargs)

    LlamaModel.forward = limited
    try:
        yield
    finally:
        LlamaModel.forward = forward


def _fresh_folder(task: Task, name: str) -> Path:
    folder = Path(task.work) / "runs" / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_suffix(".log").unlink(missing_ok=True)
    return folder


def _load(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "adapter" / "adapter_model.safetensors")

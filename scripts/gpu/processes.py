"""Two processes beside one: whole weights, and weights divided between them."""

from pathlib import Path

import torch

from scripts.bench.peers.sides import vary
from scripts.gpu.inputs import Task, prepare_job
from scripts.gpu.training import ADAPTER, PAIRS, STEP, empty_cache, measure_distance, run_ours, train_ours
from scripts.gpu.work import Tell

_WAYS = {
    "whole weights": ("distributed=ddp",),
    "FSDP2": ("distributed=fsdp2",),
}
_NF4 = ("quant=nf4", "quant.bnb_4bit_quant_storage=bfloat16")


def check_processes(task: Task, tell: Tell) -> None:
    """Train a tiny model in fp32 on fp32 and nf4 bases, with one process and with two; adapters must agree."""
    if task.device == "cuda" and torch.cuda.device_count() < 2:
        tell("two processes were not tried: there is one GPU")
        return
    job, _ = prepare_job(task, "tiny", PAIRS)
    job, folder = vary(job, batch=STEP, accumulation=2, dtype="float32"), Path(task.work) / "runs" / "processes"
    with empty_cache(Path(task.work) / "cache-processes"):
        for base, further in (("fp32", ()), ("nf4", _NF4)):
            _, one = train_ours(job, folder / f"{base}-one", tell, further)
            for number, (way, overrides) in enumerate(_WAYS.items()):
                several = ("launch.processes=2", *overrides, *further)
                _, two = train_ours(vary(job, accumulation=1), folder / f"{base}-{number}", tell, several)
                apart = measure_distance(two, one)
                tell(
                    f"two processes, {way}, {base}: the adapter is {apart:.1e} from that of one process, allowed "
                    f"{ADAPTER:.0e}",
                    apart <= ADAPTER,
                )
    _compare_speeds(task, tell)


def _compare_speeds(task: Task, tell: Tell) -> None:
    """Tell the speed of two processes beside that of one, each doing its half of the same steps."""
    size = "1b" if task.device == "cuda" else "tiny"
    job, _ = prepare_job(task, size, task.pairs)
    job, folder = vary(job, accumulation=2), Path(task.work) / "runs" / "speeds"
    with empty_cache(Path(task.work) / "cache-speeds"):
        one = run_ours(job, folder / "one").summary["pairs_per_second"]
        for number, (way, overrides) in enumerate(_WAYS.items()):
            several = run_ours(vary(job, accumulation=1), folder / str(number), ("launch.processes=2", *overrides))
            two = several.summary["pairs_per_second"]
            tell(f"{size}: {two:.1f} pairs/s with two processes, {way}; {one:.1f} with one ({two / one:.2f})")

"""Compare dpo_runner's results with TRL's on this device.

    python -m scripts.bench.peers.exactness OUT DEVICE MODEL ROWS

Everything runs in one process, because startup takes longer than training a tiny model. Each result is appended to OUT
as a JSON line at once. Distances are relative L2 norms over all weights of the adapter.
"""

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from scripts.bench.peers.same_job import DifferentJobs, check_same_job
from scripts.bench.peers.sides import Job, build_ours, build_trl, read_history, read_state, vary

LIMITS = {"loss": 1e-4, "rewards/margins": 2e-4, "logps/chosen": 2e-2, "logps/rejected": 2e-2}
"""Largest allowed difference of a step's metrics in fp32. Log-probabilities are sums over tokens."""
_ADAPTER = 1e-4
"""Largest allowed distance of adapters in fp32."""
_SHARE = 1.5
"""Largest allowed distance from the exact result in 16 bits, in units of the peer's distance.

The peer is TRL, or torch's attention. Above 1 because rounding is random."""
_OFF = ("engine.shared_prefix=false", "engine.lean_layers=false", "engine.reference_store=false")
PAIRS, STEP = 16, 2
_LAYOUTS = (
    ((120, 157, 50), (37, 64, 81), (5, 5, 0), (5, 5, 1)),
    ((0, 3, 140), (1, 1, 1), (200, 300, 130), (127, 128, 129)),
)
"""Packed pairs: tokens of common prefix, chosen row, and rejected row after the prefix."""


Adapter = dict[str, Any]


class Results:
    """Results, line by line in a file."""

    def __init__(self, out: Path) -> None:
        self._out = out
        out.write_text("", encoding="utf-8")

    def add(self, text: str, exact: bool) -> None:
        line = {"text": text, "exact": exact}
        with self._out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)


def read_results(out: Path) -> list[str]:
    """Return the results as sentences."""
    lines = map(json.loads, out.read_text(encoding="utf-8").splitlines() if out.exists() else ())
    return [f"{'' if line['exact'] else 'NOT EXACT: '}{line['text']}." for line in lines]


def main() -> None:
    out, device, model, rows = Path(sys.argv[1]), *sys.argv[2:]
    results = Results(out)
    compare_attention(results, device)
    job = Job(rows, PAIRS, 512, model, device, batch=STEP, accumulation=1)
    compare_training(results, job, out.with_suffix(""))


def compare_attention(results: Results, device: str) -> None:
    """Compare attention over packed pairs, and its gradients, with attention under a mask in fp64."""
    import torch

    from dpo_runner.training.engine.packed.attention import attend, attend_pairs
    from dpo_runner.training.engine.packed.packing import PairLengths, Pairs
    from dpo_runner.training.engine.packed.varlen_attention import takes_varlen

    layouts = [Pairs(PairLengths(*lengths) for lengths in layout) for layout in _LAYOUTS]
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        worst, one = 0.0, torch.zeros(1, 1, 1, 64, dtype=dtype, device=device)
        path = "in one call" if takes_varlen(one, one, one) else "pair by pair"
        for pairs in layouts:
            packed = partial(attend, torch.nn.Module(), attention_mask=None, pairs=pairs)
            ours, masked, exact = (
                differentiate(function, pairs, kind, device)
                for function, kind in (
                    (lambda *inputs, packed=packed: packed(*inputs)[0], dtype),
                    (partial(_attend_under_mask, pairs), dtype),
                    (partial(_attend_under_mask, pairs), torch.float64),
                )
            )
            for found, other, expected in zip(ours, masked, exact, strict=True):
                worst = max(worst, ((found - expected).norm() / (other - expected).norm()).item())
        text = (
            f"Attention over packed pairs in {dtype}, {path}, forward and backward: at most {worst:.2g} times as far "
        )
        results.add(f"{text}from fp64 as torch's attention under a mask", worst <= (2 * _SHARE))
    if takes_varlen(half := torch.zeros(1, 1, 1, 128, dtype=torch.bfloat16, device=device), half, half):
        many = Pairs([PairLengths(120, 157, 50)] * 32)
        times = []
        for function in (partial(attend, torch.nn.Module(), attention_mask=None), attend_pairs):
            further = {} if function is not attend_pairs else {"scale": 128**-0.5}
            times.append(_time(partial(function, pairs=many, **further), many, device))
        results.add(
            f"Attention of 32 pairs of 120, 37 and 50 tokens, forward and backward: {times[0]:.2f} ms in one call, "
            f"{times[1]:.2f} ms pair by pair",
            True,
        )


def differentiate(
    function: Callable[..., Any], pairs: Any, dtype: Any, device: str, heads: Sequence[int] = (6, 2), size: int = 64
) -> list[Any]:
    """Return output and gradients of q, k, v as fp64, computed in `dtype` from fixed 16-bit values."""
    import torch

    generator = torch.Generator().manual_seed(0)
    tokens = sum(pair.chosen + pair.tail for pair in pairs)

    def draw(heads: int) -> torch.Tensor:  # token-major in memory, as projections return them
        values = torch.randn(1, tokens, heads, size, generator=generator).bfloat16().to(device, dtype)
        return values.transpose(1, 2).requires_grad_()

    inputs = [draw(count) for count in (heads[0], heads[1], heads[1])]
    output = function(*inputs)
    output.backward(torch.randn(output.shape, generator=generator).bfloat16().to(device, dtype))
    return [tensor.detach().double() for tensor in (output, *(tensor.grad for tensor in inputs))]


def _attend_under_mask(pairs: Any, query: Any, key: Any, value: Any) -> Any:
    import torch

    visible = torch.block_diag(*(torch.ones(pair.chosen + pair.tail, pair.chosen + pair.tail) for pair in pairs)).tril()
    start = 0
    for pair in pairs:
        tail = start + pair.chosen
        visible[tail : tail + pair.tail, start + pair.prefix : tail] = 0
        start = tail + pair.tail
    key, value = (tensor.repeat_interleave(query.size(1) // key.size(1), dim=1) for tensor in (key, value))
    mask = visible.bool().to(query.device)
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def _time(function: Callable[..., Any], pairs: Any, device: str) -> float:
    """Return the median milliseconds of one layer's attention, forward and backward."""
    import torch

    times = []
    for _ in range(10):
        torch.cuda.synchronize()
        start = time.perf_counter()
        differentiate_once(function, pairs, device)
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return median(times[3:])


def differentiate_once(function: Callable[..., Any], pairs: Any, device: str) -> None:
    import torch

    tokens = sum(pair.chosen + pair.tail for pair in pairs)
    shapes = [(1, heads, tokens, 128) for heads in (32, 8, 8)]
    inputs = [torch.zeros(shape, dtype=torch.bfloat16, device=device, requires_grad=True) for shape in shapes]
    output = function(*inputs)
    (output[0] if isinstance(output, tuple) else output).sum().backward()


def compare_training(results: Results, job: Job, folder: Path) -> None:
    """Train a tiny model on both sides, in fp32, bf16 and nf4, and compare steps and adapters."""
    full = vary(job, dtype="float32")
    exact = _train_trl(full, folder / "trl-fp32")
    ours, again = (_train_ours(full, folder / f"ours-fp32-{store}") for store in ("cold", "warm"))
    try:
        results.add(f"fp32, {ours[0]['steps']} steps: {check_same_job(ours[0], exact[0], LIMITS)}", True)
    except DifferentJobs as error:
        results.add(f"fp32: {error}", False)
    apart = measure_distance(ours[1], exact[1])
    results.add(f"fp32: adapters {apart:.1e} apart, at most {_ADAPTER:.0e}", apart <= _ADAPTER)
    apart = measure_distance(again[1], ours[1])
    results.add(f"fp32: with the reference from the store, and computed, adapters {apart:.1e} apart", apart <= _ADAPTER)
    theirs, mine = _train_trl(job, folder / "trl-bf16"), _train_ours(job, folder / "ours-bf16")
    _compare_with_exact(results, "bf16", mine[1], theirs[1], exact[1])
    # TRL keeps adapters of a quantized base in 16 bits, where they hardly move; so run its forward on fp32 adapters.
    nf4 = vary(job, load_in_4bit=True)
    exact, theirs, mine = (
        _train_ours(vary(nf4, dtype=dtype), folder / f"nf4-{number}", *further)
        for number, (dtype, further) in enumerate((("float32", _OFF), ("bfloat16", _OFF), ("bfloat16", ())))
    )
    _compare_with_exact(results, "nf4", mine[1], theirs[1], exact[1])


def _compare_with_exact(results: Results, name: str, ours: Adapter, theirs: Adapter, exact: Adapter) -> None:
    far = [measure_distance(adapter, exact) for adapter in (ours, theirs)]
    text = f"{name}: from the same in fp32 the adapter is {far[0]:.1e} away, with TRL's forward {far[1]:.1e}"
    results.add(text, far[0] <= _SHARE * far[1])


def measure_distance(adapter: Adapter, other: Adapter) -> float:
    """Return the relative L2 distance of two adapters."""
    assert adapter.keys() == other.keys(), "the adapters have other layers"
    squares = [
        [(adapter[name].double() - values.double()).square().sum().item(), values.double().square().sum().item()]
        for name, values in other.items()
    ]
    difference, norm = map(sum, zip(*squares, strict=True))
    return float((difference / norm) ** 0.5)


def _train_ours(job: Job, folder: Path, *further: str) -> tuple[dict[str, Any], Adapter]:
    from safetensors.torch import load_file

    from dpo_runner.config.compose import load_conf
    from dpo_runner.train import run

    run(load_conf(build_ours(job, folder, further)[3:]))
    history = read_history(folder)
    steps = {"side": "dpo_runner", "steps": len(history), "pairs": job.pairs, "history": history}
    return steps, load_file(folder / "adapter" / "adapter_model.safetensors")


def _train_trl(job: Job, folder: Path) -> tuple[dict[str, Any], Adapter]:
    from safetensors.torch import load_file
    from trl.scripts.dpo import main as train
    from trl.scripts.dpo import make_parser

    train(*make_parser().parse_args_and_config(build_trl(job, folder)[2:]))
    steps, history = read_state(folder)
    return (
        {"side": "trl", "steps": steps, "pairs": job.pairs, "history": history},
        load_file(folder / "adapter_model.safetensors"),
    )


if __name__ == "__main__":
    main()

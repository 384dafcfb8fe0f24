"""Profile dpo_runner's training with torch's profiler and write the share of each group of operations.

    python -m scripts.bench.measuring.profiling OUT OVERRIDE...

Each operation's self time counts once: as attention or head if it runs inside their autograd functions, as rest if it
runs inside the optimizer, else by its name. Time outside of operations is Python and counts as rest. The profiler's own
overhead is largest for small operations.
"""

import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FUNCTIONS = {
    "PairAttention": "attention",
    "FrozenHeadLogProbs": "head",
    "ChunkedLogProbFunction": "head",
}
"""Group of each autograd function; all operations inside count for it, including matrix products."""
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "linear", "matmul", "dot", "mkldnn_linear", "_mm"}
GROUPS = ("matrix products", "attention", "head", "element-wise and copies", "rest")


def classify(names: Iterable[str]) -> str:
    """Return the group of an operation.

    Args:
        names: its name, then the names of the enclosing operations, innermost first.
    """
    names = list(names)
    for name in names:
        function = name.rpartition(" ")[2].removesuffix("Backward")  # also strips the autograd engine's prefix
        if function in FUNCTIONS:
            return FUNCTIONS[function]
        if name.startswith("Optimizer."):
            return "rest"
    operation = names[0].removeprefix("aten::")
    if "attention" in operation:
        return "attention"
    if operation in _PRODUCTS:
        return "matrix products"
    return "element-wise and copies" if names[0].startswith("aten::") else "rest"


def add_up(events: Iterable[Any], seconds: float) -> dict[str, float]:
    """Return the share of each group in `seconds`; time outside of operations counts as rest."""
    shares = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        names, within = [event.name], event.cpu_parent
        while within is not None:
            names.append(within.name)
            within = within.cpu_parent
        shares[classify(names)] += event.self_cpu_time_total / 1e6 / seconds
    shares["rest"] += 1 - sum(shares.values())
    return shares


def main() -> None:
    out, overrides = Path(sys.argv[1]), sys.argv[2:]

    from torch.profiler import ProfilerActivity, profile
    from transformers import Trainer

    from dpo_runner.config.compose import load_conf
    from dpo_runner.train import run

    found: dict[str, Any] = {}
    train = Trainer.train

    def profiled(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            result = train(self, *args, **kwargs)
            found["seconds"] = time.perf_counter() - start
        found["shares"] = add_up(profiler.events() or (), found["seconds"])
        return result

    Trainer.train = profiled
    run(load_conf(overrides))
    out.write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Synthetic run directories with the files that a comparison reads."""

import json
import math
from pathlib import Path
from typing import Any

import yaml


def write_run(path: Path, *, state: str | None = "finished", seed: int = 42, steps: int = 40, **given: Any) -> Path:
    """Write a run whose figures follow from its settings.

    Args:
        path: the directory.
        state: the state in status.json; None writes no such file. Only a finished run gets a summary and samples.
        seed: the seed in the configuration.
        steps: the last logged optimizer step.
        given: configuration keys, with `__` for a dot; `accuracy`, `margin` and `chosen` fix those results.
    """
    path.mkdir(parents=True)
    fixed = {name: given.pop(name, None) for name in ("accuracy", "margin", "chosen")}
    config: dict[str, Any] = {
        "model": {"model_name_or_path": "random:tiny-llama", "dtype": "float32"},
        "quant": None,
        "lora": {"r": 16, "lora_alpha": 32, "target_modules": ["q_proj", "v_proj"]},
        "training": {"beta": 0.1, "learning_rate": 5e-5, "loss_type": "sigmoid"},
        "wandb": {"mode": "offline", "name": path.name},
        "run_name": path.name,
        "run_dir": str(path),
        "seed": seed,
    }
    for key, value in given.items():
        section, _, name = key.partition("__")
        if name:
            config[section][name] = value
        else:
            config[section] = value
    (path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    beta, rate = config["training"]["beta"], config["training"]["learning_rate"]
    strength = math.log10(rate / 1e-6) * (1 + 0.02 * (seed % 7))

    def measure(step: int) -> dict[str, float]:
        done = 1 - math.exp(-3 * step / 40)
        margin = fixed["margin"] if fixed["margin"] is not None else strength * beta**0.5 * done
        chosen = fixed["chosen"] if fixed["chosen"] is not None else -0.3 * margin * strength
        accuracy = fixed["accuracy"] if fixed["accuracy"] is not None else round(1 - math.exp(-2 * margin), 4)
        return {
            "loss": math.log(1 + math.exp(-margin)),
            "rewards/accuracies": accuracy,
            "rewards/margins": margin,
            "rewards/chosen": chosen,
            "rewards/rejected": chosen - margin,
        }

    events = []
    for step in range(0, steps + 1, max(1, steps // 40)):
        if step:
            events.append({"step": step, **measure(step), "learning_rate": rate, "epoch": step / 40, "time": 1.0})
        if step % max(1, steps // 8) == 0:
            events.append({"step": step, **{f"eval_{key}": value for key, value in measure(step).items()}})
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    if state is not None:
        status = {"state": state, "heartbeat": "2026-01-01T00:00:00+00:00", "started": "2026-01-01T00:00:00+00:00"}
        (path / "status.json").write_text(json.dumps(status), encoding="utf-8")
    if state == "finished":
        before, after = ({f"eval_{key}": value for key, value in measure(step).items()} for step in (0, steps))
        summary = {"before": before, "after": {**after, "response_tokens": 40.0}, "steps": steps, "train_runtime": 9.5}
        (path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
        write_samples(path, [(f"Question {n}?", f"Long answer {n}.", f"Answer of {path.name}.") for n in range(2)])
    return path


def write_samples(path: Path, samples: list[tuple[str, str, str]]) -> None:
    """Write samples.jsonl from (question, the reference's answer, the policy's answer)."""
    lines = [
        {
            "prompt": [{"role": "user", "content": question}],
            "before": {"text": before, "tokens": 9, "complete": True},
            "after": {"text": after, "tokens": 5, "complete": True},
        }
        for question, before, after in samples
    ]
    (path / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")

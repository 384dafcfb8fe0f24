"""The model work of an evaluation: score pairs and answer prompts, writing each batch to disk."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.data import resolve_sources
from dpo_runner.evaluate.scoring import Compared, score_completions
from dpo_runner.io.files import JsonLines

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from dpo_runner.data.preferences import PreferenceData


@dataclass
class Task:
    """One evaluation.

    Attributes:
        conf: the run's configuration with the evaluation's overrides.
        data: the preference data.
        split: the split of `data` that is evaluated.
        rows: the pairs, with `prompt_ids`, `chosen_ids` and `rejected_ids`.
        folder: the folder of the results.
    """

    conf: RunConf
    data: "PreferenceData"
    split: str
    rows: "Dataset"
    folder: Path

    def describe(self) -> dict[str, Any]:
        """Return the evaluation's inputs and settings, for evaluation.json."""
        from dpo_runner.model.blueprint import Blueprint

        autocast, moves = name_autocast(self.conf), self.conf.training.sync_ref_model
        return {
            "reference": Blueprint.of_run(self.conf).describe_reference()
            + (", as it was before training moved it" if moves else ""),
            "autocast": autocast,
            "data": [str(source.path) for source in resolve_sources(self.conf.data).values()],
            "split": self.split if self.split == "eval" else "all",
            "pairs": len(self.rows),
            "prompts_answered": len(self.data.prompts),
            "max_new_tokens": self.conf.samples.max_new_tokens,
            "beta": self.conf.training.beta,
            "seed": self.conf.seed,
        }


def name_autocast(conf: RunConf) -> str | None:
    """Return the autocast dtype that a run scores in, such as `bfloat16`; None without autocast."""
    from dpo_runner.training.engine.precision import choose_autocast

    dtype = choose_autocast(conf.training)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def load_compared(run_dir: Path, conf: RunConf) -> Compared:
    """Load a run's policy and reference in evaluation mode, on their device.

    Raises:
        ConfigError: a model or adapter that the run names does not exist any more.
    """
    from dpo_runner.model.base import load_base_model, place
    from dpo_runner.model.blueprint import Blueprint
    from dpo_runner.model.policy import load_reference
    from dpo_runner.model.result import INITIAL, load_tuned_model
    from dpo_runner.training.engine.layers.lean import make_lean
    from dpo_runner.training.engine.precision import choose_autocast
    from dpo_runner.training.memory.device import keep_freed_memory

    keep_freed_memory()
    policy: Any = load_tuned_model(run_dir)[0]
    blueprint = Blueprint.of_run(conf)
    reference, own = blueprint.reference, load_reference(blueprint)
    adapter = None
    if reference.is_within and reference.folder is not None:
        adapter = "reference"
        policy.load_adapter(reference.folder, adapter, torch_device="cpu")
        policy.eval()
    elif reference.is_initial and blueprint.trains_all:
        own = place(load_base_model(blueprint)[0], blueprint.conf).eval()
    elif reference.is_initial and INITIAL in policy.peft_config:
        adapter = INITIAL
    if conf.engine.lean_layers:
        make_lean(policy, policy.device.type == "cpu")  # so that scores round as in the run
    return Compared(policy, own, adapter, choose_autocast(conf.training))


def score_pairs(compared: Compared, task: Task, done: JsonLines, pad_id: int, progress: Callable[[int], None]) -> None:
    """Score each pair with policy and reference, continuing after the pairs in `done`."""
    size = task.conf.training.per_device_eval_batch_size
    for start in remaining_batches(done, len(task.rows), size, progress):
        rows = [task.rows[index] for index in range(start, min(start + size, len(task.rows)))]
        completions = [
            _cut(row["prompt_ids"], row[f"{part}_ids"], task.conf) for row in rows for part in ("chosen", "rejected")
        ]
        with compared.as_in_the_run():
            policy = score_completions(compared.policy, completions, pad_id)
        with compared.reference() as model, compared.as_in_the_run():
            reference = score_completions(model, completions, pad_id)
        scores = [
            {"tokens": len(completion), "policy_logp": tuned, "reference_logp": before}
            for (_, completion), tuned, before in zip(completions, policy, reference, strict=True)
        ]
        records = [
            {
                "pair": start + index,
                "where": task.data.locate(task.split, start + index),
                "prompt": hashlib.sha256(json.dumps(row["prompt_ids"]).encode()).hexdigest()[:16],
                "chosen": scores[2 * index],
                "rejected": scores[2 * index + 1],
            }
            for index, row in enumerate(rows)
        ]
        done.append(records)
        progress(len(records))


def remaining_batches(done: JsonLines, total: int, size: int, progress: Callable[[int], None]) -> range:
    """Return the start indices of the remaining batches; a partially written batch is redone as a whole.

    A batch's rounding depends on its rows, and a resumed evaluation must give identical figures.
    """
    whole = len(done.records) if len(done.records) == total else len(done.records) // size * size
    if whole < len(done.records):
        done.keep(whole)
    progress(whole)
    return range(whole, total, size)


def _cut(prompt: list[int], completion: list[int], conf: RunConf) -> tuple[list[int], list[int]]:
    """Truncate a pair that `data.on_overlong=trl` left too long, as TRL's collator does in training."""
    limit, ids = conf.training.max_length, prompt + completion
    if limit is None or len(ids) <= limit:
        return prompt, completion
    if conf.training.truncation_mode == "keep_start":
        return prompt, completion[: limit - len(prompt)]
    kept = min(len(completion), limit - 1)  # the very first token has no prediction
    return ids[-limit : len(ids) - kept], completion[-kept:]


def answer_prompts(
    compared: Compared,
    task: Task,
    done: JsonLines,
    tokenizer: "PreTrainedTokenizerBase",
    progress: Callable[[int], None],
) -> None:
    """Answer each prompt greedily with policy and reference, and score a sample of the policy with both."""
    from dpo_runner.model.tokenizer import find_stop_ids
    from dpo_runner.training.answers.measuring import generate_answers
    from dpo_runner.training.answers.sampling import Sampling, derive_seed, sample_answers

    conf, stop_id = task.conf, task.data.stop_id
    size, length, pad_id = conf.training.per_device_eval_batch_size, conf.samples.max_new_tokens, tokenizer.pad_token_id
    stop_ids = find_stop_ids(compared.policy, tokenizer, stop_id)
    for start in remaining_batches(done, len(task.data.prompts), size, progress):
        prompts = task.data.prompts[start : start + size]
        ids = [prompt.ids for prompt in prompts]
        seeds = [[derive_seed(conf.seed, start + index)] for index in range(len(prompts))]
        policy = generate_answers(compared.policy, tokenizer, prompts, length, size, stop_id)
        with compared.as_in_the_run():  # sample from the same distribution that scores the samples
            sampled = sample_answers(compared.policy, ids, seeds, Sampling(length), stop_ids, pad_id)
            samples = [one for [one] in sampled]
            rows = list(zip(ids, samples, strict=True))
            policy_logps = score_completions(compared.policy, rows, pad_id)
        with compared.reference() as model:
            reference = generate_answers(model, tokenizer, prompts, length, size, stop_id)
            with compared.as_in_the_run():
                reference_logps = score_completions(model, rows, pad_id)
        records = [
            {
                "prompt": prompt.messages,
                "policy": policy[index],
                "reference": reference[index],
                "sample": {
                    "text": tokenizer.decode(samples[index], skip_special_tokens=True).strip(),
                    "tokens": len(samples[index]),
                    "complete": samples[index][-1] in stop_ids,
                    "policy_logp": policy_logps[index],
                    "reference_logp": reference_logps[index],
                },
            }
            for index, prompt in enumerate(prompts)
        ]
        done.append(records)
        progress(len(records))

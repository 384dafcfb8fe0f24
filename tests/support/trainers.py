"""Trainers built as in a run, and reference implementations of their scores and gradients."""

from pathlib import Path

import torch
from transformers import (
    set_seed,
)

from dpo_runner.config.compose import load_conf
from dpo_runner.data.preferences import load_preferences
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.policy import load_policy
from dpo_runner.training.build import build_dpo_config, build_trainer
from dpo_runner.training.engine.logps import completion_logps, label_completions


def build(overrides: list[str], tmp_path: Path):
    """Build data, policy and trainer as a run does; the reference store is off unless overridden."""
    conf = load_conf(["engine.reference_store=false", *overrides])
    blueprint = Blueprint.of_run(conf)
    data = load_preferences(conf, blueprint.tokenizer)
    set_seed(conf.seed)
    policy = load_policy(blueprint)
    return build_trainer(conf, build_dpo_config(conf, tmp_path / "ckpt"), blueprint, policy, data)


def first_rows(trainer) -> list[dict]:
    return [trainer.train_dataset[index] for index in range(4)]


def score_both(trainer, rows: list[dict]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score training rows with the policy and with the reference, both in evaluation mode.

    Args:
        trainer: the trainer that holds both models.
        rows: training rows; their `ref_chosen_logps` and `ref_rejected_logps`, if present, are the reference's scores
            (recomputed if `ld_alpha` is set).

    Returns:
        Policy and reference log-probabilities, summed over each completion, and the number of scored tokens:
        three tensors of shape [2 * rows], chosen first (log pi(y|x) in Eq. 7 of the DPO paper).
    """
    model, training, ld_alpha = trainer.model, trainer.model.training, trainer.ld_alpha
    batch = trainer._prepare_inputs(trainer.data_collator(list(rows)))
    stored = [batch.pop(name) for name in ("ref_chosen_logps", "ref_rejected_logps") if name in batch]
    inputs = label_completions(batch)
    model.eval()
    trainer.ld_alpha = None  # plain sums
    try:
        with torch.no_grad(), trainer.accelerator.autocast():
            policy = completion_logps(model, inputs).sum(dim=1)
        if not stored or ld_alpha is not None:
            stored = trainer.compute_ref_log_probs(trainer.ref_model or model, batch)
    finally:
        trainer.ld_alpha = ld_alpha
        model.train(training)
    return policy, torch.cat(list(stored)), (inputs["labels"] != -100).sum(dim=1)


def logps_of(model: torch.nn.Module, rows: list[dict]) -> torch.Tensor:
    """Return summed log p of completions from the logits, one row at a time; chosen first, then rejected."""
    scores = []
    with torch.no_grad():
        for column in ("chosen_ids", "rejected_ids"):
            for row in rows:
                ids = torch.tensor([row["prompt_ids"] + row[column]])
                logps = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
                start = len(row["prompt_ids"]) - 1
                scores.append(logps[torch.arange(start, ids.shape[1] - 1), ids[0, start + 1 :]].sum())
    return torch.stack(scores)


def gradients(trainer) -> dict[str, torch.Tensor]:
    trainer.model.train()
    trainer.model.zero_grad()
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(2)]))
    with trainer.compute_loss_context_manager():
        trainer.compute_loss(trainer.model, batch).backward()
    return {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}

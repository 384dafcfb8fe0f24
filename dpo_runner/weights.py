"""The result one can serve: the tuned adapter (or model) with tokenizer, chat template and model card."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from dpo_runner.artifacts import RunDirectory, write_folder
from dpo_runner.card import write_card
from dpo_runner.card_facts import read_facts
from dpo_runner.config import RunConf
from dpo_runner.model import Policy
from dpo_runner.reference import describe_reference
from dpo_runner.stacking import combined_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_weights(
    directory: RunDirectory,
    model: "PreTrainedModel | PeftModel",
    tokenizer: "PreTrainedTokenizerBase",
    conf: RunConf,
    policy: Policy,
    summary: dict[str, Any],
    tell: Callable[[str], None],
) -> Path:
    """Write adapter/ as safetensors (full fine-tuning: model/) with its model card, whole or not at all.

    Args:
        directory: the run's, where metrics, data report and environment lie already.
        model: the trained policy.
        tokenizer: saved beside it.
        conf: the run.
        policy: which adapters make up the result.
        summary: what summary.json is going to hold.
        tell: shows one line to a person.

    Returns:
        The folder, loadable with plain transformers and peft.
    """
    is_adapter = isinstance(model, PeftModel)
    folder = directory.adapter if is_adapter else directory.path / "model"

    facts = read_facts(directory.path, conf, describe_reference(conf), summary)

    def fill(staging: Path) -> None:
        if is_adapter:
            # TRL keeps the reference as a second adapter beside ours; it is no result.
            with combined_adapter(model, policy.result) as name:
                # PEFT's own choice looks for the base's config, on the hub if need be, and goes by its size alone
                model.save_pretrained(staging, selected_adapters=[name], save_embedding_layers=policy.saves_embeddings)
            if name != "default":  # PEFT puts it into a folder of its name
                for file in (staging / name).iterdir():
                    file.rename(staging / file.name)
                (staging / name).rmdir()
        else:
            model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        write_card(staging, facts, folder.name, tell=tell)

    write_folder(folder, fill)
    return folder

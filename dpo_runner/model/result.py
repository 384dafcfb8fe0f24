"""Save and load the result of a run."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.model import ModelConf
from dpo_runner.errors import ConfigError
from dpo_runner.io.files import write_folder
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.card.card import write_card
from dpo_runner.model.card.facts import read_facts
from dpo_runner.model.policy import Policy
from dpo_runner.model.stacking import combined_adapter
from dpo_runner.records.directory import RunDirectory
from dpo_runner.records.reading import read_run_conf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


INITIAL = "initial"
"""Name of the frozen SFT adapter, the start of training, next to the tuned adapter."""


def load_tuned_model(run_dir: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a run's tuned model and tokenizer, with the base and quantization of its training.

    Raises:
        ConfigError: a model or adapter of the run no longer exists, or is now a pickle.
    """
    from peft import PeftModel

    from dpo_runner.model.base import load_base_model
    from dpo_runner.model.files.locations import loading_errors
    from dpo_runner.model.files.pickles import refuse_pickled_adapter
    from dpo_runner.model.stacking import load_lora_alone

    run = read_run_conf(run_dir)
    conf = run.model
    if (run_dir / "model").is_dir():
        conf = ModelConf(model_name_or_path=str(run_dir / "model"), dtype=conf.dtype, chat_template=conf.chat_template)
        blueprint = Blueprint(conf)
        return load_base_model(blueprint)[0].eval(), blueprint.tokenizer
    refuse_pickled_adapter(run_dir / "adapter")
    blueprint = Blueprint(conf, run.quant)
    base, _ = load_base_model(blueprint)
    model = PeftModel.from_pretrained(base, run_dir / "adapter")
    if blueprint.adapter is not None and conf.adapter_mode in ("continue", "stack"):
        if conf.use_safetensors:
            refuse_pickled_adapter(blueprint.adapter, f"model.adapter={conf.adapter}")
        with loading_errors(str(conf.adapter), "model.adapter"):
            if conf.adapter_mode == "continue":
                model.load_adapter(str(blueprint.adapter), INITIAL)
            else:  # the result has already put its embeddings into the base
                load_lora_alone(model, str(blueprint.adapter), INITIAL)
    return model.eval(), blueprint.tokenizer


@contextmanager
def untuned(model: Any) -> Iterator[None]:
    """Switch to the model that training started from: the SFT adapter, or the base without adapter."""
    if not hasattr(model, "disable_adapter"):
        raise ConfigError("--compare: this run tuned all weights, so the untuned model is not part of its result")
    with switched(model, INITIAL if INITIAL in model.peft_config else None):
        yield


@contextmanager
def switched(model: Any, adapter: str | None) -> Iterator[None]:
    """Switch from the tuned adapter to another, or to none if `adapter` is None; restore it on exit."""
    # peft unfreezes an adapter on every switch
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        if adapter is None:
            with model.disable_adapter():
                yield
        else:
            model.set_adapter(adapter)
            try:
                yield
            finally:
                model.set_adapter("default")
    finally:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)


def save_result(
    directory: RunDirectory,
    model: "PreTrainedModel | PeftModel",
    policy: Policy,
    blueprint: Blueprint,
    conf: RunConf,
    summary: dict[str, Any],
    say: Callable[[str], None],
) -> Path:
    """Write adapter/ as safetensors (full fine-tuning: model/) with its model card, atomically.

    Args:
        directory: the run's directory; already contains metrics, data report and environment.
        model: the trained model.
        policy: names the adapters that make up the result.
        blueprint: its tokenizer is saved with the weights.
        conf: the run's configuration.
        summary: the contents of the future summary.json.
        say: shows one line to the user.

    Returns:
        The folder, loadable with plain transformers and peft.
    """
    is_adapter = isinstance(model, PeftModel)
    folder = directory.adapter if is_adapter else directory.path / "model"

    facts = read_facts(directory.path, conf, blueprint.reference.described, summary)

    def fill(staging: Path) -> None:
        if is_adapter:
            # TRL keeps the reference as a second adapter, which is not part of the result.
            with combined_adapter(model, policy.result) as name:
                # PEFT's "auto" looks up the base's config, possibly on the hub, and compares only the vocabulary size
                model.save_pretrained(staging, selected_adapters=[name], save_embedding_layers=policy.saves_embeddings)
            if name != "default":  # PEFT saves it to a subfolder of that name
                for file in (staging / name).iterdir():
                    file.rename(staging / file.name)
                (staging / name).rmdir()
        else:
            model.save_pretrained(staging)
        blueprint.tokenizer.save_pretrained(staging)
        write_card(staging, facts, folder.name, say=say)

    write_folder(folder, fill)
    return folder

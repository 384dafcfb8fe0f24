"""Save and load the result of a run."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from dpo_runner.config.sections.model import ModelConf
from dpo_runner.errors import ConfigError, RunError, reason_of
from dpo_runner.io.files import write_folder
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.card.card import write_card
from dpo_runner.model.card.facts import RunFacts
from dpo_runner.model.policy import Policy
from dpo_runner.model.stacking import combined_adapter
from dpo_runner.records.directory import RunDirectory
from dpo_runner.records.reading import read_run_conf

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


INITIAL = "initial"
"""Name of the frozen SFT adapter, the start of training, next to the tuned adapter."""

_SAVED = "saved"
"""Name of the saved adapter while it is beside the trained one."""

_SAME = 1e-4
"""Differences of log-probabilities that need no explanation."""

_ROUNDING = {torch.float32: 2**-11, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Relative rounding of a product, TF32's in fp32."""


def load_tuned_model(run_dir: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load a run's tuned model and tokenizer, with the base, quantization and device of its training.

    Raises:
        ConfigError: a model or adapter of the run no longer exists, or is now a pickle.
    """
    from peft import PeftModel

    from dpo_runner.model.base import load_base_model, place
    from dpo_runner.model.files.fit import check_result
    from dpo_runner.model.files.locations import loading_errors
    from dpo_runner.model.files.pickles import refuse_pickled_adapter
    from dpo_runner.model.stacking import load_lora_alone

    run = read_run_conf(run_dir)
    blueprint = Blueprint.of_run(run)
    conf = blueprint.conf
    if (run_dir / "model").is_dir():
        kept = {"chat_template": conf.chat_template, "device_map": conf.device_map}
        blueprint = Blueprint(ModelConf(model_name_or_path=str(run_dir / "model"), dtype=run.model.dtype, **kept))
        return place(load_base_model(blueprint)[0], conf).eval(), blueprint.tokenizer
    check_result(run_dir / "adapter")
    base = place(load_base_model(blueprint)[0], conf)
    model = PeftModel.from_pretrained(base, run_dir / "adapter", torch_device="cpu")
    if blueprint.adapter is not None and conf.adapter_mode in ("continue", "stack"):
        if conf.use_safetensors:
            refuse_pickled_adapter(blueprint.adapter, f"model.adapter={conf.adapter}")
        with loading_errors(str(conf.adapter), "model.adapter"):
            if conf.adapter_mode == "continue":
                model.load_adapter(str(blueprint.adapter), INITIAL, torch_device="cpu")
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
    facts: RunFacts,
    texts: Sequence[Sequence[int]],
    say: Callable[[str], None],
) -> Path:
    """Write adapter/ as safetensors (full fine-tuning: model/) with its model card, atomically.

    An adapter is loaded again before its folder gets its name; see `check_saved`. A whole model is transformers' own
    copy of the trained weights: nothing is joined or converted.

    Args:
        directory: the run's directory.
        model: the trained model.
        policy: names the adapters that make up the result.
        blueprint: its tokenizer is saved with the weights.
        facts: the facts for the model card.
        texts: token ids of a few texts, each of at least 2 tokens, on which the saved adapter is compared.
        say: shows one line to the user.

    Returns:
        The folder, loadable with plain transformers and peft.

    Raises:
        RunError: the saved adapter is not the trained one; the folder is not written.
    """
    is_adapter = isinstance(model, PeftModel)
    folder = directory.adapter if is_adapter else directory.path / "model"

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
            check_saved(staging, model, policy, blueprint, texts)
        else:
            model.save_pretrained(staging)
        blueprint.tokenizer.save_pretrained(staging)
        write_card(staging, facts, folder.name, say=say)

    write_folder(folder, fill)
    return folder


def check_saved(
    folder: Path, model: PeftModel, policy: Policy, blueprint: Blueprint, texts: Sequence[Sequence[int]]
) -> None:
    """Load a saved adapter with PEFT onto the trained model's own base, and compare it with the policy.

    Args:
        folder: the saved adapter.
        model: the trained model; the saved adapter is beside its own meanwhile.
        policy: names the adapters that make up the result.
        blueprint: the model's.
        texts: token ids to score, each at least 2.

    Raises:
        RunError: PEFT cannot load it, or log-probabilities differ by more than rounding in each adapted layer explains:
            by root mean square over all tokens, or by their mean over a text.
    """
    quantized = blueprint.quantization is not None or blueprint.own_quantization is not None
    dtype = torch.bfloat16 if quantized else blueprint.dtype
    model.eval()
    scored = model.get_base_model() if dtype == torch.float32 else model  # the base's forward has no autocast
    expected = score_texts(scored, texts)
    try:
        model.load_adapter(str(folder), _SAVED, torch_device="cpu")
    except (ValueError, TypeError, KeyError) as error:
        raise RunError(f"{folder}: PEFT cannot load the saved adapter again; {reason_of(error)}") from error
    # An initialization took its share from the base; with it the base is the published one, on which the result goes.
    taken = [name for name, weight in policy.result.items() if weight < 0]
    with switched(model, _SAVED):
        for layer in model.modules() if taken else ():
            if isinstance(layer, LoraLayer):
                layer.set_adapter([_SAVED, *taken])
        found = score_texts(scored, texts)
    model.delete_adapter(_SAVED)
    model.set_adapter("default")
    distance, shift = _compare(found, expected)
    if distance <= _SAME:
        return
    with _rounded(model, _ROUNDING[dtype]):
        tolerance = 3 * _compare(score_texts(scored, texts), expected)[0]
    if not (distance <= tolerance and shift <= tolerance / 2):
        raise RunError(
            f"the saved adapter is not the trained policy: loaded again by PEFT, its log-probabilities differ by "
            f"{distance:.2g} per token (root mean square; tolerance {tolerance:.2g}), by {shift:.2g} on average over a "
            "text; it was not kept; the last checkpoint has the trained weights"
        )


def _compare(found: list[torch.Tensor], expected: list[torch.Tensor]) -> tuple[float, float]:
    """Return the root mean square of all differences, and the largest mean difference of a text."""
    differences = [one - other for one, other in zip(found, expected, strict=True)]
    distance = torch.cat(differences).square().mean().sqrt().item()
    return distance, max(abs(each.mean().item()) for each in differences)


@contextmanager
def _rounded(model: PeftModel, share: float) -> Iterator[None]:
    """Add noise to the outputs of adapted layers, as if they were rounded otherwise."""

    def add_noise(layer: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output * (1 + share * torch.randn_like(output))

    layers = (layer for layer in model.modules() if isinstance(layer, BaseTunerLayer))
    handles = [layer.register_forward_hook(add_noise) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def score_texts(model: Any, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return log p of each text's tokens after the first, fp32."""
    scores = []
    with torch.no_grad():
        for text in texts:
            ids = torch.tensor([text], device=model.device)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[0, :-1].float()
            scores.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None].to(logits.device))[:, 0])
    return scores

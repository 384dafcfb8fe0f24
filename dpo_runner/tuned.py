"""The model that a finished run ended with, and the one that it began with."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_runner.config import RunConf
from dpo_runner.errors import ConfigError
from dpo_runner.liveness import explain_death
from dpo_runner.model_config import ModelConf
from dpo_runner.reading import PUT_BACK, explain_unreadable, read_status
from dpo_runner.removed_keys import REMOVED_KEYS, split_removed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INITIAL = "initial"
"""The frozen adapter beside the tuned one that training began with: the SFT adapter."""


def check_finished(run_dir: Path) -> None:
    """Refuse a directory without a tuned model.

    Raises:
        ConfigError: it holds no run, or one that has not finished.
    """
    status = read_status(run_dir)
    if status is None:
        raise ConfigError(f"{run_dir}: holds no run (no status.json)")
    state = status["state"]
    if state == "running" and explain_death(run_dir, status) is not None:
        raise ConfigError(f"{run_dir}: the run has died; the command that began it continues it, with this run_dir")
    if state != "finished":
        raise ConfigError(f"{run_dir}: the run is {state}, not finished; there is no tuned model yet")


def read_run_conf(run_dir: Path) -> RunConf:
    """Return the configuration that a run was started with, from its config.yaml.

    Raises:
        ConfigError: it is missing, damaged or no run's, or sets a key that was removed and without which the run's
            model cannot be loaded.
    """
    path = run_dir / "config.yaml"
    with explain_unreadable(path, PUT_BACK, OmegaConfBaseException):
        written: Any = OmegaConf.load(path)
        active: dict[str, Any] = {}
        if isinstance(written, DictConfig):
            written, active = split_removed(cast(dict[Any, Any], OmegaConf.to_container(written)))
        refused = [
            f"{path}: `{key}={value}`: was removed, and the run's model cannot be loaded without it; use the version "
            "of dpo_runner that made the run"
            for key, value in active.items()
            if REMOVED_KEYS[key].shapes_model
        ]
        if refused:
            raise ConfigError(refused)
        conf = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConf), written))
    assert isinstance(conf, RunConf)
    return conf


def load_tuned_model(run_dir: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load the model a run ended with, on the base and quantization that it was trained on.

    Raises:
        ConfigError: a model or adapter that the run names is not there any more, or has become a pickle.
    """
    from peft import PeftModel

    from dpo_runner.base_model import load_base_model
    from dpo_runner.locations import explain_missing, resolve_adapter_path
    from dpo_runner.pickles import refuse_pickled_adapter
    from dpo_runner.stacking import load_lora_alone
    from dpo_runner.tokenizer import load_tokenizer

    run = read_run_conf(run_dir)
    conf = run.model
    if (run_dir / "model").is_dir():
        conf = ModelConf(model_name_or_path=str(run_dir / "model"), dtype=conf.dtype, chat_template=conf.chat_template)
        return load_base_model(conf, None)[0].eval(), load_tokenizer(conf)
    refuse_pickled_adapter(run_dir / "adapter")
    base, _ = load_base_model(conf, run.quant)
    model = PeftModel.from_pretrained(base, run_dir / "adapter")
    if conf.adapter is not None and conf.adapter_mode in ("continue", "stack"):
        folder = resolve_adapter_path(conf)
        if conf.use_safetensors:
            refuse_pickled_adapter(Path(folder), f"model.adapter={conf.adapter}")
        with explain_missing(str(conf.adapter), "model.adapter"):
            if conf.adapter_mode == "continue":
                model.load_adapter(folder, INITIAL)
            else:  # the result has put its embeddings into the base
                load_lora_alone(model, folder, INITIAL)
    return model.eval(), load_tokenizer(conf)


@contextmanager
def untuned(model: Any) -> Iterator[None]:
    """Answer with the model that training started from: the SFT adapter, or the base with the tuned adapter off."""
    if not hasattr(model, "disable_adapter"):
        raise ConfigError("--compare: this run tuned all weights, so the untuned model is not part of its result")
    with switched(model, INITIAL if INITIAL in model.peft_config else None):
        yield


@contextmanager
def switched(model: Any, adapter: str | None) -> Iterator[None]:
    """Compute with another adapter in the tuned one's place, or with none; afterwards the model is as it was."""
    # peft unfreezes an adapter whenever it is switched on again
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

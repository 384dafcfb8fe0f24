"""PEFT adapters: PEFT's config from the `lora` group, and checks of module names and of an adapter's base."""

import dataclasses
import re
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from peft import IA3Config, LoraConfig, PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import PreTrainedModel

from dpo_runner.config.adapter_config import read_adapter_base
from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.model import LoraConf, ModelConf
from dpo_runner.errors import ConfigError, reason_of, suggest
from dpo_runner.model.files.locations import is_adapter
from dpo_runner.model.files.packaged import DEFAULT_MODEL, DEFAULT_MODEL_ORIGIN

_SAYS_NOTHING = re.compile(r"model|merged|checkpoint-\d+")  # folder names that do not identify a base


def build_peft_config(conf: LoraConf | None) -> PeftConfig | None:
    """Return PEFT's config for the `lora` group.

    Raises:
        ConfigError: `lora.config` has a field that the method lacks, or a value of the wrong type.
    """
    if conf is None:
        return None
    fields: dict[str, Any] = {"target_modules": conf.target_modules, "task_type": "CAUSAL_LM"}
    if conf.peft_type == "LORA":
        ours = {field.name for field in dataclasses.fields(LoraConf)} - {"config", "peft_type"}
        fields |= {name: getattr(conf, name) for name in ours} | {"bias": "none"}
    known = {name.value: config for name, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if conf.peft_type not in known:
        raise ConfigError(f"`lora.peft_type={conf.peft_type}`: no such method in PEFT{suggest(conf.peft_type, known)}")
    cls = known[conf.peft_type]
    _check_config_fields(conf, cls, fields)
    if "target_modules" not in {field.name for field in dataclasses.fields(cls)}:
        del fields["target_modules"]
    try:
        config = cls(**fields, **conf.config)
    except (TypeError, ValueError, ImportError) as error:
        raise ConfigError(f"`lora`: {reason_of(error)}") from None
    if conf.peft_type == "ADALORA":
        raise ConfigError(
            "`lora.peft_type=ADALORA`: moves ranks between layers by a schedule that DPOTrainer does not call, so it "
            "would train as a plain adapter of lora.config.init_r; use LORA, or lora.rank_pattern"
        )
    if config.is_prompt_learning:
        raise ConfigError(
            f"`lora.peft_type={conf.peft_type}`: learns virtual tokens, so the policy would not start equal to its "
            "reference; use a method that adapts weights, such as LORA"
        )
    return config


def _check_config_fields(conf: LoraConf, cls: type, fields: dict[str, Any]) -> None:
    known = {field.name: field for field in dataclasses.fields(cls)}
    for name, value in conf.config.items():
        if name in fields:
            raise ConfigError(f"`lora.config.{name}`: has its own key; set lora.{name}={value}")
        if name not in known:
            raise ConfigError(f"`lora.config.{name}`: {cls.__name__} has no such field{suggest(name, known)}")
        default = known[name].default
        kinds = (int, float) if type(default) is float else (type(default),)
        if isinstance(default, (bool, int, float, str)) and (
            not isinstance(value, kinds) or isinstance(value, bool) != isinstance(default, bool)
        ):
            raise ConfigError(f"`lora.config.{name}={value}`: must be {type(default).__name__}, such as {default}")


def changes_base(config: PeftConfig | None) -> bool:
    """Return whether an initialization subtracts its share from the base weights.

    PiSSA (arXiv 2404.02948, Eq. 3-5) and OLoRA (arXiv 2406.01775) replace W by W - s·B0·A0. The base then cannot be
    the reference.
    """
    initialization = config.init_lora_weights if isinstance(config, LoraConfig) else True
    return isinstance(initialization, str) and initialization.startswith(("pissa", "olora"))


def make_loadable(config: PeftConfig) -> None:
    """Name IA3's feedforward modules as its target modules are named.

    PEFT resolves only the latter, and refuses to load the saved config if the former are not among them.
    """
    if isinstance(config, IA3Config) and isinstance(config.target_modules, set):
        ends = config.feedforward_modules
        if isinstance(ends, set):
            config.feedforward_modules = {name for name in config.target_modules if name.endswith(tuple(ends))}


def check_targets(conf: LoraConf, meta: PreTrainedModel, name: str) -> None:
    """Check that each module that `lora` names is in the model.

    PEFT silently ignores a wrong name in a list.

    Raises:
        ConfigError: a module is missing; names the first one, and the nearest names in the model.
    """
    from peft.utils.other import match_target_against_key

    paths = [path for path, _ in meta.named_modules() if path]
    leaves = {path.rpartition(".")[2] for path in paths if not path.rpartition(".")[2].isdigit()}
    for key in ("target_modules", "exclude_modules", "modules_to_save"):
        value = getattr(conf, key)
        if (
            isinstance(value, str)
            and value != "all-linear"
            and not any(match_target_against_key(value, p) for p in paths)
        ):
            raise ConfigError(
                f"`lora.{key}={value}`: matches no module of {name}; its modules are {', '.join(sorted(leaves))}"
            )
        for module in value if isinstance(value, list) else []:
            if not any(path == module or path.endswith(f".{module}") for path in paths):
                near = get_close_matches(module, sorted(leaves), n=3) or sorted(leaves)
                raise ConfigError(f"`lora.{key}`: {name} has no module `{module}`; the nearest are {', '.join(near)}")
    depth = getattr(meta.config.get_text_config(), "num_hidden_layers", None)
    for index in conf.layers_to_transform or []:
        if depth is not None and not 0 <= index < depth:
            raise ConfigError(f"`lora.layers_to_transform={index}`: {name} has layers 0 to {depth - 1}")


def find_other_bases(conf: ModelConf, path: str, adapter: Path | None) -> list[str]:
    """Return a warning for each adapter that was trained on a base other than the run's.

    Names are compared as given, as folders, as hub ids in the hub's cache, and by their last part, so that two names
    of the same base give no warning.

    Raises:
        ConfigError: an adapter or the model is missing.
    """
    origin = {DEFAULT_MODEL_ORIGIN} if conf.model_name_or_path == DEFAULT_MODEL else set()
    base = {spelling for name in (conf.model_name_or_path, path, *origin) for spelling in _spell(name)}
    adapters = {} if adapter is None else {"model.adapter": (conf.adapter, str(adapter))}
    if conf.reference not in ("initial", "base") and is_adapter(conf.reference):
        adapters["model.reference"] = (conf.reference, conf.reference)
    warnings = []
    for key, (name, folder) in adapters.items():
        named = read_adapter_base(Path(folder).expanduser() / "adapter_config.json")
        if named is not None and not base & _spell(named):
            warnings.append(
                f"{key}={name}: its adapter_config.json names {named} as its base, and it is put on "
                f"{conf.model_name_or_path}; an adapter works as trained only on its own base"
            )
    return warnings


def _spell(name: str) -> set[str]:
    """Return the possible spellings of a base's name, in lower case."""
    path = Path(name).expanduser()
    spellings = {name, str(path)}
    for each in (path, path.resolve()) if path.exists() else (path,):
        cached = next((part for part in each.parts if part.startswith("models--")), None)  # the hub's cache
        hub_id = None if cached is None else cached.removeprefix("models--").replace("--", "/")
        spellings |= {str(each), hub_id or name, (hub_id or each.name).rpartition("/")[2]}
    return {each.lower() for each in spellings if each and not _SAYS_NOTHING.fullmatch(each)}


def describe_adapter(conf: RunConf) -> str:
    model = conf.model
    if conf.lora is not None:
        on_top = f" on top of the frozen {model.adapter}" if model.adapter and model.adapter_mode == "stack" else ""
        return f"new {_describe_lora(conf.lora)}{on_top}"
    if model.adapter is not None and model.adapter_mode == "continue":
        return f"continues {model.adapter}, in its own shape"
    return "none: all weights are trained"


def _describe_lora(lora: LoraConf) -> str:
    modules = lora.target_modules if isinstance(lora.target_modules, str) else ", ".join(lora.target_modules)
    if lora.peft_type != "LORA":
        given = "".join(f", {key}={value}" for key, value in lora.config.items())
        return f"{lora.peft_type}{given}, on {modules}"
    kind = "DoRA" if lora.use_dora else "LoRA"
    start = "" if lora.init_lora_weights is True else f", {lora.init_lora_weights} initialization"
    return f"{kind}, r={lora.r}, lora_alpha={lora.lora_alpha}, lora_dropout={lora.lora_dropout:g}{start}, on {modules}"

"""Read an adapter_config.json, and the base model that it names. Imports no torch."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from dpo_runner.errors import ConfigError, reason_of


def read_adapter_fields(adapter_config: Path) -> dict[str, Any]:
    """Return the content of an adapter_config.json.

    Raises:
        ConfigError: the file is not a JSON object.
    """
    try:
        return dict(json.loads(adapter_config.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{adapter_config}: cannot be read as an adapter's config; {reason_of(error)}") from None


def read_adapter_base(adapter_config: Path) -> str | None:
    """Return the base model that an adapter_config.json names, or None.

    Raises:
        ConfigError: the file is not a JSON object.
    """
    value = read_adapter_fields(adapter_config).get("base_model_name_or_path")
    return value if isinstance(value, str) and value else None


def recognise_adapter(config: DictConfig) -> None:
    """Replace an adapter folder in `model.model_name_or_path` by `model.adapter` and the adapter's base.

    Raises:
        ConfigError: the adapter names no base, or `model.adapter` is set too.
    """
    name = str(config.model.model_name_or_path)
    try:
        file = Path(name).expanduser() / "adapter_config.json"
        if not file.is_file():
            return
    except (OSError, RuntimeError):  # not a valid file name; the field checks report why
        return
    base = read_adapter_base(file)
    if config.model.adapter is not None:
        raise ConfigError(
            f"`model.model_name_or_path={name}`: is an adapter, and model.adapter names another one; put its base "
            f"({base}) here"
        )
    if not base:
        raise ConfigError(
            f"`model.model_name_or_path={name}`: is an adapter that names no base; put it in model.adapter"
        )
    config.model.model_name_or_path, config.model.adapter = base, name

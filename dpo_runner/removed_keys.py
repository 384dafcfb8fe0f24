"""Configuration keys that were removed: what to do instead, and how old runs that have them are read. No torch.

A command or a YAML file that sets one is refused. The config.yaml of an old run is read without them: where a key was
off it says nothing, and where it was on the caller decides.
"""

from dataclasses import dataclass
from typing import Any

_QUANT = "use quant=nf4, fp4 or int8, or name a checkpoint that is quantized already"


@dataclass(frozen=True)
class RemovedKey:
    """A key that was removed.

    Attributes:
        advice: what to do instead.
        off: its values that had no effect, the former default first.
        shapes_model: whether the run's model cannot be loaded without it.
    """

    advice: str
    off: tuple[Any, ...]
    shapes_model: bool = False


REMOVED_KEYS = {
    "engine.compile_layers": RemovedKey("leave it out", (False,)),
    "engine.keep_dequantized": RemovedKey("leave it out", (None, False)),
    "quant.config": RemovedKey(_QUANT, ({},), shapes_model=True),
}
REMOVED_OPTIONS = {"quant=other": _QUANT}
"""Options of config groups, and what to do instead."""


def explain_removed(key: str) -> str | None:
    """Return the line that refuses a dotted key, or one beneath it; None where it was not removed."""
    for name, removed in REMOVED_KEYS.items():
        if key == name or key.startswith(f"{name}."):
            return f"`{name}`: was removed; {removed.advice}"
    return None


def split_removed(written: dict[Any, Any]) -> tuple[dict[Any, Any], dict[str, Any]]:
    """Split what a run's config.yaml holds.

    Args:
        written: the nested configuration, which may be damaged; it is left as it is.

    Returns:
        The configuration without removed keys, and those of them that were on, with their values.
    """
    kept, active = dict(written), {}
    for key, removed in REMOVED_KEYS.items():
        section, _, name = key.partition(".")
        if isinstance(kept.get(section), dict) and name in kept[section]:
            kept[section] = dict(kept[section])
            value = kept[section].pop(name)
            if value not in removed.off:
                active[key] = value
    return kept, active


def add_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Return a nested configuration with removed keys at their former defaults, as earlier versions hashed it."""
    added = dict(config)
    for key, removed in REMOVED_KEYS.items():
        section, _, name = key.partition(".")
        if isinstance(added.get(section), dict):
            added[section] = {**added[section], name: removed.off[0]}
    return added

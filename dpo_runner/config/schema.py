"""The configuration schema: every key, and type checks of values. Imports no torch."""

import dataclasses
import functools
import re
import typing
from collections.abc import Iterator, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dpo_runner.config.keys import find_removed
from dpo_runner.config.rules.model import OTHER_LORA_FIELDS, OWNED_LORA_FIELDS
from dpo_runner.config.rules.training import OTHER_FIELDS, OWNED_FIELDS
from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.data import SourceConf
from dpo_runner.config.sections.expected import ExpectedConf
from dpo_runner.config.sections.model import LoraConf, QuantConf
from dpo_runner.config.sections.run import RunFields
from dpo_runner.errors import reason_of, suggest
from dpo_runner.io.masking import mask_override


def shorten_keys(keys: Sequence[str]) -> dict[str, str]:
    """Map each dotted key to its shortest unambiguous suffix."""
    short = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[-count:]) for count in range(1, len(parts) + 1)]
        short[key] = next((end for end in endings if sum(f".{other}".endswith(f".{end}") for other in keys) == 1), key)
    return short


ONLY_POINT = "the only point"
"""The label of a point that varies nothing."""

_LONG_FRACTION = re.compile(r"(?<==)\d+\.\d{6,}(e-?\d+)?(?= |$)")


def label_point(varied: Sequence[str]) -> str:
    """Return a short label of what a point varies, such as `beta=0.1 r=8`; long fractions are rounded."""
    pairs = [mask_override(text).lstrip("+").partition("=") for text in varied]
    short = shorten_keys([key for key, _, _ in pairs])
    label = " ".join(f"{short[key]}={value}" for key, _, value in pairs)
    return _LONG_FRACTION.sub(lambda match: f"{float(match[0]):.4g}", label) or ONLY_POINT


def _walk_schema(cls: type, prefix: str = "") -> Iterator[tuple[str, type | None]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        key, hint = f"{prefix}{field.name}", hints[field.name]
        *_, item = typing.get_args(hint) or (None,)
        if typing.get_origin(hint) is dict or (typing.get_origin(hint) is list and dataclasses.is_dataclass(item)):
            yield key, None
            yield from _walk_field(f"{key}.*", item)
        else:
            yield from _walk_field(key, hint)


def _walk_field(key: str, hint: typing.Any) -> Iterator[tuple[str, type | None]]:
    kinds = (hint, *typing.get_args(hint))  # the type itself, and the members of a union such as `QuantConf | None`
    section = next((kind for kind in kinds if isinstance(kind, type) and dataclasses.is_dataclass(kind)), None)
    yield key, section
    if section is not None:
        yield from _walk_schema(section, f"{key}.")


SCHEMA: dict[str, type | None] = dict(_walk_schema(RunFields))
"""Every dotted key of a run's configuration; maps a section to its dataclass and a field to None.

The entries of a map, and of a list of sections, are listed under `*`, such as `data.sources.*.path`.
"""


def schema_key(key: str) -> str:
    """Return a dotted key as spelled in SCHEMA, with `*` for the entry names of a map, which may hold dots."""
    known = ""
    for name in key.split("."):
        if known.endswith(".*") and SCHEMA[known] is None:
            break
        step = f"{known}.{name}" if known else name
        known = f"{known}.*" if step not in SCHEMA and f"{known}.*" in SCHEMA else step
    return known


def find_value_mistakes(key: str, value: Any) -> list[str]:
    """Return one line per mistake in setting the dotted `key` to `value`: unknown keys, wrong types."""
    known = schema_key(key)
    if known not in SCHEMA:
        return [_describe_unknown(known if "*" in known else key)]
    if known == "expected" and isinstance(value, list):
        value = {str(number): item for number, item in enumerate(value)}
    if f"{known}.*" in SCHEMA and isinstance(value, dict):
        return [line for name, item in value.items() for line in find_value_mistakes(f"{key}.{name}", item)]
    if SCHEMA[known] is not None:
        if isinstance(value, dict):
            return [line for name, item in value.items() for line in find_value_mistakes(f"{key}.{name}", item)]
        if value is None and key in ("quant", "lora"):
            return []
        return [f"`{key}={value}`: is a section; set its fields ({key}.FIELD=VALUE) or choose an option of the group"]
    if isinstance(value, str) and ("${" in value or value == "???"):
        return []  # resolved, or reported missing, after composition
    if isinstance(value, list) and any(isinstance(item, (list, dict)) for item in value) and key != "sweep.paired":
        return [f"`{key}={value}`: must be a list of plain values, such as [a,b]"]
    try:
        if "*" in known:  # an entry name chosen by the user: substitute any name
            OmegaConf.update(_blank_config(), _place(known), value, force_add=True, merge=False)
        else:
            OmegaConf.update(_blank_config(), key, value, merge=False)
    except (OmegaConfBaseException, ValueError, TypeError, ArithmeticError, AssertionError) as error:
        null = "; None is written null" if str(value).lower() == "none" and _takes_null(key) else ""
        files = "; several files are a pattern (pairs*.jsonl) or data.sources" if key == "data.path" else ""
        return [f"`{key}={value}`: {_describe_type_error(reason_of(error))}{null}{files}"]
    kept = OmegaConf.select(_blank_config(), _place(known))
    if isinstance(kept, bool) and isinstance(value, (int, float)) and value not in (0, 1):  # OmegaConf takes any number
        return [f"`{key}={value}`: must be true or false"]
    for item, as_kept in zip(value, kept, strict=True) if isinstance(value, list) and kept else [(value, kept)]:
        if isinstance(item, bool) and isinstance(as_kept, str):
            return [f"`{key}={item}`: must be a text; YAML reads no, off, yes and on as booleans, write them in quotes"]
    return []


_ANY = "any"


def _place(known: str) -> str:
    """Return where a key of SCHEMA is in the scratch configuration."""
    return known.replace("*", "0" if known.startswith("expected.") else _ANY)


@functools.cache
def _blank_config() -> DictConfig:
    """Return a scratch configuration for type checks; its values do not matter."""
    config = OmegaConf.structured(RunConf)
    config.quant, config.lora = QuantConf(), LoraConf()
    config.data.sources, config.expected = {_ANY: SourceConf()}, [ExpectedConf()]
    return typing.cast(DictConfig, config)


def _takes_null(key: str) -> bool:
    try:
        OmegaConf.update(_blank_config(), key, None, force_add=False)
    except (OmegaConfBaseException, ValueError):
        return False
    return True


def _describe_type_error(message: str) -> str:
    if "is not Optional" in message:
        return "must not be null"
    if message.startswith("Cannot convert") and "to string" in message:
        return "must be a text"
    if "is not a valid bool" in message:
        return "must be true or false"
    if "is not a ListConfig, list or tuple" in message:
        return "must be a list, such as [a,b]"
    if "to Dict[" in message or "is not a subclass of Dict[" in message:
        return "must be a map, such as {a:b}"
    kinds = {"Float": "a number", "Integer": "a whole number", "String": "a text"}
    kind = message.rpartition(" to ")[2]
    return f"must be {kinds[kind]}" if "could not be converted to" in message and kind in kinds else message


def _describe_unknown(key: str) -> str:
    if (removed := find_removed(key)) is not None:
        return removed
    section, _, name = key.rpartition(".")
    if section and section not in SCHEMA:
        return _describe_unknown(section)
    if section and SCHEMA[section] is None and f"{section}.*" not in SCHEMA:
        return f"`{key}`: is set with the field as a whole, if that takes a map: {section}={{{name}: VALUE}}"
    owned = {"training": OWNED_FIELDS, "lora": OWNED_LORA_FIELDS}.get(section, {})
    if name in owned:
        return f"`{key}`: is not set here; {owned[name]}"
    if section in ("training", "") and name in OTHER_FIELDS:
        return f"`{key}`: {OTHER_FIELDS[name]}"
    if section and name == section:
        return f"`{key}`: names `{name}` twice; a file of conf/{name}/ holds the fields without that line"
    if section == "lora" and name in OTHER_LORA_FIELDS:
        return f"`{key}`: {OTHER_LORA_FIELDS[name]}"
    if section == "lora":
        instead = f"further fields of PEFT's config go into lora.config (lora.config.{name}=VALUE)"
        near = suggest(name, _fields_of(section))
        return f"`{key}`: no such field{near if near.startswith('; did') else ''}; {instead}"
    near = suggest(name, _fields_of(section))
    elsewhere = [known for known in SCHEMA if known.rpartition(".")[2] == name and "*" not in known]
    if not near.startswith("; did you mean") and elsewhere:
        near = f"; did you mean `{elsewhere[0]}`?"
    return f"`{key}`: no such field{near or f' of `{section}`'}"


def _fields_of(section: str) -> list[str]:
    return [known.rpartition(".")[2] for known in SCHEMA if known.rpartition(".")[0] == section]

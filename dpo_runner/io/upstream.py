"""The libraries' newest tested versions, and the check of private names, which any new version may rename.

Every private name is used in one module, which checks it when it is imported. The functions at the end are for names
that several modules need.
"""

import inspect
from importlib.metadata import version
from typing import Any

from dpo_runner.errors import RunError

NEWEST = {
    "torch": "2.13",
    "transformers": "5.24",
    "trl": "1.16",
    "peft": "0.21",
    "bitsandbytes": "0.50",
    "accelerate": "1.15",
    "datasets": "5.2",
    "wandb": "0.31",
}
"""The newest versions that the tests have passed with; pyproject.toml has the oldest."""


def list_newer() -> list[str]:
    """Return one warning for each installed library that is newer than tested."""
    found = {library: version(library) for library in NEWEST}
    return [
        f"{library} {found[library]} is newer than {newest}, the newest that dpo-runner is tested with; if it does not "
        f"work: pip install '{library}=={newest}.*'"
        for library, newest in NEWEST.items()
        if _read(found[library]) > _read(newest)
    ]


def check_names(library: str, owner: object, *names: str, **methods: str) -> None:
    """Check private names of a library that are overridden, replaced or called.

    Args:
        library: its distribution's name, a key of `NEWEST` or not.
        owner: the module or class that has the names.
        names: attributes.
        methods: methods, with the parameters after `self` that they are called with, in order.

    Raises:
        RunError: a name is gone, or a method takes other parameters.
    """
    for name in names:
        find_private(library, owner, name)
    for name, known in methods.items():
        taken = list(inspect.signature(find_private(library, owner, name)).parameters.values())[1:]
        rest = taken[len(known.split()) :]
        required = [each.name for each in rest if each.default is each.empty and each.kind not in _ANY_NUMBER]
        if [each.name for each in taken[: len(known.split())]] != known.split() or required:
            raise _mismatch(library, f"{_name_of(owner)}.{name} takes ({', '.join(each.name for each in taken)})")


def find_private(library: str, owner: object, name: str) -> Any:
    """Return a private attribute.

    Raises:
        RunError: it is gone.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise _mismatch(library, f"{_name_of(owner)}.{name} is gone") from None


def find_attention(config: Any) -> str | None:
    """Return the attention implementation of a transformers config."""
    found: str | None = find_private("transformers", config, "_attn_implementation")
    return found


def find_commit(config: Any) -> str | None:
    """Return the hub commit that a transformers config was loaded from; None for a local folder."""
    found: str | None = getattr(config, "_commit_hash", None)
    return found


def find_fingerprint(rows: Any) -> str:
    """Return the fingerprint of a `datasets.Dataset`."""
    return str(find_private("datasets", rows, "_fingerprint"))


def set_fingerprint(rows: Any, fingerprint: str) -> None:
    """Give a `datasets.Dataset` the fingerprint that `datasets` finds its cached results by."""
    rows._fingerprint = fingerprint


def prepare_inputs(trainer: Any, batch: Any) -> Any:
    """Return a batch on the device of transformers' Trainer."""
    return find_private("transformers", trainer, "_prepare_inputs")(batch)


_ANY_NUMBER = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _mismatch(library: str, what: str) -> RunError:
    newest = NEWEST.get(library)
    cure = f"; it is tested with {library} up to {newest}: pip install '{library}=={newest}.*'" if newest else ""
    return RunError(f"{library} {version(library)}: {what}; dpo-runner does not support this version{cure}")


def _name_of(owner: object) -> str:
    return str(getattr(owner, "__name__", type(owner).__name__))


def _read(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)

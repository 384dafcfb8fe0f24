"""What a job is called: its place in the sweep and the hash of its configuration, never its values."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpo_runner.config import OUTSIDE, RunConf, config_keys
from dpo_runner.removed_keys import add_defaults

_JOB_NAME = re.compile(r"(\d+)-([0-9a-f]{8})")


def digest_config(conf: RunConf, ignored: frozenset[str] = frozenset()) -> str:
    """Return the sha256 of what a configuration computes, as 64 hexadecimal digits.

    Removed keys count with their former defaults, so that sweeps of earlier versions can be continued.

    Args:
        conf: the configuration.
        ignored: dotted keys to leave out as well.
    """

    def keep(value: Any, prefix: str = "") -> Any:
        if not isinstance(value, dict):
            return value
        return {key: keep(item, f"{prefix}{key}.") for key, item in value.items() if f"{prefix}{key}" not in ignored}

    told = {key: value for key, value in config_keys(conf).items() if key not in OUTSIDE}
    return hashlib.sha256(json.dumps(keep(add_defaults(told)), sort_keys=True).encode()).hexdigest()


def split_name(name: str) -> tuple[int, str] | None:
    """Return index and hash of a job directory's name, or None where it is none."""
    match = _JOB_NAME.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


def assign_names(digests: Sequence[str], existing: Mapping[str, str]) -> list[str]:
    """Return `<index>-<hash8>` for each job; one that exists keeps its name, new ones count on.

    Args:
        digests: what each job computes, all different.
        existing: names that are taken, and what those jobs compute.
    """
    known = {digest: name for name, digest in existing.items()}
    taken = [split[0] for name in existing if (split := split_name(name))]
    new = iter(range(max(taken, default=-1) + 1, len(digests) + max(taken, default=-1) + 1))
    return [known.get(digest) or f"{next(new)}-{digest[:8]}" for digest in digests]

"""Masking of secrets as `***`: by their form, and by value if they are in the environment.

All output of this process goes through here: files, logs, W&B, the terminal. Imports neither torch nor Hydra.
"""

import functools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

MASK = "***"

# A tokenizer's pad_token, eos_token, … are not secrets.
_SECRET_KEY = re.compile(
    r"(^|_)((?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!mask_)token"
    r"|secret|password|passwd|api_key|apikey|access_key|secret_key|private_key|credential)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|(?<![\w-])sk-[A-Za-z0-9_-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_[A-Za-z0-9_]{20,}"
    r"|\bglpat-[A-Za-z0-9_-]{20,}|\bxox[a-z]-[A-Za-z0-9-]{20,}|\bAKIA[A-Z0-9]{16}|\bAIza[A-Za-z0-9_-]{35}"
    r"|\beyJ[A-Za-z0-9_-]{10,2000}\.[A-Za-z0-9_-]{10,9000}\.[A-Za-z0-9_-]+|(?<=\bBearer )[^\s\"']{8,}"
    r"|\bwandb_v1_[A-Za-z0-9_]{20,}|(?<![0-9a-fA-F/])[0-9a-f]{40}(?![0-9a-fA-F/])"
    r"|(?<=://)(?:[^/\s@:]*:[^/\s]+|[^/\s@:]{16,})(?=@)"
)
# `password=…`, `{api_key: …}`, `?X-Amz-Signature=…`: a name followed by a value.
_NAMED_VALUE = re.compile(
    r"((?<![A-Za-z0-9])(?:[A-Za-z0-9]{1,40}[_-]){0,8}"
    r"(?:secret|(?:ssl)?password|passwd|api[_-]?key|access[_-]?key|(?:hub|hf|auth|access|refresh|security|session)[_-]token"
    r"|(?<=[?&])token|(?<=[?&])(?:sig|signature)|amz-signature|amz-credential)"
    r"[\"']?\s*[:=]\s*[\"']?)(?!\*\*\*)([^\s\"'&,;{}\[\]]+)",
    re.IGNORECASE,
)
_SHOWN_VALUE = re.compile(r"([\w.]+)(: |=)(.+)")
_SECRET_VARIABLE = re.compile(
    r"(token|passw(or)?d|passphrase|api_?key|access_key|private_key|credentials?)$|(^|_)(secret|key|pass|pwd|pat)(_|$)",
    re.IGNORECASE,
)
_NOT_SECRET_VARIABLES = ("PWD", "OLDPWD")
_URL_PASSWORD = re.compile(r"://[^/\s@:]*:([^/\s]+)@")
_SHORTEST = 6
"""Minimum characters of a secret in the environment; a shorter one could be an ordinary word."""
_SHORTEST_NUMBER = 8
"""Minimum digits of a password; a shorter one would mask parts of ordinary figures. No other secret is a number."""
_PASSWORD_VARIABLE = re.compile(r"passw(or)?d|passphrase|(^|_)(pass|pwd|secret)(_|$)", re.IGNORECASE)
_COMMIT_KEYS = ("revision", "adapter_revision", "commit")
"""A commit is 40 hexadecimal digits, like a W&B key, but is not a secret."""


def mask_secrets(value: Any, key: str = "") -> Any:
    """Return a copy of nested containers with everything that looks like a secret masked.

    Args:
        value: dicts, lists, tuples and strings, nested; other values stay unchanged.
        key: the name of the value, if any.
    """
    if isinstance(value, dict):
        return {name: mask_secrets(item, str(name)) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [mask_secrets(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if key in _COMMIT_KEYS:
        return _mask_known(value)
    return MASK if _SECRET_KEY.search(key) and value else mask_text(value)


def mask_text(text: str) -> str:
    """Return the text with everything that looks like a secret masked."""
    return _NAMED_VALUE.sub(rf"\1{MASK}", _SECRET_VALUE.sub(MASK, _mask_known(text)))


def mask_override(text: str) -> str:
    """Return one `KEY=VALUE` override with its value masked if it looks like a secret."""
    key, separator, value = text.partition("=")
    return f"{mask_text(key)}{separator}{mask_secrets(value, key.rpartition('.')[2])}"


def mask_shown(text: str) -> str:
    """Return YAML or overrides, as Hydra shows them, with the value of each line masked as `mask_secrets` does."""

    def mask_value(line: re.Match[str]) -> str:
        key, value = line[1], line[3]
        return f"{key}{line[2]}{value if value == 'null' else mask_secrets(value, key.rpartition('.')[2])}"

    return "\n".join(
        _SHOWN_VALUE.sub(mask_value, line, count=1) if _SHOWN_VALUE.search(line) else mask_text(line)
        for line in text.split("\n")
    )


def holds_secret(text: str) -> bool:
    """Return whether the text contains something that looks like a secret."""
    return mask_text(text) != text


def _mask_known(text: str) -> str:
    pattern = _compile_known(frozenset(os.environ.items()))
    return pattern.sub(MASK, text) if pattern else text


@functools.lru_cache(maxsize=8)
def _compile_known(environment: frozenset[tuple[str, str]]) -> re.Pattern[str] | None:
    """Return a pattern of the secrets known by value, longest first: one may be a prefix of another."""
    values = set(_find_in_environment(environment))
    return re.compile("|".join(map(re.escape, sorted(values, key=len, reverse=True)))) if values else None


def _find_in_environment(environment: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Yield secrets from environment variables: by name, and passwords in URLs such as a proxy's."""
    for name, value in environment:
        value = value.strip()  # programs that read the variable strip it too
        if match := _URL_PASSWORD.search(value):
            if len(match[1]) >= _SHORTEST:
                yield match[1]
        elif (
            len(value) >= _SHORTEST
            and name not in _NOT_SECRET_VARIABLES
            and _SECRET_VARIABLE.search(name)
            and not _is_number(name, value)
            and not _is_path(value)
        ):
            yield value


def _is_number(name: str, value: str) -> bool:
    """Return whether a value is a numeric setting (MAX_TOKEN=1000000), or too short a number to mask."""
    return value.isdecimal() and not (len(value) >= _SHORTEST_NUMBER and _PASSWORD_VARIABLE.search(name))


def _is_path(value: str) -> bool:
    """Return whether a value is an existing path, such as a file that holds the secret."""
    try:
        return value.startswith(("/", "~")) and Path(value).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long for a path, an unknown user's home, …
        return False

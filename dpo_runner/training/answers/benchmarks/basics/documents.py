"""Functions that the YAML files of the bundled tasks name: documents, and the checks of answers to instructions."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset


def load_documents(file: str, **metadata: Any) -> dict[str, Dataset]:
    """Return a bundled file's rows as the split `test`."""
    return {"test": Dataset.from_json(str(Path(__file__).with_name(file)))}


def follows(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return whether an answer follows its instruction."""
    return {"acc": float(_CHECKS[doc["check"]](results[0].strip(), doc["subject"]))}


def _words(text: str) -> list[str]:
    return re.findall(r"[\w'-]+", text)


_CHECKS: dict[str, Callable[[str, str], bool]] = {
    "includes": lambda text, subject: set(subject.split(" and ")) <= set(_words(text.lower())),
    "asks": lambda text, subject: text.endswith("?"),
    "starts": lambda text, subject: _words(text)[:1] == [subject],
    "copies": lambda text, subject: text.strip("\"'") == subject,
    "because": lambda text, subject: "because" in _words(text.lower()),
    "year": lambda text, subject: "1999" in text,
    "title": lambda text, subject: 1 <= len(_words(text)) <= 10,
    "exclaims": lambda text, subject: text.endswith("!"),
}

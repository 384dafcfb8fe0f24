"""Scores and judges' replies by content, kept in the cache so that none is paid for or computed twice."""

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

from dpo_runner.data.layouts.messages import Message
from dpo_runner.io.files import cache_dir


def digest(*content: Any) -> str:
    """Return a digest of JSON values, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


class ScoreStore:
    """The scores of one scorer, in a file that several processes may append to.

    Args:
        scorer: everything that its scores depend on, as JSON values, beside prompt and answers.
    """

    def __init__(self, *scorer: Any) -> None:
        self._path = scores_dir() / f"{digest(*scorer)}.jsonl"
        self._lock, self._scores = threading.Lock(), dict[str, Any]()
        if self._path.exists():
            for line in self._path.read_bytes().split(b"\n"):
                try:
                    key, score = json.loads(line)
                except ValueError:  # the end of a line that a kill has cut off
                    continue
                self._scores[key] = score

    def find(self, messages: list[Message], *answers: str) -> Any:
        """Return what was kept for these answers to a prompt, in this order; None if nothing was."""
        return self._scores.get(digest(messages, *answers))

    def keep(self, score: Any, messages: list[Message], *answers: str) -> None:
        """Keep a JSON value; it is on disk on return."""
        key = digest(messages, *answers)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        line = f"\n{json.dumps([key, score])}\n".encode()  # a line of its own, whatever a kill has left before it
        with self._lock:
            self._scores[key] = score
            with self._path.open("ab", buffering=0) as file:  # one write: the system appends it as a whole
                file.write(line)
                os.fsync(file.fileno())


def scores_dir() -> Path:
    """Return the folder of all stores."""
    return cache_dir() / "scores"

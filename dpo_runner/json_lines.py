"""A file of records that grows as work is done, so that work which was stopped can go on from there."""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_runner.artifacts import write_text
from dpo_runner.errors import RunError


class JsonLines:
    """Records in a file that grows as work is done, one JSON object a line.

    Args:
        path: the file. A last line that a kill has cut off is dropped.

    Raises:
        RunError: another line is no JSON.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        if not path.exists():
            return
        content = path.read_bytes()
        whole, _, cut = content.rpartition(b"\n")
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                self.records.append(json.loads(line))
            except ValueError:
                raise RunError(f"{path}:{number}: is no JSON; delete the file to have its work done again") from None
        if cut:
            self.keep(len(self.records))

    def keep(self, count: int) -> None:
        """Drop all but the first `count` records."""
        self.records = self.records[:count]
        write_text(self.path, "".join(map(_to_line, self.records)))

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Add records, on disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(map(_to_line, records)))
            file.flush()
            os.fsync(file.fileno())
        self.records += records


def _to_line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"  # ASCII: a line separator or lone surrogate in an answer must not break a line

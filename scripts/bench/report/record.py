"""What has been measured so far, kept in one JSON file so that an interrupted benchmark goes on."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo_runner.errors import ConfigError
from dpo_runner.io.files import write_text

Entry = dict[str, Any]


class Record:
    """A JSON file of measurements, written whole after each of them.

    Args:
        path: the file; made if it is not there.
        settings: what everything in it was measured with.
        machine: where.

    Raises:
        ConfigError: the file's measurements were made with other settings or on another machine.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], machine: Mapping[str, Any]) -> None:
        self.path = path
        self.data: Entry = {"settings": dict(settings), "machine": dict(machine), "shapes": {}}
        if path.exists():
            kept = json.loads(path.read_text(encoding="utf-8"))
            for part in ("settings", "machine"):
                if differing := sorted(
                    key
                    for key in self.data[part].keys() | kept[part].keys()
                    if self.data[part].get(key) != kept[part].get(key)
                ):
                    key = differing[0]
                    raise ConfigError(
                        f"{path}: measured with {part} {key}={kept[part].get(key)!r}, now it is "
                        f"{self.data[part].get(key)!r}; --fresh measures all anew, --out another file"
                    )
            self.data = kept

    def part(self, *keys: str) -> Entry:
        """Return the dict under `keys`, made where it is not there."""
        entry = self.data
        for key in keys:
            entry = entry.setdefault(key, {})
        return entry

    def measure(self, keys: tuple[str, ...], repeat: int, work: Callable[[], Entry]) -> Entry:
        """Return the measurement number `repeat` under `keys`, made and kept where it is not there."""
        entries: list[Entry] = self.part(*keys[:-1]).setdefault(keys[-1], [])
        if len(entries) <= repeat:
            assert len(entries) == repeat, keys
            entries.append(work())
            self.save()
        return entries[repeat]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.data, indent=1) + "\n")

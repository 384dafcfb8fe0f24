"""Measurements so far in one JSON file, so that an interrupted benchmark can continue."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dpo_runner.errors import ConfigError
from dpo_runner.io.files import write_text

Entry = dict[str, Any]


class Record:
    """A JSON file of measurements, rewritten after each of them.

    Args:
        path: the file; created if it does not exist.
        settings: the settings of all measurements.
        machine: the machine of all measurements.

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
        """Return the dict under `keys`, created if missing."""
        entry = self.data
        for key in keys:
            entry = entry.setdefault(key, {})
        return entry

    def measure(self, keys: tuple[str, ...], repeat: int, work: Callable[[], Entry]) -> Entry:
        """Return measurement `repeat` under `keys`; run `work` and save its result if missing."""
        entries: list[Entry] = self.part(*keys[:-1]).setdefault(keys[-1], [])
        if len(entries) <= repeat:
            assert len(entries) == repeat, keys
            entries.append(work())
            self.save()
        return entries[repeat]

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.path, json.dumps(self.data, indent=1) + "\n")

"""Files that a command writes beside what it shows in the terminal, named by its flags."""

from itertools import combinations
from pathlib import Path

from rich.console import Console
from rich.text import Text

from dpo_runner.artifacts import write_text
from dpo_runner.console import visible
from dpo_runner.errors import ConfigError


def check_targets(targets: dict[str, Path]) -> None:
    """Refuse files that cannot be written, before minutes of work.

    Args:
        targets: by flag, such as `--html`.

    Raises:
        ConfigError: with a line for each.
    """
    mistakes = []
    for flag, path in targets.items():
        if path.is_dir():
            mistakes.append(f"{flag} {path}: is a folder; name a file")
        elif not path.parent.is_dir():
            mistakes.append(f"{flag} {path}: no such folder {path.parent}")
    for (flag, path), (other, second) in combinations(targets.items(), 2):
        if path.resolve() == second.resolve():
            mistakes.append(f"{flag} and {other}: both name {path}")
    if mistakes:
        raise ConfigError(mistakes)


def write_report(flag: str, path: Path, text: str, console: Console) -> None:
    """Write a flag's file, and say so.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be written; {error.strerror}") from None
    console.print(Text(visible(f"{flag.removeprefix('--')} written to {path}"), overflow="fold"), soft_wrap=True)

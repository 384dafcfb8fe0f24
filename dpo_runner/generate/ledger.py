"""The answers of a generation as they come in, on disk at once, and what had to be left out."""

import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dpo_runner.data.prompts import Prompt
from dpo_runner.errors import ConfigError, RowError, RunError, reason_of
from dpo_runner.io.files import JsonLines, lock, write_json
from dpo_runner.io.masking import mask_secrets
from dpo_runner.records.reading import read_object

_SETTINGS, _ANSWERS, _LOCK = "sampling.json", "answers.jsonl", ".lock"


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: the text.
        complete: whether the model ended it, not the length limit.
    """

    text: str
    complete: bool

    def stripped(self) -> "Answer":
        """Return the answer without blanks at its ends."""
        return Answer(self.text.strip(), self.complete)


@dataclass
class Work:
    """The answers that are still to be sampled.

    Attributes:
        answers: their number.
        new_tokens: the most tokens that they can have.
        prompt_tokens: tokens of the prompts that go through a model; None if only an endpoint knows them.
        calls: the least number of requests to an endpoint.
    """

    answers: int = 0
    new_tokens: int = 0
    prompt_tokens: int | None = None
    calls: int = 0


class Ledger:
    """The answers so far, by prompt and model. Safe to use from several threads.

    Args:
        folder: the generation's folder; need not exist.
        repair: whether to repair a file that a kill has damaged; only with the folder's lock.

    Raises:
        RunError: the file is damaged otherwise.
    """

    def __init__(self, folder: Path, repair: bool = False) -> None:
        self._file, self._lock = JsonLines(folder / _ANSWERS, repair), threading.Lock()
        self._answers: dict[tuple[str, str], list[Answer]] = {}
        for record in self._file.records:
            self._add(record)

    def find(self, prompt: Prompt, model: str) -> list[Answer]:
        """Return a model's answers to a prompt; [] if there are none yet."""
        return self._answers.get((prompt.key, model), [])

    def append(self, model: str, answers: Sequence[tuple[Prompt, Sequence[Answer]]]) -> None:
        """Add a model's answers to prompts; they are on disk on return."""
        records = [
            {"prompt": prompt.key, "model": model, "answers": [asdict(answer) for answer in made]}
            for prompt, made in answers
        ]
        with self._lock:
            self._file.append(records)
            for record in records:
                self._add(record)

    def _add(self, record: dict[str, Any]) -> None:
        answers = self._answers.setdefault((record["prompt"], record["model"]), [])
        answers += [Answer(**answer) for answer in record["answers"]]


@contextmanager
def open_ledger(folder: Path, settings: dict[str, Any], only_read: bool = False) -> Iterator[Ledger]:
    """Open a generation's folder for one process, and check that its answers were sampled with the same settings.

    Args:
        folder: created if it does not exist.
        settings: everything that answers depend on beside their prompts, as JSON values by their keys.
        only_read: write nothing, and do not wait for a process that is at work there.

    Raises:
        ConfigError: the folder cannot be written to, holds something else, is in use, or was begun with other settings.
    """
    key = f"`generate.dir={folder}`"
    check_settings(folder, settings)
    if only_read:
        yield Ledger(folder)
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / _LOCK).open("a")
    except OSError as error:
        raise ConfigError(f"{key}: cannot be written to; {reason_of(error)}") from None
    with handle:
        if lock(handle.fileno()) is False:
            raise ConfigError(f"{key}: another process is at work there; wait for it, or use another folder")
        if not (folder / _SETTINGS).exists():
            write_json(folder / _SETTINGS, settings)
        yield Ledger(folder, repair=True)


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Check that a folder is new, or of a generation with the same settings.

    Raises:
        ConfigError: one line for each setting that differs, or the folder holds something else.
    """
    if not (folder / _SETTINGS).exists():
        if folder.exists() and (not folder.is_dir() or any(path.name != _LOCK for path in folder.iterdir())):
            raise ConfigError(
                f"`generate.dir={folder}`: holds something that is no generation; use a new or empty folder"
            )
        return
    before = read_object(folder / _SETTINGS)
    mistakes = [
        f"`{key}={value}`: the answers in {folder} were sampled with {before.get(key)}; use another generate.dir"
        for key, value in mask_secrets(settings).items()  # as they were written
        if before.get(key) != value
    ]
    if mistakes:
        raise ConfigError(mistakes)


@dataclass
class LeftOut:
    """What a generation had to leave out, up to a limit.

    Attributes:
        answers: the number of answers that were asked for.
        limit: the share of them that may be lost, `generate.max_bad_fraction`.
        lost: the number of answers that were lost.
        found: location of the prompt, reason and detail of each.
    """

    answers: int
    limit: float
    lost: int = 0
    found: list[tuple[str, RowError]] = field(default_factory=list)

    def add(self, prompt: Prompt, error: RowError, answers: int = 1) -> None:
        """Count answers that cannot be had or used.

        Raises:
            RunError: they are more than the limit allows.
        """
        self.found.append((prompt.where, error))
        self.lost += answers
        if self.lost > self.limit * self.answers:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.count().items())
            where, first = self.found[0]
            raise RunError(
                f"{self.lost:,} of {self.answers:,} answers are lost, more than generate.max_bad_fraction="
                f"{self.limit:g} ({reasons}); the first is {where}: {first}"
            )

    def count(self) -> dict[str, int]:
        """Return how often each reason was found."""
        return dict(Counter(error.reason for _, error in self.found))

    def records(self) -> list[dict[str, str]]:
        """Return `prompt` (its location), `reason` and `detail` of each."""
        return [{"prompt": where, "reason": error.reason, "detail": error.detail} for where, error in self.found]

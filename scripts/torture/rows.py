"""Fuzz the data preparation with odd rows and files: each must become pairs or be refused in one line.

    python -m scripts.torture.rows --cases 5000

Four of five cases are rows (JSON values, most of them close to real rows), written to files among sound rows; the fifth
is a file of random bytes or a damaged file. A row must become pairs, be left out, or be counted as unusable, with its
line. A file may be refused by one of our errors, in one printable line that names it. Any other outcome, and any case
of more than ten seconds, is printed, and the exit code is 1.
"""

import argparse
import dataclasses
import itertools
import json
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from dpo_runner.config.compose import load_conf
from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.data import FORMATS
from dpo_runner.data.preferences import PreferenceData, load_preferences
from dpo_runner.errors import ConfigError
from dpo_runner.model.files.packaged import load_random_model_path
from scripts.torture.limits import Hang, time_limit
from scripts.torture.strategies import ROWS, SOUND_ROWS, damage, draw, near_rows

_ROWS_PER_FILE, _SECONDS, _SOUND = 50, 10, 4
_SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".json.gz", ".jsonl.gz", ".jsonl.zst", ".txt", "")


@dataclass
class Outcome:
    """Results of all cases.

    Attributes:
        cases: number of rows and files.
        accepted: number of rows that became pairs.
        left_out: number of sound rows that make no pair.
        refused: number of unusable rows and files by reason.
        failures: one line per failed case.
    """

    cases: int = 0
    accepted: int = 0
    left_out: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return (
            f"{self.cases:,} cases: {self.accepted:,} became pairs, {self.left_out:,} left out, "
            f"{self.refused.total():,} refused for {len(self.refused)} reasons, {len(self.failures)} went wrong"
        )


class Wrong(Exception):
    """A case failed."""


def fuzz_rows(cases: int, seed: int, folder: Path) -> Outcome:
    """Prepare `cases` rows and files drawn with `seed`.

    Args:
        cases: number of rows and files.
        seed: seed of the cases.
        folder: folder of the files; files of failed cases stay.
    """
    from transformers import AutoTokenizer

    overrides = ["model=tiny_random", "data=local_file", "data.path=x", "data.eval_fraction=0.1"]
    conf = load_conf([*overrides, "data.max_bad_fraction=1", "training.dataset_num_proc=1"])
    bench = _Bench(conf, AutoTokenizer.from_pretrained(load_random_model_path()), folder, Outcome())
    files = cases // 5
    for place, layout in enumerate(FORMATS):
        count = (cases - files + place) // len(FORMATS)
        drawn = draw(st.one_of(near_rows(layout), near_rows(layout), ROWS), count, seed + place)
        rows = [json.dumps(row, ensure_ascii=bool(n % 2)) for n, row in enumerate(drawn)]
        for start in range(0, count, _ROWS_PER_FILE):
            bench.try_rows(rows[start : start + _ROWS_PER_FILE], layout)
    random_bytes = draw(st.binary(max_size=60), files // 2, seed)
    for number, content in enumerate([*random_bytes, *damage(files - files // 2, seed)]):
        bench.try_file(content, number)
    return bench.outcome


@dataclass
class _Bench:
    conf: RunConf
    tokenizer: Any
    folder: Path
    outcome: Outcome
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    def try_rows(self, rows: Sequence[str], layout: str) -> None:
        """Prepare rows among sound rows of a layout; on a failure, prepare them one by one."""
        self.outcome.cases += len(rows)
        try:
            self._count(self._load_rows(rows, layout))
        except Wrong:
            for row in rows:
                try:
                    self._load_rows([row], layout)
                except Wrong as error:
                    self.outcome.failures.append(f"as {layout}: {row!r:.300}: {error}")

    def _load_rows(self, rows: Sequence[str], layout: str) -> PreferenceData:
        make = SOUND_ROWS.get(layout, SOUND_ROWS["preference"])
        sound = [json.dumps(make(number)) for number in range(_SOUND)]
        path = self._write("\n".join([*sound, *rows]).encode("utf-8", "surrogatepass") + b"\n", ".jsonl")
        data = self._load(path, layout)
        if isinstance(data, ConfigError):
            raise Wrong(f"the sound rows are refused too: {data}")
        (source,) = {part.name: part for part in data.report.sources}.values()
        missing = len(sound) + len(rows) - source.rows
        if missing < 0 or (missing and layout != "kto"):  # whose rows of one prompt are one
            raise Wrong(f"{source.rows} rows are told of, of {len(sound) + len(rows)}")
        path.unlink()
        return data

    def try_file(self, content: bytes, number: int) -> None:
        """Prepare a file of arbitrary bytes."""
        self.outcome.cases += 1
        # a damaged file gets the suffix of its content; short ones, random bytes, take any
        path = self._write(content, _SUFFIXES[number % len(_SUFFIXES)] if len(content) < 100 else _guess(content))
        try:
            data = self._load(path, "auto")
        except Wrong as error:
            self.outcome.failures.append(f"{path}: {error}")
            return
        if isinstance(data, ConfigError):
            self.outcome.refused["a file"] += 1
        else:
            self._count(data)
        path.unlink()

    def _count(self, data: PreferenceData) -> None:
        for source in data.report.sources:
            self.outcome.refused.update(source.bad)
            self.outcome.left_out += sum(source.left_out.values())
            self.outcome.accepted += source.rows - sum(source.bad.values()) - sum(source.left_out.values())

    def _load(self, path: Path, layout: str) -> PreferenceData | ConfigError:
        """Prepare a file, and check its report or its error.

        Raises:
            Wrong: the report or the error is not as it must be.
        """
        data_conf = dataclasses.replace(self.conf.data, path=str(path), format=layout)
        conf = dataclasses.replace(self.conf, data=data_conf)
        try:
            with time_limit(_SECONDS):
                data = load_preferences(conf, self.tokenizer)
                dropped = list(data.dropped())
        except ConfigError as error:
            told = str(error)
            if len(error.mistakes) != 1 or "\n" in told or "\r" in told or len(told) > 1000:
                raise Wrong(f"not told in one line: {told!r:.300}") from None
            _encode(told)
            return error
        except (Exception, Hang) as error:
            raise Wrong(f"{type(error).__name__}: {error}") from error
        _check_account(data, dropped)
        return data

    def _write(self, content: bytes, suffix: str) -> Path:
        path = self.folder / f"{next(self._numbers)}{suffix}"
        path.write_bytes(content)
        return path


def _guess(content: bytes) -> str:
    if content[:2] == b"\x1f\x8b":
        return ".json.gz" if len(content) % 2 else ".jsonl.gz"
    marks = {b"\x28\xb5": ".jsonl.zst", b"PA": ".parquet", b"AR": ".arrow", b'{"': ".jsonl", b"[{": ".json"}
    return marks.get(content[:2], ".tsv" if b"\t" in content else ".csv")


def _check_account(data: PreferenceData, dropped: Sequence[dict[str, Any]]) -> None:
    bad = 0
    for source in data.report.sources:
        bad += sum(source.bad.values())
        if sum(source.bad.values()) + sum(source.left_out.values()) > source.rows:
            raise Wrong(f"more rows are accounted for than there are: {source}")
    used = {(part.source.files[f], n) for _, _, part in data._prepared for f, n in _places(part.rows)}
    rows = sum(source.rows - sum(source.left_out.values()) for source in data.report.sources)
    if len(used) + bad != rows:
        raise Wrong(f"{len(used)} rows became pairs and {bad} are bad, of {rows}")
    for name, split in data.report.splits.items():
        if split.kept + split.unused + sum(split.dropped.values()) != split.pairs:
            raise Wrong(f"the account of {name} does not add up: {split}")
    if sum(split.pairs for split in data.report.splits.values()) != sum(
        len(part.rows) for _, _, part in data._prepared
    ):
        raise Wrong("pairs of the splits are not those of the sources")
    if len(dropped) != bad + sum(sum(split.dropped.values()) for split in data.report.splits.values()):
        raise Wrong(f"{len(dropped)} dropped rows are listed")
    for row in dropped:
        _encode(json.dumps(row, ensure_ascii=False))
        if "\n" in row["detail"] or len(row["detail"]) > 1000:
            raise Wrong(f"a detail that is not one line: {row['detail']!r:.200}")
    for rows_of in (data.train, data.eval):
        for row in rows_of or ():
            if not row["prompt_ids"] or not row["chosen_ids"] or not row["rejected_ids"]:
                raise Wrong(f"a pair without tokens: {row}")


def _places(rows: Any) -> Iterator[tuple[int, int]]:
    columns = (rows.data.column(name).to_pylist() for name in ("file", "number"))
    return zip(*columns, strict=True)


def _encode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Wrong(f"not printable: {text!r:.200} ({error})") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="torture-rows-"))
    outcome = fuzz_rows(args.cases, args.seed, folder)
    print(outcome, *(f"{count:>8,}  {reason}" for reason, count in outcome.refused.most_common()), sep="\n  ")
    print(*outcome.failures, sep="\n")
    sys.exit(bool(outcome.failures))


if __name__ == "__main__":
    main()

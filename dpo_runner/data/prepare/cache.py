"""The on-disk cache of a source's token ids, keyed by content.

The key covers everything that determines the result: the rows, the settings that read them, the tokenizer and its
template, and this code. Paths, times and training settings are not part of it, so a sweep over beta or learning rate
tokenizes nothing.
"""

import itertools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dpo_runner.data.prepare.batches import Outcome, schema
from dpo_runner.data.prepare.recipe import Recipe
from dpo_runner.data.prepare.workers import ROWS_PER_BATCH, process_all
from dpo_runner.data.rows.sources import RowSource
from dpo_runner.io.files import cache_dir, write_folder_once
from dpo_runner.io.upstream import set_fingerprint

if TYPE_CHECKING:
    from datasets import Dataset

ROWS, BAD, FACTS = "rows.arrow", "bad.jsonl", "facts.json"
Watch = Callable[[Outcome, RowSource], None]
Entry = TypeVar("Entry")


@dataclass
class Prepared:
    """A source's pairs as token ids, memory-mapped from the cache.

    Attributes:
        source: origin of the rows.
        key: digest of everything that determines the rows.
        rows: columns prompt_ids, chosen_ids, rejected_ids (list of int32), prompt (its messages as JSON), file and
            number (location of the row), prompt_hash and pair_hash (uint64), mismatched (bool).
        folder: cache folder; its bad.jsonl lists the unusable rows.
        facts: `format`, `unread`, `rows`, `bad` and `left_out` (rows by reason), `unscored` (pairs), `first_bad`,
            `first_mismatch`.
    """

    source: RowSource
    key: str
    rows: "Dataset"
    folder: Path
    facts: dict[str, Any]

    def bad_rows(self) -> Iterator[dict[str, Any]]:
        """Yield file, line (or row), reason and detail of each unusable row."""
        with (self.folder / BAD).open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                yield self.source.place(row.pop("file"), row.pop("number")) | row


def prepare(source: RowSource, recipe: Recipe, num_proc: int | None, watch: Watch) -> Prepared:
    """Return a source's pairs as token ids, from the cache if present.

    Args:
        source: the rows.
        recipe: converts rows to pairs and token ids.
        num_proc: processes to use; None uses all cores if there are many rows.
        watch: called with each outcome as it arrives, to report progress, or to stop by raising.

    Raises:
        DataError: the source cannot be read, or its layout is ambiguous or unknown.
        RunError: a worker process died.
    """
    key = recipe.digest(source)
    folder = cache_dir() / "data" / key

    def fill(staging: Path) -> None:
        _write(staging, source, recipe, num_proc, watch)

    facts, rows = open_entry(folder, fill, lambda: (_load_facts(folder), load_rows(folder)))
    return Prepared(source, key, rows, folder, facts)


def open_entry(folder: Path, fill: Callable[[Path], None], load: Callable[[], Entry]) -> Entry:
    """Load a cache folder with `load`; if it is missing or damaged, write it with `fill` first."""
    if not folder.exists():
        write_folder_once(folder, fill)
    try:
        return load()
    except (ValueError, OSError):  # raised by Arrow and JSON for damaged files
        shutil.rmtree(folder)
        write_folder_once(folder, fill)
        return load()


def load_rows(folder: Path) -> "Dataset":
    """Memory-map the rows of a cache folder, which is named by their digest."""
    from datasets import Dataset

    rows = Dataset.from_file(str(folder / ROWS))
    set_fingerprint(rows, folder.name)  # stable, so that `datasets` finds its cached results for these rows
    return rows


def _load_facts(folder: Path) -> dict[str, Any]:
    facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    assert isinstance(facts, dict)
    return facts


def _write(folder: Path, source: RowSource, recipe: Recipe, num_proc: int | None, watch: Watch) -> None:
    import pyarrow as pa

    bad: Counter[str] = Counter()
    left_out: Counter[str] = Counter()
    rows, unscored, first_bad, first_mismatch = 0, 0, None, None
    batches = source.batches(ROWS_PER_BATCH)
    first = next(batches)
    layout = recipe.find_layout(first, source)
    with (
        pa.OSFile(str(folder / ROWS), "wb") as file,
        pa.ipc.new_stream(file, schema()) as writer,
        (folder / BAD).open("w", encoding="utf-8") as bad_file,
    ):
        for outcome in process_all(itertools.chain([first], batches), recipe, num_proc):
            watch(outcome, source)
            writer.write_batch(outcome.pairs)
            rows += outcome.rows
            left_out += outcome.left_out
            unscored += outcome.unscored
            for number_of_file, number, reason, detail in outcome.bad:
                bad[reason] += 1
                row = {"file": number_of_file, "number": number, "reason": reason, "detail": detail}
                bad_file.write(json.dumps(row) + "\n")
                first_bad = first_bad or [number_of_file, number, f"{reason}: {detail}" if detail else reason]
            first_mismatch = first_mismatch or outcome.first_mismatch
    facts = {
        "format": layout,
        "unread": recipe.unread,
        "rows": rows,
        "bad": dict(bad.most_common()),
        "left_out": dict(left_out.most_common()),
        "unscored": unscored,
        "first_bad": first_bad,
        "first_mismatch": first_mismatch,
    }
    (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")

"""List and clear what is kept between runs, and old checkpoints.

python -m dpo_runner.cache [list | clear KIND [KIND ...] | checkpoints [FOLDER ...] [--clear]]
"""

import argparse
import shutil
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from dpo_runner.io.interrupts import end_at_once, on_ctrl_c

with on_ctrl_c(end_at_once):
    from rich.console import Console
    from rich.text import Text

    from dpo_runner.cache.old_checkpoints import clear_checkpoints, find_checkpoints
    from dpo_runner.errors import ConfigError, reason_of
    from dpo_runner.io.console import FoldingTable, open_terminal, visible
    from dpo_runner.io.exits import honest_exit
    from dpo_runner.io.files import cache_dir
    from dpo_runner.training.answers.benchmarks.scores import benchmarks_dir
    from dpo_runner.training.answers.rewards.store import scores_dir
    from dpo_runner.training.engine.reference.store import list_references, make_room, store_dir

Entry = tuple[Path, str]
"""A file or folder, and its description."""


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exit codes: 0 done, 2 invalid argument, 130 interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="python -m dpo_runner.cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="show what there is (the default)")
    clear = actions.add_parser("clear", help="delete it; the next run makes again what it needs")
    clear.add_argument("kinds", nargs="+", choices=(*_KINDS, "all"), metavar="KIND", help=f"{', '.join(_KINDS)} or all")
    old = actions.add_parser("checkpoints", help="show the checkpoints of runs, and which of them are no longer needed")
    old.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="where runs are (default: outputs)")
    old.add_argument("--clear", action="store_true", help="delete those that are no longer needed")
    args = parser.parse_args(argv)
    console = open_terminal()
    with honest_exit("interrupted"):
        if args.action == "clear":
            _clear(list(_KINDS) if "all" in args.kinds else args.kinds, console)
        elif args.action == "checkpoints":
            _show_checkpoints(args.folders or [Path("outputs")], args.clear, console)
        else:
            _list(console)


def _find_models() -> Iterator[Entry]:
    for path in sorted(cache_dir().iterdir()):
        if (
            path.is_dir()
            and path not in (cache_dir() / "data", store_dir(), scores_dir(), benchmarks_dir())
            and not path.name.startswith(".")
        ):
            yield path, "converted or merged weights"


def _find_data() -> Iterator[Entry]:
    folder = cache_dir() / "data"
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if not path.name.startswith("."):
            yield path, "tokenized rows"


def _find_scores() -> Iterator[Entry]:
    if scores_dir().is_dir():
        scorers = len(list(scores_dir().glob("*.jsonl")))
        yield scores_dir(), f"scores of answers, by {scorers:,} judges and reward models"


def _find_benchmarks() -> Iterator[Entry]:
    if benchmarks_dir().is_dir():
        scores = len(list(benchmarks_dir().glob("*.json")))
        yield benchmarks_dir(), f"{scores:,} scores of models in tasks"


def _find_references() -> Iterator[Entry]:
    for reference in list_references():
        what = "damaged" if reference.pairs is None else f"{reference.pairs:,} pairs"
        about = [str(reference.description[key]) for key in ("reference", "forward") if key in reference.description]
        yield reference.path, "; ".join([what, *about])


_KINDS: dict[str, Callable[[], Iterator[Entry]]] = {
    "models": _find_models,
    "data": _find_data,
    "scores": _find_scores,
    "benchmarks": _find_benchmarks,
    "reference": _find_references,
}


def _list(console: Console) -> None:
    table = FoldingTable(title=visible(str(cache_dir())), title_justify="left")
    for name in ("kind", "name", "size", "last used", "what"):
        table.add_column(name, no_wrap=name not in ("name", "what"))
    total = 0
    for kind, find in _KINDS.items():
        for path, what in find() if cache_dir().is_dir() else ():
            size = _measure(path)
            total += size
            used = datetime.fromtimestamp(path.stat().st_mtime).strftime("%Y-%m-%d %H:%M")
            table.add_row(kind, Text(visible(path.name)), _format(size), used, Text(visible(what)))
    console.print(table if table.row_count else f"{visible(str(cache_dir()))}: empty")
    if table.row_count:
        console.print(f"{_format(total)} in all")


def _clear(kinds: list[str], console: Console) -> None:
    freed, kept = 0, []
    for kind in kinds:
        entries = list(_KINDS[kind]()) if cache_dir().is_dir() else []
        sizes = {path: _measure(path) for path, _ in entries}
        if kind == "reference":
            make_room(0)  # skips files that a run has open
        else:
            for path in sizes:
                shutil.rmtree(path, ignore_errors=True)
        kept += [path for path in sizes if path.exists()]
        freed += sum(size for path, size in sizes.items() if not path.exists())
    console.print(f"{_format(freed)} freed")
    if kept:
        raise ConfigError(f"{', '.join(map(str, kept))}: in use or not ours to delete; still there")


def _show_checkpoints(folders: list[Path], clear: bool, console: Console) -> None:
    """List the checkpoints of runs, and with `clear` delete the old ones."""
    runs, notes = find_checkpoints(folders)
    table = FoldingTable("run", "state", "old", "size", "kept")
    freed, refused = 0, list(notes)
    for run in runs:
        size = sum(map(_measure, run.old))
        whys = {why: [path.name for path in run.kept if run.kept[path] == why] for why in run.kept.values()}
        kept = "; ".join(f"{', '.join(names)}: {why}" for why, names in whys.items())
        old = ", ".join(path.name for path in run.old)
        cells = (str(run.run_dir), run.state, old, _format(size) if run.old else "", kept)
        table.add_row(*(Text(visible(cell)) for cell in cells))
        if clear and run.old:
            try:
                clear_checkpoints(run)
            except (ConfigError, OSError) as error:
                refused.append(f"{run.run_dir}: its checkpoints stay; {reason_of(error)}")
                continue
        freed += size
    if runs:
        console.print(table)
    done = "freed" if clear else "in old checkpoints; add --clear to delete them"
    console.print(f"{_format(freed)} {done}" if runs else "no checkpoints")
    if refused:
        raise ConfigError(refused)


def _measure(path: Path) -> int:
    """Return the size in bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.lstat().st_size for file in files if file.is_file())


def _format(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


if __name__ == "__main__":
    main()

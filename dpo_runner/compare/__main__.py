"""Compare runs on this machine: `python -m dpo_runner.compare DIR [DIR ...]`."""

import argparse
import os
import sys
from pathlib import Path

from dpo_runner.io.interrupts import end_at_once, on_ctrl_c

with on_ctrl_c(end_at_once):
    from rich.text import Text

    from dpo_runner.compare.comparison import DEFAULT_OBJECTIVE, choose_objective, compare_runs
    from dpo_runner.compare.page import build_page
    from dpo_runner.compare.table import show_table, to_csv, to_json
    from dpo_runner.errors import ConfigError
    from dpo_runner.io.console import open_terminal, visible
    from dpo_runner.io.exits import honest_exit
    from dpo_runner.io.pages import check_targets, write_report
    from dpo_runner.io.streams import Guarded, put
    from dpo_runner.records.runs import RunRecord, read_runs

_STDOUT = Path("-")


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exit codes: 0 done, 2 invalid argument or nothing to compare, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m dpo_runner.compare", description=__doc__, allow_abbrev=False)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="run or sweep directories, at any depth")
    parser.add_argument(
        "--objective",
        metavar="METRIC",
        help=f"what to rank by (default {DEFAULT_OBJECTIVE}, or eval_reward if runs have that alone)",
    )
    direction = parser.add_mutually_exclusive_group()
    direction.add_argument("--minimize", action="store_const", const=True, help="less of it is better")
    direction.add_argument(
        "--maximize", action="store_const", const=False, dest="minimize", help="more of it is better"
    )
    parser.add_argument("--per-seed", action="store_true", help="list runs singly that differ by their seed alone")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a page with curves, plots, settings, answers")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table as CSV; - is stdout")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table as JSON; - is stdout")
    parser.add_argument("--best", action="store_true", help="print the best finished run's path and nothing else")
    args = parser.parse_args(argv)
    with honest_exit("interrupted"):
        _compare(args)


def _compare(args: argparse.Namespace) -> None:
    given = {"--html": args.html, "--csv": args.csv, "--json": args.json}
    targets = {flag: path for flag, path in given.items() if path is not None}
    if args.best and targets:
        raise ConfigError(f"--best: prints a path and nothing else; leave out {', '.join(targets)}")
    if targets.get("--html") == _STDOUT or args.csv == args.json == _STDOUT:
        raise ConfigError("-: stdout takes either the CSV or the JSON")
    files = {flag: path for flag, path in targets.items() if path != _STDOUT}
    check_targets(files)
    runs, notes = read_runs(args.folders)
    errors = open_terminal(stderr=True, soft_wrap=True)
    for note in notes:
        errors.print(Text(visible(f"note: {note}"), style="dim"))
    if not runs:
        raise ConfigError(f"{', '.join(map(str, args.folders))}: no runs there (no status.json or summary.json)")
    _check_overwriting(files, runs)
    objective = choose_objective(args.objective, args.minimize, runs)
    comparison = compare_runs(runs, objective, args.per_seed)
    if args.best:
        best = comparison.find_best_run()
        if best is None:
            raise ConfigError(f"--best: no finished run has {objective.metric}")
        stdout = Guarded(getattr(sys.stdout, "buffer", None))
        stdout.write(os.fsencode(best.path) + b"\n")  # the path may not be valid UTF-8
        stdout.flush()
        return
    console = open_terminal()
    if len(files) == len(targets):
        show_table(comparison, console)
    else:
        put(to_csv(comparison) if args.csv == _STDOUT else to_json(comparison), end="")
    build = {"--html": build_page, "--csv": to_csv, "--json": to_json}
    for flag, path in files.items():
        write_report(flag, path, build[flag](comparison), errors if len(files) < len(targets) else console)


def _check_overwriting(files: dict[str, Path], runs: list[RunRecord]) -> None:
    """Refuse to overwrite a run's own files."""
    for flag, path in files.items():
        if path.exists() and any(path.resolve().is_relative_to(run.path.resolve()) for run in runs):
            raise ConfigError(f"{flag} {path}: is a run's own file; name another one")


if __name__ == "__main__":
    main()

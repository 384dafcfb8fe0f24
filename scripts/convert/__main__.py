"""Convert a DPO configuration of axolotl, LLaMA-Factory, TRL or alignment-handbook to overrides.

    python -m scripts.convert FILE              # prints the command, and on stderr what has no counterpart
    python -m scripts.convert --tables          # rewrites the tables of docs/migration.md

Exit codes: 0 done; 1 the command lacks something, which a line names; 2 the file cannot be converted.
"""

import argparse
import re
import shlex
import sys
from pathlib import Path

from dpo_runner.errors import ConfigError
from dpo_runner.sweep.command_line import check_command_line
from scripts.convert.conversion import PROJECTS, TABLES, convert, list_rows, read_file, recognise

PAGE = Path(__file__).parents[2] / "docs" / "migration.md"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, nargs="?", metavar="FILE", help="a YAML or JSON file")
    parser.add_argument("--project", choices=sorted(PROJECTS), help="its project; recognised by its keys otherwise")
    parser.add_argument("--tables", action="store_true", help="rewrite the tables of docs/migration.md")
    args = parser.parse_args(argv)
    if args.tables == (args.file is not None):
        parser.error("give FILE, or --tables")
    if args.tables:
        PAGE.write_text(fill_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    try:
        config = read_file(args.file)
        project = PROJECTS[args.project] if args.project else recognise(config)
        converted = convert(config, project)
    except ConfigError as error:
        print(f"error: {args.file}: {error}", file=sys.stderr)
        return 2
    print(f"{args.file}: read as {project.name}'s", file=sys.stderr)
    for note in converted.notes:
        print(f"note: {note}", file=sys.stderr)
    mistakes = check_command_line(converted.words)
    for mistake in mistakes:
        print(f"error: {mistake}", file=sys.stderr)
    print(" \\\n  ".join(["python -m dpo_runner", *map(shlex.quote, converted.words)]))
    return 1 if mistakes else 0


def fill_tables(page: str) -> str:
    """Return the page with the tables of all projects."""
    for name, rules in TABLES.items():
        rows = "\n".join(["| theirs | ours | |", "|---|---|---|", *list_rows(rules)])
        head, mark, rest = page.partition(f"<!-- table: {name} -->\n")
        page = f"{head}{mark}{rows}\n" + re.sub(r"\A(\|.*\n)*", "", rest)
    return page


if __name__ == "__main__":
    sys.exit(main())

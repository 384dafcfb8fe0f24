"""Show what a run would train on, without a model: `python -m dpo_runner.preview [OVERRIDES]`."""

import argparse
import json
from pathlib import Path

from dpo_runner.io.interrupts import end_at_once, on_ctrl_c

with on_ctrl_c(end_at_once):
    from rich.text import Text

    from dpo_runner.config.compose import load_conf
    from dpo_runner.data.report import DataReport
    from dpo_runner.errors import ConfigError
    from dpo_runner.io.console import RunConsole, open_terminal, visible
    from dpo_runner.io.exits import honest_exit
    from dpo_runner.io.masking import mask_override
    from dpo_runner.io.pages import check_targets, write_report
    from dpo_runner.preview.page import build_page
    from dpo_runner.preview.screen import pick_rows, show_report, show_rows


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exit codes: 0 done, 1 failed, 2 invalid configuration or data, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m dpo_runner.preview", description=__doc__, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=OPTION or KEY=VALUE, as for a run")
    parser.add_argument("--rows", type=int, default=3, metavar="N", help="show so many training pairs (default 3)")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write the same as one HTML page, with plots")
    parser.add_argument("--dropped", type=Path, metavar="FILE", help="write every dropped row as JSON lines")
    parser.add_argument("--config-dir", metavar="DIR", help="look for GROUP/OPTION.yaml in DIR first")
    args = parser.parse_intermixed_args(argv)
    with honest_exit("interrupted"):
        _preview(args)


def _preview(args: argparse.Namespace) -> None:
    if args.rows < 0:
        raise ConfigError(f"--rows {args.rows}: must be 0 or more")
    conf = load_conf(args.overrides, args.config_dir)
    targets = {flag: path for flag, path in (("--html", args.html), ("--dropped", args.dropped)) if path is not None}
    check_targets(targets)

    from dpo_runner.io.logs import quiet_imports

    with quiet_imports():
        from dpo_runner.data.preferences import load_preferences
        from dpo_runner.io.logs import route_library_logs
        from dpo_runner.model.blueprint import Blueprint

    console = open_terminal()
    with route_library_logs(None):
        blueprint = Blueprint.of_run(conf)
        tokenizer, origin = blueprint.tokenizer, blueprint.template_origin
        data = load_preferences(conf, tokenizer, origin, RunConsole(console).show_preparing)
        _check_overwriting(targets, data.report)
        rows = pick_rows(data, tokenizer, args.rows)
        show_report(data.report, console)
        show_rows(rows, console)
        for warning in data.report.warnings:
            console.print(Text.assemble(("warning: ", "yellow"), visible(warning)))
        if args.html is not None:
            facts = {
                "model": str(conf.model.model_name_or_path),
                "longest pair": f"training.max_length={conf.training.max_length}",
                "overrides": " ".join(map(mask_override, args.overrides)) or "none",
            }
            write_report("--html", args.html, build_page(data.report, rows, facts), console)
        if args.dropped is not None:
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in data.dropped()]
            # A lone surrogate cannot be encoded as UTF-8, but its escape is valid JSON.
            text = "".join(lines).encode("utf-8", "backslashreplace").decode("utf-8")
            write_report("--dropped", args.dropped, text, console)


def _check_overwriting(targets: dict[str, Path], report: DataReport) -> None:
    """Refuse to overwrite the data."""
    files = [Path(file).expanduser() for source in report.sources for file in source.files]
    for flag, path in targets.items():
        if path.exists() and any(file.exists() and file.samefile(path) for file in files):
            raise ConfigError(f"{flag} {path}: is the data itself; name another file")


if __name__ == "__main__":
    main()

"""Evaluate a finished run against its reference: `python -m dpo_runner.evaluate RUN_DIR [KEY=VALUE ...]`."""

import argparse
from pathlib import Path

from dpo_runner.io.interrupts import end_at_once, on_ctrl_c

with on_ctrl_c(end_at_once):
    from dpo_runner.evaluate.evaluation import evaluate
    from dpo_runner.evaluate.settings import ALLOWED
    from dpo_runner.io.exits import honest_exit


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exit codes: 0 done, 1 failed, also at the gate, 2 invalid configuration or data, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m dpo_runner.evaluate", description=__doc__, allow_abbrev=False)
    parser.add_argument("run_dir", type=Path, help="a finished run's directory")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help=f"what to evaluate, and how: {ALLOWED}"
    )
    parser.add_argument(
        "--gate", action="store_true", help="exit with 1 if a benchmark fell by more than benchmarks.max_drop"
    )
    args = parser.parse_intermixed_args(argv)
    with honest_exit("interrupted; the same command goes on from there"):
        evaluate(args.run_dir, args.overrides, gate=args.gate)


if __name__ == "__main__":
    main()

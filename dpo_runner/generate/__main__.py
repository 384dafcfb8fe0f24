"""Sample answers to prompts, score them, and write pairs to train on: `python -m dpo_runner.generate [OVERRIDES]`."""

import argparse

from dpo_runner.io.interrupts import end_at_once, on_ctrl_c

with on_ctrl_c(end_at_once):
    from dpo_runner.config.compose import load_conf
    from dpo_runner.io.exits import honest_exit
    from dpo_runner.io.logs import quiet_imports, route_library_logs


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exit codes: 0 done, 1 failed, 2 invalid configuration or data, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m dpo_runner.generate", description=__doc__, allow_abbrev=False)
    parser.add_argument("overrides", nargs="*", metavar="OVERRIDE", help="GROUP=OPTION or KEY=VALUE, as for a run")
    parser.add_argument("--config-dir", metavar="DIR", help="look for GROUP/OPTION.yaml in DIR first")
    args = parser.parse_intermixed_args(argv)
    with honest_exit("interrupted; the same command with the same generate.dir goes on from there"):
        conf = load_conf(args.overrides, args.config_dir)
        with quiet_imports():
            from dpo_runner.generate.generation import generate
        with route_library_logs(None):
            generate(conf)


if __name__ == "__main__":
    main()

"""Export a finished run's result to a folder to serve or publish: `python -m dpo_runner.export RUN_DIR --out DIR`."""

import argparse
import re
from pathlib import Path

from dpo_runner.io.interrupts import end_at_once, on_ctrl_c

with on_ctrl_c(end_at_once):
    from dpo_runner.data.rows.sources import is_hub_id
    from dpo_runner.errors import ConfigError
    from dpo_runner.export.export import ROUNDING_TOLERANCE, export_run, push_to_hub
    from dpo_runner.io.exits import honest_exit
    from dpo_runner.io.streams import put


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exit codes: 0 done, 1 export failed, 2 invalid argument or run, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m dpo_runner.export", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="a finished run's directory")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write; not there yet, or empty")
    parser.add_argument("--adapter-only", action="store_true", help="the adapter by itself, not merged")
    parser.add_argument("--dtype", choices=list(ROUNDING_TOLERANCE), help="default: the base checkpoint's own")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="the largest weight file (default 5GB)")
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="upload the folder; a new repository is private")
    parser.add_argument("--public", action="store_true", help="with --push-to-hub: a new repository is public")
    args = parser.parse_args(argv)
    with honest_exit("interrupted; nothing was left half written"):
        _export(args)


def _export(args: argparse.Namespace) -> None:
    if args.adapter_only and (args.dtype or args.max_shard_size):
        raise ConfigError("--adapter-only: copies the adapter as it is; leave out --dtype and --max-shard-size")
    if args.max_shard_size and not re.fullmatch(r"[1-9]\d*(KB|MB|GB|TB)", args.max_shard_size):
        raise ConfigError(f"--max-shard-size {args.max_shard_size}: must be a number and KB, MB, GB or TB, as in 5GB")
    if args.public and args.push_to_hub is None:
        raise ConfigError("--public: goes with --push-to-hub REPO_ID")
    if args.push_to_hub is not None and not is_hub_id(args.push_to_hub):
        raise ConfigError(f"--push-to-hub {args.push_to_hub}: must be a repository id, such as me/my-model")

    from dpo_runner.io.logs import route_library_logs

    with route_library_logs(None):
        size = args.max_shard_size or "5GB"
        options = {"adapter_only": args.adapter_only, "dtype": args.dtype, "max_shard_size": size}
        out = export_run(args.run_dir, args.out, **options, name=args.push_to_hub)
        put(f"exported to {out}")
        if args.push_to_hub is not None:
            put(f"uploaded to {push_to_hub(out, args.push_to_hub, args.public)}")


if __name__ == "__main__":
    main()

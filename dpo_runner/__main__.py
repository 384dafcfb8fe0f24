"""`python -m dpo_runner`: check the command line, compose with Hydra, run, and set the exit code."""

import contextlib
import gc
import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

from dpo_runner.io.interrupts import end_at_once, on_ctrl_c

with on_ctrl_c(end_at_once):
    from dpo_runner.config.compose import build_run_conf, expand_overrides
    from dpo_runner.config.help import build_help
    from dpo_runner.config.overrides import write_override
    from dpo_runner.config.run_conf import RunConf
    from dpo_runner.config.yaml_files import CONF_DIR, CONFIG_NAME
    from dpo_runner.errors import ConfigError, DpoRunnerError, RunInterrupted
    from dpo_runner.io.exits import honest_exit, report
    from dpo_runner.io.masking import mask_shown
    from dpo_runner.io.processes import take_gpu
    from dpo_runner.io.streams import put
    from dpo_runner.io.version import __version__
    from dpo_runner.sweep.command_line import check_command_line, complete_sweep, shows_config


def main() -> None:
    """Run the command line.

    Exit codes: 0 finished, 1 failed, 2 invalid configuration, 128 + N stopped by signal N.
    """
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        put(build_help())
        return
    if "--version" in argv:
        put(f"dpo_runner {__version__}")
        return
    with honest_exit("interrupted"):
        take_gpu()
        if mistakes := check_command_line(argv):
            raise ConfigError(mistakes)
        _run_with_hydra()


def _run_with_hydra() -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    from dpo_runner.sweep.axes import defer_sections
    from dpo_runner.sweep.sweeper import register_plugins

    # Errors are raised outside of Hydra, which would print an additional notice.
    failure_alone: list[DpoRunnerError] = []

    def job(config: DictConfig) -> None:
        hydra_config = HydraConfig.get()
        typed = list(hydra_config.overrides.task)
        sources = hydra_config.runtime.config_sources
        own = next((source.path for source in sources if source.provider == "command-line"), None)
        conf = build_run_conf(config, typed, own)
        if hydra_config.mode == RunMode.MULTIRUN:  # started by one of Hydra's launchers
            _run_in_sweep(conf, typed, Path(hydra_config.runtime.output_dir))
            return

        try:
            _check_early(conf)
            from dpo_runner.train import run

            gc.freeze()  # imported objects stay alive; exclude them from garbage collection
            if conf.rounds:
                from dpo_runner.generate.rounds import run_rounds

                run_rounds(conf, typed)
            else:
                run(conf, typed)
        except DpoRunnerError as error:
            failure_alone.append(error)

    sys.argv[1:] = expand_overrides(sys.argv[1:])
    if {"-m", "--multirun"} & set(sys.argv) or any(text.startswith("sweep=") for text in sys.argv):
        if os.environ.get("WORLD_SIZE", "1") != "1":
            raise ConfigError("a sweep starts its own workers; use launch.processes=N in it instead of a launcher")
        sys.argv[1:] = complete_sweep(defer_sections(sys.argv[1:]))
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise errors instead of printing them
    register_plugins()
    application = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=CONFIG_NAME)(job)
    if shows_config(sys.argv[1:]):
        _show(application)
        return
    application()
    if failure_alone:
        raise failure_alone[0]


def _show(application: Callable[[], None]) -> None:
    """Print what Hydra shows of a configuration (`--cfg`, `--info`), with secrets masked."""
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            application()
    finally:
        put(mask_shown(shown.getvalue()), end="")


def _check_early(conf: RunConf) -> None:
    """Reject unusable data files of a new run within a second; a continued run may not need them any more."""
    from dpo_runner.data.rows.sources import check_local_sources
    from dpo_runner.records.reading import read_status

    if conf.run_dir is None or read_status(Path(conf.run_dir).expanduser()) is None:
        check_local_sources(conf.data)


def _run_in_sweep(conf: RunConf, typed: list[str], run_dir: Path) -> None:
    """Run one job of a sweep; its status.json, and later the sweep, report a failure."""
    from dpo_runner.sweep.executor import perform
    from dpo_runner.sweep.jobs import place_conf, read_labels

    label = read_labels(run_dir.parent).get(run_dir.name, " ".join(typed))
    outcome = perform(place_conf(conf, run_dir, label), typed)
    if outcome["state"] == "interrupted":
        error = f"{run_dir}: interrupted; the same command with {write_override('sweep.dir', run_dir.parent)} continues"
        sys.exit(report(RunInterrupted(error, outcome["signal"])))  # ends the whole sweep


if __name__ == "__main__":
    main()

"""`python -m dpo_runner`: check the command, let Hydra compose it, run it, and end with an honest exit code."""

import os
import sys
from pathlib import Path

from dpo_runner import __version__
from dpo_runner.artifacts import mask_file
from dpo_runner.command_line import build_help, check_command_line
from dpo_runner.config import CONF_DIR, CONFIG_NAME, build_run_conf, expand_overrides
from dpo_runner.errors import ConfigError, DpoRunnerError, RunError, RunInterrupted
from dpo_runner.exits import honest_exit, report


def main() -> None:
    """Run the command line.

    Exit codes: 0 finished, 1 failed, 2 the configuration is wrong, 128 + N stopped by signal N.
    """
    argv = sys.argv[1:]
    if "--help" in argv or "-h" in argv:
        print(build_help())
        return
    if "--version" in argv:
        print(f"dpo_runner {__version__}")
        return
    with honest_exit("interrupted"):
        if mistakes := check_command_line(argv):
            raise ConfigError(mistakes)
        _run_with_hydra()


def _run_with_hydra() -> None:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    # What goes wrong is kept out of Hydra, which would print a notice of its own about it.
    failure_alone: list[DpoRunnerError] = []
    failures_in_sweep: list[str] = []  # texts alone: an error would keep its run's model in memory
    main_process = os.getpid()

    def job(config: DictConfig) -> None:
        from dpo_runner.run import run

        hydra_config = HydraConfig.get()
        typed = list(hydra_config.overrides.task)
        conf = build_run_conf(config, typed)
        if hydra_config.mode != RunMode.MULTIRUN:
            try:
                run(conf, typed)
            except DpoRunnerError as error:
                failure_alone.append(error)
            return
        conf.run_dir = hydra_config.runtime.output_dir
        mask_file(Path(hydra_config.sweep.dir) / "multirun.yaml")  # Hydra has written the overrides as typed
        try:
            run(conf, typed)
        except RunInterrupted as error:
            sys.exit(report(error))  # ends the whole sweep
        except DpoRunnerError as error:
            if os.getpid() != main_process:
                raise  # under a launcher with processes of its own, which reports it
            failures_in_sweep.append(f"  {conf.run_dir}: {error}")
            report(error)

    sys.argv[1:] = expand_overrides(sys.argv[1:])
    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand errors back to us instead of printing tracebacks
    application = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=CONFIG_NAME)(job)
    application()
    if failure_alone:
        raise failure_alone[0]
    if failures_in_sweep:
        raise RunError("\n".join([f"{len(failures_in_sweep)} runs of the sweep failed:", *failures_in_sweep]))


if __name__ == "__main__":
    main()

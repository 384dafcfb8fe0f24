"""`python -m dpo_runner`: check the command, let Hydra compose it, run it, and end with an honest exit code."""

import os
import sys

from dpo_runner import __version__
from dpo_runner.command_line import build_help, check_command_line
from dpo_runner.config import CONF_DIR, CONFIG_NAME, build_run_conf
from dpo_runner.errors import ConfigError, DpoRunnerError, RunInterrupted


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
    command = check_command_line(argv)
    if command.mistakes:
        sys.exit(_report(ConfigError(command.mistakes)))
    sys.exit(_run_with_hydra(command.flags, command.overrides))


def _run_with_hydra(flags: list[str], overrides: list[str]) -> int:
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import DictConfig

    failures: list[tuple[str | None, DpoRunnerError]] = []
    main_process = os.getpid()

    def job(config: DictConfig) -> None:
        from dpo_runner.run import run

        conf = build_run_conf(config)
        hydra_config = HydraConfig.get()
        if hydra_config.mode == RunMode.MULTIRUN and conf.run_dir is None:
            conf.run_dir = hydra_config.runtime.output_dir
        try:
            run(conf, overrides=list(hydra_config.overrides.task))
        except RunInterrupted as error:
            sys.exit(_report(error))  # ends the whole sweep
        except DpoRunnerError as error:
            if os.getpid() != main_process:
                raise  # under a launcher with processes of its own, which reports it
            failures.append((conf.run_dir, error))
            if hydra_config.mode == RunMode.MULTIRUN:
                _report(error)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # hand errors back to us instead of printing tracebacks
    sys.argv = [sys.argv[0], *flags, *overrides]
    application = hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=CONFIG_NAME)(job)
    try:
        application()
    except DpoRunnerError as error:
        return _report(error)
    if (len(failures) == 1 and failures[0][0] is None) or (len(failures) == 1 and "-m" not in flags):
        return _report(failures[0][1])
    if failures:
        print(f"error: {len(failures)} runs of the sweep failed:", file=sys.stderr)
        for directory, failure in failures:
            print(f"  {directory}: {failure}", file=sys.stderr)
        return 1
    return 0


def _report(error: DpoRunnerError) -> int:
    lines = error.mistakes if isinstance(error, ConfigError) else [str(error)]
    for line in lines:
        print(f"error: {line}", file=sys.stderr)
    return error.exit_code


if __name__ == "__main__":
    main()

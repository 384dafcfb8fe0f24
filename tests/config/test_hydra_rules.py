"""No command or config file makes Hydra run code; each attempt would create a marker file."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.commands import give
from tests.support.programs import run_python

EVIL = """
import logging, pathlib
from hydra.experimental.callback import Callback
def mark(*args, **kwargs):
    pathlib.Path("{marker}").touch()
class Mark(Callback, logging.Handler):
    def __init__(self, *args, **kwargs):
        mark()
        logging.Handler.__init__(self)
"""
TARGET = "{_target_: evil.Mark}"
CALLBACK = f"hydra: {{callbacks: {{x: {TARGET}}}}}"
LOGGING = "{version: 1, root: {handlers: [x]}, handlers: {x: {class: evil.Mark}}}"
FACTORY = "{version: 1, root: {handlers: [x]}, handlers: {x: {(): evil.mark}}}"
GLOBAL = "# @package _global_\n"

ON_THE_COMMAND_LINE = [
    "+hydra.callbacks.x._target_=evil.Mark",
    "++hydra.callbacks.x._target_=evil.Mark",
    "hydra.callbacks={x:{_target_:evil.Mark}}",
    "++hydra.callbacks={x:{_target_:evil.Mark}}",
    "~hydra.callbacks",
    "hydra/callbacks=evil",
    "+hydra/callbacks=evil",
    "hydra.launcher._target_=evil.Mark",
    "++hydra.launcher._target_=evil.Mark",
    "++hydra.launcher.x={_target_:evil.Mark}",
    "++hydra.launcher.x={_target_:evil.Mark,a:{b:c}}",
    "++hydra.launcher.x=${oc.create:{_target_:evil.Mark}}",
    "++hydra.launcher.x=${lora.config}",
    "hydra.launcher={_target_:evil.Mark}",
    "~hydra.launcher",
    "hydra/launcher@hydra.callbacks.x=basic",
    "hydra.sweeper._target_=evil.Mark",
    "hydra/sweeper=basic",
    "hydra.sweeper.params={_target_:evil.Mark}",
    "hydra.job_logging={version:1,root:{handlers:[x]},handlers:{x:{class:evil.Mark}}}",
    "++hydra.hydra_logging.handlers.x.class=evil.Mark",
    "hydra/job_logging=evil",
    "hydra.job.env_set.PYTHONSTARTUP=evil.py",
    "hydra.searchpath=[pkg://evil]",
    "+hydra.searchpath=[file://evil]",
    "hydra.output_subdir=/tmp/x",
    "hydra.run.dir=elsewhere",
    "++lora.config={_target_:evil.Mark}",
    "++training.lr_scheduler_kwargs={_target_:evil.Mark}",
    "++model.device_map={a:{_target_:evil.Mark}}",
    "run_name=${evil.mark:}",
    "--config-path=evil",
    "--config-name=evil",
    "--experimental-rerun=evil.pickle",
]

# Files of a user's config folder; experiment=z selects them.
IN_FILES: list[dict[str, str]] = [
    {"experiment/z.yaml": GLOBAL + CALLBACK},
    {"experiment/z.yaml": GLOBAL + f"hydra: {{launcher: {TARGET}}}"},
    {"experiment/z.yaml": GLOBAL + f"hydra: {{launcher: {{x: {TARGET}}}}}"},
    {"experiment/z.yaml": GLOBAL + f"hydra: {{launcher: {{x: [{TARGET}]}}}}"},
    {"experiment/z.yaml": GLOBAL + f"hydra: {{sweeper: {TARGET}}}"},
    {"experiment/z.yaml": GLOBAL + f"hydra: {{job_logging: {LOGGING}}}"},
    {"experiment/z.yaml": GLOBAL + f"hydra: {{job_logging: {FACTORY}}}"},
    {"experiment/z.yaml": GLOBAL + f"hydra: {{hydra_logging: {LOGGING}}}"},
    {"experiment/z.yaml": GLOBAL + "hydra: {searchpath: ['file://evil']}"},
    {"experiment/z.yaml": GLOBAL + "hydra: {job: {env_set: {PYTHONPATH: evil}}}"},
    {"experiment/z.yaml": GLOBAL + f"x: &x {TARGET}\nhydra: {{callbacks: {{x: *x}}}}"},
    {"experiment/z.yaml": GLOBAL + f"x: &x {TARGET}\nhydra: {{callbacks: {{x: {{<<: *x}}}}}}"},
    {"experiment/z.yaml": GLOBAL + f"lora: {{config: {TARGET}}}\nhydra: {{launcher: {{x: '${{lora.config}}'}}}}"},
    {"experiment/z.yaml": "# @package hydra.callbacks.x\n_target_: evil.Mark"},
    {"experiment/z.yaml": GLOBAL + "# @package hydra.callbacks.x\n_target_: evil.Mark"},
    {"experiment/z.yaml": "\n# @package hydra.callbacks.x\n_target_: evil.Mark"},
    {"experiment/z.yaml": GLOBAL + "run_name: !!python/object/apply:evil.mark []"},
    {"experiment/z.yaml": GLOBAL + "run_name: !!python/object/new:evil.Mark {}"},
    {"experiment/z.yaml": GLOBAL + "run_name: !!python/name:evil.mark"},
    {"experiment/z.yaml": GLOBAL + "run_name: ${evil.mark:}"},
    {
        "experiment/z.yaml": GLOBAL + "defaults: [{override /hydra/callbacks: evil}]",
        "hydra/callbacks/evil.yaml": TARGET,
    },
    {"experiment/z.yaml": GLOBAL + "defaults: [{override /hydra/launcher: evil}]", "hydra/launcher/evil.yaml": TARGET},
    {"experiment/z.yaml": GLOBAL + "defaults: [{training: dpo}]", "experiment/training/dpo.yaml": GLOBAL + CALLBACK},
    {"experiment/z.yaml": GLOBAL + "defaults: [sub/y]", "experiment/sub/y.yaml": GLOBAL + CALLBACK},
    {"experiment/z.yaml": GLOBAL + "defaults: [/y]", "y.yaml": GLOBAL + CALLBACK},
    {"experiment/z.yaml": GLOBAL + "defaults: [/new/y]", "new/y.yaml": GLOBAL + CALLBACK},
    {"experiment/z.yaml": GLOBAL + "defaults: [/new/y@hydra.callbacks.x]", "new/y.yaml": "_target_: evil.Mark"},
    {"experiment/z.yaml": GLOBAL + "defaults: [{/new@hydra.callbacks.x: y}]", "new/y.yaml": "_target_: evil.Mark"},
    {"experiment/z.yaml": GLOBAL + "defaults: [{optional /new: y}]", "new/y.yaml": GLOBAL + CALLBACK},
    {"experiment/z.yaml": GLOBAL + "defaults: [{/new: [y]}]", "new/y.yaml": GLOBAL + CALLBACK},
    {"experiment/z.yaml": GLOBAL + "defaults: [../new/y]", "new/y.yaml": GLOBAL + CALLBACK},
    {"experiment/z.yaml": GLOBAL, "config.yaml": CALLBACK},
    {"experiment/z.yaml": GLOBAL, "hydra/config.yaml": f"callbacks: {{x: {TARGET}}}"},
    {"experiment/z.yaml": GLOBAL, "hydra/job_logging/none.yaml": LOGGING},
    {"sweep/z.yaml": GLOBAL + f"hydra: {{sweeper: {{params: {TARGET}}}}}"},
    {"sweep/z.yaml": GLOBAL + "hydra: {sweeper: {_target_: evil.Mark, params: {seed: '1,2'}}}"},
    {"sweep/z.yaml": GLOBAL + "hydra: {sweeper: {params: {+hydra.callbacks.x._target_: evil.Mark}}}"},
    {"sweep/z.yaml": GLOBAL + "hydra: {sweeper: {params: {hydra.job_logging.root.handlers: '[x]'}}}"},
    {"sweep/z.yaml": GLOBAL + "hydra: {sweeper: {params: {+hydra.searchpath: '[pkg://evil]'}}}"},
    {"sweep/z.yaml": GLOBAL + "hydra: {sweeper: {params: {seed: '${oc.create:{_target_: evil.Mark}}'}}}"},
    {
        "sweep/z.yaml": GLOBAL + "defaults: [sub/y]\nhydra: {mode: MULTIRUN}",
        "sweep/sub/y.yaml": GLOBAL + "hydra: {sweeper: {params: {hydra.searchpath: '[pkg://evil]'}}}",
    },
    # Hydra's launchers compose again with these.
    {"experiment/z.yaml": GLOBAL + "hydra: {overrides: {hydra: ['hydra.searchpath=[pkg://evil]']}}"},
    {
        "experiment/z.yaml": GLOBAL + "defaults: [{override /hydra/env: sub/x}]",
        "hydra/env/sub/x.yaml": "# @package hydra.overrides\nhydra: ['hydra.searchpath=[pkg://evil]']",
    },
]
CONTROLS = [IN_FILES[at] for at in (0, 5, 22)]
"""Controls: these run code if nothing is checked."""

UNCHECKED = """
import sys, dpo_runner.__main__ as program, dpo_runner.config.compose as config
program.check_command_line = lambda argv: []
config.check_composed = lambda config: None
sys.argv = {argv!r}
program.main()
"""


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    (tmp_path / "evil.py").write_text(EVIL.format(marker=tmp_path / "marker"))
    return tmp_path / "marker"


@pytest.fixture
def attempt(marker: Path, capsys, monkeypatch) -> Callable[..., None]:
    """Return a function that runs a command, which must be rejected before anything runs or is written."""

    def refused(*arguments: str) -> None:
        before = sorted(marker.parent.rglob("*"))
        monkeypatch.syspath_prepend(marker.parent)
        err = give(list(arguments), capsys, monkeypatch)
        assert err and all(line.startswith("error: ") for line in err.splitlines())
        assert sorted(marker.parent.rglob("*")) == before and "evil" not in sys.modules

    return refused


def write(files: dict[str, str]) -> list[str]:
    """Write a folder of config groups; return the arguments that select it."""
    for name, text in files.items():
        path = Path("mine", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return [f"--config-dir={Path('mine').resolve()}", f"{next(iter(files)).split('/')[0]}=z"]


@pytest.mark.parametrize("override", ON_THE_COMMAND_LINE)
def test_no_override_runs_code(override: str, attempt) -> None:
    attempt(override)


@pytest.mark.parametrize("files", IN_FILES, ids=range(len(IN_FILES)))
def test_no_file_runs_code(files: dict[str, str], attempt) -> None:
    attempt(*write(files))


@pytest.mark.parametrize("files", CONTROLS, ids=range(len(CONTROLS)))
def test_these_attempts_would_succeed_where_nothing_is_checked(files: dict[str, str], marker: Path) -> None:
    argv = ["dpo_runner", *write(files), "dry_run=true", "model=tiny_random"]
    run_python("-c", f"import sys; sys.path.insert(0, {str(marker.parent)!r})\n" + UNCHECKED.format(argv=argv))
    assert marker.exists()


def test_a_linked_folder_is_looked_into(attempt) -> None:
    arguments = write({"experiment/z.yaml": GLOBAL})
    Path("elsewhere", "callbacks").mkdir(parents=True)
    Path("elsewhere", "callbacks", "evil.yaml").write_text(f"x: {TARGET}\n")
    Path("mine", "hydra").symlink_to(Path("elsewhere").resolve())
    attempt(*arguments)


def test_no_point_of_a_sweep_hides_what_hydra_composes_for_all(attempt) -> None:
    """Hydra makes the launcher of what all points share, without the options that each of them has."""
    sound = GLOBAL + "hydra: {launcher: {_target_: hydra_plugins.dpo_runner.WorkersLauncher}}"
    evil = GLOBAL + f"hydra: {{launcher: {TARGET}}}"
    files = {"training/z.yaml": evil, "experiment/a.yaml": sound, "experiment/b.yaml": sound}
    attempt("-m", *write(files), "experiment=a,b")


def test_no_second_value_of_a_key_hides_the_first(attempt) -> None:
    """Hydra merges maps that are given twice."""
    attempt("++lora.config={_target_:evil.Mark}", "++lora.config={a:b}")


def test_what_the_check_of_keys_has_missed_is_caught_when_it_is_composed(marker: Path) -> None:
    """The check of what is composed does not look at files at all."""
    from dpo_runner.config.compose import compose_config
    from dpo_runner.config.hydra_rules import UnsafeConfigError

    for files in (IN_FILES[0], IN_FILES[5], IN_FILES[9]):
        flag, choice = write(files)
        with pytest.raises(UnsafeConfigError, match="could run code or write elsewhere"):
            compose_config([choice], flag.removeprefix("--config-dir="))

"""Versions of libraries: what is said to be tested, and checks of private names."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from dpo_runner.config.compose import load_conf
from dpo_runner.errors import RunError
from dpo_runner.io import upstream
from dpo_runner.io.logs import quiet_imports
from dpo_runner.io.upstream import NEWEST, check_names
from dpo_runner.train import run

ROOT = Path(__file__).parents[2]


class Trainer:
    _private = 1

    def _save(self, model: object, trial: object, output_dir: str = "", **kwargs: object) -> None: ...


def read_pins(name: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#")]
    return {line.partition("==")[0].lower(): Version(line.partition("==")[2]) for line in lines}


def read_oldest() -> dict[str, Version]:
    """Return the oldest version of each dependency of the package and its extras that pyproject.toml allows."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    used = ("search", "workspace", "sentiment", "benchmarks")
    texts = [*project["dependencies"], *(text for extra in used for text in extras[extra])]
    needs = [Requirement(text) for text in texts]
    floors = {need.name.lower(): [each.version for each in need.specifier if each.operator == ">="] for need in needs}
    return {name: Version(floor) for name, (floor,) in floors.items()}


def test_each_statement_of_the_versions_is_the_same() -> None:
    oldest = read_oldest()
    assert read_pins("constraints-oldest.txt") == {name: pin for name, pin in oldest.items() if name != "torch"}
    pinned = read_pins("constraints.txt")
    for library, newest in NEWEST.items():
        assert oldest[library] <= pinned[library] < Version(f"{newest}.999"), library
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## Versions\n")[2].partition("\n## ")[0]
    said = re.findall(r"^\| ([\w-]+) \| (\S+) \| (\S+) \|", section, flags=re.MULTILINE)
    assert {name: (Version(low), high) for name, low, high in said if name in oldest} == {
        name: (oldest[name], newest) for name, newest in NEWEST.items()
    }
    python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert "Python 3.11 to 3.13;" in section and python == ">=3.11,<3.14"


def test_a_newer_library_is_named_once_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tiny_run: list[str]
) -> None:
    assert upstream.list_newer() == []
    found = {"transformers": "5.99.1", "wandb": f"{NEWEST['wandb']}.7"}
    monkeypatch.setattr(upstream, "version", lambda name: found.get(name) or version(name))
    run(load_conf([*tiny_run, "dry_run=true"]))
    said = "transformers 5.99.1 is newer than 5.24, the newest that dpo-runner is tested with"
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count(said) == 1 and "wandb" not in printed
    with pytest.raises(RunError, match=f"cannot import name 'Conv1D'; {said}"), quiet_imports():
        raise ImportError("cannot import name 'Conv1D'")


def test_a_changed_private_name_is_one_line_with_the_version_to_take() -> None:
    check_names("peft", Trainer, "_private", _save="model trial")
    cure = f"it is tested with peft up to {NEWEST['peft']}: pip install 'peft=={NEWEST['peft']}.*'"
    for names, methods, what in (
        (("_gone",), {}, "Trainer._gone is gone"),
        ((), {"_save": "model"}, "Trainer._save takes (model, trial, output_dir, kwargs)"),
        ((), {"_save": "trial model"}, "Trainer._save takes (model, trial, output_dir, kwargs)"),
    ):
        with pytest.raises(RunError) as raised:
            check_names("peft", Trainer, *names, **methods)
        assert str(raised.value).startswith(f"peft {version('peft')}: {what}; ") and cure in str(raised.value)

"""Nothing is written outside the run directory and the caches, whatever the names."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError
from tests.support.common import ROWS
from tests.support.programs import run_python

HOSTILE = (
    "../../out",
    "/../out",
    "a/../../out",
    "..",
    "~/out",
    "$HOME/out",
    "\N{RIGHT-TO-LEFT OVERRIDE}\x1b[2J",
)


def list_files(*roots: Path, without: tuple[Path, ...] = ()) -> dict[str, int]:
    """Return the files below some folders with their modification times."""
    return {
        str(path): path.lstat().st_mtime_ns
        for root in roots
        for path in root.rglob("*")
        if not path.is_dir() and not any(path.is_relative_to(each) for each in without)
    }


@pytest.fixture
def sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with a folder for temporary files, and the working directory `a/b/work`."""
    for name in ("a/b/work", "tmp"):
        (tmp_path / "home" / name).mkdir(parents=True)
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path / "home"


def name_badly(sandbox: Path, tiny_model: str, sft_adapter: str) -> list[str]:
    """Write data, a model and an adapter with paths as names and contents; return overrides."""
    work = sandbox / "a" / "b" / "work"
    (work / "..out .jsonl").write_text(
        "".join(
            json.dumps({**row, "prompt": f"{HOSTILE[n % len(HOSTILE)]} {row['prompt']}", "id": "../../id"}) + "\n"
            for n, row in enumerate(ROWS)
        )
    )
    shutil.copytree(tiny_model, work / "-- ..model")
    config = json.loads((work / "-- ..model" / "config.json").read_text())
    (work / "-- ..model" / "config.json").write_text(json.dumps(config | {"_name_or_path": "../../out"}))
    shutil.copytree(sft_adapter, work / "..adapter")
    adapter = json.loads((work / "..adapter" / "adapter_config.json").read_text())
    (work / "..adapter" / "adapter_config.json").write_text(
        json.dumps(adapter | {"base_model_name_or_path": "../../out"})
    )
    return [
        f"model.model_name_or_path='{work / '-- ..model'}'",
        f"model.adapter={work / '..adapter'}",
        "data.path='..out .jsonl'",
        "run_name=..%2F..%2Fout",
        "wandb.name=../../out",
        "wandb.group=/tmp/../../out",
        "wandb.project=dpo",
        "wandb.tags=[../../out]",
        "wandb.notes=../../out",
    ]


def test_a_run_writes_into_its_directory_and_the_caches_alone(
    sandbox: Path, tiny_run: list[str], tiny_model: str, sft_adapter: str
) -> None:
    bad = name_badly(sandbox, tiny_model, sft_adapter)
    kept = [each for each in tiny_run if not each.startswith(("data.path", "wandb"))]
    work = sandbox / "a" / "b" / "work"
    environment = {**os.environ, "HOME": str(sandbox), "TMPDIR": str(sandbox / "tmp")}
    for name in ("WANDB_DATA_DIR", "XDG_CACHE_HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"):
        environment.pop(name, None)
    allowed = (work / "outputs", sandbox / ".cache")
    before = list_files(sandbox)
    result = run_python("-m", "dpo_runner", *kept, *bad, cwd=work, env=environment)
    assert result.returncode == 0, result.stderr + result.stdout
    (run_dir,) = (work / "outputs").glob("*/*")
    assert run_dir.parent.name == "..%2F..%2Fout"
    assert list_files(sandbox, without=allowed) == before
    assert (run_dir / "adapter" / "adapter_model.safetensors").exists() and list((run_dir / "wandb").glob("*run-*"))
    for command in (
        ["export", "--out", "merged"],
        ["evaluate"],
        ["compare", "--html", "c.html"],
    ):
        module, *arguments = command
        result = run_python("-m", f"dpo_runner.{module}", str(run_dir), *arguments, cwd=work, env=environment)
        assert result.returncode == 0, result.stderr + result.stdout
    assert list_files(sandbox, without=(*allowed, work / "merged", work / "c.html")) == before


@pytest.mark.parametrize("name", ["..", ".", "../../out", "/out", "a/b", "", "x" * 300, "a\0b"])
def test_a_run_name_that_is_no_folders_name_is_refused(name: str, tiny_run: list[str], tmp_path: Path) -> None:
    before = list_files(tmp_path)
    with pytest.raises(ConfigError) as refused:
        run(replace(load_conf(tiny_run), run_name=name))
    assert all("\n" not in line and line.startswith("`run_") for line in refused.value.mistakes)
    assert list_files(tmp_path) == before

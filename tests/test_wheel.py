"""The installed wheel works, not only the checkout: it includes conf/ and the bundled data."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from the files that the Dockerfile copies, and install it alone into an empty folder."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, flags=re.MULTILINE):
        for name in line.split():
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / "source" / name)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    subprocess.run([*build, str(folder / "source")], check=True, capture_output=True)
    wheel = next(folder.glob("*.whl"))
    target = folder / "site"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return target


def run_installed(installed: Path, *arguments: str, program: str = "dpo-runner") -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    command = [str(installed / "bin" / program), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_command_composes_from_the_packaged_conf(installed: Path) -> None:
    code = "import dpo_runner.config.yaml_files as files; print(files.CONF_DIR)"
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert result.stdout.strip() == str(installed / "dpo_runner" / "conf")
    text = run_installed(installed, "--cfg", "job", "experiment=zephyr_7b_dpo_qlora")
    assert "alignment-handbook/zephyr-7b-sft-qlora" in text


def test_the_command_trains_on_the_packaged_data(installed: Path, tmp_path: Path) -> None:
    sizes = ["data.max_train_samples=4", "data.max_eval_samples=2", "samples.num_prompts=1", "samples.max_new_tokens=4"]
    said = run_installed(installed, "model=tiny_random", "training=smoke", "wandb=disabled", "run_dir=r", *sizes)
    assert (tmp_path / "r" / "adapter" / "adapter_model.safetensors").exists()
    for next_step in ("chat r\n", "chat r --compare\n", "evaluate r\n", "export r --out DIR\n"):
        assert f"python -m dpo_runner.{next_step}" in said


def test_every_command_is_installed_and_named_in_the_help(installed: Path) -> None:
    text = run_installed(installed, "--help")
    package = ROOT / "dpo_runner"
    files = {file.stem: file for file in package.glob("*.py")}
    files |= {file.parent.name: file for file in package.glob("*/__main__.py")}
    modules = [name for name, file in files.items() if "\ndef main(argv" in file.read_text()]
    assert sorted(modules) == ["cache", "chat", "compare", "evaluate", "export", "generate", "preview", "workspace"]
    for module in modules:
        assert f"python -m dpo_runner.{module} " in text
        answer = run_installed(installed, "--help", program=f"dpo-runner-{module}")
        assert f"python -m dpo_runner.{module} " in answer


def test_the_image_runs_the_command_of_the_readme_with_the_packages_of_make_setup() -> None:
    command = re.findall(r"^ENTRYPOINT (.*)$", DOCKERFILE, flags=re.MULTILINE)
    assert [json.loads(text) for text in command] == [["python", "-m", "dpo_runner"]]
    assert "\npython -m dpo_runner " in (ROOT / "README.md").read_text()
    makefile = (ROOT / "Makefile").read_text()
    for text in re.findall(r"--constraint \S+|--no-deps \S+", DOCKERFILE):
        assert f" {text}" in makefile

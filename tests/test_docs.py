"""The docs cannot drift: every command is run, every name in them exists."""

import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpo_runner.config.schema import SCHEMA, schema_key
from dpo_runner.config.yaml_files import ConfigFiles
from dpo_runner.sweep.command_line import check_command_line
from tests.support.programs import quick_python

ROOT = Path(__file__).parents[1]
DOCS = ["README.md", "CONTRIBUTING.md"]
FURTHER = ["docs/data.md", "docs/models.md", "docs/sweeps.md", "docs/engine.md", "docs/reliability.md"]
NOT_RUN = "<!-- not run: needs a GPU and the hub -->"
SERVERS = ("<!-- not run: needs vLLM -->", "<!-- not run: needs Ollama -->")

# What makes a documented run small enough for a test, where the command itself does not say otherwise.
SMALL = [
    "model.model_name_or_path=random:tiny-llama",
    "training.max_steps=2",
    "training.eval_steps=2",
    "training.save_steps=2",
    "training.per_device_train_batch_size=1",
    "training.gradient_accumulation_steps=1",
    "data.max_train_samples=2",
    "data.max_eval_samples=1",
    "samples.num_prompts=1",
    "samples.max_new_tokens=4",
]


def read_blocks(document: str) -> list[tuple[str, str]]:
    """Return (code, its mark as not run or "") for each bash block."""
    text = (ROOT / document).read_text(encoding="utf-8")
    found = re.finditer(r"(?P<mark><!-- not run:[^>]*-->\n)?```bash\n(?P<code>.*?)```", text, flags=re.DOTALL)
    blocks = [(match["code"], (match["mark"] or "").strip()) for match in found]
    assert {mark for _, mark in blocks} <= {"", NOT_RUN, *SERVERS}
    assert sum(mark != "" for _, mark in blocks) == text.count("<!-- not run:")
    return blocks


def read_commands(document: str, *marks: str) -> list[str]:
    return [
        line for code, mark in read_blocks(document) if mark in (marks or ("",)) for line in code.splitlines() if line
    ]


@pytest.fixture(scope="module")
def environment(own_cache: None, tiny_model: str) -> Iterator[dict[str, str]]:
    """Of a shell whose `python` starts quickly."""
    with quick_python() as quick:
        yield quick


def test_every_documented_command_runs(tmp_path: Path, environment: dict[str, str]) -> None:
    """In order and in one folder, as a reader would type them."""
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    for command in map(shrink, read_commands("README.md")):
        result = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=240, env=environment)
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    check_served_folders()


def shrink(command: str) -> str:
    """Return a documented command with what makes it small enough for a test."""
    if command.startswith("make "):
        return ":"  # see test_make_targets_exist
    if command.startswith("python -m dpo_runner ") and "--" not in command:
        given = {word.partition("=")[0] for word in shlex.split(command)}
        kept = [o for o in SMALL if o.partition("=")[0] not in given and not ("model" in given and "model" in o)]
        points = ["sweep.sample=2"] if " -m " in command.removeprefix("python -m") else []
        return " ".join([command, *kept, *points])
    if "scripts/train_sft_adapter.py" in command:
        return f"{command} --model random:tiny-llama --max-steps 1 --per-device-train-batch-size 1"
    if "dpo_runner.preview" in command:
        return f"{command} model=tiny_random"
    return f"{command} --max-new-tokens 4" if "dpo_runner.chat" in command else command


def check_served_folders() -> None:
    """What the servers are pointed at is what the commands before have written, and what each of them reads."""
    commands = read_commands("README.md", *SERVERS)
    merged = {"outputs/" + path for line in commands for path in re.findall(r"FROM \./(\w+)", line)}
    merged |= {path for line in commands for path in re.findall(r"vllm serve (outputs/\w+)", line)}
    adapters = {"outputs/" + path for line in commands for path in re.findall(r"ADAPTER \./(\w+)", line)}
    adapters |= {path for line in commands for path in re.findall(r"--lora-modules mine=(outputs/\w+)", line)}
    assert (merged, adapters) == ({"outputs/merged"}, {"outputs/adapter"})
    names = ("config.json", "model.safetensors"), ("adapter_config.json", "adapter_model.safetensors")
    for folder, wanted in zip(("outputs/merged", "outputs/adapter"), names, strict=True):
        for name in (*wanted, "tokenizer.json", "chat_template.jinja"):
            assert Path(folder, name).is_file(), f"{folder}/{name}"


def test_commands_for_the_gpu_pass_every_check() -> None:
    commands = read_commands("README.md", NOT_RUN)
    assert commands
    for command in commands:
        assert check_command_line(shlex.split(command)[3:]) == []


@pytest.mark.parametrize("document", DOCS)
def test_make_targets_exist(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*##", makefile, flags=re.MULTILINE))
    named = re.findall(r"(?:^|`)make (?:PYTHON=\S+ )?([a-z-]+)", (ROOT / document).read_text(), flags=re.MULTILINE)
    assert named and set(named) <= targets
    listed = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
    assert all(f"make {target} " in listed for target in targets)


@pytest.mark.parametrize("document", DOCS + FURTHER)
def test_keys_options_and_files_that_are_named_exist(document: str) -> None:
    text = re.sub(r"```text\n.*?```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)
    files = ConfigFiles.over(None)
    for key, value in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)*)=([^`\s]+)`", text):
        if key in files.groups():
            assert value in files.options(key) or value == "OPTION", (key, value)
        elif key not in ("GROUP", "KEY", "defaults"):
            assert schema_key(key) in SCHEMA, key
    for name in re.findall(r"`((?:dpo_runner|conf|scripts|tests)/[\w./]*)", text):
        assert "GROUP" in name or (ROOT / name).exists(), name
    for name in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert "GROUP" in name or ((ROOT / document).parent / name).exists(), name
    for key in re.findall(r"`((?:data|model|quant|lora|judge|sweep)(?:\.(?!py`|json`)[a-z_]+)+)`", text):
        assert schema_key(key) in SCHEMA, key


def test_the_tables_list_every_group_option_and_module() -> None:
    readme, contributing = ((ROOT / name).read_text(encoding="utf-8") for name in DOCS)
    files = ConfigFiles.over(None)
    for group in files.groups():
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{group}` |"))
        assert all(f"`{option}`" in row for option in files.options(group)), row
    for module in (ROOT / "dpo_runner").rglob("*.py"):
        if module.name != "__init__.py":
            assert module.name in contributing or f"`{module.stem}`" in contributing, module


def test_the_data_docs_list_every_layout_and_the_cited_formatter_works() -> None:
    from dpo_runner.config.sections.data import FORMATS
    from dpo_runner.data.layouts.formats import find_layout, format_row, read_pairs

    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z]+)` \|", text, flags=re.MULTILINE)[: len(FORMATS) - 1] == list(FORMATS[1:])
    namespace: dict = {}
    exec(re.search(r"```python\n(.*?)```", text, flags=re.DOTALL)[1], namespace)
    row = {"lang": "en", "q": "Why?", "best": "So.", "worst": "No."}
    made = format_row(row, namespace["to_pairs"])
    assert read_pairs(made[0], find_layout(made, "auto"), "best_vs_worst")[0].prompt[0]["content"] == "Why?"
    assert format_row(row | {"lang": "de"}, namespace["to_pairs"]) == []


def test_the_error_examples_are_what_is_printed() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for mistake in check_command_line(["training.lerning_rate=1", "quant=nf5"]):
        assert f"error: {mistake}" in readme


def test_the_python_examples_run(tmp_path: Path, environment: dict[str, str]) -> None:
    from dpo_runner import run
    from dpo_runner.config.compose import load_conf

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL)
    assert len(blocks) == 2
    small = [override for override in SMALL if not override.startswith("model.")]
    run(load_conf(["model=tiny_random", "run_dir=outputs/first", "wandb=disabled", *small]))
    for block in blocks:
        code = block.replace(
            '"training.beta=0.2"', ", ".join(map(repr, ["training.beta=0.2", "wandb=disabled", *small]))
        )
        (tmp_path / "example.py").write_text(code)
        subprocess.run("python example.py", shell=True, check=True, capture_output=True, env=environment)

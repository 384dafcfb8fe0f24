"""The docs stay correct: every command of README and docs/ is run, every name in them exists."""

import io
import json
import re
import shlex
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from dpo_runner.config.schema import SCHEMA, schema_key
from dpo_runner.config.yaml_files import ConfigFiles
from dpo_runner.io.console import RunConsole
from dpo_runner.sweep.command_line import check_command_line
from scripts.make_gpu_table import METHODS, SHAPES, build_rows
from scripts.make_scale_tables import TABLES
from tests.support.programs import quick_python

ROOT = Path(__file__).parents[1]
PAGES = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
DOCS = ["README.md", "CONTRIBUTING.md", *PAGES]
FIGURES = sorted(f"benchmarks/{path.name}" for path in (ROOT / "benchmarks").glob("*.md"))

NOT_RUN = "<!-- not run: needs a GPU and the hub -->"
SERVERS = ("<!-- not run: needs vLLM -->", "<!-- not run: needs Ollama -->")
WANDB = "<!-- not run: needs W&B -->"
INSTALLS = "<!-- not run: installs packages -->"
FRAGMENT = "<!-- not run: a fragment -->"
YOURS = "<!-- not run: needs a file of yours -->"
MARKS = {"", NOT_RUN, *SERVERS, WANDB, INSTALLS, FRAGMENT, YOURS}

# Overrides that shrink a documented run for tests, unless the command sets them itself.
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


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def read_blocks(document: str, language: str = "bash") -> list[tuple[str, str]]:
    """Return (code, its not-run mark or "") for each code block of a language."""
    found = re.finditer(
        r"^(?P<mark><!-- not run:[^>]*-->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$",
        read(document),
        flags=re.DOTALL | re.MULTILINE,
    )
    blocks = [(match["language"], match["code"], (match["mark"] or "").strip()) for match in found]
    assert {mark for _, _, mark in blocks} <= MARKS
    assert sum(mark != "" for _, _, mark in blocks) == read(document).count("<!-- not run:")
    assert 2 * len(blocks) == len(re.findall(r"^\s*```", read(document), flags=re.MULTILINE))
    assert {name for name, _, _ in blocks} <= {"bash", "python", "text", "yaml"}
    assert all(mark != FRAGMENT or name == "python" for name, _, mark in blocks)
    return [(code, mark) for name, code, mark in blocks if name == language]


def read_commands(document: str, *marks: str) -> list[str]:
    return [
        line for code, mark in read_blocks(document) if mark in (marks or ("",)) for line in code.splitlines() if line
    ]


@pytest.fixture(scope="module")
def environment(own_cache: None, tiny_model: str) -> Iterator[dict[str, str]]:
    """Environment of a shell whose `python` starts quickly."""
    with quick_python() as quick:
        yield quick


@pytest.fixture(scope="module")
def after_readme(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str], tiny_model: str) -> Path:
    """The folder after running the commands of README.md in order."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "scripts").symlink_to(ROOT / "scripts")
    run_commands("README.md", folder, environment, tiny_model)
    return folder


def test_every_command_of_the_readme_runs(after_readme: Path) -> None:
    """In order and in one folder, like a reader."""
    for name in ("first/adapter", "grid/sweep.json", "merged/model.safetensors"):
        assert (after_readme / "outputs" / name).exists()


@pytest.mark.parametrize("document", [page for page in PAGES if read_commands(page)])
def test_every_command_of_a_page_runs(
    document: str, after_readme: Path, environment: dict[str, str], tiny_model: str, tmp_path: Path
) -> None:
    """In order, in a folder where only the commands of README.md were run before."""
    folder = tmp_path / "reader"
    shutil.copytree(after_readme, folder, symlinks=True)
    run_commands(document, folder, environment, tiny_model)
    if document == "docs/export.md":
        check_served_folders(folder)


def run_commands(document: str, folder: Path, environment: dict[str, str], tiny_model: str) -> None:
    for command in (shrink(command, tiny_model) for command in read_commands(document)):
        result = subprocess.run(
            command, shell=True, capture_output=True, text=True, timeout=240, env=environment, cwd=folder
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"


def shrink(command: str, tiny_model: str) -> str:
    """Return a documented command, shrunk for tests."""
    if command.startswith("make "):
        return ":"  # see test_make_targets_exist
    if command.startswith("python -m dpo_runner ") and "--" not in command:
        command = re.sub(r"sweep\.search\.trials=\d+|training\.max_steps=\d+", "", command)
        command = command.replace("=DIR ", f"={tiny_model} ")
        given = {word.partition("=")[0] for word in shlex.split(command)}
        kept = [o for o in SMALL if o.partition("=")[0] not in given and not ("model" in given and "model" in o)]
        if "sweep.search" in command or "sweep=optuna" in command:
            points = ["sweep.search.trials=2"]
        else:
            points = ["sweep.sample=2"] if " -m " in command.removeprefix("python -m") else []
        return " ".join([command, *kept, *points])
    if "scripts/train_sft_adapter.py" in command:
        return f"{command} --model random:tiny-llama --max-steps 1 --per-device-train-batch-size 1"
    if "dpo_runner.generate" in command:
        return f"{command} model=tiny_random generate.max_new_tokens=8 generate.max_bad_fraction=1"
    if "dpo_runner.preview" in command:
        return f"{command} model=tiny_random"
    return f"{command} --max-new-tokens 4" if "dpo_runner.chat" in command else command


def check_served_folders(folder: Path) -> None:
    """Check that documented servers point to folders written by earlier commands, in a readable format."""
    commands = read_commands("docs/export.md", *SERVERS)
    merged = {"outputs/" + path for line in commands for path in re.findall(r"FROM \./(\w+)", line)}
    merged |= {path for line in commands for path in re.findall(r"vllm serve (outputs/\w+)", line)}
    adapters = {"outputs/" + path for line in commands for path in re.findall(r"ADAPTER \./(\w+)", line)}
    adapters |= {path for line in commands for path in re.findall(r"--lora-modules mine=(outputs/\w+)", line)}
    assert (merged, adapters) == ({"outputs/model"}, {"outputs/adapter"})
    names = ("config.json", "model.safetensors"), ("adapter_config.json", "adapter_model.safetensors")
    for served, wanted in zip(("outputs/model", "outputs/adapter"), names, strict=True):
        for name in (*wanted, "tokenizer.json", "chat_template.jinja"):
            assert Path(folder, served, name).is_file(), f"{served}/{name}"


def test_commands_for_the_gpu_pass_every_check() -> None:
    assert read_commands("README.md", NOT_RUN)
    for document in DOCS:
        for command in read_commands(document, NOT_RUN):
            assert check_command_line(shlex.split(command)[3:]) == []


@pytest.mark.parametrize("command", read_commands("docs/gpu.md", NOT_RUN))
def test_each_command_for_a_gpu_is_planned(
    command: str, tiny_model: str, sft_adapter: str, pairs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a small model in place of the hub's, small rows, and a card that is only described."""
    from dpo_runner import run
    from dpo_runner.config.compose import load_conf
    from dpo_runner.training.memory import estimate, settle
    from dpo_runner.training.memory.device import Device

    card = Device("a card", 24 * 10**9, 23 * 10**9, is_gpu=True, has_varlen=True)
    monkeypatch.setattr(settle, "read_device", lambda args, held: card)
    monkeypatch.setattr(estimate, "read_device", lambda args: card)
    monkeypatch.setattr(settle, "bound_memory", lambda *_: float("inf"))
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "dpo_runner"]
    overrides = [*words[3:], f"model.model_name_or_path={tiny_model}", "data=local_file", f"data.path={pairs}"]
    if load_conf(words[3:]).model.adapter is not None:
        overrides.append(f"model.adapter={sft_adapter}")
    text = io.StringIO()
    run(load_conf([*overrides, "dry_run=true"]), console=RunConsole(Console(file=text, width=200)))
    assert re.search(r"at the peak \((training|evaluation)\) *│ *\d+\.\d\d", text.getvalue())
    assert "free on a card" in text.getvalue()


def test_the_table_of_gpus_is_what_the_estimate_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dpo_runner.training.memory.estimate._FULL_DEPTH", 2)  # quicker than 8
    page = read("docs/gpu.md")
    found = re.findall(rf"^\| (?:{'|'.join(map(re.escape, SHAPES))}) \|.*$", page, flags=re.MULTILINE)
    assert len(found) == len(SHAPES) * len(METHODS)
    for row, expected in zip(found, build_rows(list(SHAPES)[:1]), strict=False):
        told, made = ([cell.strip() for cell in line.strip("|").split("|")] for line in (row, expected))
        assert told[:2] == made[:2] and told[-1] == made[-1]
        for one, other in zip(told[2:-1], made[2:-1], strict=True):
            assert float(one) == pytest.approx(float(other), abs=0.1, rel=0.02)
    assert re.search(r"No figure on this page was measured on a GPU", page)


def test_the_tables_of_large_runs_are_what_the_formulas_give() -> None:
    page = read("docs/scale.md")
    for name, rows in TABLES.items():
        found = re.search(rf"<!-- table: {name} -->\n\|.*\n\|[-|]+\n((?:\|.*\n)+)", page)
        assert found is not None and found[1].splitlines() == list(rows())
    assert page.count("<!-- table: ") == len(TABLES) and "computed, not measured" in page


def test_packages_that_the_docs_install_are_those_of_the_project() -> None:
    extras = tomllib.loads(read("pyproject.toml"))["project"]["optional-dependencies"]
    commands = [shlex.split(command) for page in DOCS for command in read_commands(page, INSTALLS, WANDB)]
    installed = {package for words in commands if words[:2] == ["pip", "install"] for package in words[2:]}
    assert installed == {
        *extras["search"],
        *extras["workspace"],
        *extras["sentiment"],
        *extras["trackers"],
        *extras["benchmarks"],
    }
    for words in (words for words in commands if words[0] != "pip"):
        assert all((ROOT / word).exists() for word in words if word.startswith("scripts/"))
    [inline] = re.findall(r"`pip install --no-deps (\S+)`", read("docs/troubleshooting.md"))
    assert f"--no-deps {inline}\n" in read("Makefile")


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    assert len(read("README.md").splitlines()) <= 150
    linked = set(re.findall(r"\]\((docs/[a-z]+\.md)", read("README.md")))
    assert linked == set(PAGES)
    commands = tomllib.loads(read("pyproject.toml"))["project"]["scripts"]
    modules = {target.removesuffix(":main").removesuffix(".__main__") for target in commands.values()}
    assert set(re.findall(r"^\| `python -m ([\w.]+)` \|", read("README.md"), flags=re.MULTILINE)) == modules


@pytest.mark.parametrize("document", DOCS)
def test_make_targets_exist(document: str) -> None:
    makefile = read("Makefile")
    targets = set(re.findall(r"^([a-z-]+):.*##", makefile, flags=re.MULTILINE))
    named = re.findall(r"(?:^|`)make (?:PYTHON=\S+ )?([a-z-]+)", read(document), flags=re.MULTILINE)
    assert set(named) <= targets
    assert named or document in PAGES
    listed = subprocess.run(["make", "-C", str(ROOT), "help"], capture_output=True, text=True, check=True).stdout
    assert all(f"make {target} " in listed for target in targets)


@pytest.mark.parametrize(
    "document", [page for page in DOCS + FIGURES if page != "docs/reference.md"]
)  # upstream's texts
def test_keys_options_and_files_that_are_named_exist(document: str) -> None:
    text = re.sub(r"```text\n.*?```", "", read(document), flags=re.DOTALL)
    files = ConfigFiles.over(None)
    for key, value in re.findall(r"`([a-z_]+(?:\.[a-z_0-9]+)*)=([^`\s]+)`", text):
        if key in files.groups():
            assert value in files.options(key) or value == "OPTION", (key, value)
        elif key not in ("GROUP", "KEY", "defaults"):
            assert schema_key(key) in SCHEMA, key
    for name in re.findall(r"`((?:dpo_runner|conf|scripts|tests|docs|benchmarks)/[\w./]*)", text):
        assert "GROUP" in name or (ROOT / name).exists(), name
    for key in re.findall(r"`((?:data|model|quant|lora|judge|sweep)(?:\.(?!py`|json`)[a-z_]+)+)`", text):
        assert schema_key(key) in SCHEMA, key


@pytest.mark.parametrize("document", DOCS + FIGURES)
def test_modules_that_are_named_exist(document: str) -> None:
    for name in re.findall(r"python -m ((?:dpo_runner|scripts)[\w.]*\w)", read(document)):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


@pytest.mark.parametrize("document", DOCS + FIGURES)
def test_links_lead_to_files_and_headings(document: str) -> None:
    text = re.sub(r"```.*?```", "", read(document), flags=re.DOTALL)
    for name, heading in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        target = (ROOT / document).parent / name if name else ROOT / document
        assert target.exists(), name
        if heading:
            assert heading in anchors_of(target.read_text(encoding="utf-8")), f"{name}#{heading}"


def anchors_of(text: str) -> set[str]:
    """Return the link anchors of a page's headings."""
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", plain, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_tables_list_every_group_option_and_module() -> None:
    groups, house = (read(name).splitlines() for name in ("docs/configuration.md", "docs/house.md"))
    files = ConfigFiles.over(None)
    for group in files.groups():
        row = next(line for line in groups if line.startswith(f"| `{group}` |"))
        assert all(f"`{option}`" in row for option in files.options(group)), row
    listed = {match[1]: line for line in house if (match := re.match(r"\| `(dpo_runner/[\w/]*)` \|", line))}
    modules = {path.relative_to(ROOT) for path in (ROOT / "dpo_runner").rglob("*.py") if path.name != "__init__.py"}
    assert set(listed) == {f"{module.parent}/" for module in modules}
    for module in modules:
        assert f"`{module.stem}`" in listed[f"{module.parent}/"].split("|")[-2], module


def test_the_picture_of_the_layers_is_the_one_that_is_checked() -> None:
    contract = tomllib.loads(read("pyproject.toml"))["tool"]["importlinter"]["contracts"][0]
    layers = [{name.strip() for name in layer.split("|")} for layer in contract["layers"]]
    for document in ("CONTRIBUTING.md", "docs/house.md"):
        picture = read_blocks(document, "text")[0][0]
        words = [word for line in picture.splitlines() for word in re.split(r"\s{3,}", line.strip())[0].split("  ")]
        drawn = [word.strip("/ ") for word in words if word.strip("/ |")]
        for layer in layers:
            assert set(drawn[: len(layer)]) == layer, (document, layer)
            del drawn[: len(layer)]
        assert not drawn


def test_the_data_docs_list_every_layout_and_the_cited_formatter_works() -> None:
    from dpo_runner.config.sections.data import FORMATS
    from dpo_runner.data.layouts.formats import find_layout, format_row, read_pairs

    text = read("docs/data.md")
    assert re.findall(r"^\| `([a-z]+)` \|", text, flags=re.MULTILINE)[: len(FORMATS) - 1] == list(FORMATS[1:])
    namespace: dict = {}
    [(code, _)] = read_blocks("docs/data.md", "python")
    exec(code, namespace)
    row = {"lang": "en", "q": "Why?", "best": "So.", "worst": "No."}
    made = format_row(row, namespace["to_pairs"])
    assert read_pairs(made[0], find_layout(made, "auto"), "best_vs_worst")[0].prompt[0]["content"] == "Why?"
    assert format_row(row | {"lang": "de"}, namespace["to_pairs"]) == []


def test_each_example_of_the_data_docs_is_the_pair_that_they_promise() -> None:
    from dpo_runner.config.sections.data import FORMATS
    from dpo_runner.data.layouts.formats import find_layout, read_pairs
    from dpo_runner.data.layouts.messages import Pair
    from dpo_runner.data.layouts.scored import group_responses

    examples = re.findall(r"^\| `([a-z]+)`([^|]*) \| (`\{.*`) \|$", read("docs/data.md"), flags=re.MULTILINE)
    assert {name for name, _, _ in examples} == set(FORMATS[1:])
    for name, variant, cell in examples:
        rows = [json.loads(text) for text in re.findall(r"`([^`]+)`", cell)]
        layout = find_layout(rows, "auto")
        assert layout.describe(rows[0]) == name + variant
        if layout.grouped:
            rows = [row for _, row in group_responses(enumerate(rows)) if isinstance(row, dict)]
        [pair] = [pair for row in rows for pair in read_pairs(row, layout, "best_vs_worst")]
        turns = [("user", "Why?"), ("assistant", "So."), ("assistant", "No.")]
        prompt, chosen, rejected = ([{"role": role, "content": content}] for role, content in turns)
        assert pair == Pair(prompt, chosen, rejected, score_gap=pair.score_gap)


def test_the_mixture_of_the_data_docs_is_a_configuration(tmp_path: Path) -> None:
    [(text, _)] = read_blocks("docs/data.md", "yaml")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine.yaml").write_text(text)
    assert check_command_line(["--config-dir", str(tmp_path), "data=mine"]) == []


def test_the_error_examples_are_what_is_printed() -> None:
    mistakes = check_command_line(["training.lerning_rate=1", "quant=nf5"])
    assert len(mistakes) == 2
    for mistake in mistakes:
        assert f"error: {mistake}" in read("docs/configuration.md")


def test_the_python_examples_run(tmp_path: Path, environment: dict[str, str]) -> None:
    from dpo_runner import run
    from dpo_runner.config.compose import load_conf

    blocks = read_blocks("docs/runs.md", "python")
    assert len(blocks) == 2 and all(mark == "" for _, mark in blocks)
    small = [override for override in SMALL if not override.startswith("model.")]
    run(load_conf(["model=tiny_random", "run_dir=outputs/first", "wandb=disabled", *small]))
    for block, _ in blocks:
        code = block.replace(
            '"training.beta=0.2"', ", ".join(map(repr, ["training.beta=0.2", "wandb=disabled", *small]))
        )
        (tmp_path / "example.py").write_text(code)
        subprocess.run("python example.py", shell=True, check=True, capture_output=True, env=environment)


def test_python_of_all_pages_is_run_or_a_fragment() -> None:
    """The examples of docs/runs.md and the formatter of docs/data.md are run by the tests above."""
    for document in DOCS:
        for code, mark in read_blocks(document, "python"):
            compile(code, document, "exec")
            assert mark == FRAGMENT or document in ("docs/runs.md", "docs/data.md")

"""Package layout rules that import-linter cannot check: cycles, crowded folders, sizes, names."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = {path.relative_to(ROOT): ast.parse(path.read_text()) for path in sorted((ROOT / "dpo_runner").rglob("*.py"))}
GENERATED = "dpo_runner/config/sections/training.py"
FOREIGN_SIGNATURES = {"_Dispatch.apply"}
"""Functions whose parameters are dictated by a library."""


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


NAMES = {module_name(path) for path in FILES}


def imports_of(tree: ast.Module) -> Iterator[str]:
    """Yield the package modules that a module imports, including lazy and type-only imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from (full if (full := f"{node.module}.{a.name}") in NAMES else node.module for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path, tree in FILES.items():
        for parent in ast.walk(tree):
            for node in ast.iter_child_nodes(parent):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    owner = f"{parent.name}." if isinstance(parent, ast.ClassDef) else ""
                    yield f"{path}:{owner}{node.name}", node


def test_no_circle() -> None:
    left = {
        module_name(path): {name for name in imports_of(tree) if name in NAMES} - {module_name(path)}
        for path, tree in FILES.items()
    }
    while free := {name for name, wanted in left.items() if not wanted & left.keys()}:
        left = {name: wanted for name, wanted in left.items() if name not in free}
    assert not left, f"these modules import one another: {sorted(left)}"


def test_no_folder_is_crowded() -> None:
    entries: dict[Path, set[str]] = {}
    for path in FILES:
        if path.name != "__init__.py":
            entries.setdefault(path.parent, set()).add(path.name)
        for folder in (path.parent, *path.parent.parents):
            if len(folder.parts) > 1:
                entries.setdefault(folder.parent, set()).add(folder.name)
    crowded = {str(folder): len(names) for folder, names in entries.items() if len(names) > 12}
    assert crowded.pop("dpo_runner") <= 18
    assert not crowded


def test_modules_and_functions_are_of_readable_size() -> None:
    lines = {str(path): len((ROOT / path).read_text().splitlines()) for path in FILES}
    assert {path: count for path, count in lines.items() if count > 300 and path != GENERATED} == {}
    assert lines["dpo_runner/train.py"] <= 150
    long, wide = {}, {}
    for name, node in functions():
        assert node.end_lineno is not None
        if (size := node.end_lineno - node.lineno + 1) > 60:
            long[name] = size
        arguments = (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
        count = sum(argument.arg not in ("self", "cls") for argument in arguments)
        if count > 7 and name.partition(":")[2] not in FOREIGN_SIGNATURES:
            wide[name] = count
    assert long == {}
    assert wide == {}


def test_names_of_modules_are_nouns_that_differ() -> None:
    for folder in {path.parent for path in FILES}:
        names = sorted({path.stem for path in FILES if path.parent == folder} - {"__init__", "__main__"})
        alike = [(one, other) for one in names for other in names if other in (f"{one}s", f"{one}ing", f"{one}_rules")]
        assert not alike
    assert not {path.stem for path in FILES} & {"utils", "helpers", "common", "misc"}


def test_docstrings_say_what_a_module_is() -> None:
    docs = {str(path): ast.get_docstring(tree) for path, tree in FILES.items() if path.name != "__init__.py"}
    assert [path for path, text in docs.items() if not text] == []
    riddles = [
        path for path, text in docs.items() if re.match(r"(What|How|Where|Whether|Which|Whose|Who)\b", text or "")
    ]
    assert len(riddles) <= 5


def test_packages_import_nothing_by_themselves() -> None:
    texts = {str(path): (ROOT / path).read_text() for path in FILES if path.name == "__init__.py"}
    assert texts.pop("dpo_runner/__init__.py")
    assert {path for path, text in texts.items() if ast.parse(text).body[1:] or "import" in text} == set()


@pytest.mark.parametrize("name", ["RunConf", "apply_chat_template", "load_conf", "run", "__version__"])
def test_the_public_names_stay(name: str) -> None:
    assert getattr(importlib.import_module("dpo_runner"), name) is not None


@pytest.mark.parametrize(
    "command", ["chat", "cache", "compare", "evaluate", "export", "generate", "preview", "workspace"]
)
def test_each_command_answers(command: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", f"dpo_runner.{command}", "--help"], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert result.returncode == 0 and f"python -m dpo_runner.{command}" in result.stdout


def test_each_private_name_of_a_library_is_used_in_one_module() -> None:
    own: set[str] = set()
    for tree in FILES.values():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                own.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                own.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
                own.add(node.attr)
    used: dict[str, set[str]] = {}
    for path, tree in FILES.items():
        for node in ast.walk(tree):
            for name in private_names(node, own):
                used.setdefault(name, set()).add(str(path))
    assert {"_attn_implementation", "_save_checkpoint", "_ChunkedLogProbFunction", "FakeTensorMode"} <= used.keys()
    assert {name: sorted(paths) for name, paths in used.items() if len(paths) > 1} == {}


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_names(node: ast.AST, own: set[str]) -> Iterator[str]:
    """Yield the private names of libraries in a node: read, checked, or imported from a private module."""
    if isinstance(node, ast.Attribute) and node.attr not in own and re.match("_[^_]", node.attr):
        yield node.attr
    elif isinstance(node, ast.ImportFrom):
        yield from (name.name for name in node.names if re.search(r"(^|\.)_[a-z]", f"{node.module}.{name.name}"))
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("check_names", "find_private", "getattr", "hasattr"):
        texts = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
        texts += [keyword.arg for keyword in node.keywords]
        yield from (text for text in texts if isinstance(text, str) and re.match("_[^_]", text))

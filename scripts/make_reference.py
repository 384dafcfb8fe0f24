"""Write docs/reference.md: every configuration key with its type, default and text, from the dataclasses.

python scripts/make_reference.py
"""

import argparse
import ast
import dataclasses
import inspect
import typing
from pathlib import Path
from typing import Any

from dpo_runner.config.schema import SCHEMA
from dpo_runner.config.sections.data import SourceConf
from dpo_runner.config.sections.run import RunFields

PAGE = Path(__file__).parents[1] / "docs" / "reference.md"
INTRODUCTION = """# Configuration reference

Every key, from the dataclasses of `dpo_runner/config/sections/`, written by `scripts/make_reference.py`. The defaults are those of the dataclasses; the files of `conf/` set others, and `--cfg job` shows the result ([configuration.md](configuration.md)). A `*` stands for a name that you choose.
"""  # noqa: E501


def build_page() -> str:
    sections = {key: kind for key, kind in SCHEMA.items() if kind is not None}
    parts = [INTRODUCTION, build_section("", RunFields), *(build_section(key, kind) for key, kind in sections.items())]
    return "\n".join(part for part in parts if part)


def build_section(name: str, kind: type) -> str:
    """Return a section's table; its own sections have theirs."""
    fields = [field for field in dataclasses.fields(kind) if SCHEMA[f"{name}.{field.name}".lstrip(".")] is None]
    if not fields:
        return ""
    texts, hints = read_texts(kind), typing.get_type_hints(kind)
    prefix = f"{name}." if name else ""
    rows = [
        f"| `{prefix}{field.name}` | {describe_type(field, hints[field.name])} | {describe_default(field)} | "
        f"{texts[field.name]} |"
        for field in fields
    ]
    heading = [f"## {name or 'Top level'}", "", _cells(inspect.getdoc(kind) or ""), ""]
    return "\n".join([*heading, "| key | type | default | |", "|---|---|---|---|", *rows, ""])


def read_texts(kind: type) -> dict[str, str]:
    """Return the docstring of each field, its base classes' included."""
    texts: dict[str, str] = {}
    for cls in reversed(kind.__mro__[:-1]):
        [body] = ast.parse(inspect.getsource(cls)).body
        assert isinstance(body, ast.ClassDef)
        for field, text in zip(body.body, body.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                texts[ast.unparse(field.target)] = _cells(str(text.value.value))
    return texts


def describe_type(field: "dataclasses.Field[Any]", hint: Any) -> str:
    if choices := field.metadata.get("choices"):
        listed = ", or a list of them" if "list" in field.metadata.get("type", "") else ""
        return ", ".join(f"`{choice}`" for choice in choices) + listed
    is_plain = isinstance(hint, type) and not typing.get_args(hint)
    told = str(field.metadata.get("type") or (hint.__name__ if is_plain else hint))
    told = told.replace(f"{SourceConf.__module__}.", "")
    return f"`{told.replace('typing.', '').replace(' | ', ' or ').replace('None', 'null')}`"


def describe_default(field: "dataclasses.Field[Any]") -> str:
    made: Any = field.default_factory
    default = field.default if made is dataclasses.MISSING else made()
    if default == "???":
        return "must be set"
    words = {"True": "true", "False": "false", "None": "null"}
    text = str(default) if isinstance(default, str) else words.get(str(default), str(default))
    return f"`{text}`" if text else "empty"


def _cells(text: str) -> str:
    """Return a text on one line, for a cell of a table, without HTML outside its code."""
    parts = " ".join(text.split()).replace("|", "\\|").replace("%%", "%").split("`")
    return "`".join(part if at % 2 else part.replace("<", "&lt;") for at, part in enumerate(parts))


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    PAGE.write_text(build_page(), encoding="utf-8")


if __name__ == "__main__":
    main()

"""MkDocs' hooks for the documentation site: README.md, CONTRIBUTING.md and benchmarks/ are pages of it too.

Links to files that are no pages, such as scripts/wandb_sweep.yaml, become their names.
"""

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md"} | {
    f"benchmarks/{path.name}": f"benchmarks/{path.name}" for path in sorted((ROOT / "benchmarks").glob("*.md"))
}
"""Pages outside docs/, with their places in the site."""


def on_files(files: Files, config: Any) -> Files:
    """Add the pages outside docs/."""
    for source, place in OUTSIDE.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point the links, which are right in the repository, to the pages of the site."""
    sources = {place: source for source, place in OUTSIDE.items()}
    here = PurePosixPath(sources.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    up = "../" * page.file.src_uri.count("/")

    def resolve(link: re.Match[str]) -> str:
        mark, text, target, heading = link.groups()
        path = normpath(here.parent / target) if target else str(here)
        place = OUTSIDE.get(path, path.removeprefix("docs/") if path.startswith("docs/") else None)
        if place is None:
            return f"{mark}{text}"
        return f"{mark}[{text}]({up}{place}{heading or ''})"

    return re.sub(r"(!?)\[([^]]*)\]\((?![a-z]+:)([^)#\s]*)(#[^)]*)?\)", resolve, markdown)

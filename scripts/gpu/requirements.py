"""The project's requirements that are missing."""

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from scripts import ROOT

NOT_USED = ("gguf", "plotly", "matplotlib", "rensa")
"""Dependencies of parts that the check does not run, which are imported only there."""


def find_lacking(pyproject: Path) -> tuple[list[str], list[str]]:
    """Compare the dependencies in a pyproject.toml with what is installed, wherever Python finds it.

    Returns:
        The requirements of which nothing is installed, and a line for each whose version is another.
    """
    texts = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {text: re.split(r"[^\w.-]", text)[0] for text in texts}
    versions = {text: _find_version(name) for text, name in names.items()}
    missing = [text for text, name in names.items() if versions[text] is None and name not in NOT_USED]
    if missing:  # perhaps packaging too, which comes with others
        return missing, []
    from packaging.requirements import Requirement

    others = []
    for text, version in versions.items():
        wanted = Requirement(text)
        if version is not None and not wanted.specifier.contains(version, prereleases=True):
            others.append(f"{wanted.name} {version} is installed, pyproject.toml asks for {wanted.specifier}")
    return [], others


def _find_version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main() -> None:
    """End with one line if requirements are missing, which the check could not be imported without."""
    if missing := find_lacking(ROOT / "pyproject.toml")[0]:
        print(f"error: {sys.executable} lacks {' '.join(missing)}; run make setup", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

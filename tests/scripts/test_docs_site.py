"""The documentation site and its generated page."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_runner.config.schema import SCHEMA
from scripts import ROOT
from scripts.make_reference import PAGE, build_page

NO_NETWORK = """
import socket, sys
def refuse(*args): raise OSError("no network")
socket.socket.connect = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli(["build", "--strict", "--quiet", "--config-file", "mkdocs.yml", "--site-dir", sys.argv[1]])
"""


def test_the_reference_is_the_dataclasses_and_has_every_key() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == build_page(), "run python scripts/make_reference.py"
    rows = re.findall(r"^\| `([^`]+)` \| (`?[^|]+) \| ([^|]+) \| (.+) \|$", page, flags=re.MULTILINE)
    assert {key for key, *_ in rows} == {key for key, kind in SCHEMA.items() if kind is None and not key.endswith(".*")}
    told = {key: rest for key, *rest in rows}
    assert told["training.beta"][:2] == ["`float`", "`0.1`"] and told["model.model_name_or_path"][1] == "must be set"
    assert told["quant.bnb_4bit_quant_type"][:2] == ["`nf4`, `fp4`", "`nf4`"]


def test_the_site_is_built_without_a_network_and_loads_nothing_from_one(tmp_path: Path) -> None:
    """Strictly: each page is in the navigation, and each link leads to a page and a heading."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-c", NO_NETWORK, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    assert {"index.html", "reference.html", "migration.html", "benchmarks/training.html"} <= pages.keys()
    for name, text in pages.items():
        loaded = re.findall(r"<(?:script|img|link|iframe)\b[^>]*(?:src|href)=\"?([^\"\s>]+)", text)
        assert not [address for address in loaded if re.match(r"(https?:)?//", address)], name
    pictures = {path.name: path.stat().st_size for path in (ROOT / "docs" / "images").iterdir()}
    assert pictures.keys() == {"preview.png", "compare.png", "leet.png", "frontier.png"}
    assert sum(pictures.values()) < 600_000
    for page, picture in (("preview", "preview"), ("compare", "compare"), ("wandb", "leet")):
        assert f'src="images/{picture}.png"' in pages[f"{page}.html"]
    assert 'href="models.html#the-reference"' in pages["tasks.html"]
    assert 'href="runs.html"' in pages["index.html"] and 'href="../data.html"' in pages["benchmarks/data.html"]

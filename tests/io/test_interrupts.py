"""Ctrl-C during imports: one line, exit code 130, no traceback."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import os, signal, sys

class Sender:
    def find_spec(self, name, path=None, target=None):
        if name == os.environ["INTERRUPTED_AT"]:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Sender())
"""


def heed() -> None:
    """Reset SIGINT to the default: a shell ignores it in background jobs, such as these tests."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("dpo_runner.sweep.command_line", ["dpo_runner", "--help"]),
        ("hydra", ["dpo_runner", "--cfg", "job"]),
        ("torch", ["dpo_runner", "model=tiny_random", "dry_run=true"]),
        ("rich.console", ["dpo_runner.compare", "."]),
    ],
)
def test_ctrl_c_during_an_import_is_one_line(module: str, arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(PROGRAM)
    places = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    environment = {**os.environ, "INTERRUPTED_AT": module, "PYTHONPATH": places}
    command = [sys.executable, "-m", *arguments]
    result = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False, preexec_fn=heed
    )
    assert (result.returncode, result.stderr, result.stdout) == (130, "error: interrupted\n", "")


def test_a_program_that_imports_this_one_keeps_its_own_ways() -> None:
    code = "import signal, sys, dpo_runner\n"
    code += "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    subprocess.run([sys.executable, "-c", code], check=True, preexec_fn=heed)

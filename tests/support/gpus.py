"""A stand-in for nvidia-smi."""

from pathlib import Path

import pytest

LISTING = """\
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-aaaa-1)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-bbbb-2)
"""


def put_program(folder: Path, name: str, output: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program that lists GPUs in front on the PATH."""
    (folder / "answer").write_text(output)
    (folder / name).write_text(f'#!/bin/sh\n[ "$1" = --list-gpus ] && cat {folder / "answer"}\n')
    (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")

"""Libraries are imported quietly, and without torch's compiler, which only functions that are called need."""

import subprocess
import sys

import pytest
import torch

from dpo_runner.imports import quiet_imports


def test_a_run_imports_no_compiler() -> None:
    code = "import sys, dpo_runner.run, bitsandbytes; print('torch._inductor.compile_fx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False" and not done.stderr


def test_what_is_decorated_while_importing_is_compiled_when_it_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_now(function, **settings):
        compiled.append((function.__name__, settings))
        return lambda *args: function(*args) + 1

    monkeypatch.setattr(torch, "compile", compile_now)
    with quiet_imports():

        @torch.compile
        def plain(x: int) -> int:
            return x

        @torch.compile(dynamic=False)
        def static(x: int) -> int:
            return 2 * x

    assert torch.compile is compile_now and not compiled
    assert (plain(1), plain(2), static(3), static.__name__) == (2, 3, 7, "static")
    assert compiled == [("plain", {}), ("static", {"dynamic": False})]
    with pytest.raises(ImportError), quiet_imports():
        raise ImportError
    assert torch.compile is compile_now

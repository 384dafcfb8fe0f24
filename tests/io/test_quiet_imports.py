"""Quiet imports of libraries, without torch's compiler until a compiled function is called."""

import gc
import subprocess
import sys

import pytest
import torch

from dpo_runner.io.logs import quiet_imports


def test_a_run_imports_no_compiler() -> None:
    code = "import sys, dpo_runner.train, bitsandbytes; print('torch._inductor.compile_fx' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False" and not done.stderr


def test_a_result_is_loaded_without_the_library_that_draws_its_card() -> None:
    code = "import sys, dpo_runner.model.result, dpo_runner.model.card.card; print('matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


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


def test_nothing_is_collected_while_importing_and_the_collector_is_left_as_it_was() -> None:
    assert gc.isenabled()
    with pytest.raises(ImportError), quiet_imports():
        with quiet_imports():
            assert not gc.isenabled()
        assert not gc.isenabled(), "an import within another one has switched it on"
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with quiet_imports():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_no_collection_goes_through_what_was_imported(tiny_run: list[str]) -> None:
    """Neither during a run nor at process exit, where it would take over a second."""
    code = """
import atexit, gc, importlib, sys
from dpo_runner.__main__ import main
run = importlib.import_module("dpo_runner.train")
def stand_in(*args):
    print(gc.get_freeze_count(), len(gc.get_objects()))
    run.kept = [[] for _ in range(200_000)]
run.run = stand_in
atexit.register(lambda: print(gc.get_freeze_count(), len(gc.get_objects())))
main()
"""
    done = subprocess.run([sys.executable, "-c", code, *tiny_run], capture_output=True, text=True, check=True)
    running, ending = ([int(number) for number in line.split()] for line in done.stdout.splitlines())
    assert running[0] > 100_000 > running[1]
    assert ending[0] > 300_000 and ending[1] < 100_000, "what a run has left"

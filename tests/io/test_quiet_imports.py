"""Quiet imports of libraries, without torch's compiler until a compiled function is called."""

import gc
import os
import subprocess
import sys

import pytest
import torch

from dpo_runner.io.logs import quiet_imports


def test_a_run_imports_no_compiler_and_no_matplotlib_and_torch_has_our_setting() -> None:
    code = "import sys, dpo_runner.train, bitsandbytes; print('torch._inductor.compile_fx' in sys.modules)\n"
    code += "import dpo_runner.model.result, dpo_runner.model.card.card; print('matplotlib' in sys.modules)\n"
    code += "import torch; print(torch._C._accelerator_getAllocatorSettings())"
    others = {key: value for key, value in os.environ.items() if not key.endswith("_ALLOC_CONF")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=others)
    setting = "expandable_segments:True" if "microsoft" not in os.uname().release else ""
    assert done.stdout.split("\n")[:3] == ["False", "False", setting] and not done.stderr


@pytest.mark.parametrize(
    ("given", "busy", "spins"),
    [
        ({}, 1, "1000"),
        ({}, 0, "None"),
        ({"OMP_NUM_THREADS": "1"}, 1, "None"),
        ({"GOMP_SPINCOUNT": "7"}, 1, "7"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, 1, "None"),
    ],
)
def test_waiting_threads_soon_sleep_beside_a_busy_process(given: dict[str, str], busy: int, spins: str) -> None:
    """The number of running processes is given: others may run beside the test."""
    code = (
        "import os, pathlib, sys; pathlib.Path.read_text = lambda path: f'0 0 0 {1 + BUSY}/99 7';"
        "os.sched_getaffinity = lambda pid: {0, 1};"
        "import dpo_runner; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    ).replace("BUSY", str(busy))
    ours = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    others = {key: value for key, value in os.environ.items() if key not in ours}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=others | given)
    assert done.stdout.split() == [spins, "False"]


def test_a_busy_process_is_noticed() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        code = (
            "import os; os.sched_getaffinity = lambda pid: {0}; import dpo_runner; print(os.environ['GOMP_SPINCOUNT'])"
        )
        env = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        other.kill()
    assert done.stdout.split() == ["1000"]


@pytest.mark.parametrize(
    ("given", "kernel", "setting"),
    [
        ({}, "6.1.0-18-amd64", "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "backend:native"}, "6.1.0-18-amd64", "backend:native"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "backend:native"}, "6.1.0-18-amd64", "None"),
        ({}, "6.6.87.2-microsoft-standard-WSL2", "None"),
        ({}, "4.4.0-19041-Microsoft", "None"),
    ],
)
def test_segments_of_gpu_memory_grow_unless_the_user_or_the_system_is_against_it(
    given: dict[str, str], kernel: str, setting: str
) -> None:
    code = f"import os, platform; platform.release = lambda: {kernel!r}; import dpo_runner\n"
    code += "print(os.environ.get('PYTORCH_ALLOC_CONF'))"
    others = {key: value for key, value in os.environ.items() if not key.endswith("_ALLOC_CONF")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=others | given)
    assert done.stdout.strip() == setting


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

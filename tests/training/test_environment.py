"""Peak memory and machine facts recorded by a run."""

import mmap
from pathlib import Path

import pytest
import torch

from dpo_runner.training.environment import measure_peak_memory, reset_peak_memory


def hold(megabytes: int) -> None:
    """Hold memory for a moment with mmap, since the allocator may keep freed memory."""
    with mmap.mmap(-1, megabytes * 1_000_000) as memory:
        for at in range(0, len(memory), mmap.PAGESIZE):
            memory[at] = 1


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets a process's peak")
def test_the_peak_of_memory_is_the_runs_own_and_not_an_earlier_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # and training.use_cpu=true
    cpu = torch.device("cpu")
    reset_peak_memory(cpu)
    idle = measure_peak_memory(cpu)
    hold(600)
    first = measure_peak_memory(cpu)
    reset_peak_memory(cpu)
    hold(200)
    second = measure_peak_memory(cpu)
    assert first - idle == pytest.approx(0.6, abs=0.15)
    assert second - idle == pytest.approx(0.2, abs=0.15)

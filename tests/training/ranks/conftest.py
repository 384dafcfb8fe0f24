"""Processes of runs start fast."""

import subprocess
from collections.abc import Iterator

import pytest

from tests.support.programs import QuickRanks


@pytest.fixture(scope="module", autouse=True)
def quick_ranks() -> Iterator[None]:
    """Save the imports of the processes; the runs of torchrun and of a parent that is killed start in full."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", QuickRanks)
        yield

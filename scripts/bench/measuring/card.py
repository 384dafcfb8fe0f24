"""GPU name, driver and memory in use, from nvidia-smi."""

import subprocess
import threading
from types import TracebackType


def read_card() -> str | None:
    """Return the first GPU's name, its memory and the driver's version; None without a GPU."""
    try:
        return _ask("name,memory.total,driver_version")
    except (OSError, subprocess.CalledProcessError):
        return None


class CardMemory:
    """Sampler of the memory in use on the first GPU during a `with` block.

    Attributes:
        peak_gb: peak memory in use, less the memory in use at the start, in GB (1e9 bytes).
    """

    def __init__(self) -> None:
        self.peak_gb = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "CardMemory":
        self._start = _used()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.2):
            self.peak_gb = max(self.peak_gb, (_used() - self._start) / 1e9)


def _used() -> int:
    return int(_ask("memory.used").split()[0]) * 2**20


def _ask(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

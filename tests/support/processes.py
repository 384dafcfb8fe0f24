"""The code of a process that claims the run directory r and stays running."""

HOLD = """
import sys, time
from pathlib import Path
from dpo_runner.records.directory import RunDirectory
directory = RunDirectory(Path("r"))
with directory.claim():
    directory.write_status("running")
    directory.note_step(7)
    directory.note()
    print("held", flush=True)
    time.sleep(300)
"""

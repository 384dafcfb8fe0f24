"""The libraries' messages in run.log: each once, with its number at the end, and none on the terminal."""

import logging
from pathlib import Path

from dpo_runner.io.logs import route_library_logs


def test_a_repeated_message_of_a_library_is_logged_once_and_counted(capfd, tmp_path: Path) -> None:
    library, ours = logging.getLogger("bitsandbytes.autograd._functions"), logging.getLogger("dpo_runner.x")
    log = tmp_path / "run.log"
    with route_library_logs(log):
        for step in range(300):
            library.warning("inputs will be cast from %s to float16", "bfloat16")
            logging.getLogger("py.warnings").warning("x.py:1: UserWarning: old")  # as captureWarnings does
            if step % 100 == 0:
                library.warning("step %d", step)
                ours.info("what we say ourselves")
        library.error("inputs will be cast from bfloat16 to float16")
        for name in "ab":
            try:
                raise ValueError(name)
            except ValueError:
                library.exception("failed")
    text = log.read_text()
    cast = "WARNING bitsandbytes.autograd._functions: inputs will be cast from bfloat16 to float16"
    assert text.count(cast) == text.count(cast.replace("WARNING", "ERROR")) == 1
    told = text[text.index("ValueError: b") :]
    assert cast.replace(": ", ": logged 300 times in all: ") in told and told.count("logged") == 2
    assert text.count("UserWarning: old") == 2
    assert [text.count(f": step {step}\n") for step in (0, 100, 200)] == [1, 1, 1]
    assert text.count("what we say ourselves") == 3 and "ValueError: a" in text and "ValueError: b" in text
    assert capfd.readouterr() == ("", "")

"""Terminal failures: a run's result and exit code stay the same, and commands end quietly."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import RunError
from dpo_runner.io import console as module
from dpo_runner.io.console import RunConsole, count_progress
from dpo_runner.io.exits import report
from dpo_runner.io.streams import Guarded, put
from dpo_runner.records.reading import read_status
from tests.support.programs import start_python


class Gone(io.StringIO):
    """A stream whose reader has closed the pipe."""

    writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        raise BrokenPipeError(32, "Broken pipe")


def closed_pipe() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("lost", ["reader", "disk"])
def test_a_run_goes_on_where_nothing_can_be_printed(lost: str, tiny_run: list[str]) -> None:
    stdout = subprocess.PIPE if lost == "reader" else os.open("/dev/full", os.O_WRONLY)
    with start_python("-m", "dpo_runner", *tiny_run, "run_dir=r", stdout=stdout, stderr=subprocess.PIPE) as process:
        if process.stdout is not None:
            while not process.stdout.readline().startswith("step 1/"):
                pass
            process.stdout.close()
        assert process.stderr is not None and process.stderr.read() == ""
    if stdout != subprocess.PIPE:
        os.close(stdout)
    status = read_status(Path("r"))
    assert process.returncode == 0 and status is not None and status["state"] == "finished"
    log = Path("r/run.log").read_text()
    assert log.count("nothing more is printed") + log.count("nothing is printed") == 1


def test_nothing_more_is_tried_where_a_reader_has_gone_away_and_the_bar_goes_with_it() -> None:
    stream = Gone()
    console = RunConsole(Console(file=Guarded(stream), force_terminal=True))
    console.start_training(0, 3, 2, with_bar=True)
    console.show_step(1, {"loss": 0.5})
    console.stop_training()
    console.say("more")
    assert stream.writes == 1


@pytest.mark.parametrize(("width", "is_terminal"), [(60, True), (80, True), (200, True), (80, False)])
def test_progress_stays_in_place_in_a_terminal_and_is_a_line_per_step_elsewhere(width: int, is_terminal: bool) -> None:
    text = io.StringIO()
    console = RunConsole(Console(file=text, force_terminal=is_terminal, width=width, soft_wrap=True))
    console.start_training(0, 4, 2, with_bar=True)
    for step in range(1, 5):
        accuracy = "tie" if step == 1 else 0.25
        console.show_step(step, {"loss": 0.6, "rewards/accuracies": accuracy, "rewards/margins": -1e-7})
    console.stop_training()
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text.getvalue())
    assert all(len(line) <= width for line in re.split(r"\r|\n", plain)) and "…" not in plain
    *_, last = plain.strip().split("\r")  # of a terminal 60 columns wide the last two lines
    if not is_terminal:
        assert last.count("\n") == 3
        last = last.split("\n")[-1]
    assert "4/4" in last and "0:00" in last
    assert re.search(r"loss 0\.600  accuracy 0\.25\s+margin 0\.00", last)


def test_what_an_encoding_lacks_is_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="ascii"))
    summary = {"before": {"eval_loss": "tie"}, "after": {"eval_loss": 0.5}, **SPEED}
    RunConsole().show_summary(summary, {"eval_loss": "loss"})
    answer = {"text": "Grüße", "tokens": 3, "complete": True}
    RunConsole().show_samples([{"prompt": [{"role": "user", "content": "Wie?"}], "before": answer, "after": answer}])
    put("überall")
    assert b"Gr\\xfc\\xdfe" in written.getvalue() and written.getvalue().endswith(b"\\xfcberall\n")


def test_words_longer_than_their_column_are_folded(capsys: pytest.CaptureFixture[str]) -> None:
    path, sentence = "/" + "folder/" * 30, "睡眠是健康的基础" * 20
    answer = {"text": sentence, "tokens": 99, "complete": True}
    RunConsole().show_plan({"output": path})
    RunConsole().show_samples([{"prompt": [{"role": "user", "content": "Why?"}], "before": answer, "after": answer}])
    shown = capsys.readouterr().out
    assert path in re.sub(r"\s", "", shown) and shown.count("础") == 40


SPEED = {"steps": 1, "train_runtime": 1.0, "pairs_per_second": 1.0, "peak_memory_gb": 1.0}


def test_an_error_that_nobody_can_read_has_its_exit_code_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for stream in (Gone(), None):
        monkeypatch.setattr(sys, "stderr", stream)
        assert report(RunError("lost")) == 1


def test_commands_end_quietly_where_their_reader_has_gone_away(tiny_run: list[str]) -> None:
    run(load_conf([*tiny_run, "run_dir=r", "samples.num_prompts=0"]))
    preview = [override for override in tiny_run if not override.startswith("samples")]
    for command in (
        ["dpo_runner", "--help"],
        ["dpo_runner", "--cfg", "job"],
        ["dpo_runner", "run_dir=r", *tiny_run, "samples.num_prompts=0"],
        ["dpo_runner.compare", "."],
        ["dpo_runner.compare", ".", "--best"],
        ["dpo_runner.compare", ".", "--csv", "-"],
        ["dpo_runner.cache", "checkpoints", "."],
        ["dpo_runner.preview", *preview],
        ["dpo_runner.chat", "r", "--prompt", "Hello", "--max-new-tokens", "2"],
        ["dpo_runner.chat", "r"],
    ):
        lost = closed_pipe()
        streams = {"stdin": subprocess.PIPE, "stdout": lost, "stderr": subprocess.PIPE}
        with start_python("-m", *command, **streams) as process:
            os.close(lost)
            _, told = process.communicate("/quit\n", timeout=200)
        assert (process.returncode, told) == (0, ""), command


def test_the_last_lines_can_be_typed_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    RunConsole().show_next_steps(Path("run two"), Path("run two/adapter"), {"upload": "wandb sync 'run two/wandb'"})
    *_, results, weights, chat, compare, evaluate, export, upload = capsys.readouterr().out.splitlines()
    assert (results, weights) == ("results     run two", "weights     run two/adapter")
    assert chat == "talk to it  python -m dpo_runner.chat 'run two'"
    assert compare == "compare     python -m dpo_runner.chat 'run two' --compare"
    assert evaluate == "evaluate    python -m dpo_runner.evaluate 'run two'"
    assert export == "export      python -m dpo_runner.export 'run two' --out DIR"
    assert upload == "upload      wandb sync 'run two/wandb'"


def test_progress_without_a_terminal_tells_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    told = io.StringIO()
    with count_progress(Console(file=told), "answers", 100) as count:
        count(40)  # by an earlier program
        for _ in range(4):
            now[0] += 8
            count(5)
    assert told.getvalue().splitlines() == ["answers: 50 of 100, 1:20 left", "answers: 60 of 100, 1:04 left"]

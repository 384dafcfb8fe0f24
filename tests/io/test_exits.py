"""Command exits: actionable error lines and reliable exit codes."""

import subprocess
import sys
from importlib import import_module
from unittest.mock import Mock

import pytest

from dpo_runner.errors import ConfigError, DpoRunnerError, RunError, RunInterrupted, SweepFailed, describe_failure
from dpo_runner.io.exits import honest_exit, report


@pytest.mark.parametrize(
    ("error", "code", "lines"),
    [
        (ConfigError(["`a=1`: no", "`b=2`: no"]), 2, ["error: `a=1`: no", "error: `b=2`: no"]),
        (RunError("two\nlines\n"), 1, ["error: two␊lines"]),
        (SweepFailed("2 failed", ["  a  r=1", "      b\nc"]), 1, ["error: 2 failed", "  a  r=1", "      b␊c"]),
        (RunInterrupted("stopped", 15), 143, ["error: stopped"]),
        (ConfigError("\x1b]0;x\x07\x9b2J\u202e.jsonl"), 2, ["error: ␛]0;x␇\\x9b2J\\u202e.jsonl"]),
    ],
)
def test_an_error_ends_in_its_lines_and_its_code(error: DpoRunnerError, code: int, lines: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught, honest_exit("not said"):
        raise error
    assert caught.value.code == code
    output = capsys.readouterr()
    assert (output.out, output.err.splitlines()) == ("", lines)
    assert report(error) == code and capsys.readouterr().err == output.err


def test_what_ends_well_or_is_no_mistake_of_a_person_is_left_alone(capsys) -> None:
    with honest_exit("not said"):
        pass
    with pytest.raises(ZeroDivisionError), honest_exit("not said"):
        raise ZeroDivisionError
    with pytest.raises(SystemExit, match="3"), honest_exit("not said"):
        sys.exit(3)
    assert capsys.readouterr().err == ""


def test_a_librarys_error_is_told_in_one_line() -> None:
    error = RuntimeError("\nCUDA error: an illegal memory access\nCUDA kernel errors might\nFor debugging consider\n")
    assert describe_failure(error) == "RuntimeError: CUDA error: an illegal memory access"
    assert describe_failure(ValueError()) == "ValueError"
    assert describe_failure(OSError(28, "No space left", "f")).endswith("goes on (No space left (f))")


def test_a_reader_who_has_enough_of_what_a_library_prints_is_no_error() -> None:
    code = "from dpo_runner.io.exits import honest_exit\nwith honest_exit('x'):\n    "
    for body, ends_well in (("print('x' * 100_000)", True), ("raise BrokenPipeError", False)):
        command = [sys.executable, "-c", code + body]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            if ends_well:
                process.stdout.close()
            assert (process.stderr.read() == b"") == ends_well
        assert (process.returncode == 0) == ends_well


@pytest.mark.parametrize("terminal", [False, True])
def test_ctrl_c_ends_with_130_and_the_commands_own_words(terminal: bool, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    with pytest.raises(SystemExit) as caught, honest_exit("interrupted; it goes on"):
        raise KeyboardInterrupt
    assert caught.value.code == 130
    assert capsys.readouterr().err == "\n" * terminal + "error: interrupted; it goes on\n"


@pytest.mark.parametrize(
    ("command", "work", "words"),
    [
        ("chat", "_talk", "interrupted"),
        ("preview.__main__", "_preview", "interrupted"),
        ("export.__main__", "_export", "interrupted; nothing was left half written"),
        ("evaluate.__main__", "evaluate", "interrupted; the same command goes on from there"),
    ],
)
def test_every_command_ends_so(command: str, work: str, words: str, capsys, monkeypatch) -> None:
    module = import_module(f"dpo_runner.{command}")
    arguments = ["r", "--out", "x"] if work == "_export" else ["r"]
    for stopped, code, said in (
        (KeyboardInterrupt(), 130, words),
        (ConfigError(["one\x1b", "two"]), 2, "one␛\nerror: two"),
        (RunError("three"), 1, "three"),
    ):
        monkeypatch.setattr(module, work, Mock(side_effect=stopped))
        with pytest.raises(SystemExit) as caught:
            module.main(arguments)
        assert (caught.value.code, capsys.readouterr().err) == (code, f"error: {said}\n")


def test_a_command_that_ends_well_pays_nothing_for_it() -> None:
    code = "import sys, dpo_runner.io.exits; assert not {'rich', 'torch', 'omegaconf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

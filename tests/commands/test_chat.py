"""Chat with a finished run: single prompts, comparisons, conversations."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dpo_runner import run
from dpo_runner.chat import Chat, main
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.policy import load_policy
from dpo_runner.model.result import untuned
from tests.support.common import run_main
from tests.support.programs import run_python


@pytest.fixture
def run_dir(tiny_run: list[str], tmp_path: Path) -> Path:
    run(load_conf([*tiny_run, "run_dir=r", "training.learning_rate=1e-2", "training.warmup_steps=0"]))
    return tmp_path / "r"


def test_an_answer_streams_and_the_conversation_is_remembered(run_dir: Path) -> None:
    chat = Chat(run_dir, max_new_tokens=6, system="Be brief.")
    pieces: list[str] = []
    answer = chat.ask("Hello.", pieces.append)
    assert answer and "".join(pieces).strip() == answer
    assert [message["role"] for message in chat.messages] == ["system", "user", "assistant"]
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]

    config = (run_dir / "config.yaml").read_text()  # as of a run trained with a system prompt
    (run_dir / "config.yaml").write_text(config.replace("system_prompt: null", "system_prompt: Be kind."))
    assert Chat(run_dir, max_new_tokens=6).messages == [{"role": "system", "content": "Be kind."}]
    assert Chat(run_dir, max_new_tokens=6, system="Be brief.").messages[0]["content"] == "Be brief."


def test_compare_answers_with_and_without_the_adapter(run_dir: Path) -> None:
    chat = Chat(run_dir, max_new_tokens=6)
    before, after = chat.compare("Hello.")
    assert before != after
    assert chat.ask("Hello.", lambda piece: None) == after


@pytest.mark.parametrize("mode", ["continue", "stack"])
def test_untuned_is_the_sft_model_where_the_run_began_with_one(mode, tiny_run, sft_adapter, tmp_path) -> None:
    start = [f"model.adapter={sft_adapter}", f"model.adapter_mode={mode}"]
    overrides = [*tiny_run, *start, "training.learning_rate=1e-2"]
    run(load_conf([*overrides, "run_dir=r"]))
    chat = Chat(tmp_path / "r", max_new_tokens=4)
    ids = torch.tensor([[1, 2, 3, 4]])
    with torch.no_grad():
        expected = load_policy(Blueprint.of_run(load_conf(overrides))).model.eval()(ids).logits
        tuned = chat.model(ids).logits
        with untuned(chat.model):
            reference = chat.model(ids).logits
        assert torch.equal(chat.model(ids).logits, tuned)
    assert torch.allclose(reference, expected, atol=1e-5)
    assert not torch.allclose(tuned, expected, atol=1e-3)


def test_full_fine_tuning_can_be_talked_to_but_not_compared(tiny_run, tmp_path) -> None:
    run(load_conf([*tiny_run, "lora=none", "run_dir=r"]))
    chat = Chat(tmp_path / "r", max_new_tokens=4)
    assert chat.ask("Hello.", lambda piece: None)
    with pytest.raises(ConfigError, match="tuned all weights"):
        chat.compare("Hello.")


def test_a_gpu_that_is_full_is_one_line(run_dir: Path, monkeypatch, capsys) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB.")

    for name in ("transformers.generation.GenerationMixin.generate", "dpo_runner.model.result.load_tuned_model"):
        monkeypatch.setattr(name, fail)
        assert run_main(main, str(run_dir), "--prompt", "Hello.") == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: out of memory in ") and "CUDA_VISIBLE_DEVICES= in the environment" in line


def test_an_unfinished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(tmp_path)])
    assert caught.value.code == 2
    assert "holds no run" in capsys.readouterr().err
    (tmp_path / "status.json").write_text(json.dumps({"state": "failed"}))
    with pytest.raises(SystemExit):
        main([str(tmp_path)])
    assert "the run is failed, not finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "value", "rule"),
    [
        ("--max-new-tokens", "0", "at least 1"),
        ("--temperature", "-1.0", "from 0 on"),
        ("--temperature", "nan", "from 0"),
    ],
)
def test_a_wrong_number_is_refused(flag: str, value: str, rule: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main, "r", flag, value) == 2
    assert f"{flag} {value}: must be" in (told := capsys.readouterr().err) and rule in told


@pytest.mark.parametrize("arguments", [[], ["--compare"]], ids=["streamed", "compared"])
def test_no_answer_commands_the_terminal(arguments, run_dir, monkeypatch, capsys) -> None:
    """Both streamed and side by side; newlines and tabs stay."""
    said = "one\n\ttwo \x1b]0;owned\x07 \x9b31m \u202e"

    def answer(self: Chat, messages: object, show: Callable[[str], None]) -> str:
        for piece in (said[:10], said[10:12], said[12:]):
            show(piece)
        return said

    monkeypatch.setattr(Chat, "_answer", answer)
    monkeypatch.setenv("COLUMNS", "200")
    main([str(run_dir), "--prompt", "Hello.", *arguments])
    shown = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(shown)
    assert "␛]0;owned␇ \\x9b31m \\u202e" in shown and "two" in shown
    if not arguments:
        assert shown == "one\n\ttwo ␛]0;owned␇ \\x9b31m \\u202e\n"


def test_the_program_talks_in_the_terminal(run_dir: Path) -> None:
    def talk(*arguments: str, typed: str = "") -> str:
        command = ["-m", "dpo_runner.chat", str(run_dir), "--max-new-tokens", "4", *arguments]
        result = run_python(*command, typed=typed, env={**os.environ, "COLUMNS": "100"})
        assert result.returncode == 0, result.stderr
        assert "Traceback" not in result.stderr
        return result.stdout

    compared = talk("--prompt", "Hello.", "--compare")
    assert "untuned" in compared and "tuned" in compared
    conversation = talk(typed="Hello.\n/reset\n/nonsense\n")  # then the input ends
    assert "forgotten" in conversation and "no such command" in conversation

"""Missing or damaged files of a run directory: one line, not a traceback."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from dpo_runner import run
from dpo_runner.chat import main as chat
from dpo_runner.compare.__main__ import main as compare
from dpo_runner.config.compose import load_conf
from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import ConfigError
from dpo_runner.evaluate.__main__ import main as evaluate
from dpo_runner.export.__main__ import main as export
from dpo_runner.records.checkpoints import write_sealed
from dpo_runner.records.directory import RunDirectory, update_status
from dpo_runner.records.reading import read_mapping, read_metrics, read_object, read_run_conf, read_status, read_summary
from dpo_runner.records.resume import check_continuable
from tests.support.common import run_main
from tests.support.run_folders import write_run


@pytest.fixture
def stopped() -> RunConf:
    """The configuration of a run stopped after a checkpoint."""
    write_run(Path("r"), state="interrupted")
    conf = load_conf(["run_dir=r"])
    RunDirectory(Path("r")).write_config(conf, [])
    Path("r/environment.json").write_text("{}")
    write_sealed(Path("r/checkpoints/checkpoint-2"), lambda folder: (folder / "trainer_state.json").write_text("{}"))
    check_continuable(Path("r"), {"state": "interrupted"}, conf)
    return conf


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"state": 1}', "\udcff"], ids=repr)
def test_every_command_says_that_the_status_is_damaged(
    content: str, stopped: RunConf, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("r/status.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigError, match=r'^r/status\.json: cannot be used: .*; write {"state": "interrupted"} into'):
        run(stopped)
    for main, arguments in ((chat, ["r"]), (evaluate, ["r"]), (export, ["r", "--out", "out"])):
        assert run_main(main, *arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: r/status.json: cannot be used: ")
    assert run_main(compare, "r") == 0
    update = '{"state": "interrupted"}'  # the remedy in the error
    Path("r/status.json").write_text(update)
    check_continuable(Path("r"), read_status(Path("r")) or {}, stopped)


@pytest.mark.parametrize("name", ["config.yaml", "environment.json"])
@pytest.mark.parametrize("content", [None, "[", "just text"])
def test_what_a_continuation_is_compared_with_is_read_before_anything_is_loaded(
    name: str, content: str | None, stopped: RunConf
) -> None:
    path = Path("r") / name
    path.unlink() if content is None else path.write_text(content)
    says = "is missing" if content is None else r"cannot be used: .*"
    with pytest.raises(ConfigError, match=rf"^r/{name}(:1)?: {says}; the run cannot be continued without it"):
        run(stopped)


def test_a_damaged_configuration_is_a_line_for_those_who_load_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("r"), state="finished")
    for damage in (None, "model: [", "no: such\n", "seed: many\n", "text"):
        Path("r/config.yaml").unlink() if damage is None else Path("r/config.yaml").write_text(damage)
        with pytest.raises(ConfigError, match=r"^r/config\.yaml(:\d)?: .*; put it back as the run wrote it"):
            read_run_conf(Path("r"))
        for main in (chat, evaluate):
            assert run_main(main, "r") == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("error: r/config.yaml")


def test_a_finished_run_without_its_summary_says_how_to_have_it_made_again(stopped: RunConf) -> None:
    update_status(Path("r"), state="finished")
    for damage in ('{"after": ', None):
        file = Path("r/summary.json")
        file.unlink() if damage is None else file.write_text(damage)
        with pytest.raises(ConfigError, match=r'^r/summary\.json: .*; put it back, or write {"state": "interrupted"}'):
            run(stopped)
        with pytest.raises(ConfigError, match=r"^r/summary\.json"):
            read_summary(Path("r"))


@pytest.mark.parametrize("line", ["garbage", "[1]", '{"loss": 1.0}', "\0\0", '{"step": "two"}'], ids=repr)
def test_a_line_that_is_no_log_event_is_named(line: str, stopped: RunConf) -> None:
    Path("r/metrics.jsonl").write_text('{"step": 1}\n' + line + '\n{"step": 2}\n{"step": 3, "torn')
    with pytest.raises(ConfigError, match=r"^r/metrics\.jsonl:2: cannot be used: .*delete this line, whose figures"):
        run(stopped)
    Path("r/metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "torn')
    assert read_metrics(Path("r")) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("read", [read_object, read_mapping])
def test_what_is_whole_is_returned(read: Callable[[Path], dict], tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps({"key": [1]}))
    assert read(tmp_path / "file") == {"key": [1]}
    (tmp_path / "file").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"file.*cannot be used"):
        read(tmp_path / "file")

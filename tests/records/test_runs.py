"""Tolerant reading of run directories: unreadable parts are reported, one line each."""

import json
import os
from pathlib import Path

import pytest

from dpo_runner.errors import ConfigError
from dpo_runner.records.runs import RunRecord, flatten, read_runs
from tests.support.run_folders import write_run


def read_one(path: Path) -> RunRecord:
    runs, _ = read_runs([path])
    assert len(runs) == 1
    return runs[0]


def test_runs_are_found_at_any_depth_once_and_in_natural_order(tmp_path: Path) -> None:
    for name in ("10-a", "9-b", "deep/er/0-c"):
        write_run(tmp_path / "sweep" / name)
    (tmp_path / "sweep" / "9-b" / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    (tmp_path / "sweep" / "9-b" / "checkpoints" / "checkpoint-5" / "trainer_state.json").write_text("{}")
    (tmp_path / "sweep" / ".hidden").mkdir()
    (tmp_path / "sweep" / ".hidden" / "status.json").write_text("{}")
    runs, notes = read_runs([tmp_path / "sweep", tmp_path / "sweep" / "9-b", Path("sweep")])
    assert [run.name for run in runs] == ["9-b", "10-a", "deep/er/0-c"]
    assert notes == []


def test_a_sweep_with_a_status_of_its_own_is_looked_into(tmp_path: Path) -> None:
    write_run(tmp_path / "sweep" / "0-a")
    write_run(tmp_path / "sweep" / "1-b")
    (tmp_path / "sweep" / "status.json").write_text('{"state": "running"}')
    assert [run.name for run in read_runs([tmp_path])[0]] == ["0-a", "1-b"]


def test_a_run_that_has_only_been_announced_is_one(tmp_path: Path) -> None:
    folder = tmp_path / "3-c"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "status.json").write_text('{"state": "pending"}')
    run = read_one(tmp_path)
    assert (run.state, run.metrics, run.notes) == ("pending", {}, [])


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="gone: no such folder"):
        read_runs([tmp_path / "gone"])


def test_a_finished_run_tells_its_results_and_how_far_it_moved(tmp_path: Path) -> None:
    run = read_one(write_run(tmp_path / "r", training__beta=0.2, margin=1.5, chosen=-0.4, accuracy=0.75))
    assert run.state == "finished" and run.notes == []
    assert run.config["training.beta"] == 0.2 and run.config["quant"] is None
    assert run.metrics["eval_rewards/accuracies"] == 0.75 and run.metrics["response_tokens"] == 40
    assert run.metrics["chosen_shift"] == pytest.approx(-2.0) and run.metrics["drift"] == pytest.approx(2.0)
    assert run.metrics["rejected_shift"] == pytest.approx((-0.4 - 1.5) / 0.2)
    assert run.curves["eval_loss"][0] == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert run.curves["eval_rewards/accuracies"][0] == [5, 10, 15, 20, 25, 30, 35, 40]  # step 0 is a tie
    assert run.curves["rewards/accuracies"][0][:2] == [2, 3]
    assert not {"time", "epoch", "step"} & set(run.curves)
    assert run.samples[0] == {"prompt": "Question 0?", "before": "Long answer 0.", "after": "Answer of r."}


def test_without_beta_the_shift_is_that_of_the_log_probabilities(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    folder.mkdir()
    summary = {"before": {"eval_logps/chosen": -90.0}, "after": {"eval_logps/chosen": -97.5, "eval_loss": 0.5}}
    (folder / "summary.json").write_text(json.dumps(summary))
    run = read_one(folder)
    assert run.state == "finished" and run.metrics["chosen_shift"] == -7.5 and run.metrics["drift"] == 7.5
    assert run.notes == ["config.yaml is missing; its settings are not known"]


@pytest.mark.parametrize("state", ["failed", "interrupted", "pruned"])
def test_a_run_that_has_not_ended_tells_its_newest_figures_but_not_those_before_training(tmp_path, state) -> None:
    run = read_one(write_run(tmp_path / "half", state=state, steps=20))
    assert run.state == state and run.metrics["steps"] == 20
    assert run.metrics["eval_rewards/margins"] == run.curves["eval_rewards/margins"][1][-1] > 0
    events = [json.loads(line) for line in (tmp_path / "half" / "metrics.jsonl").read_text().splitlines()]
    (tmp_path / "half" / "metrics.jsonl").write_text(json.dumps(events[0]) + "\n")
    assert events[0]["step"] == 0
    assert not any(name.startswith("eval_") for name in read_one(tmp_path / "half").metrics)


def test_a_running_run_without_a_heartbeat_has_died(tmp_path: Path) -> None:
    from datetime import UTC, datetime

    path = write_run(tmp_path / "r", state="running")
    run = read_one(path)
    assert run.state == "died"
    assert run.error == "no sign of life since 2026-01-01T00:00:00+00:00; step 40 is the last that is known of"
    now = datetime.now(UTC).isoformat(timespec="seconds")
    (path / "status.json").write_text(json.dumps({"state": "running", "heartbeat": now}))
    assert read_one(path).state == "running"
    (path / "status.json").write_text(json.dumps({"state": "running", "heartbeat": "2026-01-01T00:00:00"}))
    assert read_one(path).state == "running", "a time without its zone says nothing"


TORN = {
    "metrics.jsonl": (b'{"step": 1, "loss": 0.7}\n{"step": 2, "lo', "metrics.jsonl: the last line is cut off"),
    "summary.json": (b'{"before": ', "summary.json: is no JSON"),
    "status.json": (b"[1, 2]", "status.json: holds no object"),
    "config.yaml": (b"model: [", "config.yaml: while parsing"),
    "samples.jsonl": (b"\xff\xfe\n", "samples.jsonl: cannot be read"),
    "environment.json": (b"[" * 100_000, "environment.json: is no JSON"),
}


@pytest.mark.parametrize("name", TORN)
def test_a_file_that_is_torn_or_foreign_costs_a_line_and_no_more(tmp_path: Path, name: str) -> None:
    path = write_run(tmp_path / "r")
    content, note = TORN[name]
    (path / name).write_bytes(content)
    runs, notes = read_runs([path])
    assert len(runs) == 1 and any(line.startswith(f"{path}: {note}") for line in notes), notes
    assert all("\n" not in line for line in notes)


@pytest.mark.parametrize(
    "line",
    [
        '{"step": "x", "loss": {"a": 1}}',
        '{"loss": 1%s}' % ("0" * 400),
        '{"step": null, "": NaN}',
        "[]",
        "7",
        '"x"',
        "{}",
    ],
)
def test_foreign_log_lines_do_no_harm(tmp_path: Path, line: str) -> None:
    path = write_run(tmp_path / "r")
    with (path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert len(read_one(path).curves["loss"][0]) == 40


def test_foreign_samples_and_evaluations_do_no_harm(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r")
    (path / "evaluations" / "x").mkdir(parents=True)
    (path / "evaluations" / "x" / "evaluation.json").write_text('{"judge": 3, "kl_per_answer": {"mean": "much"}}')
    lines = [
        '{"prompt": [1, {"role": 2}], "after": "plain"}',
        '{"prompt": 4}',
        '{"prompt": "p", "after": {"text": 5}}',
    ]
    (path / "samples.jsonl").write_text("\n".join(lines) + "\n")
    run = read_one(path)
    assert run.samples == [{"prompt": "None", "after": "plain"}]
    assert not any(name.startswith("evaluation/") for name in run.metrics)


def test_the_newest_evaluation_adds_its_estimates(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r")
    for number, name in enumerate(("old", "new")):
        folder = path / "evaluations" / name
        folder.mkdir(parents=True)
        value = {"kl_per_answer": {"mean": 3.0 + number}, "judge": {"win_rate": {"mean": 0.5}, "name": {"model": "m"}}}
        (folder / "evaluation.json").write_text(json.dumps(value))
        os.utime(folder / "evaluation.json", (1000 + number, 1000 + number))
    metrics = read_one(path).metrics
    assert (metrics["evaluation/kl_per_answer"], metrics["evaluation/win_rate"]) == (4.0, 0.5)


def test_an_output_directory_of_plain_trl_gives_its_curves(tmp_path: Path) -> None:
    for step in (5, 10):
        folder = tmp_path / "trl" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        history = [{"step": n, "loss": 1 / n, "rewards/margins": 0.1 * n} for n in range(1, step + 1)]
        (folder / "trainer_state.json").write_text(
            json.dumps({"global_step": step, "max_steps": 10, "log_history": history})
        )
    run = read_one(tmp_path)
    assert run.state == "finished" and run.metrics["rewards/margins"] == 1.0 and len(run.curves["loss"][0]) == 10
    assert "no run of this program" in run.notes[0]


def test_settings_are_flat_plain_and_bounded() -> None:
    import datetime

    nested = {"a": {"b": None, 1: [datetime.date(2026, 1, 2)]}, "empty": {}}
    assert dict(flatten(nested)) == {"a.b": None, "a.1": ["2026-01-02"], "empty": {}}
    bomb: object = "x"
    for _ in range(40):
        bomb = [bomb, bomb]
    with pytest.raises(ValueError, match="more than"):
        list(flatten({"bomb": bomb}))


def test_settings_without_a_json_number_and_secrets_are_plain_text(tmp_path: Path) -> None:
    path = write_run(
        tmp_path / "r", training__beta=float("inf"), training__hub_token="abc", training__tags=["hf_" + "a" * 30]
    )
    (path / "status.json").write_text(json.dumps({"state": "failed", "error": "no access with hf_" + "a" * 30}))
    run = read_one(path)
    assert run.config["training.beta"] == "inf" and run.config["training.hub_token"] == "***"
    assert run.config["training.tags"] == ["***"] and run.error == "no access with ***"


def test_a_config_that_repeats_its_parts_over_and_over_is_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path / "r")
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    (path / "config.yaml").write_text("\n".join(lines))
    run = read_one(path)
    assert run.config == {} and "more than" in run.notes[0]

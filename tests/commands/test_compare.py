"""The compare command: table, files, and `--best` for scripts."""

import csv
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_runner.compare.__main__ import main
from dpo_runner.compare.comparison import DEFAULT_OBJECTIVE
from tests.support.common import children_seconds, run_main
from tests.support.run_folders import write_run

HOSTILE = "[red]\x1b[31m\u202e<b>x"


def compare(*arguments: str) -> int:
    return run_main(main, *arguments)


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    for index, (beta, seed) in enumerate(((0.1, 1), (0.1, 2), (0.3, 1), (0.3, 2))):
        write_run(tmp_path / "sweep" / f"{index}-ab", seed=seed, training__beta=beta, accuracy=beta + seed / 100)
    write_run(tmp_path / "sweep" / "4-ab", state="failed", training__beta=0.5)
    status = {"state": "failed", "error": "RuntimeError: out of memory\nmore"}
    (tmp_path / "sweep" / "4-ab" / "status.json").write_text(json.dumps(status))
    return tmp_path / "sweep"


def test_the_table_shows_what_differs_the_states_and_the_marks(sweep: Path, capsys) -> None:
    assert compare(str(sweep)) == 0
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert output.err == "" and "5 runs, 3 configurations" in lines[0]
    heading = next(line for line in lines if "beta" in line)
    assert "learning_rate" not in heading and "seed" not in heading
    best = next(line for line in lines if "│ ★" in line)
    assert "2-ab (+1)" in best and "0.315 ± 0.005" in best and "finished" in best
    assert any("4-ab" in line and "failed" in line for line in lines)
    assert lines[-1] == "4-ab failed: RuntimeError: out of memory"
    assert compare(str(sweep), "--per-seed") == 0
    singly = capsys.readouterr().out
    assert "± " not in singly and "seed" in singly and "3-ab" in singly


def write_sweep(folder: Path, varied: dict[str, list[str]], **settings: float) -> None:
    for name, texts in varied.items():
        beta = float(texts[0].rpartition("=")[2])
        write_run(folder / name, training__beta=beta, accuracy=beta, seed=int(texts[-1][-1]), **settings)
    record = {"jobs": {name: {"digest": "", "varied": texts, "overrides": texts} for name, texts in varied.items()}}
    (folder / "sweep.json").write_text(json.dumps(record))


def test_jobs_are_called_by_what_they_vary_and_are_found_by_their_directories(tmp_path: Path, capsys) -> None:
    one = {f"{at}-aaaaaaa{at}": [f"training.beta={beta}", f"seed={seed}"] for at, (beta, seed) in enumerate(GRID)}
    write_sweep(tmp_path / "one", one)
    assert compare(str(tmp_path / "one"), "--per-seed") == 0
    table = capsys.readouterr().out
    row = next(line for line in table.splitlines() if "beta=0.3 seed=2" in line)
    assert "3-aaaaaaa3 │" in row and "│ 3-" not in row.partition("finished")[0]
    assert compare(str(tmp_path / "one")) == 0
    assert "│ beta=0.3 (+1) " in capsys.readouterr().out
    # Another sweep, continued with another setting: the same labels twice.
    write_sweep(tmp_path / "two", {"0-bbbbbbbb": ["training.beta=0.1", "seed=1"]}, training__learning_rate=1e-4)
    write_run(tmp_path / "two" / "1-cccccccc", training__beta=0.1, accuracy=0.7, seed=1)
    record = json.loads((tmp_path / "two" / "sweep.json").read_text())
    record["jobs"]["1-cccccccc"] = record["jobs"]["0-bbbbbbbb"]
    (tmp_path / "two" / "sweep.json").write_text(json.dumps(record))
    write_run(tmp_path / "single", training__beta=0.9)
    assert compare(str(tmp_path), "--json", "-", "--per-seed") == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    places = {row["name"]: str(Path(row["runs"][0]["path"]).relative_to(tmp_path)) for row in rows}
    again = {f"two/beta=0.1 seed=1 ({name})": f"two/{name}" for name in ("0-bbbbbbbb", "1-cccccccc")}
    assert places == {
        **{f"one/beta={beta} seed={seed}": f"one/{at}-aaaaaaa{at}" for at, (beta, seed) in enumerate(GRID)},
        **again,
        "single": "single",
    }
    for damaged in ("", "[]", '{"jobs": {"0-aaaaaaa0": {}}}', '{"jobs": {"0-aaaaaaa0": {"varied": [1]}}}'):
        (tmp_path / "one" / "sweep.json").write_text(damaged)
        assert compare(str(tmp_path / "one"), "--csv", "-", "--per-seed") == 0
        assert "\n0-aaaaaaa0," in capsys.readouterr().out


GRID = ((0.1, 1), (0.1, 2), (0.3, 1), (0.3, 2))


def test_data_cannot_steer_the_terminal(tmp_path: Path, capsys) -> None:
    write_run(tmp_path / HOSTILE.replace("<b>", ""), training__loss_type=HOSTILE)
    write_run(tmp_path / "b")
    assert compare(str(tmp_path)) == 0
    output = capsys.readouterr()
    assert "\x1b" not in output.out + output.err and "\u202e" not in output.out + output.err
    assert "[red]␛[31m" in output.out
    assert compare(str(tmp_path), "--csv", "-") == 0
    assert "\x1b" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("width", "shown", "left_out"),
    [
        (110, ("beta", "long_setting_b", "accuracy", "tokens"), "training.long_setting_c, "),
        (80, ("beta", "long_setting_b", "accuracy", "margin"), "loss, drift, tokens, "),
        (60, ("accuracy", "margin"), "training.beta, "),
    ],
)
def test_a_narrow_terminal_keeps_what_matters_most_and_says_what_it_leaves_out(
    width: int, shown: tuple[str, ...], left_out: str, tmp_path: Path
) -> None:
    from rich.console import Console

    from dpo_runner.compare.comparison import choose_objective, compare_runs
    from dpo_runner.compare.table import show_table
    from dpo_runner.records.runs import read_runs

    for index in range(3):
        extra = {f"long_setting_{letter}": f"value {index}" for letter in "bcdefgh"}
        write_run(
            tmp_path / "zephyr_7b_ultrafeedback_grid" / f"{index}-learning_rate=5e-05",
            training={"beta": index / 10, "learning_rate": 1e-5, **extra},
        )
    write_run(tmp_path / "other", training={"beta": 0.7, "learning_rate": 1e-5})
    runs, _ = read_runs([tmp_path])
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    show_table(compare_runs(runs, choose_objective(DEFAULT_OBJECTIVE, None, runs)), console)
    text = console.file.getvalue()
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert all(heading in lines[2] for heading in shown) and f"too narrow for {left_out}" in text
    assert text.count("learning_") == text.count("5e-05") == 3, "a name is folded only after its separators"
    assert "│   0.4517 │" in text and "│ finished │" in text


def test_csv_and_json_hold_every_row_and_figure(sweep: Path, tmp_path: Path, capsys) -> None:
    assert compare(str(sweep), "--csv", "-", "--json", "all.json") == 0
    output = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(output.out)))
    assert [row["training.beta"] for row in rows] == ["0.5", "0.3", "0.1"]
    assert [row["best"] for row in rows] == ["0", "1", "0"] and rows[1]["n"] == "2"
    assert float(rows[1][DEFAULT_OBJECTIVE]) == pytest.approx(0.315)
    assert float(rows[1][f"{DEFAULT_OBJECTIVE} (standard error)"]) == pytest.approx(0.005)
    assert "json written to all.json" in output.err
    written = json.loads((tmp_path / "all.json").read_text())
    assert written["objective"] == {"metric": DEFAULT_OBJECTIVE, "direction": "maximize"}
    assert written["settings"] == ["training.beta"]
    assert [len(row["runs"]) for row in written["rows"]] == [1, 2, 2] and written["rows"][1]["best"] is True
    assert compare(str(sweep), "--json", "-") == 0
    assert json.loads(capsys.readouterr().out) == written


def test_no_text_of_the_csv_is_a_formula_to_a_spreadsheet(tmp_path: Path, capsys) -> None:
    values = ["=1+1", "+cmd", "-2+3", "@SUM(A1)", "\t=1", "-1", "1e-3", "plain"]
    for index, value in enumerate(values):
        margin = -1.5 if index == 0 else 1.0
        write_run(tmp_path / f"@{index}", training__loss_type=value, training__beta=-0.5 + index, margin=margin)
    assert compare(str(tmp_path), "--csv", "-") == 0
    rows = {row["run"]: row for row in csv.DictReader(io.StringIO(capsys.readouterr().out))}
    told = [rows[f"'@{index}"]["training.loss_type"] for index in range(len(values))]
    assert told == ["'=1+1", "'+cmd", "'-2+3", "'@SUM(A1)", "'\t=1", "-1", "1e-3", "plain"]
    assert (rows["'@0"]["training.beta"], rows["'@0"]["eval_rewards/margins"]) == ("-0.5", "-1.5")


def test_json_has_null_for_what_is_no_number(tmp_path: Path, capsys) -> None:
    write_run(tmp_path / "a", accuracy=float("nan"))
    assert compare(str(tmp_path), "--json", "-") == 0
    text = capsys.readouterr().out
    assert "NaN" not in text
    assert json.loads(text)["rows"][0]["metrics"][DEFAULT_OBJECTIVE]["mean"] is None


def test_the_best_path_may_hold_bytes_that_are_no_text(tmp_path: Path, capfdbinary) -> None:
    write_run(tmp_path / "r\udcff\nx")
    assert compare("--best", ".") == 0
    assert capfdbinary.readouterr().out == b"r\xff\nx\n"
    assert compare(".", "--html", "page.html") == 0


def test_best_prints_a_path_and_nothing_else(sweep: Path, capsys) -> None:
    (sweep / "0-ab" / "samples.jsonl").write_text("{")
    assert compare("--best", str(sweep)) == 0
    output = capsys.readouterr()
    assert output.out == f"{sweep / '3-ab'}\n"
    assert "the last line is cut off" in output.err
    assert compare("--best", str(sweep), "--objective", "drift", "--maximize") == 0
    assert capsys.readouterr().out != output.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--best", "half"], f"--best: no finished run has {DEFAULT_OBJECTIVE}"),
        (["gone"], "gone: no such folder"),
        (["empty"], "empty: no runs there (no status.json or summary.json)"),
        (["half", "--objective", "eval_los"], "--objective eval_los: no run has it; did you mean `eval_loss`?"),
        (["half", "--html", "no/page.html"], "--html no/page.html: no such folder no"),
        (["half", "--csv", "x", "--html", "./x"], "--html and --csv: both name x"),
        (["half", "--csv", "-", "--json", "-"], "-: stdout takes either the CSV or the JSON"),
        (["half", "--html", "-"], "-: stdout takes either the CSV or the JSON"),
        (["half", "--best", "--csv", "-"], "--best: prints a path and nothing else; leave out --csv"),
        (["half", "--json", "half/status.json"], "--json half/status.json: is a run's own file; name another one"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(tmp_path: Path, capsys, arguments, message) -> None:
    write_run(tmp_path / "half", state="interrupted")
    (tmp_path / "empty").mkdir()
    assert compare(*arguments) == 2
    output = capsys.readouterr()
    assert output.out == "" and output.err.splitlines() == [f"error: {message}"]
    assert json.loads((tmp_path / "half" / "status.json").read_text())["state"] == "interrupted"


def test_the_command_is_quick_and_imports_neither_torch_nor_plotly(sweep: Path) -> None:
    code = (
        "import sys; from dpo_runner.compare.__main__ import main\n"
        "main(sys.argv[1:])\n"
        "assert not {'torch', 'transformers', 'trl', 'plotly', 'wandb', 'numpy'} & set(sys.modules)\n"
    )
    before = children_seconds()
    subprocess.run([sys.executable, "-c", code, "--best", str(sweep)], check=True, capture_output=True)
    assert children_seconds() - before < 2


def test_real_runs_are_compared_and_the_best_one_answers(tiny_run: list[str], tmp_path: Path, capsys) -> None:
    from dpo_runner import run
    from dpo_runner.chat import main as chat
    from dpo_runner.config.compose import load_conf

    for index, overrides in enumerate((["seed=1"], ["seed=2"], ["training.learning_rate=1e-3"])):
        run(load_conf([*tiny_run, *overrides, f"run_dir=sweep/{index}"]))
    capsys.readouterr()
    assert compare("sweep", "--html", "page.html") == 0
    output = capsys.readouterr()
    assert output.err == "" and "learning_rate" in output.out and "3 runs, 2 configurations" in output.out
    assert Path("page.html").read_text(encoding="utf-8").count("What is") > 1
    assert compare("--best", "sweep") == 0
    best = capsys.readouterr().out.strip()
    chat([best, "--prompt", "Why?", "--max-new-tokens", "4"])
    assert capsys.readouterr().err == ""

"""The GPU check: each part tells right from wrong, failures are named, and all of it runs on a CPU."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from scripts import ROOT
from scripts.bench.inputs.shapes import HH_TOKENS, write_rows
from scripts.bench.measuring.process import CommandFailed
from scripts.bench.peers.sides import Job
from scripts.gpu import attention as attention_part
from scripts.gpu import benchmark, card, check, layers, processes, rounding, training
from scripts.gpu.benchmark import list_tries
from scripts.gpu.inputs import SIZES, Task, describe_size, write_random_model
from scripts.gpu.requirements import NOT_USED, find_lacking
from scripts.gpu.work import MARK, perform


class Told(list[dict[str, Any]]):
    """Results of a part, as a `Tell`."""

    def __call__(self, text: str, ok: bool = True, **figures: Any) -> None:
        self.append({"text": text, "ok": ok, **figures})

    @property
    def failed(self) -> list[str]:
        return [result["text"] for result in self if not result["ok"]]


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task("cpu", str(tmp_path / "work"), 16, 60.0)


def test_attention_that_misses_tokens_is_found(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    from dpo_runner.training.engine.packed import attention

    right, wrong = Told(), Told()
    attention_part.check_attention(task, right)
    assert len(right) == 3 and not right.failed
    attend = attention.attend

    def without_prefix(*args: Any, pairs: Any, **kwargs: Any) -> Any:
        return attend(*args, pairs=[pair._replace(prefix=pair.prefix // 2) for pair in pairs], **kwargs)

    monkeypatch.setattr(attention, "attend", without_prefix)
    monkeypatch.setattr(attention_part, "_HEADS", attention_part._HEADS[:1])
    attention_part.check_attention(task, wrong)
    assert len(wrong.failed) == 3
    # a card whose kernel is not taken
    monkeypatch.setattr(attention, "attend", attend)
    monkeypatch.setattr(attention_part, "compare_with_mask", lambda *_: 1.0)
    monkeypatch.setattr(attention_part, "takes_varlen", lambda *_: False)
    monkeypatch.setattr(attention_part, "_compare_speed", lambda *_: None)
    monkeypatch.setattr(torch, "zeros", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    fallen = Told()
    attention_part.check_attention(Task("cuda", task.work, 16), fallen)
    assert [text.partition(":")[0] for text in fallen.failed] == ["torch.bfloat16", "torch.float16"]


def test_gradients_of_quantized_layers_are_those_of_their_weights(task: Task) -> None:
    told = Told()
    layers.check_layers(task, told)
    assert len(told) == 6 and not told.failed
    layer, weights = layers.build_layer("nf4", "cpu")
    output, gradient = layers.measure_layer(layer, weights * 1.02, "cpu")
    assert output > 0.01 and gradient > 1.5


def test_adapters_are_compared_and_fallbacks_fail(pairs: str, tiny_model: str, tmp_path: Path) -> None:
    ours, theirs = {"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([3.0, 5.0])}
    assert training.measure_distance(ours, theirs) == pytest.approx(34**-0.5)
    assert training.measure_distance(ours, ours) == 0
    told, job = Told(), Job(pairs, 24, 256, tiny_model, max_steps=1)
    training.train_ours(job, tmp_path / "eager", told, ("model.attn_implementation=eager",))
    [line] = told.failed
    assert line.startswith("eager fell back: engine.shared_prefix: TRL's own forward is taken; model.attn_impl")
    lines = ["step-0 check", "out of memory in training: 1 GB"]
    assert training.Ran({}, lines).fallbacks == lines[1:]


def test_rows_and_models_need_no_packaged_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer has a token for each byte; the rows have the lengths of HH with it too."""
    from dpo_runner.model.files import packaged

    monkeypatch.setattr(packaged, "load_default_model_path", None)
    folder = write_random_model("tiny", tmp_path, "cpu")
    assert json.loads(Path(folder, "config.json").read_text())["vocab_size"] == 1024
    assert write_random_model("tiny-nf4", tmp_path, "cpu") == folder
    lengths = write_rows("hh", 64, folder, tmp_path, None).lengths
    for part, wanted in zip(zip(*lengths, strict=True), HH_TOKENS.values(), strict=True):
        assert sum(part) / 64 == pytest.approx(wanted, rel=0.05) and max(part) > 2.5 * wanted
    assert [describe_size(size) for size in SIZES[:2]] == ["Mistral-7B, nf4", "Mistral-7B, bf16"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match=r"0\.0 GB free, the model takes 16"):
        write_random_model("7b", tmp_path, "cpu")


def test_trls_search_goes_on_with_the_best_settings() -> None:
    speeds: dict[str, float] = {}
    tried = []
    for name in list_tries(speeds):
        tried.append(name)
        if name != "trl no checkpointing":  # out of memory
            speeds[name] = len(name)
    assert tried[0] == "trl" and len(tried) == 6
    assert tried[4:] == ["trl precompute, no checkpointing, 8×1", "trl precompute, no checkpointing, 2×4"]


def test_missing_and_other_packages_are_named(tmp_path: Path) -> None:
    assert find_lacking(ROOT / "pyproject.toml") == ([], [])
    file = tmp_path / "pyproject.toml"
    needs = ["torch<2", "no-such-package>=1", "rich", NOT_USED[0] + "-not-there"]
    file.write_text(f"[project]\ndependencies = {json.dumps(needs)}\n")
    assert find_lacking(file) == (["no-such-package>=1", NOT_USED[0] + "-not-there"], [])
    file.write_text(f"[project]\ndependencies = {json.dumps(needs[:1] + needs[2:3])}\n")
    missing, (other,) = find_lacking(file)
    assert missing == [] and re.match(r"torch \S+ is installed, pyproject.toml asks for <2", other)


def test_cards_are_known_by_words_of_their_name(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA L40S": 362, "NVIDIA L4": 121}
    assert {name: card.find_peak(name) for name in peaks} == {name: 1e12 * peak for name, peak in peaks.items()}
    assert {card.find_peak(name) for name in ("Tesla T4", "NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA RTX A4000")} == {
        None
    }
    monkeypatch.setattr(card, "list_cards", lambda: "NVIDIA L4, 23034 MiB, 560")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match=r"torch \S+ sees no GPU; the driver lists NVIDIA L4"):
        card.describe_card(Task("cuda", "", 16), Told())


class Children:
    """Processes of parts, each played by a function that prints results and may fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.started: list[list[str]] = []
        self.plays: dict[str, Callable[[Callable[..., None]], Any]] = {}
        self.out = tmp_path / "gpu.md"
        monkeypatch.setattr(check, "run", self._run)
        self._monkeypatch = monkeypatch

    def _run(
        self, command: list[str], environment: Any, log: Path, timeout: float, hear: Callable[[str], None]
    ) -> None:
        names = [text.partition("=")[0] for text in command[4:]]
        self.started.append(names)
        for name in names:

            def say(name: str = name, **result: Any) -> None:
                hear(f"{MARK}{json.dumps({'part': name, **result})}\n")

            say(started=True)
            if not self.plays.get(name, lambda say: say(text="fine", ok=True))(say):
                say(seconds=1.0, error=None)

    def check(self, *arguments: str) -> int:
        """Run the command and return its exit code."""
        out = f"--out={self.out}"
        self._monkeypatch.setattr(sys, "argv", ["check", "--device=cpu", f"--work={self.out.parent}", out, *arguments])
        try:
            check.main()
        except SystemExit as stopped:
            return int(str(stopped.code))
        return 0


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Children:
    return Children(monkeypatch, tmp_path)


def test_what_fails_is_named_and_costs_nothing_else(children: Children, capsys: pytest.CaptureFixture[str]) -> None:
    def die(say: Callable[..., None]) -> None:
        say(text="half of it", ok=True)
        raise CommandFailed("exit code -11; log ends with:\nSegmentation fault")

    children.plays = {"layers": die, "resume": lambda say: say(text="it is 1e-1 away", ok=False)}
    children.plays["memory"] = lambda say: say(seconds=2.0, error="ValueError: no") or True
    assert check_names(children) == ([["card", *check.EXACTNESS], [*check.EXACTNESS][2:]], 1)
    shown = capsys.readouterr()
    assert shown.err == "failed: layers, resume, memory\n" and "resume: FAILED: it is 1e-1 away" in shown.out
    report = children.out.read_text()
    assert "- layers: half of it.\n- layers: **FAILED**: the process ended: Segmentation fault; " in report
    assert "- resume: **FAILED**: it is 1e-1 away.\n" in report and "- memory: **FAILED**: ValueError: no.\n" in report
    assert "- training: fine.\n" in report and report.startswith("# The GPU check, run on a CPU\n")
    # in pieces: the report keeps what an earlier command found
    children.plays = {}
    assert children.check("--only=layers,resume,memory") == 0
    report = children.out.read_text()
    assert "FAILED" not in report and "- training: fine.\n" in report and "half of it" not in report


def check_names(children: Children) -> tuple[list[list[str]], int]:
    code = children.check("--only=exactness")
    return children.started, code


def test_a_part_that_takes_too_long_is_said_so(children: Children, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(check.time, "monotonic", lambda: clock[0])

    def hang(say: Callable[..., None]) -> None:
        clock[0] += 3600
        raise CommandFailed("exit code 1; log ends with:\n  File x")

    children.plays = {"attention": hang}
    assert children.check("--only=attention,resume") == 1
    report = children.out.read_text()
    assert re.search(r"- attention: \*\*FAILED\*\*: took more than its \d+ s; ", report)
    assert "- resume: **FAILED**: not run: no time was left." in report
    shares = check.share_time(["attention", "ours:7b"], ["trl:7b"], 210)
    assert shares == {"attention": 20, "ours:7b": 120} and check.share_time(["card"], ["trl:7b"], 8)["card"] == 8


def test_the_table_compares_the_same_job(children: Children) -> None:
    def side(name: str, speed: float, margin: float = 0.1) -> dict[str, Any]:
        history = [{"loss": 0.6931, "rewards/margins": 0.0}, {"loss": 0.6, "rewards/margins": margin}]
        figures = {"pairs_per_second": speed, "with_reference": speed, "total_seconds": 1.0, "peak_gb": 2.0}
        return {"text": name, "ok": True, "size": "tiny", "history": history, **figures}

    def ours(say: Callable[..., None]) -> None:
        say(text="products", ok=True, peak=1e12, flops=5e10)
        say(**side("dpo_runner, warm store", 12.0))

    def trl(say: Callable[..., None]) -> None:
        say(**side("trl", 4.0))
        say(text="trl, 8×1", ok=True, size="tiny", out_of_memory="OutOfMemoryError: CUDA")
        say(**side("trl precompute", 6.0, margin=3.0))

    children.plays = {"ours:tiny": ours, "trl:tiny": trl}
    assert children.check("--only=benchmark", "--sizes=tiny") == 1
    report = children.out.read_text()
    assert "| a tiny Llama, bf16 | trl | 4.00 | 4.00 | 1.00× | 2.00 | 20.0% |  |\n" in report
    assert "| a tiny Llama, bf16 | dpo_runner, warm store | 12.00 | 12.00 | 3.00× | 2.00 | 60.0% |  |\n" in report
    assert "trl precompute: NOT THE SAME JOB: rewards/margins" in report and "trl: largest difference" in report
    assert "- trl:tiny, trl, 8×1: out of memory (OutOfMemoryError: CUDA)." in report


def test_no_gpu_is_one_line(children: Children, capsys: pytest.CaptureFixture[str]) -> None:
    children.plays = {"card": lambda say: say(seconds=1.0, error="RuntimeError: torch sees no GPU")}
    assert children.check("--device=cuda", "--only=resume") == 2
    assert capsys.readouterr().err == "error: RuntimeError: torch sees no GPU\n" and not children.out.exists()
    assert check.plan(["exactness"], ["7b"], "cuda")[1:] == [[f"ours:{size}" for size in check.ESTIMATED]]
    assert check.plan(["exactness", "benchmark"], ["7b"], "cuda")[1][0] == "ours:7b"
    assert check.parse_arguments([]).out == ROOT / "benchmarks" / "gpu.md"
    assert check.parse_arguments(["--device=cpu"]).out.parent != ROOT / "benchmarks"


def test_one_card_has_no_second_process(monkeypatch: pytest.MonkeyPatch, task: Task) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    told = Told()
    processes.check_processes(replace(task, device="cuda"), told)
    assert [each["text"] for each in told] == ["two processes were not tried: there is one GPU"]


def test_an_error_of_a_part_is_its_result(task: Task) -> None:
    def fail(task: Task, tell: Any) -> None:
        tell("begun", ok=False)
        raise ValueError("one\ntwo")

    said: list[dict[str, Any]] = []
    perform("resume", fail, task, said.append)
    assert said[0] == {"part": "resume", "text": "begun", "ok": False}
    assert said[1]["error"] == "ValueError: two" and len(said) == 2


@pytest.mark.real_model
def test_a_right_reference_passes_and_a_wrong_one_does_not(default_model: str, tmp_path: Path) -> None:
    """Some ways of `scripts.gpu.rounding`, on four pairs: other sums pass each time, other masks never."""
    rows = [write_rows("synthetic", 2, default_model, tmp_path, None, length, 0.5) for length in (48, 80)]
    Path("rows.jsonl").write_text("".join(Path(some.path).read_text() for some in rows))
    ways = [way for way in rounding.WAYS if not way.steps and "quant" not in str(way.overrides)]
    found = list(rounding.judge(default_model, "rows.jsonl", "cpu", tmp_path, 20, ways))
    assert [judged.way for judged in found if not judged.ok] == []
    assert [judged.is_right for judged in found] == [True, True, False, True, False, True]


def test_both_sides_of_the_benchmark_are_measured(task: Task) -> None:
    told = Told()
    benchmark.measure_ours("tiny", task, told)
    benchmark.measure_trl("tiny", replace(task, seconds=0), told)
    measured = {each["text"]: each for each in told if "pairs_per_second" in each}
    assert list(measured)[:2] == ["dpo_runner, cold store", "dpo_runner, warm store"] and len(measured) == 3
    assert all(each["pairs_per_second"] > 0 and len(each["history"]) > 1 for each in measured.values())
    assert told[-1]["text"] == "the search for TRL's best settings ended after 1 tries, for lack of time"


@pytest.mark.parametrize("only", ["layers", pytest.param("layers,benchmark", marks=pytest.mark.slow)])
def test_it_runs_where_packages_are_on_pythonpath_alone(only: str, tmp_path: Path) -> None:
    """Another interpreter, without .venv: `make` finds it, and every process finds the packages."""
    python = Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}"
    packages = tmp_path / "packages"
    packages.symlink_to(next(path for path in map(Path, sys.path) if path.name == "site-packages"))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("VIRTUAL_ENV", "PYTHON"))}
    options = f"--device cpu --only {only} --sizes tiny --work {tmp_path / 'work'}"
    command = ["make", "-C", str(ROOT), "check-gpu", f"PYTHON={python}", f"VENV={tmp_path}/none", f"ARGS={options}"]
    result = subprocess.run(command, env={**kept, "PYTHONPATH": str(packages)}, capture_output=True, text=True)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
    assert ("a tiny Llama, bf16 | dpo_runner, warm store |" in result.stdout) == ("benchmark" in only)
    assert "FAILED" not in result.stdout
    assert not list((tmp_path / "work" / "cache").glob("smollm2-*"))

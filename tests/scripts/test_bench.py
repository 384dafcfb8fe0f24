"""The benchmarks compare the same rows, tokens and job on all sides, and tabulate only those."""

import copy
import json
import math
import os
import sys
import time
from pathlib import Path
from statistics import mean
from types import SimpleNamespace

import pytest

from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError
from dpo_runner.records.status import is_process_alive
from dpo_runner.training.build import build_dpo_config
from scripts.bench.inputs.shapes import HH_TOKENS, check_same_tokens, cut, tokenize_ours, tokenize_trl, write_rows
from scripts.bench.measuring.flops import ModelShape, read_shape
from scripts.bench.measuring.process import CommandFailed, build_environment, carry_packages, read_event, run
from scripts.bench.measuring.profiling import GROUPS, add_up
from scripts.bench.parts import COLD, WARM, check_jobs, check_store, choose_variants
from scripts.bench.peers.llamafactory import PEER, PEER_VARIANTS, build_config
from scripts.bench.peers.same_job import DifferentJobs, check_same_job
from scripts.bench.peers.sides import TRL_VARIANTS, Job, Measured, Variant, build_our_sweep, build_ours, build_trl
from scripts.bench.peers.tuning import best_variants, tune
from scripts.bench.report.record import Record
from scripts.bench.report.table import NOT_MEASURED, build_report, compare
from scripts.bench.session import Bench
from tests.support.sweeps import wait_until

ROOT = Path(__file__).parents[2]
DEMO_ROW = {
    "conversations": [
        {"from": "system", "value": "You are brief."},
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "Tell me of rain."},
    ],
    "chosen": {"from": "gpt", "value": "It falls. " * 4},
    "rejected": {"from": "gpt", "value": "It rises, they say, from below."},
}


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """Two rows in the layout of the demo data; the answers of the second exceed 1024 bytes."""
    long = copy.deepcopy(DEMO_ROW)
    long["chosen"]["value"] = "It falls and falls. " * 60
    path = tmp_path / "demo.json"
    path.write_text(json.dumps([DEMO_ROW, long]))
    return path


@pytest.mark.real_model
def test_hh_rows_have_the_lengths_of_hh(default_model: str, tmp_path: Path) -> None:
    for pairs in (32, 100):
        lengths = write_rows("hh", pairs, default_model, tmp_path, None).lengths
        for part, wanted in zip(zip(*lengths, strict=True), HH_TOKENS.values(), strict=True):
            assert len(part) == pairs and mean(part) == pytest.approx(wanted, rel=0.05)
            assert max(part) > 2.5 * mean(part) and sorted(part)[pairs // 2] < mean(part)


def test_bundled_rows_and_those_of_the_demo_layout(tiny_model: str, demo: Path, tmp_path: Path) -> None:
    bundled = write_rows("bundled", 8, tiny_model, tmp_path, None)
    assert bundled.pairs == len(Path(bundled.path).read_text().splitlines()) == len(bundled.lengths) == 8
    both = write_rows("demo", 2, tiny_model, tmp_path, demo)
    assert max(sum(pair[:2]) for pair in both.lengths) == both.max_length == 1024
    assert max(sum(pair[:2]) for pair in write_rows("demo_fit", 1, tiny_model, tmp_path, demo).lengths) < 1024
    with pytest.raises(ValueError, match="demo_fit: 2 pairs are asked for, and it has 1"):
        write_rows("demo_fit", 2, tiny_model, tmp_path, demo)


def test_synthetic_rows_have_their_length_and_share(tiny_model: str, tmp_path: Path) -> None:
    for length, share in ((256, 0.5), (1024, 0.9)):
        for prompt, *answers in write_rows("synthetic", 2, tiny_model, tmp_path, None, length, share).lengths:
            assert length - 24 <= prompt + max(answers) <= length and prompt / length == pytest.approx(share, abs=0.05)


def test_all_sides_read_the_same_tokens(tiny_model: str, tokenizer, demo: Path, tmp_path: Path) -> None:
    """Tokens are counted from the files, TRL's with TRL's code; different tokens or rows are refused."""
    written = write_rows("demo", 2, tiny_model, tmp_path, demo)
    rows = [json.loads(line) for line in Path(written.path).read_text().splitlines()]
    ours = tokenize_ours(rows, tokenizer)
    check_same_tokens(ours, tokenize_trl(rows, tokenizer, 1024), "TRL")
    told = json.loads((tmp_path / "demo.tokens.json").read_text())
    assert told == [cut(ids, 1024) for ids in ours] and told != ours
    sharegpt = json.loads((tmp_path / "demo.sharegpt.json").read_text())
    assert sharegpt[0]["system"] == "You are brief." and len(sharegpt[0]["conversations"]) == 3
    with pytest.raises(ValueError, match="LLaMA-Factory makes 1 rows of 2"):
        check_same_tokens(ours, ours[1:], "LLaMA-Factory")
    other = copy.deepcopy(ours)
    other[1]["chosen_ids"][3] += 1
    with pytest.raises(ValueError, match=r"row 1: TRL makes .* chosen_ids here, and they differ from 3 on"):
        check_same_tokens(ours, other, "TRL")


@pytest.mark.parametrize("load_in_4bit", [False, True])
def test_both_commands_say_the_same_job(load_in_4bit: bool, tiny_model: str, pairs: str, tmp_path: Path) -> None:
    from trl.scripts.dpo import make_parser

    job = Job(pairs, 24, 256, tiny_model, load_in_4bit=load_in_4bit, beta=0.3, learning_rate=3e-5, max_steps=7)
    conf = load_conf(build_ours(job, tmp_path / "r")[3:])
    ours = build_dpo_config(conf, tmp_path).to_dict()
    _, theirs, model, _ = make_parser().parse_args_and_config(build_trl(job, tmp_path)[2:])
    # Paths and display of results, and settings that affect only time or memory.
    own = {
        "output_dir",
        "logging_dir",
        "run_name",
        "disable_tqdm",
        "gradient_checkpointing",
        "project",
        "save_total_limit",
    }
    own |= {"activation_checkpointing", "logging_nan_inf_filter", "eval_steps", "per_device_eval_batch_size"}
    own |= {"disable_dropout"}  # the model has no dropout
    theirs = theirs.to_dict()
    assert {key: value for key, value in theirs.items() if ours[key] != value and key not in own} == {}
    assert theirs["beta"] == 0.3 and theirs["gradient_checkpointing"]  # its default
    assert conf.lora is not None and conf.model.dtype == model.dtype
    for key in ("r", "alpha", "dropout", "target_modules"):
        name = key if key in ("r", "target_modules") else f"lora_{key}"
        assert getattr(conf.lora, name) == getattr(model, f"lora_{key}"), key
    assert (conf.quant is not None) == model.load_in_4bit == load_in_4bit
    assert conf.quant is None or conf.quant.bnb_4bit_quant_type == model.bnb_4bit_quant_type == "nf4"
    peer = build_config(Job(str(tmp_path / "x.jsonl"), 24, 256, tiny_model, beta=0.3), tmp_path, True)
    assert (peer["pref_beta"], peer["lora_rank"], peer["cutoff_len"], peer["warmup_steps"]) == (0.3, 16, 256, 0.1)


def test_the_sweep_is_the_job_with_nine_points(pairs: str, tiny_model: str, tmp_path: Path) -> None:
    job = Job(pairs, 24, 256, tiny_model)
    command = build_our_sweep(job, tmp_path, (0.1, 0.2, 0.3), (1e-5, 2e-5, 3e-5), 2)
    fixed = {text for text in build_ours(job, tmp_path)[3:] if not text.startswith("run_dir=")}
    axes = {"training.beta=0.1,0.2,0.3", "training.learning_rate=1e-05,2e-05,3e-05"}
    axes |= {"sweep.workers=2", f"sweep.dir={tmp_path}"}
    single = {"training.beta=0.1", "training.learning_rate=0.00015"}
    assert set(command[3:]) - {"-m"} == (fixed - single) | axes


def make_run(side: str, seconds: float, margin: float = 0.1, tokens: bool = True) -> dict:
    steps = [
        {"loss": math.log(2), "rewards/margins": 0.0, "logps/chosen": -99.0},
        {"loss": 0.6, "rewards/margins": margin},
    ]
    history = [step | ({"num_tokens": 100.0 * at} if tokens else {}) for at, step in enumerate(steps, 1)]
    times = {"train_seconds": seconds, "total_seconds": 2 * seconds, "first_step_seconds": 3.0, "cpu_seconds": 9.0}
    return {
        "side": side,
        "steps": 2,
        "pairs": 16,
        "peak_gb": seconds,
        "step_seconds": [1.0],
        "load_before": "0.30",
        "history": history,
        **times,
    }


def test_unequal_jobs_are_refused() -> None:
    mine = make_run(WARM, 1)
    assert "same tokens" in check_same_job(mine, make_run("trl", 8))
    assert "same tokens" not in check_same_job(mine, make_run("LLaMA-Factory", 8, tokens=False))
    wrong = {
        "made 3 steps": {"steps": 3},
        "made 15 pairs": {"pairs": 15},
        "logged 1 steps": {"history": mine["history"][:1]},
        "trained 201 tokens by step 2": {"history": [mine["history"][0], mine["history"][1] | {"num_tokens": 201}]},
        "the first loss of trl is 0.7500": {"history": [mine["history"][0] | {"loss": 0.75}, mine["history"][1]]},
        "rewards/margins of trl and dpo_runner differ by up to 0.4": {"history": make_run("trl", 1, 0.5)["history"]},
        "logps/chosen of trl is -90.0 at step 1, not -99.0": {
            "history": [mine["history"][0] | {"logps/chosen": -90.0}, mine["history"][1]]
        },
        "loss of trl and dpo_runner differ by up to nan": {
            "history": [mine["history"][0], mine["history"][1] | {"loss": math.nan}]
        },
    }
    for message, changes in wrong.items():
        with pytest.raises(DifferentJobs, match=message):
            check_same_job(mine, make_run("trl", 8) | changes)


@pytest.fixture
def record(tmp_path: Path) -> Record:
    """The record of a benchmark of one shape: with a different job on one side, and a shape without data."""
    machine = {"cpu": "a processor", "flags": ["avx512_bf16"], "cores": 2, "memory_gb": 24, "python": "3.11"}
    machine |= dict.fromkeys(("torch", "transformers", "trl", "peft"), "1")
    record = Record(tmp_path / "training.json", {"threads": 2, "model": "m"}, machine)
    record.part("shapes").update(
        hh={"pairs": 2, "max_length": 512, "lengths": [[100, 30, 40], [140, 44, 60]]}, demo=None
    )
    seconds = {"trl": (8, 10, 9), "trl precompute": (6, 6, 6), COLD: (2, 2, 2), WARM: (1, 1, 2)}
    for side, runs in seconds.items():
        for repeat, value in enumerate(runs):
            record.measure(("runs", "hh", side), repeat, lambda side=side, value=value: make_run(side, value))
    record.measure(("runs", "hh", "odd"), 0, lambda: make_run("odd", 0.5, margin=3))
    check_jobs(record, "hh")
    return record


def test_the_table_is_made_of_the_record_and_compares_only_the_same_job(record: Record) -> None:
    assert compare(record.data, "hh", WARM, "train_seconds") == ("trl precompute", [6, 6, 3])
    assert compare(record.data, "hh", COLD, "total_seconds") == ("trl precompute", [3, 3, 3])
    assert compare(record.data, "bundled", WARM, "train_seconds") is None
    record.part("mfu")["hh"] = {"flops_per_pair": 1e9, "peak": {"flops_per_second": 1e11}}
    record.part("sweep")["hh"] = {
        "pairs": 16,
        "dpo_runner": {"total_seconds": 20.0},
        "trl": [make_run("trl", 11) for _ in range(9)],
        "trl, 1×8": [make_run("trl, 1×8", 10) for _ in range(9)],
        "trl precompute": [],  # interrupted before its first run
    }
    record.part("growth_length", "256")["dpo_runner"] = [make_run("dpo_runner", 1)]
    report = build_report(record.data)
    start = report.splitlines().index("|---|---|---|---|---|") + 1
    steps, single, memory, sweep, share = report.splitlines()[start : start + 5]
    missing = f" {NOT_MEASURED} |" * 3
    assert steps == f"| training step, warm store | 6.0× (3.0×–6.0×) of 8.0×, trl precompute |{missing}"
    assert "3.0× (3.0×–3.0×) of 4.5×" in single and "3.0× (3.0×–3.0×) of 2.0×" in memory
    assert "9.0× of 11.0×, trl, 1×8 |" in sweep and "16% (8%–16%) of 35%, 0.10 TFLOP/s" in share
    assert "| trl | 3 | 1.778 (1.600–2.000) | 18.0 (16.0–20.0) |" in report
    assert "- odd: not measured; rewards/margins of odd and dpo_runner differ by up to 2.9" in report
    assert "| odd |" not in report and "on average 120 prompt, 37 chosen and 50 rejected" in report
    assert f"## demo\n\n{NOT_MEASURED}: its data is not at hand." in report
    assert f"| 256 | {NOT_MEASURED} |  | 1.00 | 1.00 |" in report and f"| 1000000 | {NOT_MEASURED} |  |" in report
    assert f"bundled: {NOT_MEASURED}." in report and f"{NOT_MEASURED}.\n" in report.partition("Where the time")[2]
    assert "load average of the minute before a run: 0.30 (0.30–0.30)" in report
    record.part("profile")["hh"] = {"pairs": 24, "seconds": 9.0, "shares": dict.fromkeys(GROUPS, 0.2)}
    assert "| hh | 24 | 9.0 | 20% | 20% | 20% | 20% | 20% |" in build_report(record.data)


def test_an_interrupted_benchmark_goes_on(record: Record) -> None:
    again = Record(record.path, record.data["settings"], record.data["machine"])

    def never() -> dict:
        raise AssertionError

    assert again.measure(("runs", "hh", "trl"), 2, never)["train_seconds"] == 9
    assert again.measure(("runs", "hh", "trl"), 3, lambda: make_run("trl", 7))["train_seconds"] == 7
    with pytest.raises(ConfigError, match=r"measured with settings threads=2, now it is 4; --fresh"):
        Record(record.path, {"threads": 4, "model": "m"}, record.data["machine"])
    with pytest.raises(ConfigError, match=r"measured with machine cpu='a processor', now it is 'x'"):
        Record(record.path, record.data["settings"], record.data["machine"] | {"cpu": "x"})


def test_the_best_settings_are_by_training_and_by_total() -> None:
    slow_start = make_run("trl precompute", 5) | {"total_seconds": 99.0}
    tried = {"trl": [make_run("trl", 9)], "trl precompute": [slow_start], "trl padding-free": {"failed": "no"}}
    assert best_variants(tried, tried) == ["trl precompute", "trl"] and best_variants(tried, PEER_VARIANTS) == []
    tried["trl, 1×8"] = [make_run("trl, 1×8", 4)]
    assert choose_variants(tried, TRL_VARIANTS) == ["trl", "trl, 1×8"]
    assert choose_variants(tried, PEER_VARIANTS) == [PEER]  # not measured
    assert next(iter(TRL_VARIANTS)) == "trl" and TRL_VARIANTS["trl"] == Variant()


@pytest.fixture
def bench(record: Record, tmp_path: Path) -> Bench:
    return Bench(record, tmp_path, tmp_path, ROOT, Job("", 8, 64, ""), 2, lambda text: None)


def test_rows_at_once_are_tried_with_the_best_of_the_other_settings(bench: Bench) -> None:
    """Each with the same pairs per step, none twice, and none that might exceed memory."""
    tried = []
    # Training is slower with more rows at once; the start with a reference is slow.
    settings = {(True, False): (9, 9), (False, False): (8, 8.5), (True, True): (7, 20), (False, True): (6, 20)}

    def work(side: str, job: Job, variant: Variant, folder: Path) -> Measured:
        assert job.batch == variant.batch and job.batch * job.accumulation == 8
        tried.append(side)
        if variant.batch == 2:
            raise CommandFailed("exit code 1; the log ends with:\nno memory")
        train, total = settings[variant.gradient_checkpointing, variant.precompute_ref_log_probs]
        run = make_run(side, train) | {"train_seconds": train * variant.batch, "total_seconds": total + variant.batch}
        return Measured(**{key: value for key, value in run.items() if key != "load_before"})

    bases = [name for name, variant in TRL_VARIANTS.items() if variant.batch == 4]
    tune(bench, "hh", bench.job, TRL_VARIANTS, work)
    best = "trl precompute, no checkpointing"
    assert tried == [*bases, f"{best}, 2×4", f"{best}, 1×8", f"{best}, 8×1", "trl no checkpointing, 1×8"]
    found = bench.record.part("tune", "hh")
    assert choose_variants(found, TRL_VARIANTS) == ["trl", f"{best}, 1×8", "trl no checkpointing, 1×8"]
    assert found[f"{best}, 2×4"] == {"failed": "no memory"}
    tune(bench, "hh", bench.job, TRL_VARIANTS, work)
    assert len(tried) == 8
    bench.record.data["machine"]["memory_gb"] = 16  # GB; the best setting takes 6 with 4 rows at once
    tune(bench, "bundled", bench.job, TRL_VARIANTS, work)
    assert "12 GB" in bench.record.part("tune", "bundled")[f"{best}, 8×1"]["failed"] and f"{best}, 8×1" in tried[:8]
    assert tried[8:].count(f"{best}, 8×1") == 0


def test_a_profile_counts_each_operation_once() -> None:
    def event(name: str, seconds: float, *within: str) -> SimpleNamespace:
        parent = event(within[0], 0, *within[1:]) if within else None
        return SimpleNamespace(name=name, self_cpu_time_total=seconds * 1e6, cpu_parent=parent)

    backward = "autograd::engine::evaluate_function: PairAttentionBackward"
    events = [
        event("aten::mm", 3, "aten::linear"),
        event("aten::bmm", 1, "PairAttention"),
        event("aten::mul", 1, "aten::mul_", backward),
        event("aten::scaled_dot_product_attention", 0.5),
        event("aten::mm", 2, "FrozenHeadLogProbs"),
        event("aten::add", 1),
        event("aten::lerp_", 0.5, "Optimizer.step#AdamW.step"),
    ]
    expected = dict(zip(GROUPS, (0.3, 0.25, 0.2, 0.1, 0.15), strict=True))
    assert add_up(events, 10) == pytest.approx(expected)


def test_a_cold_store_is_empty_and_a_warm_one_has_all() -> None:
    cold = "scoring 16 pairs with the reference; the store has 0 already"
    check_store(COLD, cold)
    check_store(WARM, "step-0 check")
    for side, log in ((COLD, "step-0 check"), (COLD, cold.replace("0 already", "3 already")), (WARM, cold)):
        with pytest.raises(CommandFailed):
            check_store(side, log)


def test_a_process_is_measured(tmp_path: Path) -> None:
    code = "import time; x = bytes(3 * 10**8); print({'loss': '0.5', 'epoch': 1}); time.sleep(0.3); print('done')"
    environment = build_environment(1, tmp_path, ROOT)
    finished = run([sys.executable, "-c", code], environment, tmp_path / "log")
    assert finished.seconds > 0.3 and 0.3 < finished.peak_gb < 5 and "done" in (tmp_path / "log").read_text()
    ((when, event),) = finished.events
    assert event == {"loss": 0.5, "epoch": 1} and finished.started < when < finished.started + finished.seconds - 0.2
    with pytest.raises(CommandFailed, match=r"exit code 3; .*\n.*broken"):
        run([sys.executable, "-c", "print('broken'); raise SystemExit(3)"], environment, tmp_path / "log")
    assert read_event("{'loss': oops}") is read_event("{'a': 1}") is None


def test_packages_on_pythonpath_reach_every_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """dill takes the modules of another folder for the user's own, and then fails on those of pyarrow."""
    packages, own, named = (tmp_path / name for name in ("packages", "own", "lib/site-packages"))
    for folder in (packages, named):
        (folder / "toy-1.dist-info").mkdir(parents=True)
    own.mkdir()
    (packages / "toy.py").write_text("import os\nFILE = __file__\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (packages, own, named, tmp_path / "none"))))
    work = tmp_path / "work"
    for _ in range(2):
        root, linked, *rest = build_environment(1, work, ROOT)["PYTHONPATH"].split(os.pathsep)
        assert root == str(ROOT) and rest == [str(own), str(named), str(tmp_path / "none")]
        assert linked.endswith("/site-packages") and Path(linked).resolve() == packages
    code = "import dill, toy; assert b'FILE' not in dill.dumps(toy); print(toy.FILE)"
    heard: list[str] = []
    run([sys.executable, "-c", code], build_environment(1, work, ROOT), tmp_path / "log", hear=heard.append)
    assert heard == [f"{linked}/toy.py\n"] and carry_packages("", work) == []


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(CommandFailed, match=r"took more than 0 s"):
        run(["bash", "-c", "sleep 60 & echo $!; wait"], os.environ, tmp_path / "log", timeout=0.4)
    child = int((tmp_path / "log").read_text().splitlines()[-1])
    wait_until(lambda: not is_process_alive(child))  # a killed process closes its files shortly before it disappears
    assert time.monotonic() - start < 20


def test_flops_are_those_of_the_formula(tiny_model: str) -> None:
    shape = ModelShape({(4, 8): 2, (8, 4): 1}, (4, 10), layers=2, attention_width=4, lora_rank=1)
    linear, lora, tokens = 3 * 32, 3 * 12, 5 + 3 + 2
    seen = 8**2 / 2 + 5 * 2 + 2**2 / 2
    assert shape.count_flops(5, 3, 2) == (4 * linear + 6 * lora) * tokens + 4 * 40 * 5 + 12 * 2 * 4 * seen
    read = read_shape(tiny_model)
    assert read.layers == 2 and read.attention_width == 64 and read.head[0] == 64
    assert read.linear == {(64, 64): 4, (64, 32): 4, (64, 128): 4, (128, 64): 2}

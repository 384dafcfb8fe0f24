"""Several processes train what one trains, and all end as one does."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from dpo_runner import load_conf, run
from dpo_runner.data.preferences import load_preferences
from dpo_runner.errors import ConfigError, RunError
from dpo_runner.model.blueprint import draw_blueprint
from dpo_runner.records.reading import read_metrics, read_status, read_summary
from dpo_runner.sweep.directory import read_jobs
from dpo_runner.training.callbacks import agreement
from dpo_runner.training.callbacks.movement import take_fingerprints
from dpo_runner.training.engine.token_batches import TokenBatches
from dpo_runner.training.memory.retry import launch_attempts
from dpo_runner.training.memory.settle import settle
from dpo_runner.training.ranks.launch import launch
from tests.support import sweeps
from tests.support.common import make_tiny_run, write_pairs
from tests.support.light_ranks import work, work_again
from tests.support.programs import start_python
from tests.support.ranks import STAGES, fail_in, train
from tests.support.sweeps import finish, furnish, wait_until
from tests.support.trainers import build

ROOT = Path(__file__).parents[3]
CAPTURED = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
TIMES = ("time", "runtime", "per_second")


def overrides_of(pairs: str) -> list[str]:
    """Overrides of a run in fp32 whose last step of an epoch is short: 22 rows, 12 pairs a step."""
    steps = ["training.max_steps=6", "training.save_steps=3", "training.eval_steps=3", "training.bf16=false"]
    return [*make_tiny_run(pairs), *steps, "training.learning_rate=1e-3", "samples.num_prompts=9"]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def distance(one: Path, other: Path) -> float:
    """Return the relative distance of two runs' adapters."""
    a, b = read_weights(one), read_weights(other)
    difference = sum(float((a[name] - b[name]).double().square().sum()) for name in a)
    return (difference / sum(float(weight.double().square().sum()) for weight in a.values())) ** 0.5


def figures_of(folder: Path) -> list[dict[str, float]]:
    return [{key: value for key, value in event.items() if not key.endswith(TIMES)} for event in read_metrics(folder)]


def check_same(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    assert distance(one, other) <= tolerance
    for event, expected in zip(figures_of(one), figures_of(other), strict=True):
        assert event == pytest.approx(expected, rel=tolerance, abs=tolerance)
    assert (one / "samples.jsonl").read_text() == (other / "samples.jsonl").read_text()
    before, after = read_summary(one), read_summary(other)
    for part in ("before", "after"):
        assert before[part] == pytest.approx(after[part], rel=tolerance, abs=tolerance)


def check_bits(one: Path, other: Path) -> None:
    for name in ("adapter/adapter_model.safetensors", "samples.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    assert figures_of(one) == figures_of(other)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the same run by one process and by two, and its data."""
    folder = tmp_path_factory.mktemp("runs")
    overrides = overrides_of(write_pairs(folder))
    run(load_conf([*overrides, f"run_dir={folder}/one", "training.gradient_accumulation_steps=6"]))
    two = ["training.gradient_accumulation_steps=3", "launch.processes=2", "training.report_to=tensorboard"]
    run(load_conf([*overrides, f"run_dir={folder}/two", *two]))
    return folder


def test_two_processes_train_evaluate_and_answer_as_one(runs: Path) -> None:
    check_same(runs / "two", runs / "one")
    status = read_status(runs / "two")
    assert status is not None and status["state"] == "finished" and len(status["processes"]) == 2
    assert not list((runs / "two").glob("ranks/*.stacks"))
    assert len(list((runs / "two" / "tensorboard").iterdir())) == 1, "one process logs"


@pytest.fixture
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the processes import the tests' support."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def start(runs: Path, *further: str, program: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    """Start the run of two processes as a command, or as another program's job."""
    overrides = [*overrides_of(str(runs / "pairs.jsonl")), "training.gradient_accumulation_steps=3", *further]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return start_python(*program, "-m", "dpo_runner", *overrides, env=environment, **CAPTURED)


def find_processes(run_dir: Path) -> list[int]:
    status = read_status(run_dir)
    assert status is not None
    return [each["pid"] for each in status["processes"]]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def check_gone(pids: list[int]) -> None:
    until = time.monotonic() + 10
    while any(map(is_alive, pids)):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_a_launcher_gives_the_same_run(runs: Path, tmp_path: Path) -> None:
    """torchrun twice, as on two nodes."""
    launcher = ("-m", "torch.distributed.run", "--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", "29713")
    nodes = [start(runs, f"run_dir={tmp_path}/r", program=(*launcher, "--node-rank", node)) for node in ("0", "1")]
    output, other = (process.communicate()[0] for process in nodes)
    assert [process.returncode for process in nodes] == [0, 0], output + other
    assert output.count("step-0 check") == 1 and "2 processes" in output and "step-0 check" not in other
    check_bits(tmp_path / "r", runs / "two")


def test_the_slurm_script_starts_the_processes(runs: Path, tmp_path: Path) -> None:
    """The documented command, run as srun would on a node with two tasks; a dry run joins the processes and no more."""
    script = re.search(r"srun bash -c '(.*?)'", (ROOT / "docs/processes.md").read_text(), flags=re.DOTALL)
    assert script is not None
    shrunk = " ".join([*overrides_of(str(runs / "pairs.jsonl")), "dry_run=true"])
    command = (
        script[1].replace("python", sys.executable).replace("model=mistral", shrunk).replace("runs/", f"{tmp_path}/")
    )
    fixed = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29714",
        "SLURM_NTASKS": "2",
    }
    tasks = [{**fixed, "SLURM_PROCID": task, "SLURM_LOCALID": task} for task in ("0", "1")]
    nodes = [subprocess.Popen(["bash", "-c", command], env=task, text=True, **CAPTURED) for task in tasks]
    output, other = (process.communicate()[0] for process in nodes)
    assert [process.returncode for process in nodes] == [0, 0], output + other
    assert "x 2 processes" in " ".join(output.split()) and not other


def kill_second(run_dir: Path) -> None:
    while not (run_dir / "checkpoints/checkpoint-3").exists():
        time.sleep(0.01)
    os.kill(find_processes(run_dir)[1], signal.SIGKILL)


@pytest.mark.usefixtures("importable")
def test_kills_and_signals_end_all_processes_and_change_nothing(runs: Path, tmp_path: Path) -> None:
    path, again = tmp_path / "r", ("launch.processes=2", f"run_dir={tmp_path}/r")
    conf = load_conf([*overrides_of(str(runs / "pairs.jsonl")), "training.gradient_accumulation_steps=3", *again])

    killer = threading.Thread(target=kill_second, args=(path,), daemon=True)
    killer.start()
    told = "process 1 was killed by SIGKILL; the same command continues the run"
    with pytest.raises(RunError, match=f"^{told}$") as caught:
        run(conf)
    killer.join()
    assert caught.value.exit_code == 137
    check_gone(find_processes(path))
    status = read_status(path)
    assert status is not None and status["state"] == "failed" and told in status["error"]

    signals = ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138), (signal.SIGTERM, 143))
    for turn, (number, code) in enumerate(signals):
        process = start(runs, *again)
        assert process.stdout is not None
        while "continuing from" not in process.stdout.readline():
            assert process.poll() is None
        pids = find_processes(path)
        os.kill(process.pid if turn else pids[1], number)  # to the command, or to one of its processes alone
        output = process.communicate()[0]
        assert process.returncode == code, output
        assert output.count("error: ") == 1 and "error: interrupted; continue with the same command" in output
        check_gone(pids)

    run(conf)
    check_bits(path, runs / "two")


def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    code = (
        "from functools import partial; from dpo_runner import load_conf; from pathlib import Path;"
        "from dpo_runner.training.ranks.launch import launch; from tests.support.light_ranks import work;"
        "launch(partial(work, load_conf(['training.use_cpu=true']), 'a hang'), 2, Path('r'))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], env=environment)
    while len(children := psutil.Process(process.pid).children()) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    check_gone([child.pid for child in children])


def test_another_number_of_processes_continues_a_run_with_as_many_pairs_a_step(runs: Path, tmp_path: Path) -> None:
    overrides = [*overrides_of(str(runs / "pairs.jsonl")), f"run_dir={tmp_path}/r"]
    shutil.copytree(runs / "two", tmp_path / "r")
    for name in ("summary.json", "adapter", "checkpoints/checkpoint-6"):
        path = tmp_path / "r" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    status = json.loads((tmp_path / "r" / "status.json").read_text())
    (tmp_path / "r" / "status.json").write_text(json.dumps({**status, "state": "interrupted"}))
    with pytest.raises(ConfigError, match=r"make 6 pairs a step, and the run in .* has 12"):
        run(load_conf([*overrides, "training.gradient_accumulation_steps=3"]))
    run(load_conf([*overrides, "training.gradient_accumulation_steps=6"]))
    check_same(tmp_path / "r", runs / "one")


@pytest.mark.usefixtures("importable")
def test_other_trainings_are_those_of_one_process_too(
    runs: Path, tmp_path: Path, sft_adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TRL's batches, all weights, a bad row, whose step all skip, a merged base; each process has its own dropout."""
    few = ["samples.num_prompts=0", "training.save_strategy=no", "training.max_steps=3"]
    overrides = [*overrides_of(str(runs / "pairs.jsonl")), *few]
    variants = {
        "trl": ["engine.shared_prefix=false", "training.loss_type=[sigmoid,sft]", "engine.reference_store=false"],
        "all": ["lora=none", "training.learning_rate=1e-5"],
        "bad": ["checks.on_nonfinite=skip_batch", "checks.max_skipped_batches=9"],
        "merged": [f"model.adapter={sft_adapter}", "model.adapter_mode=merge", "lora=r16"],
        "dropout": ["lora.lora_dropout=0.5"],
    }
    monkeypatch.setenv("DPO_RUNNER_CACHE", str(tmp_path / "cache"))  # empty: the processes fill it
    row = build(overrides, tmp_path / "unused").train_dataset[7]
    bad_row = [*row["prompt_ids"], *row["chosen_ids"]]
    confs = {
        (name, count): load_conf(
            [
                *(*overrides, *variants[name], f"run_dir={tmp_path}/{name}-{count}", f"launch.processes={count}"),
                f"training.gradient_accumulation_steps={6 // count}",
            ]
        )
        for name in variants
        for count in (1, 2)
    }
    two = [confs[name, 2] for name in variants]
    launch(partial(train, two, bad_row=bad_row, draws=tmp_path / "draws"), 2, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TokenBatches, "compute_loss", TokenBatches.compute_loss)  # undone at the end
        train([confs[name, 1] for name in ("trl", "all", "bad", "merged")], bad_row=bad_row)
    draws = [json.loads((tmp_path / f"draws/dropout-2/draws-{number}.json").read_text()) for number in (0, 1)]
    assert len(set(draws[0] + draws[1])) == 6
    for name in ("trl", "all", "bad", "merged"):
        one, other = tmp_path / f"{name}-1", tmp_path / f"{name}-2"
        assert figures_of(one)
        for event, expected in zip(figures_of(other), figures_of(one), strict=True):
            assert event == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert distance(tmp_path / "bad-2", tmp_path / "bad-1") < 1e-5
    dumps = [json.loads(next((tmp_path / f"bad-{count}/nonfinite").iterdir()).read_text()) for count in (1, 2)]
    assert dumps[0]["pairs"][0].keys() == dumps[1]["pairs"][0].keys()
    assert [pair["row"] for pair in dumps[0]["pairs"] if not pair["finite"]] == [7]
    assert [pair["source"] for pair in dumps[0]["pairs"]] == [pair["source"] for pair in dumps[1]["pairs"]]


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("an error", r"^process 1: ValueError: a fault of one process; its output is in ranks/1\.log$"),
        ("an exit", r"^process 1: the run called sys.exit\(3\); its output is in ranks/1\.log$"),
        ("a hang", r"^no step for 0\.03 minutes \(launch\.timeout\)$"),
    ],
)
def test_a_fault_of_one_process_ends_all_with_one_line(tmp_path: Path, fault: str, told: str) -> None:
    conf = load_conf(["model=tiny_random", "training.use_cpu=true", "launch.timeout=0.03"])
    begin = time.monotonic()
    with pytest.raises(RunError, match=told):
        launch(partial(work, conf, fault), 2, tmp_path / "r")
    assert time.monotonic() - begin < 60


@pytest.mark.usefixtures("importable")
def test_what_a_launcher_asks_for_in_vain_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ConfigError, match=r"^ACCELERATE_USE_FSDP=true: several processes share the work of a step"):
        launch(partial(work, load_conf(["training.use_cpu=true"]), None), 2, tmp_path / "r")


def test_what_cannot_be_passed_to_processes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"^`launch\.processes=2`: the run cannot be passed to other processes; "):
        launch(lambda: None, 2, tmp_path)
    monkeypatch.setattr(sys.modules["__main__"], "job", type("job", (), {"__module__": "__main__"}), raising=False)
    with pytest.raises(ConfigError, match="a callback of the program's main file cannot be passed"):
        launch(sys.modules["__main__"].job, 2, tmp_path)  # type: ignore[attr-defined]


@pytest.mark.usefixtures("importable")
def test_processes_exchange_gradients_and_values_until_a_run_has_failed(tmp_path: Path) -> None:
    conf = load_conf(["training.use_cpu=true"])
    launch(partial(work, conf, None), 2, tmp_path / "r")
    launch(partial(work_again, conf, tmp_path), 2, tmp_path / "r")
    assert len(list(tmp_path.glob("refused-*"))) == 2


def test_weights_that_differ_end_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    for same, told in ((model, None), (other, "after step 1 process 1 has other weights than process 0: 2 of 2")):
        monkeypatch.setattr(agreement, "gather", lambda mine, same=same: [mine, take_fingerprints(same)])
        with nullcontext() if told is None else pytest.raises(RunError, match=told):
            agreement.check_agreement(model, 1)


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize(("stage", "distributed"), list(zip(STAGES, ["ddp", "fsdp2"] * 3, strict=True)))
def test_an_error_of_one_process_at_any_stage_ends_all(
    runs: Path, tmp_path: Path, stage: str, distributed: str
) -> None:
    overrides = [*overrides_of(str(runs / "pairs.jsonl")), "training.save_steps=1", "training.eval_steps=1"]
    conf = load_conf([*overrides, f"distributed={distributed}", "launch.processes=2", f"run_dir={tmp_path}/r"])
    with pytest.raises(RunError, match=rf"^process 1: ValueError: a fault in {stage}; its output is in ranks/1\.log$"):
        launch(partial(fail_in, stage, conf, tmp_path), 2, tmp_path / "r")
    assert time.time() - float((tmp_path / "failed").read_text()) < 10
    status = read_status(tmp_path / "r")
    assert status is not None and status["state"] == "failed" and f"a fault in {stage}" in status["error"]


@pytest.mark.usefixtures("importable")
@pytest.mark.parametrize("distributed", ["ddp", "fsdp2"])
def test_too_little_memory_in_one_process_starts_all_again_with_smaller_batches(
    runs: Path, tmp_path: Path, distributed: str
) -> None:
    overrides = [*overrides_of(str(runs / "pairs.jsonl")), "training.gradient_accumulation_steps=3"]
    overrides += [f"distributed={distributed}"]
    retry = ["checks.on_out_of_memory=smaller_batch", "launch.processes=2", f"run_dir={tmp_path}/r"]
    conf = load_conf([*overrides, *retry])
    blueprint = draw_blueprint(conf)
    data = load_preferences(conf, blueprint.tokenizer, blueprint.template_origin)
    settled = settle(conf, blueprint, data.shape(), tmp_path / "r/checkpoints")
    warnings: list[str] = []
    launch_attempts(partial(train, [conf], short_of_memory=True), settled, tmp_path / "r", warnings.append)
    assert "starting again with engine.max_tokens_per_micro_batch=" in warnings[0]
    assert read_summary(tmp_path / "r")["out_of_memory"]
    check_same(tmp_path / "r", runs / "one")


def test_the_processes_of_a_sweeps_job_end_with_its_worker_and_the_sweep_goes_on(tmp_path: Path) -> None:
    furnish(tmp_path)
    sweep, held = tmp_path / "s", tmp_path / "held"
    points = ("training.beta=0.1,0.2", "launch.processes=2", "sweep.dir=s")
    process = sweeps.start(tmp_path, *points, HOLD="0.1")
    wait_until(lambda: held.exists() and read_jobs(sweep)[0].checkpoint == 2)
    pids = find_processes(sweep / read_jobs(sweep)[0].name)
    assert len(pids) == 2
    [worker] = psutil.Process(process.pid).children()
    worker.kill()
    check_gone(pids)
    held.unlink()
    code, _, err = finish(process)
    assert code == 1 and "its process was killed by SIGKILL" in err
    assert [job.state for job in read_jobs(sweep)] == ["failed", "finished"]
    code, out, err = finish(sweeps.start(tmp_path, *points))
    assert code == 0 and out.count("started ") == 1 and "continues at step 2" in out, err
    assert [job.state for job in read_jobs(sweep)] == ["finished"] * 2
    for job in read_jobs(sweep):
        pids = find_processes(sweep / job.name)
        assert len(pids) == 2
        check_gone(pids)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["launch.processes=x"], "`launch.processes=x`: must be a number, or auto"),
        (["launch.processes=0"], "`launch.processes=0`: must be at least 1"),
        (["launch.processes=2", "model.device_map=auto"], "`model.device_map=auto`: each of launch.processes has one"),
    ],
)
def test_what_processes_cannot_do_is_refused(overrides: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        load_conf(overrides)

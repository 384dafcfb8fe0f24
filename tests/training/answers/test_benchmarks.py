"""Benchmarks of lm-evaluation-harness in a run, in its evaluation, and as what a search improves and guards."""

import io
import json
import re
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from dpo_runner import load_conf, run
from dpo_runner.compare.comparison import choose_objective, compare_runs
from dpo_runner.compare.table import show_table, to_csv
from dpo_runner.config.compose import compose_point
from dpo_runner.config.metrics import direction_of
from dpo_runner.config.sections.benchmarks import BenchmarksConf
from dpo_runner.config.sections.sweep import SearchConf, SweepConf
from dpo_runner.errors import ConfigError, RunError
from dpo_runner.evaluate.__main__ import main as evaluate_main
from dpo_runner.evaluate.evaluation import evaluate
from dpo_runner.io.files import write_json
from dpo_runner.records.directory import update_status
from dpo_runner.records.reading import read_metrics, read_summary
from dpo_runner.records.runs import read_runs
from dpo_runner.sweep.directory import read_job
from dpo_runner.sweep.points import digest_config
from dpo_runner.sweep.screen import SweepScreen
from dpo_runner.sweep.search.trials import Search
from dpo_runner.training.answers.benchmarks import scores as kept_scores
from dpo_runner.training.answers.benchmarks.prefixes import score_continuations
from dpo_runner.training.answers.benchmarks.scores import TaskScores, compare
from dpo_runner.training.answers.benchmarks.tasks import BASICS, check_tasks, load_tasks
from scripts.make_benchmarks import MAKERS, build_text
from tests.support.common import make_tiny_run, run_main, write_pairs
from tests.support.families import make_family
from tests.support.programs import run_python
from tests.support.run_folders import write_run
from tests.support.spaces import space_of

ACC, SAID = "benchmarks/mine_choice/acc", "benchmarks/mine_said/exact_match/first"

CHOICE = """
task: mine_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, train: {rows}}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: mcc, aggregation: matthews_corrcoef, higher_is_better: true}}
"""
SAYS = """
task: mine_said
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: question
doc_to_target: "a"
generation_kwargs: {{until: ["."], max_gen_toks: 4}}
filter_list:
  - {{name: first, filter: [{{function: regex, regex_pattern: "(.)"}}, {{function: take_first}}]}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """
task: mine_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list:
  - {{metric: word_perplexity}}
"""
GROUP = """
group: mine
task: [mine_choice]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
"""


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tasks of all kinds, on ten documents."""
    folder = tmp_path_factory.mktemp("tasks")
    choices = ["an old house", "an old horse", "no", "never ever"]
    rows = [{"question": f"What is number {n}?", "choices": choices, "label": n % 4} for n in range(10)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in {"choice": CHOICE, "says": SAYS, "rolling": ROLLING}.items():
        (folder / f"{name}.yaml").write_text(text.format(rows=folder / "rows.jsonl"))
    (folder / "group.yaml").write_text(GROUP)
    return folder


@pytest.fixture(scope="module")
def trained(own_tasks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has scored its tasks before, at a step and after; another without them is beside it."""
    folder = tmp_path_factory.mktemp("runs")
    tiny = [*make_tiny_run(write_pairs(folder)), "training.learning_rate=3e-2", "training.bf16=false", "wandb=offline"]
    tasks = [f"benchmarks.include_path={own_tasks}", "benchmarks.tasks=[mine,mine_said,mine_rolling]"]
    run(load_conf([*tiny, *tasks, "benchmarks.steps=[2]", f"run_dir={folder}/with"]))
    run(load_conf([*tiny, f"run_dir={folder}/without"]))
    return folder / "with"


def score_alone(model: Any, tokenizer: Any, own_tasks: Path, names: list[str], **settings: Any) -> dict[str, Any]:
    """Return the figures of the harness by itself."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3, softmax_dtype="float32")
    manager = TaskManager(include_path=str(own_tasks), include_defaults=False)
    told = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0, **settings)
    return told["results"]


def test_policy_and_reference_have_the_harnesss_own_figures(
    trained: Path, own_tasks: Path, tiny_model: str, tokenizer: Any
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    names = ["mine", "mine_said", "mine_rolling"]
    before = score_alone(base, tokenizer, own_tasks, names, apply_chat_template=True)
    tuned = PeftModel.from_pretrained(base, trained / "adapter")
    after = score_alone(tuned, tokenizer, own_tasks, names, apply_chat_template=True)
    summary = read_summary(trained)
    for alone, figures in ((before, summary["before"]), (after, summary["after"])):
        assert figures[ACC] == pytest.approx(alone["mine_choice"]["acc,none"], abs=1e-6)
        assert figures["benchmarks/mine/acc"] == pytest.approx(alone["mine"]["acc,none"], abs=1e-6)
        assert figures["benchmarks/mine_choice/mcc"] == pytest.approx(alone["mine_choice"]["mcc,none"], abs=1e-6)
        assert figures[SAID] == pytest.approx(alone["mine_said"]["exact_match,first"], abs=1e-6)
        perplexity = alone["mine_rolling"]["word_perplexity,none"]
        assert figures["benchmarks/mine_rolling/word_perplexity"] == pytest.approx(perplexity, rel=1e-4)
    assert before["mine_rolling"] != after["mine_rolling"]  # otherwise both could be scores of the same model
    result = evaluate(trained, ["samples.num_prompts=0"])["benchmarks"]
    for side, figures in (("reference", summary["before"]), ("policy", summary["after"])):
        found = {name: value for name, value in figures.items() if name.startswith("benchmarks/")}
        assert result[side] == pytest.approx(found, rel=1e-4, abs=1e-5) and ACC in found
    [record] = read_runs([trained])[0]
    assert record.metrics[ACC] == result["policy"][ACC]


@pytest.mark.parametrize(
    ("settings", "is_plain"),
    [({"repetition_penalty": 1.0}, True), ({"repetition_penalty": 1.3}, False), ({"max_new_tokens": 5}, False)],
    ids=str,
)
def test_answers_are_the_harnesss_own(
    settings: dict[str, Any], is_plain: bool, tiny_model: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain greedy ones from our sampler; others, as the model's files may ask for, from the harness itself."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from dpo_runner.training.answers.benchmarks import harness

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    model.generation_config.update(**settings, do_sample=True, temperature=0.7)
    sampled: list[tuple[int, int]] = []
    sample = harness.sample_answers

    def note(live: Any, prompts: Any, *given: Any) -> Any:
        sampled.append((len(prompts), given[-1]))
        return sample(live, prompts, *given)

    monkeypatch.setattr(harness, "sample_answers", note)

    def answer(lm: Any, until: list[str]) -> list[str]:
        asked = {"until": until, "max_gen_toks": 12, "do_sample": False}
        texts = ["What is the sum?", "What is the", "What is the name of the last of them all?", "What is the end"]
        texts += [f"What is the {number}?" for number in range(40)]
        requests = [Instance("generate_until", {}, (text, asked), at) for at, text in enumerate(texts)]
        return list(lm.generate_until(requests, disable_tqdm=True))

    alone = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4)
    free = answer(alone, [])
    until = [free[0][3:5], free[2][-1]]
    expected = answer(alone, until)
    assert expected != free and len(set(map(len, expected))) > 1
    lm = harness.LiveModel(model, tokenizer, 1, None)
    assert answer(lm, until) == expected and lm.batch_size == 1
    if is_plain:
        common = len(tokenizer("What is the ").input_ids)
        assert sampled[0] == (9, common) and sum(count for count, _ in sampled) == 44, "512 tokens hold 9 of 54"
    else:
        assert sampled == []


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_neox", "gpt_neo", "mpt", "mamba", "lfm2"])
def test_windows_and_other_caches_give_the_harnesss_own_figures(family: str, tokenizer: Any, tmp_path: Path) -> None:
    """Windows and ALiBi may count padding, and states of linear attention cannot be repeated like keys and values."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from dpo_runner.training.answers.benchmarks.harness import LiveModel

    window = {"sliding_window": 24} if family in ("mistral", "gemma3") else {}
    model = AutoModelForCausalLM.from_pretrained(make_family(family, tokenizer, tmp_path, **window)).eval()
    texts = [f"These all begin alike{' and on' * at}." for at in range(6)]
    scored = [
        Instance("loglikelihood", {}, (text, end), at) for text in texts for at, end in enumerate((" no", " yes"))
    ]
    settings = {"until": [], "max_gen_toks": 12, "do_sample": False}
    answered = [Instance("generate_until", {}, (text, settings), at) for at, text in enumerate(texts)]
    ours, alone = LiveModel(model, tokenizer, 1, None), HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    for (logp, greedy), expected in zip(ours.loglikelihood(scored), alone.loglikelihood(scored), strict=True):
        assert logp == pytest.approx(expected[0], abs=1e-4) and greedy == expected[1]
    assert ours.generate_until(answered) == alone.generate_until(answered)
    assert ours._shares == (family not in ("mamba", "lfm2")) and ours._shares_start == (family == "gpt_neox")


def test_short_requests_share_a_forward(tiny_model: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    shapes: list[torch.Size] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    draw = torch.Generator().manual_seed(0)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 250, (length,), generator=draw).tolist())

    requests = [(context, ids(2)) for length in (30, 30, 600) for context in [ids(length)] for _ in range(4)]
    found = score_continuations(model, requests, 2, 0)
    assert shapes == [(1, 600), (2, 1), (2, 1), (2, 30), (8, 1)]
    for (context, answer), (logp, _) in zip(requests, found, strict=True):
        with torch.no_grad():
            logps = model(input_ids=torch.tensor([[*context, *answer]])).logits[0].log_softmax(dim=-1)
        alone = sum(logps[len(context) - 1 + at, token].item() for at, token in enumerate(answer))
        assert logp == pytest.approx(alone, abs=1e-4)


def test_scoring_changes_nothing_in_training_and_is_logged(trained: Path) -> None:
    weights, others = (
        load_file(trained.with_name(name) / "adapter/adapter_model.safetensors") for name in ("with", "without")
    )
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
    events = read_metrics(trained)
    losses, plain = (
        [e["loss"] for e in read_metrics(trained.with_name(name)) if "loss" in e] for name in ("with", "without")
    )
    assert losses == plain
    scored = {event["step"]: event[ACC] for event in events if ACC in event}
    steps, summary = read_summary(trained)["steps"], read_summary(trained)
    assert list(scored) == [0, 2, steps] and steps > 2
    assert (scored[0], scored[steps]) == (summary["before"][ACC], summary["after"][ACC])
    [curve] = [record.curves[ACC] for record in read_runs([trained])[0]]
    assert curve[0] == [0, 2, steps]
    card = (trained / "adapter/README.md").read_text()
    assert "| mine_choice/acc | " in card and "difference to the reference" in card


def test_what_was_scored_is_not_scored_again(own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By another run on the same base nothing of the reference, and after a failure the finished tasks are kept."""
    monkeypatch.setattr(kept_scores, "cache_dir", lambda: tmp_path / "cache")
    from dpo_runner.training.answers.benchmarks import harness

    scored: list[str] = []
    run_task = harness.run_task

    def note(lm: Any, task: Any, conf: Any) -> Any:
        if broken == task.task_name:
            raise ValueError("no answer")
        scored.append(task.task_name)
        return run_task(lm, task, conf)

    monkeypatch.setattr(harness, "run_task", note)
    tiny = [*make_tiny_run(write_pairs(tmp_path)), f"benchmarks.include_path={own_tasks}", "benchmarks.limit=2"]
    tasks = "benchmarks.tasks=[mine_choice,mine_said]"
    broken = "mine_said"
    with pytest.raises(RunError, match="benchmarks: mine_said failed; no answer"):
        run(load_conf([*tiny, tasks, "run_dir=one"]))
    broken = ""
    run(load_conf([*tiny, tasks, "run_dir=one"]))
    assert scored == ["mine_choice", "mine_said", "mine_choice", "mine_said"]
    run(load_conf([*tiny, tasks, "run_dir=two", "seed=1", "training.learning_rate=1e-2"]))
    assert scored[4:] == ["mine_choice", "mine_said"]  # the tuned model alone
    evaluate(Path("two"), ["samples.num_prompts=0"])
    assert len(scored) == 6  # both sides are known from the run
    run(load_conf([*tiny, tasks, "run_dir=three", "seed=1", "training.learning_rate=1e-2", "benchmarks.num_fewshot=1"]))
    assert len(scored) == 10


def test_a_loaded_policy_has_the_scores_of_its_run(
    own_tasks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last digit, since both round alike. PEFT's own layers moved arithmetic of the default model by 0.05."""
    monkeypatch.setattr(kept_scores, "cache_dir", lambda: tmp_path / cache)
    tasks = [f"benchmarks.include_path={own_tasks}", "benchmarks.tasks=[mine_rolling]", "training.learning_rate=3e-2"]
    cache = "one"
    run(load_conf([*make_tiny_run(write_pairs(tmp_path)), "model.dtype=bfloat16", *tasks, "run_dir=r"]))
    cache = "other"
    found = evaluate(Path("r"), ["samples.num_prompts=0"])["benchmarks"]["policy"]
    name = "benchmarks/mine_rolling/word_perplexity"
    assert (tmp_path / "other/benchmarks").is_dir() and found[name] == read_summary(Path("r"))["after"][name]


def test_differences_are_paired_over_documents() -> None:
    mine = {"t": TaskScores({"acc,none": 0.5, "acc_stderr,none": 0.3, "f1,none": 0.5, "f1_stderr,none": 0.3},
                            {"acc,none": [1.0, 0.0, 1.0, 0.0]})}  # fmt: skip
    theirs = {"t": TaskScores({"acc,none": 0.75, "acc_stderr,none": 0.4, "f1,none": 0.25, "f1_stderr,none": 0.4},
                              {"acc,none": [1.0, 1.0, 1.0, 0.0]})}  # fmt: skip
    assert compare(mine, theirs) == {
        "benchmarks/t/acc_diff": -0.25,
        "benchmarks/t/acc_diff_ci95": pytest.approx(1.96 * 0.5 / 2, abs=1e-6),  # of 0, -1, 0, 0: sd 1/2
        "benchmarks/t/f1_diff": 0.25,
        "benchmarks/t/f1_diff_ci95": pytest.approx(1.96 * 0.5, abs=1e-6),
    }


def test_the_gate(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(trained)
    less = ["samples.num_prompts=0", "benchmarks.limit=8", "benchmarks.tasks=[mine_rolling]"]
    assert run_main(evaluate_main, folder, "--gate", "benchmarks.max_drop=1", *less) == 1
    told = capsys.readouterr()
    assert "gate: mine_rolling/word_perplexity went from " in told.err and "max_drop allows 1" in told.err
    assert run_main(evaluate_main, folder, "--gate", "benchmarks.max_drop=1", *less[:2], "benchmarks.tasks=[mine]") == 0
    assert "no task fell by more than 1" in capsys.readouterr().out


def test_answers_for_judges(trained: Path, tmp_path: Path) -> None:
    """Of both sides, in the projects' own formats; an answer is part of what the next turn is asked after."""
    files = {
        "alpaca_eval": json.dumps([{"instruction": "Why?", "dataset": "own", "output": "So.", "generator": "other"}]),
        "mt_bench": json.dumps({"question_id": 81, "category": "writing", "turns": ["Why?", "Where?"]}) + "\n",
        "arena_hard": json.dumps({"uid": "a1", "category": "hard_prompt", "prompt": "Why?"}) + "\n",
    }
    written: dict[str, list[dict[str, Any]]] = {}
    for project, text in files.items():
        (tmp_path / project).write_text(text)
        asked = [f"benchmarks.answers={project}", f"benchmarks.questions={tmp_path / project}"]
        result = evaluate(trained, ["samples.max_new_tokens=5", *asked, "benchmarks.tasks=[mine_said]"])
        folder = max((trained / "evaluations").iterdir(), key=lambda path: path.stat().st_mtime)
        texts = [(folder / file).read_text() for file in result["answers"]["files"]]
        rows = [json.loads(text) for text in texts]
        written[project] = [row[0] if isinstance(row, list) else row for row in rows]
    policy, reference = written["alpaca_eval"]
    assert policy.keys() == {"instruction", "dataset", "output", "generator"} and policy["output"] != "So."
    assert (policy["generator"], reference["generator"]) == ("dpo", "dpo-reference")
    assert policy["output"] != reference["output"] and policy["dataset"] == "own"
    answer = written["mt_bench"][0]
    assert answer["question_id"] == 81 and answer["model_id"] == "dpo"
    assert answer["choices"][0]["index"] == 0 and len(answer["choices"][0]["turns"]) == 2
    assert answer["choices"][0]["turns"][0] == policy["output"]
    hard = written["arena_hard"][1]
    assert (hard["uid"], hard["model"]) == ("a1", "dpo-reference")
    assert hard["messages"] == [
        {"role": "user", "content": "Why?"}, {"role": "assistant", "content": {"answer": reference["output"]}}
    ]  # fmt: skip
    told = "`benchmarks.questions=.*arena_hard`: row 1 is not of mt_bench, whose rows have question_id and turns"
    with pytest.raises(ConfigError, match=told):
        evaluate(trained, ["benchmarks.answers=mt_bench", f"benchmarks.questions={tmp_path}/arena_hard"])
    with pytest.raises(ConfigError, match="must be set too"):
        evaluate(trained, ["benchmarks.answers=mt_bench"])


def write_point(path: Path, score: float, loss: float, **settings: Any) -> None:
    """Write a point of a guarded search: its score in one task, and what it lost in another."""
    write_run(
        path,
        accuracy=1.0,
        sweep={"search": {"guard": {"benchmarks/facts/acc": -0.01}}},
        training__beta=score,
        **settings,
    )
    summary = read_summary(path)
    summary["after"] |= {"benchmarks/said/acc": score, "benchmarks/said/acc_stderr": 0.1}
    summary["after"] |= {
        "benchmarks/facts/acc": 0.7 + loss,
        "benchmarks/facts/acc_diff": loss,
        "benchmarks/facts/acc_diff_ci95": 0.03,
    }
    (path / "summary.json").write_text(json.dumps(summary))


def test_a_comparison_keeps_to_the_guard(tmp_path: Path) -> None:
    for name, (score, loss) in {"worst": (0.1, 0.0), "best": (0.5, -0.01), "ruined": (0.9, -0.2)}.items():
        write_point(tmp_path / name, score, loss)
    runs, _ = read_runs([tmp_path])
    comparison = compare_runs(runs, choose_objective("benchmarks/said/acc", None, runs))
    assert [row.name for row in comparison.rows] == ["ruined", "best", "worst"]
    assert comparison.best is not None and comparison.best.name == "best"
    assert comparison.find_best_run().path.name == "best"
    text = io.StringIO()
    show_table(comparison, Console(file=text, width=200))
    assert re.search(r"ruined .*finished, guarded.* 0.9 .*-0.200 \(-0.230 to -0.170\)", text.getvalue())
    assert "ruined: cannot win, sweep.search.guard excludes it: facts/acc -0.2 (guard -0.01)" in text.getvalue()
    assert comparison.notes[-1].startswith("ruined: cannot win")
    write_point(tmp_path / "more", 0.2, 0.0, benchmarks={"limit": 5})
    notes = compare_runs(runs := read_runs([tmp_path])[0], choose_objective("benchmarks/said/acc", None, runs)).notes
    assert "benchmarks.limit or num_fewshot differ between the runs; their scores cannot be compared" in notes
    assert "benchmarks/said/acc_stderr" in to_csv(comparison).splitlines()[0]


def test_a_search_keeps_to_the_guard(tmp_path: Path) -> None:
    settings = {"objective": "benchmarks/said/acc", "guard": {"benchmarks/facts/acc": -0.01}, "sampler": "tpe"}
    search = build_search(tmp_path, "training.beta=interval(0.1,0.9)", trials=4, **settings)
    after = [(0.2, 0.0), (0.9, -0.02), (0.5, -0.01)]
    jobs = search.take(4)
    for (name, _), (score, loss) in zip(jobs, after, strict=False):
        figures = {"benchmarks/said/acc": score, "benchmarks/facts/acc_diff": loss}
        finish_job(search, tmp_path / name, figures)
    finish_job(search, tmp_path / jobs[3][0], {"benchmarks/said/acc": 1.0})
    assert search.refused()[0].endswith("has no benchmarks/said/acc, or no difference to the reference for the guard")
    assert search.find_best() == (jobs[2][0], 0.5)
    constraints = [trial.system_attrs.get("constraints") for trial in search.study.trials[:3]]
    assert constraints == [pytest.approx([-0.01]), pytest.approx([0.01]), pytest.approx([0.0])]
    states = [read_job(tmp_path / name) for name, _ in jobs]
    screen = SweepScreen(console=Console(file=(text := io.StringIO()), width=200))
    conf = replace(
        load_conf([]), sweep=SweepConf(search=SearchConf(**settings)), benchmarks=BenchmarksConf(tasks=["a"])
    )
    screen.show_result(tmp_path, states, ["", "", "", ""], conf)
    assert "finished, cannot win: facts/acc -0.02 (guard -0.01)" in text.getvalue()


def test_wandb_has_them_under_their_own_names(trained: Path) -> None:
    [file] = trained.glob("wandb/offline-run-*/*.wandb")
    lines = run_python("-m", "wandb", "leet", "inspect", "--json", str(file)).stdout.splitlines()
    records = [json.loads(line) for line in lines]
    history = [record["history"]["item"] for record in records if "history" in record]
    assert any("train/loss" in event for event in history)
    logged = [event for event in history if ACC in event]
    assert [event["train/global_step"] for event in logged] == [0, 2, read_summary(trained)["steps"]]
    assert [event[ACC] for event in logged] == [event[ACC] for event in read_metrics(trained) if ACC in event]
    [summary] = [r["summary"]["update"] for r in records if f"after/{ACC}" in r.get("summary", {}).get("update", {})]
    assert summary[f"after/{ACC}"] == logged[-1][ACC]


def build_search(path: Path, *texts: str, trials: int, **settings: Any) -> Search:
    search = SearchConf(trials=trials, **settings)
    return Search(path, space_of(*texts), SweepConf(search=search), None)


def finish_job(search: Search, path: Path, figures: dict[str, float]) -> None:
    update_status(path, state="finished")
    write_json(path / "summary.json", {"steps": 4, "after": figures})
    search.settle(path.name)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["benchmarks.limit=5"], "`benchmarks.limit=5.0`: has no effect without benchmarks.tasks"),
        (["benchmarks=basics", "benchmarks.limit=2.5"], "`benchmarks.limit=2.5`: must be a whole number"),
        (["benchmarks=basics", "benchmarks.limit=0"], "`benchmarks.limit=0.0`: must be above 0"),
        (["benchmarks=basics", "benchmarks.steps=[0]"], "must be numbers of optimizer steps"),
        (["benchmarks=basics", "benchmarks.include_path=absent"], "there is no such folder"),
        (["benchmarks=basics", "benchmarks.max_drop=-1"], "`benchmarks.max_drop=-1.0`: must be at least 0"),
        (["benchmarks.tasks=[a,a]"], "names a task twice"),
        (["benchmarks=basics", "distributed=fsdp2"], "`benchmarks.tasks`: training.fsdp divides the model"),
    ],
)  # fmt: skip
def test_what_cannot_be_scored_is_refused_before_training(tmp_path: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        run(load_conf([*make_tiny_run(write_pairs(tmp_path)), *overrides, "run_dir=r"]))
    assert not Path("r").exists()


@pytest.mark.slow
def test_a_task_that_is_not_known() -> None:
    """The harness reads the files of all its tasks before it can say so."""
    with pytest.raises(ConfigError, match="no task basics_fact; did you mean `basics_facts`"):
        check_tasks(load_conf(["benchmarks.tasks=[basics_fact]"]))


@pytest.mark.parametrize(
    ("search", "tasks", "expected"),
    [
        ({"objective": "benchmarks/basics_facts/acc"}, [], r"no task is scored; add benchmarks.tasks=\[basics_facts\]"),
        ({"guard": {"eval_loss": 0}}, ["basics"], "must name a metric as benchmarks/TASK/METRIC"),
        ({"objective": "benchmarks/basics_facts/acc_stderr"}, ["basics"], "must name a metric"),
        ({"objective": "benchmarks/basics_facts/odd"}, ["basics"], "`sweep.search.direction`: must be set"),
        ({"guard": {"benchmarks/basics_facts/ac": 0}}, ["basics"],
         "no task has the metric benchmarks/basics_facts/ac; did you mean `benchmarks/basics_facts/acc`?"),
        ({"guard": {"benchmarks/basics_facts/acc": 0}, "sampler": None}, [], "no task is scored"),
        ({"objective": "benchmarks/basics_facts/acc", "pruner": "median"}, ["basics"], "is measured once, at the end"),
    ],
)  # fmt: skip
def test_what_a_search_cannot_read_is_refused(search: dict[str, Any], tasks: list[str], expected: str) -> None:
    settings = SweepConf(search=SearchConf(**{"sampler": "tpe", **search}))
    with pytest.raises(ConfigError, match=expected):
        check_tasks(replace(load_conf([]), sweep=settings, benchmarks=BenchmarksConf(tasks=tasks)))


def test_a_guard_is_written_on_the_command_line() -> None:
    overrides = ("sweep.search.guard={benchmarks/basics_facts/acc: -0.1}", "benchmarks=basics")
    assert compose_point(overrides, None).sweep.search.guards == {"benchmarks/basics_facts/acc": -0.1}
    assert load_conf([]).sweep.search.guards == {}


def test_the_harness_is_needed_only_for_benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version

    def find(name: str) -> str:
        if name == "lm-eval":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr("dpo_runner.config.rules.benchmarks.version", find)
    compose_point.cache_clear()  # another test may have composed the same
    load_conf([])
    with pytest.raises(ConfigError, match=r"and none is installed; pip install 'lm-eval>=0.4.13,<0.5'"):
        load_conf(["benchmarks=basics"])
    monkeypatch.setattr("dpo_runner.config.rules.benchmarks.version", lambda name: "0.5.1")
    with pytest.raises(ConfigError, match=r"and 0.5.1 is installed"):
        load_conf(["benchmarks=basics"])


def test_names_and_directions_of_metrics() -> None:
    for name, better in {
        "ifeval/prompt_level_strict_acc": "maximize", "gsm8k/exact_match/strict-match": "maximize",
        "wikitext/word_perplexity": "minimize", "x/acc_diff": "maximize", "x/odd": None,
    }.items():  # fmt: skip
        assert direction_of(f"benchmarks/{name}") == better
    # a point of a sweep stays the same point if its benchmarks change
    assert digest_config(load_conf(["benchmarks=basics"])) == digest_config(load_conf([]))


def test_the_bundled_rows_are_those_that_the_script_makes() -> None:
    loaded = load_tasks(BenchmarksConf(tasks=["basics"]))
    assert sorted(loaded.tasks) == sorted(f"basics_{name}" for name in MAKERS)
    for name in MAKERS:
        written = (BASICS / f"{name}.jsonl").read_text(encoding="utf-8")
        assert build_text(name) == written
        rows = [json.loads(line) for line in written.splitlines()]
        assert (
            len({json.dumps(row, sort_keys=True) for row in rows})
            == len(rows)
            == len(loaded.tasks[f"basics_{name}"].eval_docs)
        )
        assert all(len(set(row["choices"])) == 4 for row in rows if "choices" in row)
    assert sum(len(build_text(name)) for name in MAKERS) < 1e6

"""The model card: metadata that a hub accepts, the run's figures, and code that loads the right model."""

import json
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
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.export.__main__ import main as export
from dpo_runner.model.card.card import write_card
from dpo_runner.model.card.facts import LABELS, RunFacts, list_citations, read_facts
from dpo_runner.model.result import load_tuned_model
from dpo_runner.records.reading import read_run_conf, read_summary
from tests.support.common import make_tiny_run

SECRET = "hf_" + "A1b2C3d4" * 4
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, sft_adapter: str) -> Path:
    """A folder with pairs and an SFT adapter, in which runs are started with relative names."""
    folder = tmp_path_factory.mktemp("home")
    rows: list[dict[str, str]] = [
        {"prompt": f"What is {n} plus {n}?", "chosen": f"It is {2 * n}.", "rejected": "Who knows?"} for n in range(40)
    ]
    rows.append({"prompt": "Why?", "chosen": "Same.", "rejected": "Same."})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(sft_adapter, folder / "sft")
    return folder


@pytest.fixture
def finished(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Runs by their overrides, each run once; tests must not modify them."""
    monkeypatch.chdir(home)

    def make(*overrides: str) -> str:
        name = "runs/" + (re.sub(r"\W+", "-", "_".join(overrides)) or "plain")
        if not Path(name).exists():
            shared = [*make_tiny_run("pairs.jsonl"), f"run_dir={name}"]
            run(load_conf([*shared, "training.learning_rate=1e-2", "training.warmup_steps=0", *overrides]))
        return name

    return make


@pytest.fixture
def facts(finished: Callable[..., str]) -> RunFacts:
    path = Path(finished())
    return read_facts(path, read_run_conf(path), "the base without the adapter", read_summary(path))


def load(folder: str | Path) -> ModelCard:
    return ModelCard.load(Path(folder, "README.md"))


def write(facts: RunFacts, folder: Path, name: str = "me/tuned") -> ModelCard:
    """Write the card of an adapter's folder."""
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "elsewhere"}')
    write_card(folder, facts, name)
    return load(folder)


def from_hub(facts: RunFacts, **data: Any) -> RunFacts:
    """Return the same run's facts as if its base and its pairs were from the hub."""
    conf = replace(
        facts.conf,
        model=replace(facts.conf.model, model_name_or_path="some/model"),
        data=replace(facts.conf.data, path="some/pairs", split="train_prefs", **data),
    )
    model = {**facts.environment["model"], "base": "some/model", "commit": COMMIT, "fingerprint": None}
    environment = {**facts.environment, "model": model}
    sources = [{**source, "files": ["some/pairs (split train_prefs)"]} for source in facts.report["sources"]]
    return replace(facts, conf=conf, environment=environment, report={**facts.report, "sources": sources})


def read_code(card: ModelCard) -> str:
    [code] = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    return str(code).replace("max_new_tokens=256", "max_new_tokens=4")


def score(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(40, 60)[None]).logits.float()


VARIANTS = [
    [],
    ["lora=none"],
    ["model.adapter=sft"],
    ["model.adapter=sft", "model.adapter_mode=stack"],
    ["model.adapter=sft", "model.adapter_mode=merge"],
    ["lora.init_lora_weights=pissa"],
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=lambda overrides: overrides[-1] if overrides else "plain")
def test_the_code_loads_the_very_model_that_was_trained(overrides, finished, monkeypatch) -> None:
    run_dir = finished(*overrides)
    code, tuned = read_code(load(f"{run_dir}/{'model' if 'lora=none' in overrides else 'adapter'}")), None
    tuned = score(load_tuned_model(Path(run_dir))[0])
    code = code.replace('"sft"', json.dumps(str(Path("sft").resolve())))  # the code runs in another folder
    monkeypatch.chdir(run_dir)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    torch.testing.assert_close(score(namespace["model"]), tuned, rtol=0, atol=1e-4)


@pytest.mark.parametrize("options", [[], ["--adapter-only"]], ids=["merged", "adapter"])
def test_the_code_of_an_export_runs_in_a_process_of_its_own(options, finished, tmp_path, monkeypatch) -> None:
    run_dir = Path(finished()).resolve()
    monkeypatch.chdir(tmp_path)
    export([str(run_dir), "--out", "made", *options])
    code = read_code(load("made"))
    if not options:
        assert "dpo_runner" not in code and "peft" not in code
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("\n")


def test_the_figures_are_the_runs(finished) -> None:
    run_dir = finished()
    card, summary = load(f"{run_dir}/adapter"), read_summary(Path(run_dir))
    rows = {line.split("`")[-2]: line for line in card.text.splitlines() if re.match(r"\| [\w /-]+ \(`\w", line)}
    assert list(rows)[:3] == ["eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"]
    assert rows.keys() == summary["after"].keys()
    for key, value in summary["after"].items():
        before, after = (cell.strip().replace(",", "") for cell in rows[key].split("|")[2:4])
        assert float(after) == pytest.approx(value, rel=1e-3), key
        if key == "eval_rewards/accuracies":  # policy and reference are equal, which makes every pair a tie
            assert before == "tie"
        else:
            assert float(before) == pytest.approx(summary["before"][key], rel=1e-3), key
        assert len(rows[key].split("|")[3].strip()) <= 10
    report = json.loads(Path(run_dir, "data_report.json").read_text())
    assert "| `pairs.jsonl` | train | preference (texts) | 41 | 40 | 1 chosen equals rejected |" in card.text
    train, evaluation = (report["splits"][split]["kept"] for split in ("train", "eval"))
    assert train + evaluation == 40
    assert f"| train | {train} | {train} |" in card.text and f"| eval | {evaluation} | {evaluation} |" in card.text
    environment = json.loads(Path(run_dir, "environment.json").read_text())
    assert environment["hardware"]["cpu"] in card.text
    assert all(f"{name} {version}" in card.text for name, version in environment["packages"].items())
    assert f"| {summary['pairs_per_second']:.2f} pairs/s |" in card.text
    assert f"| {summary['peak_memory_gb']:.1f} GB |" in card.text


def test_the_configuration_is_the_composed_one(finished) -> None:
    run_dir = finished()
    [block] = re.findall(r"<details>.*?```yaml\n(.*?)```\n\n</details>", load(f"{run_dir}/adapter").text, re.DOTALL)
    assert yaml.safe_load(block) == yaml.safe_load(Path(run_dir, "config.yaml").read_text())


def test_the_plots_are_there_and_nothing_else_is_named(finished) -> None:
    run_dir = finished()
    export([run_dir, "--out", "exported"])
    for folder in (f"{run_dir}/adapter", "exported"):
        images = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", load(folder).text)
        assert images == ["plots/loss.png", "plots/rewards.png", "plots/logps.png"]
        assert sorted(images) == sorted(f"plots/{path.name}" for path in Path(folder, "plots").iterdir())
    shutil.rmtree("exported")


@pytest.mark.parametrize("overrides", [[], ["model.adapter=sft", "model.adapter_mode=merge"]], ids=["plain", "merge"])
def test_no_path_of_this_machine_is_published(overrides, finished, home, tiny_model) -> None:
    run_dir = finished(*overrides)
    for options in ([], ["--adapter-only"]):
        export([run_dir, "--out", "exported", *options])
        for name in ("README.md", "lineage.json"):
            text = Path("exported", name).read_text()
            # Tokenizer and weight files are not written by dpo_runner; adapter_config.json: see below.
            for path in (home, Path.home(), Path(tiny_model).parent):
                assert str(path) not in text, (name, path)
            assert not re.search(r"(?<![\w.:/])/(?:tmp|home|root|Users|var|private)/", text), name
        shutil.rmtree("exported")


def test_the_export_differs_from_the_runs_card_in_use_and_origin_only(finished) -> None:
    run_dir = finished("model.adapter=sft")
    export([run_dir, "--out", "exported", "--adapter-only"])
    own, exported = (
        dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", load(folder).text, re.DOTALL | re.MULTILINE))
        for folder in (f"{run_dir}/adapter", "exported")
    )
    assert {title for title in own if own[title] != exported[title]} == {"Use", "Where it comes from"}
    assert own.keys() == exported.keys()
    assert own["Use"].replace('"adapter"', '"exported"') == exported["Use"]
    assert "is `sft`, trained further" in own["Use"] and "SFT adapter (continue) | sft |" in own["Where it comes from"]
    shutil.rmtree("exported")


def test_what_is_of_no_hub_is_not_in_the_metadata(facts, tmp_path) -> None:
    plain = {"library_name": "peft", "pipeline_tag": "text-generation", "tags": ["dpo", "trl", "dpo_runner", "lora"]}
    assert write(facts, tmp_path / "x").data.to_dict() == plain
    # A folder whose name has the form of a repository id:
    conf = replace(facts.conf, model=replace(facts.conf.model, model_name_or_path="models/mine"))
    conf = replace(conf, data=replace(conf.data, path="data/mine"))
    model = {**facts.environment["model"], "base": "models/mine", "commit": None, "fingerprint": "ab"}
    environment = {**facts.environment, "model": model}
    card = write(replace(facts, conf=conf, environment=environment), tmp_path / "y")
    assert card.data.to_dict() == plain
    assert 'from_pretrained("models/mine", dtype="float32")' in card.text
    assert "`models/mine`, is a folder on the training machine" in card.text


def test_what_is_of_the_hub_is_in_the_metadata(facts, tmp_path) -> None:
    card = write(from_hub(facts, subset="default"), tmp_path / "x")
    assert (card.data.base_model, card.data.datasets) == ("some/model", ["some/pairs"])
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    for repo_id in (card.data.base_model, *card.data.datasets):
        validate_repo_id(repo_id)
    assert card.data.model_name == facts.conf.run_name
    after = facts.summary["after"]
    found = {result.metric_type: result for result in card.data.eval_results}
    assert found.keys() == {"accuracy", "reward_margin", "loss"}
    assert found["reward_margin"].metric_value == round(after["eval_rewards/margins"], 4)
    assert found["loss"].metric_value == round(after["eval_loss"], 4)
    where = {(r.dataset_type, r.dataset_config, r.dataset_split) for r in card.data.eval_results}
    assert where == {("some/pairs", "default", "train_prefs")}
    assert f'from_pretrained("some/model", revision="{COMMIT}", dtype="float32")' in card.text  # a commit is not masked
    # The metadata survives a round trip through the file.
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    whole = tmp_path / "whole"
    whole.mkdir()
    write_card(whole, from_hub(facts), "me/tuned")
    metadata = load(whole).data.to_dict()
    assert (metadata["library_name"], metadata["base_model_relation"]) == ("transformers", "finetune")
    assert "lora" not in metadata["tags"]


def test_evaluations_on_other_pairs_than_the_hubs_are_no_results_of_the_hubs(facts, tmp_path) -> None:
    hub = from_hub(facts, eval_path="mine.jsonl")
    mine = {**hub.report["sources"][0], "split": "eval", "files": ["mine.jsonl"]}
    hub = replace(hub, report={**hub.report, "sources": [*hub.report["sources"], mine]})
    card = write(hub, tmp_path / "x")
    assert card.data.datasets == ["some/pairs"] and card.data.eval_results is None
    assert "| `mine.jsonl` | eval |" in card.text


def test_each_source_of_a_mixture_is_named(finished) -> None:
    sources = ["data.path=null", "data.sources.sums.path=pairs.jsonl", "data.sources.same.path=pairs.jsonl"]
    run_dir = finished(*sources, "data.eval_fraction=0.3", "training.max_steps=1")
    text = load(f"{run_dir}/adapter").text
    assert (
        "| evaluation loss, sums (`eval_sums_loss`) |" in text and "| reward margin (`eval_rewards/margins`) |" in text
    )
    kept = json.loads(Path(run_dir, "data_report.json").read_text())["splits"]["train"]
    counts = ", ".join(f"{count} {name}" for name, count in kept["by_source"].items())
    assert f"| train | {kept['pairs']} | {kept['kept']} ({counts}) |" in text


def test_secrets_are_masked(facts, tmp_path) -> None:
    model = replace(facts.conf.model, adapter=f"https://me:{SECRET}@example.org/sft", adapter_mode="merge")
    wandb = replace(facts.conf.wandb, notes=f"key {SECRET}", tags=[SECRET])
    conf = replace(facts.conf, wandb=wandb, lora=facts.conf.lora)
    for field, value in (("model", model), ("run_name", f"run {SECRET}")):  # a command would refuse these
        object.__setattr__(conf, field, value)
    card = write(replace(facts, conf=conf, reference=f"of {SECRET}"), tmp_path / "x", f"me/{SECRET}")
    assert SECRET not in str(card) and "***" in card.text


def test_text_of_the_run_cannot_break_out_of_its_place(facts, tmp_path) -> None:
    conf = replace(facts.conf, wandb=replace(facts.conf.wandb, notes="```\n</details>\n# Not a heading\n````"))
    conf = replace(conf, data=replace(conf.data, path="a|b.jsonl"))
    card = write(replace(facts, conf=conf), tmp_path / "x")
    assert "| `a\\|b.jsonl` | train |" in card.text
    [block] = re.findall(r"^`````yaml\n(.*?)^`````$", card.text, re.DOTALL | re.MULTILINE)
    assert yaml.safe_load(block)["wandb"]["notes"] == conf.wandb.notes


def test_a_run_without_evaluation_has_a_card_too(finished) -> None:
    run_dir = finished("data.eval_fraction=0", "training.eval_strategy=no", "samples.num_prompts=0")
    text = load(f"{run_dir}/adapter").text
    assert "no evaluation pairs" in text
    assert re.findall(r"plots/\w+\.png", text) == ["plots/loss.png", "plots/rewards.png"]


def test_an_exported_adapter_names_its_base_as_others_know_it(finished, tmp_path) -> None:
    """A continued SFT adapter carries its base's name from another machine."""

    def export_as(overrides: list[str]) -> str:
        run_dir = Path(shutil.copytree(finished(*overrides), tmp_path / "r"))
        config = (run_dir / "config.yaml").read_text().replace("random:tiny-llama", "some/model")
        (run_dir / "config.yaml").write_text(config)
        environment = json.loads((run_dir / "environment.json").read_text())
        if "model.adapter_mode=merge" not in overrides:
            environment["model"] |= {"base": "some/model", "commit": None, "fingerprint": None}
        (run_dir / "environment.json").write_text(json.dumps(environment))
        export([str(run_dir), "--out", str(tmp_path / "x"), "--adapter-only"])
        text = load(tmp_path / "x").text
        named = json.loads((tmp_path / "x" / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert ("`AutoPeftModelForCausalLM` does not find it" in text) == (named != "some/model")
        assert load(tmp_path / "x").data.base_model == "some/model"
        shutil.rmtree(run_dir)
        shutil.rmtree(tmp_path / "x")
        return str(named)

    assert export_as(["model.adapter=sft"]) == "some/model"
    # On the bare base this adapter would be silently wrong, so it keeps the merged base's folder.
    assert "merged-" in export_as(["model.adapter=sft", "model.adapter_mode=merge"])


def test_what_is_cited_is_what_was_used() -> None:
    def numbers(*overrides: str) -> list[str]:
        return re.findall(r"arXiv:(\S+)", "\n".join(list_citations(load_conf(list(overrides)))))

    assert numbers("lora=none") == ["2305.18290"]
    assert numbers("training=ipo") == ["2305.18290", "2310.12036", "2106.09685"]
    assert numbers("quant=nf4", "lora.use_dora=true")[1:] == ["2106.09685", "2402.09353", "2305.14314"]
    assert numbers("training.loss_type=[apo_zero,apo_down]", "lora=none") == ["2305.18290", "2408.06266"]
    cited = list_citations(load_conf(["quant=nf4"]))
    assert any("https://github.com/huggingface/trl" in line for line in cited) and not "".join(cited).count("\n")


def test_every_metric_that_is_named_is_one_of_a_runs(facts) -> None:
    measured = {key.removeprefix("eval_") for key in facts.summary["after"]}
    assert measured >= LABELS.keys()


def test_curves_that_cannot_be_drawn_cost_no_weights(
    tiny_run: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(load_conf([*tiny_run, "run_dir=whole"]))

    def fail(path: Path, panels: object) -> None:
        path.write_text("half a picture")
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr(sys.modules["dpo_runner.model.card.plots"], "_draw", fail)
    capsys.readouterr()
    run(load_conf([*tiny_run, "run_dir=r"]))
    (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert told == "warning: the model card has no curves; drawing them failed: no font"
    weights = [Path(name, "adapter", "adapter_model.safetensors").read_bytes() for name in ("r", "whole")]
    assert weights[0] == weights[1] and not Path("r/adapter/plots").exists()
    assert load("r/adapter").text and "plots/" not in load("r/adapter").text
    assert export(["r", "--out", "out", "--adapter-only"]) is None
    assert "drawing them failed: no font" in capsys.readouterr().out

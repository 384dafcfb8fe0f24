"""The exported folder: the run's result, loadable by plain transformers, with its lineage."""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear, LoraModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_runner import __version__, run
from dpo_runner.chat import Chat
from dpo_runner.config.compose import load_conf
from dpo_runner.export.__main__ import main
from dpo_runner.export.export import ROUNDING_TOLERANCE
from dpo_runner.model.result import save_result
from tests.support.answers import answer_in_chat, answer_plainly
from tests.support.programs import run_python

SECRET = "hf_" + "A1b2C3d4" * 4
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Runs by their overrides, each trained once; tests that modify one copy it."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    rows = [
        {"prompt": f"What is {n} plus {n}?", "chosen": f"It is {2 * n}.", "rejected": "Who knows?"} for n in range(24)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*overrides: str) -> Path:
        if overrides not in made:
            made[overrides] = path = folder / f"run{len(made)}"
            shared = ["model=tiny_random", "training=smoke", "data=local_file", f"data.path={folder / 'pairs.jsonl'}"]
            shared += ["samples.num_prompts=2", "samples.max_new_tokens=4", "wandb=disabled", f"run_dir={path}"]
            run(load_conf([*shared, "training.learning_rate=1e-2", "training.warmup_steps=0", *overrides]))
        return made[overrides]

    return make


def load(folder: Path | str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.float() for name, tensor in model.state_dict().items()}


def assert_same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        torch.testing.assert_close(tensor, others[name], rtol=0, atol=atol, msg=name)


def merge_by_hand(base: str, *adapters: Path | str) -> dict[str, torch.Tensor]:
    """Add B A · alpha / r to the base's weights, without PEFT."""
    weights = weights_of(load(base))
    for adapter in map(Path, adapters):
        conf = json.loads((adapter / "adapter_config.json").read_text())
        tensors = load_file(adapter / "adapter_model.safetensors")
        for name in [name for name in tensors if name.endswith("lora_A.weight")]:
            delta = tensors[name.replace("lora_A", "lora_B")].float() @ tensors[name].float()
            key = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
            weights[key] = weights[key] + conf["lora_alpha"] / conf["r"] * delta
    return weights


def refuse(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    """Run a command that is refused; return its exit code and its only error line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in argv])
    [line] = capsys.readouterr().err.splitlines()
    assert isinstance(caught.value.code, int)
    return caught.value.code, line


def test_plain_transformers_in_another_process_answers_as_chat_does(finished, tmp_path) -> None:
    run_dir = finished()
    result = run_python("-m", "dpo_runner.export", str(run_dir), "--out", "made/for/this")
    assert (result.returncode, result.stderr) == (0, "")
    merging, saving, last = result.stdout.splitlines()
    assert merging.startswith("merging, in float32, moves the logits of 2 prompts by at most ")
    assert saving.startswith("saving as float32 moves the distribution of the next token by 0 nats (KL; ")
    assert last == f"exported to {tmp_path / 'made/for/this'}"
    tuned = answer_plainly("made/for/this")
    chat = Chat(run_dir, max_new_tokens=24)
    assert answer_in_chat(chat) == tuned
    with chat.model.disable_adapter():
        assert answer_in_chat(chat) != tuned  # so the comparison above is meaningful


def test_an_adapter_trained_on_4_bits_is_merged_into_unquantized_weights(finished, tiny_model) -> None:
    run_dir = finished("quant=nf4")
    main([str(run_dir), "--out", "x"])
    config = json.loads(Path("x/config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert not list(Path("x").glob("adapter_*"))
    assert_same(weights_of(load("x")), merge_by_hand(tiny_model, run_dir / "adapter"))
    assert "quantized to nf4" in Path("x/README.md").read_text()
    assert json.loads(Path("x/lineage.json").read_text())["dpo_run"]["quantization"] == "nf4"


def test_a_continued_sft_adapter_is_in_it_once(finished, tiny_model, sft_adapter) -> None:
    run_dir = finished(f"model.adapter={sft_adapter}")
    main([str(run_dir), "--out", "x"])
    assert_same(weights_of(load("x")), merge_by_hand(tiny_model, run_dir / "adapter"), atol=1e-5)
    sft = json.loads(Path("x/lineage.json").read_text())["sft_adapter"]
    digest = hashlib.sha256(Path(sft_adapter, "adapter_model.safetensors").read_bytes()).hexdigest()
    assert (sft["name"], sft["mode"]) == (sft_adapter, "continue")
    assert sft["sha256"]["adapter_model.safetensors"] == digest
    assert f"| SFT adapter (continue) | {sft_adapter} |  | {digest[:16]} |" in Path("x/README.md").read_text()


def test_a_merged_sft_adapter_is_in_it_beneath_the_new_one(finished, tiny_model, sft_adapter) -> None:
    run_dir = finished(f"model.adapter={sft_adapter}", "model.adapter_mode=merge", "quant=nf4")
    main([str(run_dir), "--out", "x"])
    assert_same(weights_of(load("x")), merge_by_hand(tiny_model, sft_adapter, run_dir / "adapter"), atol=1e-5)
    main([str(run_dir), "--out", "y", "--adapter-only"])
    assert f'PeftModel.from_pretrained(model, "{sft_adapter}").merge_and_unload()' in Path("y/README.md").read_text()


@pytest.mark.parametrize("start", [["model.adapter=SFT", "model.adapter_mode=stack"], ["lora.init_lora_weights=pissa"]])
def test_an_adapter_made_of_several_is_exported_as_one_on_the_plain_base(
    start, finished, tiny_model, sft_adapter, monkeypatch
) -> None:
    trained = []
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])

    def save(directory: Any, model: Any, *rest: Any) -> Path:
        with torch.no_grad():
            trained.append(model.eval()(ids).logits)
        return save_result(directory, model, *rest)

    monkeypatch.setattr(sys.modules["dpo_runner.train"], "save_result", save)
    named = [text.replace("SFT", sft_adapter) for text in start]
    run_dir = finished("training.bf16=false", "lora.r=4", "training.max_steps=2", *named)
    main([str(run_dir), "--out", "merged"])
    main([str(run_dir), "--out", "adapter", "--adapter-only"])
    base = load(tiny_model)
    with torch.no_grad():
        before = base(ids).logits
        served = PeftModel.from_pretrained(base, "adapter").eval()(ids).logits
        merged = load("merged")(ids).logits
    [expected] = trained
    torch.testing.assert_close(served, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-4)
    assert not torch.allclose(before, expected, atol=1e-2)


def test_full_fine_tuning_is_exported_as_it_is(finished, capsys) -> None:
    run_dir = finished("lora=none")
    main([str(run_dir), "--out", "x"])
    assert_same(weights_of(load("x")), weights_of(load(run_dir / "model")), atol=0)
    assert "merging" not in capsys.readouterr().out
    assert refuse(capsys, run_dir, "--out", "y", "--adapter-only")[0] == 2


def test_adapter_only_copies_the_adapter(finished, tiny_model) -> None:
    run_dir = finished()
    main([str(run_dir), "--out", "x", "--adapter-only"])
    for file in (run_dir / "adapter").iterdir():
        if file.is_file() and file.name != "README.md":
            assert Path("x", file.name).read_bytes() == file.read_bytes()
    assert not list(Path("x").glob("model*"))
    merged = PeftModel.from_pretrained(load(tiny_model), "x").merge_and_unload()
    assert_same(weights_of(merged), merge_by_hand(tiny_model, run_dir / "adapter"))
    card = huggingface_hub.ModelCard.load("x/README.md")
    assert (card.data.library_name, "lora" in card.data.tags) == ("peft", True)
    assert json.loads(Path("x/lineage.json").read_text())["export"]["sha256"].keys() >= {"adapter_model.safetensors"}


def test_the_dtype_is_the_checkpoints_own_or_the_one_asked_for(finished, tiny_model, tmp_path) -> None:
    base = tmp_path / "bf16"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    run_dir = finished(f"model.model_name_or_path={base}")  # trains in float32
    by_hand = merge_by_hand(str(base), run_dir / "adapter")
    for name, options in (("bfloat16", []), ("float16", ["--dtype", "float16"]), ("float32", ["--dtype", "float32"])):
        main([str(run_dir), "--out", name, *options])
        model, dtype = load(name), getattr(torch, name)
        assert model.dtype == dtype
        assert_same(weights_of(model), {key: value.to(dtype).float() for key, value in by_hand.items()}, atol=1e-3)
        check = json.loads(Path(name, "lineage.json").read_text())["export"]["check"]
        assert (check["rounding"]["largest_difference"] > 0) == (name != "float32")
        assert check["merge"]["largest_difference"] < 1e-5  # whatever dtype is saved
    assert json.loads(Path("bfloat16/config.json").read_text())["dtype"] == "bfloat16"


def test_sharding(finished, tiny_model, capsys) -> None:
    run_dir = finished()
    main([str(run_dir), "--out", "x", "--max-shard-size", "100KB"])
    shards = list(Path("x").glob("model-*.safetensors"))
    assert len(shards) > 2 and Path("x/model.safetensors.index.json").exists()
    assert_same(weights_of(load("x")), merge_by_hand(tiny_model, run_dir / "adapter"))
    digests = json.loads(Path("x/lineage.json").read_text())["export"]["sha256"]
    assert digests.keys() >= {shard.name for shard in shards}
    assert "--max-shard-size big" in refuse(capsys, run_dir, "--out", "y", "--max-shard-size", "big")[1]


def test_the_chat_template_ends_an_answer_in_plain_generate_too(finished, tmp_path) -> None:
    template = tmp_path / "other.jinja"
    template.write_text(
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|endoftext|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    main([str(finished(f"model.chat_template={template}")), "--out", "x"])
    tokenizer = AutoTokenizer.from_pretrained("x")
    assert tokenizer.chat_template == template.read_text()
    ends = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert load("x").generation_config.eos_token_id == sorted(ends)


@pytest.mark.parametrize("fault", ["not merged", "wrongly scaled", "not a number"])
def test_a_bad_merge_is_refused_and_nothing_is_written(fault, finished, tmp_path, monkeypatch, capsys) -> None:
    run_dir = finished()
    right = Linear.get_delta_weight
    if fault == "not merged":
        monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **kwargs: self.unload())
    elif fault == "wrongly scaled":
        monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: 1.1 * right(self, adapter))
    else:
        monkeypatch.setattr(Linear, "get_delta_weight", lambda self, adapter: float("nan") * right(self, adapter))
    code, line = refuse(capsys, run_dir, "--out", "x")
    assert code == 1 and line.startswith(f"error: {run_dir / 'adapter'}: ") and "nothing was written" in line
    assert not list(tmp_path.iterdir())


def test_a_hardly_trained_adapter_that_is_not_merged_is_found_too(finished, monkeypatch, capsys) -> None:
    run_dir = finished("training.learning_rate=1e-6")  # moves the logits by less than 1e-3 of the largest
    main([str(run_dir), "--out", "x"])
    check = json.loads(Path("x/lineage.json").read_text())["export"]["check"]["merge"]
    assert check["adapter_effect"] < 1e-3 * check["largest_logit"]
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda self, **kwargs: self.unload())
    assert refuse(capsys, run_dir, "--out", "y")[0] == 1


def test_the_merge_is_made_on_the_gpu_if_that_has_the_memory(finished, monkeypatch) -> None:
    placed, free, path = [], 10**12, finished()
    monkeypatch.setattr("dpo_runner.model.base.place", lambda model, conf: placed.append(model.dtype))
    monkeypatch.setattr("dpo_runner.training.memory.device.read_memory", lambda of_host: ("GPU", 10**12, free))
    main([str(path), "--out", "x"])
    assert placed == [torch.float32]
    free = 10**5
    main([str(path), "--out", "y"])
    free = 10**12
    shutil.copytree(path, "r")
    config = Path("r/config.yaml").read_text()
    Path("r/config.yaml").write_text(config.replace("use_cpu: false", "use_cpu: true"))
    main(["r", "--out", "z"])
    assert placed == [torch.float32]


def test_a_dtype_that_loses_too_much_is_refused(finished, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(ROUNDING_TOLERANCE, "bfloat16", 0.0)
    code, line = refuse(capsys, finished(), "--out", "x", "--dtype", "bfloat16")
    assert code == 1 and "use --dtype float32" in line
    assert not list(tmp_path.iterdir())


def test_only_an_empty_or_a_new_folder_is_written(finished, capsys) -> None:
    Path("x").mkdir()
    Path("x/mine.txt").write_text("keep")
    code, line = refuse(capsys, finished(), "--out", "x")
    assert code == 2 and "is there and not empty" in line
    assert [path.name for path in Path("x").iterdir()] == ["mine.txt"]
    assert refuse(capsys, finished(), "--out", "x/mine.txt")[0] == 2
    Path("x/mine.txt").unlink()
    main([str(finished()), "--out", "x"])
    assert Path("x/model.safetensors").exists() and [path.name for path in Path().iterdir()] == ["x"]


def test_arguments_that_would_be_ignored_are_refused(finished, capsys) -> None:
    run_dir = finished()
    assert refuse(capsys, run_dir, "--out", "x", "--adapter-only", "--dtype", "float32")[0] == 2
    assert refuse(capsys, run_dir, "--out", "x", "--public")[0] == 2
    assert refuse(capsys, run_dir, "--out", "x", "--push-to-hub", "no/such/id")[0] == 2


def test_an_unfinished_run_is_refused(finished, tmp_path, capsys) -> None:
    assert "holds no run" in refuse(capsys, tmp_path, "--out", "x")[1]
    shutil.copytree(finished(), "r")
    status = json.loads(Path("r/status.json").read_text())
    Path("r/status.json").write_text(json.dumps({**status, "state": "interrupted"}))
    code, line = refuse(capsys, "r", "--out", "x")
    assert code == 2 and "the run is interrupted, not finished" in line
    assert not Path("x").exists()


def test_the_lineage_is_right_and_holds_no_secret(finished, tiny_model) -> None:
    run_dir = Path(shutil.copytree(finished(), SECRET))
    environment = json.loads((run_dir / "environment.json").read_text())
    (run_dir / "environment.json").write_text(json.dumps({**environment, "commit": COMMIT}))
    config = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(config.replace("notes: null", f"notes: https://me:{SECRET}@example.org"))
    main([str(run_dir), "--out", "x"])
    lineage = json.loads(Path("x/lineage.json").read_text())

    def digest(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    assert lineage["base"]["name"] == "random:tiny-llama"
    assert lineage["base"]["sha256"]["model.safetensors"] == digest(Path(tiny_model) / "model.safetensors")
    assert lineage["sft_adapter"] is None
    assert lineage["dpo_run"]["commit"] == COMMIT
    assert lineage["dpo_run"]["config_sha256"] == digest(run_dir / "config.yaml")
    adapter = digest(run_dir / "adapter" / "adapter_model.safetensors")
    assert lineage["dpo_run"]["sha256"]["adapter_model.safetensors"] == adapter
    assert lineage["export"]["dpo_runner"] == __version__
    assert lineage["export"]["sha256"]["model.safetensors"] == digest(Path("x/model.safetensors"))
    assert f"| DPO run | dpo | {COMMIT} | {adapter[:16]} |" in Path("x/README.md").read_text()
    for path in (path for path in Path("x").rglob("*") if path.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path


def test_the_model_card_has_metadata_results_and_citations(finished) -> None:
    run_dir = Path(shutil.copytree(finished(), "r"))
    main(["r", "--out", "x"])
    card = huggingface_hub.ModelCard.load("x/README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["dpo", "trl", "dpo_runner"],
    }
    for key in json.loads((run_dir / "summary.json").read_text())["after"]:
        assert f"(`{key}`) | " in card.text  # test_card.py has the figures
    assert "arXiv:2305.18290" in card.text and "TRL: Transformers Reinforcement Learning" in card.text
    assert 'AutoModelForCausalLM.from_pretrained("x"' in card.text and card.text.count("```") == 4

    config = (run_dir / "config.yaml").read_text().replace("random:tiny-llama", "some/model")
    data = next(line for line in config.splitlines() if line.startswith("  path: "))
    (run_dir / "config.yaml").write_text(config.replace(data, "  path: some/pairs"))
    environment = json.loads((run_dir / "environment.json").read_text())
    environment["model"] |= {"base": "some/model", "commit": COMMIT, "fingerprint": None}
    report = json.loads((run_dir / "data_report.json").read_text())
    report["sources"][0]["files"] = ["some/pairs (split train)"]
    (run_dir / "data_report.json").write_text(json.dumps(report))
    (run_dir / "environment.json").write_text(json.dumps(environment))
    main(["r", "--out", "y", "--adapter-only"])
    metadata = huggingface_hub.ModelCard.load("y/README.md").data.to_dict()
    assert (metadata["base_model"], metadata["datasets"]) == ("some/model", ["some/pairs"])
    base = json.loads(Path("y/lineage.json").read_text())["base"]
    assert base == {"name": "some/model", "commit": COMMIT, "sha256": {}}


def test_the_hub_is_called_only_when_asked(finished, tmp_path, monkeypatch, capsys) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    class FakeApi:
        error: Exception | None = None

        def create_repo(self, repo_id: str, **options: Any) -> str:
            if self.error:
                raise self.error
            calls.append((repo_id, options))
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, *, folder_path: Path, **options: Any) -> None:
            assert (folder_path / "lineage.json").exists()  # written completely before the upload
            calls.append((str(folder_path), options))

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    main([str(finished()), "--out", "a"])
    assert calls == []
    main([str(finished()), "--out", "b", "--push-to-hub", "me/tuned"])
    assert calls[0] == ("me/tuned", {"private": True, "exist_ok": True})
    assert calls[1][0] == str(tmp_path / "b") and calls[1][1]["repo_id"] == "me/tuned"
    assert "uploaded to https://huggingface.co/me/tuned" in capsys.readouterr().out
    assert 'from_pretrained("me/tuned"' in Path("b/README.md").read_text()
    main([str(finished()), "--out", "c", "--push-to-hub", "me/tuned", "--public", "--adapter-only"])
    assert calls[2][1]["private"] is False

    FakeApi.error = huggingface_hub.errors.LocalTokenNotFoundError(f"no token\nfor {SECRET}")
    code, line = refuse(capsys, finished(), "--out", "d", "--push-to-hub", "me/tuned")
    assert code == 1 and line == f"error: --push-to-hub me/tuned: no token; {tmp_path / 'd'} is written and stays"
    assert Path("d/model.safetensors").exists()

"""No code in a checkpoint, a model, an adapter or data is executed."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from dpo_runner import run
from dpo_runner.chat import main as chat
from dpo_runner.config.compose import load_conf
from dpo_runner.config.sections.data import SourceFields
from dpo_runner.data.rows.decoding import decode_rows
from dpo_runner.data.rows.sources import open_sources
from dpo_runner.errors import ConfigError
from dpo_runner.evaluate.__main__ import main as evaluate
from dpo_runner.export.__main__ import main as export
from dpo_runner.model.blueprint import Blueprint, draw_blueprint
from dpo_runner.model.files.pickles import refuse_pickled_code
from dpo_runner.model.policy import load_policy
from dpo_runner.records.checkpoints import MANIFEST, find_damage, list_checkpoints, seal
from dpo_runner.records.directory import update_status
from tests.support.common import make_tiny_run, run_main, write_pairs

CODE = "import pathlib\npathlib.Path({mark!r}).touch()\n"


class Evil:
    """Object that creates the file `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = str(mark)

    def __reduce__(self) -> Any:
        return exec, (CODE.format(mark=self.mark),)


def by_torch(file: Path, mark: Path) -> None:
    torch.save({"state": Evil(mark)}, file)


def by_old_torch(file: Path, mark: Path) -> None:
    torch.save({"state": Evil(mark)}, file, _use_new_zipfile_serialization=False)


def by_pickle(file: Path, mark: Path) -> None:
    file.write_bytes(pickle.dumps(Evil(mark)))


def reseal(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    seal(checkpoint)
    assert find_damage(checkpoint, whole=True) is None


WAYS = (by_torch, by_old_torch, by_pickle)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that exists once planted code has run."""
    return tmp_path / "executed"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    run(load_conf([*make_tiny_run(write_pairs(folder)), "samples.num_prompts=0", f"run_dir={folder / 'r'}"]))
    return folder / "r"


@pytest.fixture
def run_dir(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "r"))


def unfinish(run_dir: Path, finished: Path) -> list[str]:
    """Turn a finished run into one interrupted after two steps; return the overrides that continue it."""
    shutil.rmtree(run_dir / "checkpoints" / "checkpoint-4")
    (run_dir / "summary.json").unlink()
    update_status(run_dir, state="interrupted")
    return [*make_tiny_run(str(finished.parent / "pairs.jsonl")), "samples.num_prompts=0", f"run_dir={run_dir}"]


@pytest.mark.parametrize("plant", WAYS, ids=lambda plant: plant.__name__)
def test_what_is_planted_would_run(plant: Callable[[Path, Path], None], mark: Path, tmp_path: Path) -> None:
    plant(tmp_path / "file", mark)
    torch.load(tmp_path / "file", weights_only=False) if plant is not by_pickle else pickle.loads(
        (tmp_path / "file").read_bytes()
    )
    assert mark.exists()


def test_checkpoints_hold_no_pickle_but_tensors_and_numbers(finished: Path) -> None:
    for checkpoint in list_checkpoints(finished / "checkpoints"):
        suffixes = {file.name: file.suffix for file in checkpoint.rglob("*")}
        pickles = {
            name for name, suffix in suffixes.items() if suffix not in (".json", ".safetensors", ".jinja", ".md")
        }
        assert pickles == {"optimizer.pt", "scheduler.pt", "rng_state.pth"}
        refuse_pickled_code(checkpoint)


@pytest.mark.parametrize("plant", WAYS, ids=lambda plant: plant.__name__)
@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "scaler.pt",
        "adapter_model.bin",
        "pytorch_model.bin",
        "ref/x.pt",
    ],
)
def test_a_checkpoint_with_a_planted_file_is_refused_before_anything_is_loaded(
    name: str, plant: Callable[[Path, Path], None], finished: Path, mark: Path, tmp_path: Path
) -> None:
    checkpoint = Path(shutil.copytree(finished / "checkpoints" / "checkpoint-2", tmp_path / "checkpoint-2"))
    (checkpoint / name).parent.mkdir(exist_ok=True)
    plant(checkpoint / name, mark)
    if name == "adapter_model.bin":
        (checkpoint / "adapter_model.safetensors").unlink()
    reseal(checkpoint)
    with pytest.raises(ConfigError) as refused:
        refuse_pickled_code(checkpoint)
    (line,) = refused.value.mistakes
    assert line.startswith(f"{checkpoint / name}: ") and "\n" not in line
    assert ("builtins.exec" in line) == (plant is by_torch and not name.endswith(".bin"))
    assert not mark.exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "pytorch_model.bin", "training_args.bin"])
def test_a_run_continues_from_no_planted_file(name: str, run_dir: Path, finished: Path, mark: Path) -> None:
    """Files that are never read, such as those that older versions wrote, do not block a run."""
    overrides = unfinish(run_dir, finished)
    checkpoint = run_dir / "checkpoints" / "checkpoint-2"
    by_torch(checkpoint / name, mark)
    reseal(checkpoint)
    if name == "training_args.bin":
        run(load_conf(overrides))
        written = (run_dir / "adapter" / "adapter_model.safetensors").read_bytes()
        assert written == (finished / "adapter" / "adapter_model.safetensors").read_bytes()
    else:
        with pytest.raises(ConfigError, match=f"checkpoint-2/{name}: "):
            run(load_conf(overrides))
        assert json.loads((run_dir / "status.json").read_text())["state"] == "failed"
    assert not mark.exists()


def test_torch_itself_would_refuse_it(run_dir: Path, finished: Path, mark: Path, monkeypatch) -> None:
    """The second line of defence: `weights_only`, which Trainer passes for each file that it reads."""
    overrides = unfinish(run_dir, finished)
    monkeypatch.setattr("dpo_runner.training.session.refuse_pickled_code", lambda checkpoint: None)
    whole = Path(shutil.copytree(run_dir / "checkpoints", run_dir.parent / "whole"))
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        by_torch(run_dir / "checkpoints" / "checkpoint-2" / name, mark)
        reseal(run_dir / "checkpoints" / "checkpoint-2")
        with pytest.raises(Exception, match="Weights only load failed"):
            run(load_conf(overrides))
        assert not mark.exists()
        shutil.rmtree(run_dir / "checkpoints")
        shutil.copytree(whole, run_dir / "checkpoints")


@pytest.mark.parametrize("decoy", [False, True], ids=["alone", "beside"])
def test_no_command_reads_a_pickled_result(decoy: bool, run_dir: Path, mark: Path, tmp_path: Path, capsys) -> None:
    by_torch(run_dir / "adapter" / "adapter_model.bin", mark)
    if not decoy:
        (run_dir / "adapter" / "adapter_model.safetensors").unlink()
    commands: list[tuple[Any, list[str]]] = [
        (chat, [str(run_dir), "--prompt", "Why?", "--max-new-tokens", "2"]),
        (export, [str(run_dir), "--out", "whole"]),
        (export, [str(run_dir), "--out", "part", "--adapter-only"]),
        (evaluate, [str(run_dir), "samples.num_prompts=0"]),
    ]
    for main, arguments in commands:
        code = run_main(main, *arguments)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert not mark.exists()
        if decoy:
            assert (code, errors) == (0, [])
        else:
            why = "holds no adapter_model.safetensors, only a pickle, which may run code"
            assert (code, errors) == (2, [f"error: {run_dir / 'adapter'}: {why}"])


def test_permission_for_pickled_weights_is_for_weights_alone(
    tiny_run: list[str], tiny_model: str, sft_adapter: str, mark: Path, tmp_path: Path
) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    (model / "model.safetensors").unlink()
    by_torch(model / "pytorch_model.bin", mark)
    adapter = Path(shutil.copytree(sft_adapter, tmp_path / "adapter"))
    (adapter / "adapter_model.safetensors").unlink()
    by_torch(adapter / "adapter_model.bin", mark)
    cases = {
        "model.model_name_or_path": [f"model.model_name_or_path={model}"],
        "model.adapter": [f"model.adapter={adapter}"],
        "model.adapter_mode=merge": [f"model.adapter={adapter}", "model.adapter_mode=merge"],
    }
    for overrides in cases.values():
        with pytest.raises(ConfigError, match="a pickle with more than weights, which could run code"):
            load_policy(Blueprint.of_run(load_conf([*tiny_run, *overrides, "model.use_safetensors=false"])))
        with pytest.raises(ConfigError, match=r"a pickle, which may run code; model\.use_safetensors=false"):
            conf = load_conf([*tiny_run, *overrides])
            draw_blueprint(conf)
            load_policy(Blueprint.of_run(conf))
    assert not mark.exists()


def test_code_that_a_model_brings_is_run_for_who_trusts_it_alone(
    tiny_run: list[str], tiny_model: str, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    own = "from transformers import LlamaConfig\nclass Config(LlamaConfig):\n    model_type = 'evil'\n"
    (folder / "modeling_evil.py").write_text(CODE.format(mark=str(mark)) + own)
    config = json.loads((folder / "config.json").read_text())
    mapped = {"AutoConfig": "modeling_evil.Config", "AutoModelForCausalLM": "modeling_evil.Model"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "evil", "auto_map": mapped}))
    overrides = [*tiny_run, f"model.model_name_or_path={folder}"]
    with pytest.raises(ConfigError, match="contains custom code which must be executed") as refused:
        draw_blueprint(load_conf(overrides))
    assert len(refused.value.mistakes) == 1 and "\n" not in refused.value.mistakes[0]
    assert not mark.exists()
    assert Blueprint(load_conf([*overrides, "model.trust_remote_code=true"]).model).config.vocab_size
    assert mark.exists()


def test_nobody_is_asked_whether_to_run_an_adapters_code(
    tiny_run: list[str], tiny_model: str, sft_adapter: str, mark: Path, tmp_path: Path, monkeypatch
) -> None:
    def ask(question: str = "") -> str:
        raise AssertionError(question)

    monkeypatch.setattr("builtins.input", ask)
    folder = Path(shutil.copytree(sft_adapter, tmp_path / "adapter"))
    for file in Path(tiny_model).glob("*token*"):
        shutil.copy(file, folder)
    (folder / "tokenization_evil.py").write_text(CODE.format(mark=str(mark)) + "class Evil: ...\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    mapped = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": "Evil", "auto_map": mapped}))
    with pytest.raises(ConfigError, match=r"`model\.adapter=.*custom code"):
        assert Blueprint(load_conf([*tiny_run, f"model.adapter={folder}"]).model).tokenizer
    assert not mark.exists()


def test_an_adapters_settings_import_no_module(
    tiny_run: list[str], sft_adapter: str, mark: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "evil.py").write_text(CODE.format(mark=str(mark)))
    monkeypatch.syspath_prepend(tmp_path)
    folder = Path(shutil.copytree(sft_adapter, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    hostile = {
        "auto_mapping": {"base_model_class": "Model", "parent_library": "evil"},
        "megatron_config": {"a": 1},
        "megatron_core": "evil",
        "auto_map": {"AutoModel": "evil.Model"},
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | hostile))
    with pytest.raises(ConfigError, match=r"`model\.adapter=.*megatron_core"):
        load_policy(Blueprint.of_run(load_conf([*tiny_run, f"model.adapter={folder}"])))
    assert not mark.exists()


def test_a_template_cannot_leave_its_sandbox(tiny_run: list[str], tiny_model: str, mark: Path, tmp_path: Path) -> None:
    template = "{{ cycler.__init__.__globals__.os.system('touch MARK') }}{{ messages[0]['content'] }}"
    (tmp_path / "evil.jinja").write_text(template.replace("MARK", str(mark)))
    with pytest.raises(ConfigError) as refused:
        run(load_conf([*tiny_run, f"model.chat_template={tmp_path / 'evil.jinja'}", "dry_run=true"]))
    assert "unsafe" in str(refused.value) and "\n" not in str(refused.value)
    assert not mark.exists()


def test_data_that_could_be_code_is_not_read(mark: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(CODE.format(mark=str(mark)))  # a loading script, which `datasets` used to run
    by_pickle(folder / "rows.pkl", mark)
    by_torch(folder / "rows.pt", mark)
    with pytest.raises(ConfigError, match="holds no file of a known format"):
        open_sources(SourceFields(path=str(folder)), "data")
    for name in ("data.py", "rows.pkl", "rows.pt"):
        with pytest.raises(ConfigError, match=f"no such format `{Path(name).suffix}`"):
            open_sources(SourceFields(path=str(folder / name)), "data")
    hidden = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Evil(mark)),
    }
    field = pa.field("prompt", pa.string(), metadata=hidden)
    schema = pa.schema([field, ("chosen", pa.string()), ("rejected", pa.string())])
    table = pa.table([["What?"], ["This."], ["That."]], schema=schema)
    with pa.OSFile(str(folder / "rows.arrow"), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(table)
    source, _ = open_sources(SourceFields(path=str(folder)), "data")
    assert [row["chosen"] for batch in source.batches(8) for _, row in decode_rows(batch)] == ["This."]
    assert not mark.exists()


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a\0b", "", ".hidden", "x" * 300])
def test_a_template_whose_name_is_a_path_is_refused_when_it_is_loaded(
    name: str, tiny_run: list[str], tiny_model: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    template = (folder / "chat_template.jinja").read_text()
    (folder / "chat_template.jinja").unlink()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    given = [{"name": each, "template": template} for each in ("default", "tool use", name)]
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": given}))
    overrides = [*tiny_run, f"model.model_name_or_path={folder}"]
    with pytest.raises(ConfigError, match=r"calls a chat template .* not a valid file name"):
        assert Blueprint(load_conf(overrides).model).tokenizer
    assert Blueprint(load_conf([*overrides, "model.chat_template=chatml"]).model).tokenizer.chat_template

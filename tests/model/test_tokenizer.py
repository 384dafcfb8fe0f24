"""Precedence of the configuration, the SFT adapter and the model for tokenizer and chat template."""

import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from dpo_runner.config.sections.model import ModelConf
from dpo_runner.data.templates.chat_template import ChatTemplate
from dpo_runner.data.templates.rendering import CHAT_TEMPLATES
from dpo_runner.errors import ConfigError
from dpo_runner.model.blueprint import Blueprint

MODEL = "random:tiny-llama"


def adapter_with(sft_adapter: str, folder: Path, template: str | None, extra: int = 0) -> str:
    """Copy the SFT adapter to `folder`, add a tokenizer, and return the folder."""
    shutil.copytree(sft_adapter, folder)
    tokenizer = Blueprint(ModelConf(MODEL)).tokenizer
    tokenizer.add_tokens([f"<extra{n}>" for n in range(extra)])
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_an_adapters_own_template_wins_and_the_report_says_so(sft_adapter: str, tmp_path: Path) -> None:
    adapter = adapter_with(sft_adapter, tmp_path / "sft", CHAT_TEMPLATES["zephyr"])
    conf = ModelConf(MODEL, adapter=adapter)
    tokenizer = Blueprint(conf).tokenizer
    assert tokenizer.chat_template == CHAT_TEMPLATES["zephyr"]
    assert Blueprint(conf).template_origin == f"the SFT adapter's ({adapter}); {MODEL} has another one"


def test_a_configured_template_wins_over_both(sft_adapter: str, tmp_path: Path) -> None:
    adapter = adapter_with(sft_adapter, tmp_path / "sft", CHAT_TEMPLATES["zephyr"])
    conf = ModelConf(MODEL, adapter=adapter, chat_template="llama3")
    tokenizer = Blueprint(conf).tokenizer
    assert tokenizer.chat_template == CHAT_TEMPLATES["llama3"]
    assert Blueprint(conf).template_origin == "model.chat_template=llama3"


def test_an_adapter_without_a_template_or_tokenizer_takes_the_models(sft_adapter: str, tmp_path: Path) -> None:
    own = Blueprint(ModelConf(MODEL)).tokenizer.chat_template
    for adapter in (sft_adapter, adapter_with(sft_adapter, tmp_path / "sft", None)):
        conf = ModelConf(MODEL, adapter=adapter)
        assert Blueprint(conf).tokenizer.chat_template == own
        assert Blueprint(conf).template_origin in ("the tokenizer's own", "the model's own")


def test_an_adapter_with_more_tokens_than_the_model_has_room_for_is_refused(sft_adapter: str, tmp_path: Path) -> None:
    adapter = adapter_with(sft_adapter, tmp_path / "sft", None, extra=2)
    with pytest.raises(ConfigError, match=r"its tokenizer has 261 tokens, random:tiny-llama has room for 259"):
        assert Blueprint(ModelConf(MODEL, adapter=adapter)).tokenizer


def test_a_model_without_a_template_says_none(tiny_model: str, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    shutil.rmtree(tmp_path / "bare")
    shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("chat_template*", "tokenizer*"))
    tokenizer.save_pretrained(tmp_path / "bare")
    conf = ModelConf(str(tmp_path / "bare"))
    assert Blueprint(conf).template_origin == "none"


def test_a_tokenizer_that_splits_special_tokens_keeps_the_templates_whole(tiny_model: str, tmp_path: Path) -> None:
    AutoTokenizer.from_pretrained(tiny_model, split_special_tokens=True).save_pretrained(tmp_path / "split")
    shutil.copytree(tiny_model, tmp_path / "split", ignore=shutil.ignore_patterns("*token*"), dirs_exist_ok=True)
    tokenizer = Blueprint(ModelConf(str(tmp_path / "split"))).tokenizer
    assert ChatTemplate(tokenizer).end_of_turn == tokenizer.eos_token_id

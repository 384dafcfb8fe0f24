"""The tokenizer, and the chat template that counts: the configured one, the SFT adapter's, or the model's own."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoTokenizer

from dpo_runner.config import ModelConf
from dpo_runner.data.templates import resolve_chat_template
from dpo_runner.errors import ConfigError
from dpo_runner.locations import explain_missing, resolve_adapter_path, resolve_model_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(conf: ModelConf) -> "PreTrainedTokenizerBase":
    """Load the tokenizer: the SFT adapter's, where it brings one, with the chat template that it was tuned with.

    Raises:
        ConfigError: there is no such model, or the adapter's tokenizer has tokens that the model has no room for.
    """
    adapter = _find_adapter_tokenizer(conf)
    if adapter is None:
        tokenizer = _load_base_tokenizer(conf)
    else:
        with explain_missing(str(conf.adapter), "model.adapter"):
            tokenizer = AutoTokenizer.from_pretrained(adapter)
        _check_vocabulary(tokenizer, conf)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _load_base_tokenizer(conf).chat_template
    if conf.chat_template is not None:
        tokenizer.chat_template = resolve_chat_template(conf.chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked in loss and attention, so any token will do
    return tokenizer


def describe_chat_template(conf: ModelConf, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Say in a few words whose chat template `load_tokenizer` has settled on."""
    if tokenizer.chat_template is None:
        return "none"
    if conf.chat_template is not None:
        return f"model.chat_template={conf.chat_template}"
    if _find_adapter_tokenizer(conf) is None:
        return "the tokenizer's own"
    if tokenizer.chat_template == _load_base_tokenizer(conf).chat_template:
        return "the model's own"
    return f"the SFT adapter's ({conf.adapter}); {conf.model_name_or_path} has another one"


def _load_base_tokenizer(conf: ModelConf) -> "PreTrainedTokenizerBase":
    with explain_missing(conf.model_name_or_path, "model.model_name_or_path"):
        return AutoTokenizer.from_pretrained(
            resolve_model_path(conf), revision=conf.revision, trust_remote_code=conf.trust_remote_code
        )


def _find_adapter_tokenizer(conf: ModelConf) -> str | None:
    if conf.adapter is None:
        return None
    folder = resolve_adapter_path(conf)
    return folder if (Path(folder) / "tokenizer_config.json").exists() else None


def _check_vocabulary(tokenizer: Any, conf: ModelConf) -> None:
    """Refuse a tokenizer whose ids reach beyond the base model's embeddings."""
    with explain_missing(conf.model_name_or_path, "model.model_name_or_path"):
        config = AutoConfig.from_pretrained(
            resolve_model_path(conf), revision=conf.revision, trust_remote_code=conf.trust_remote_code
        )
    room = config.get_text_config().vocab_size
    if len(tokenizer) > room:
        raise ConfigError(
            f"`model.adapter={conf.adapter}`: its tokenizer has {len(tokenizer)} tokens, {conf.model_name_or_path} has "
            f"room for {room}; merge the adapter into a model with resized embeddings first"
        )

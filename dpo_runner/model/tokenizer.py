"""The tokenizer, what it asks of the embeddings, and the chat template that counts: whose of three it is."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from dpo_runner.config.sections.model import ModelConf
from dpo_runner.data.templates.rendering import resolve_chat_template
from dpo_runner.errors import ConfigError
from dpo_runner.model.files.locations import explain_missing, resolve_adapter_path, resolve_model_path
from dpo_runner.model.vocabulary import (
    Vocabulary,
    add_tokens,
    build_meta_model,
    count_rows,
    load_model_config,
    read_brought_rows,
    settle_pad_token,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def find_stop_ids(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", stop_id: int | None = None
) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's, the chat template's, and those of the published model."""
    stops = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, stop_id, *(stops if isinstance(stops, list) else [stops])} - {None})


def load_tokenizer(conf: ModelConf) -> "PreTrainedTokenizerBase":
    """Load the tokenizer: the SFT adapter's, where it brings one, with the chat template that it was tuned with.

    Raises:
        ConfigError: there is no such model, the adapter's tokenizer has tokens that no embeddings are there for, or
            `model.pad_token` is no token.
    """
    return _load_with_added(conf)[0]


def settle_vocabulary(conf: ModelConf) -> Vocabulary:
    """Find out which embeddings the run's tokens need, from the adapter's file and the tokenizer.

    Raises:
        ConfigError: as `load_tokenizer`; or the adapter's file has embeddings for a part of its tokens only.
    """
    if conf.adapter is None and not conf.added_tokens:
        return Vocabulary()
    meta = build_meta_model(load_model_config(conf), conf)
    vocabulary, has = Vocabulary(), count_rows(meta)
    if conf.adapter is not None:
        vocabulary.brought, vocabulary.replaces_base = read_brought_rows(Path(resolve_adapter_path(conf)), meta)
    vocabulary.rows = vocabulary.brought
    if conf.added_tokens:
        tokenizer, vocabulary.new_ids = _load_with_added(conf)
        if len(tokenizer) > (vocabulary.rows or has):
            vocabulary.rows = len(tokenizer)
    return vocabulary


def _load_with_added(conf: ModelConf) -> "tuple[PreTrainedTokenizerBase, list[int]]":
    adapter = _find_adapter_tokenizer(conf)
    if adapter is None:
        tokenizer = _load_base_tokenizer(conf)
    else:
        with explain_missing(str(conf.adapter), "model.adapter"):
            # Without the setting, transformers would ask at the terminal whether to run an adapter's own code.
            tokenizer = AutoTokenizer.from_pretrained(adapter, trust_remote_code=conf.trust_remote_code)
        _check_vocabulary(tokenizer, conf)
        if tokenizer.chat_template is None:
            tokenizer.chat_template = _load_base_tokenizer(conf).chat_template
    if conf.chat_template is not None:
        tokenizer.chat_template = resolve_chat_template(conf.chat_template)
    _check_template_names(tokenizer, conf)
    new_ids = add_tokens(tokenizer, conf.added_tokens)
    settle_pad_token(tokenizer, conf.pad_token)
    return tokenizer, new_ids


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


def _check_template_names(tokenizer: Any, conf: ModelConf) -> None:
    """Refuse a name by which a template would be saved elsewhere than among the result's, or not at all."""
    for name in tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ():
        if not re.fullmatch(r"\w[\w .-]{0,99}", name):
            raise ConfigError(
                f"`model.model_name_or_path={conf.model_name_or_path}`: its tokenizer calls a chat template "
                f"{name[:100]!r}, which is no name for a file; set model.chat_template"
            )


def _check_vocabulary(tokenizer: Any, conf: ModelConf) -> None:
    """Refuse a tokenizer whose ids reach beyond the embeddings, the base model's or those the adapter brings."""
    config = load_model_config(conf)
    room = config.get_text_config().vocab_size
    if len(tokenizer) > room:
        room = read_brought_rows(Path(resolve_adapter_path(conf)), build_meta_model(config, conf))[0] or room
    if len(tokenizer) > room:
        raise ConfigError(
            f"`model.adapter={conf.adapter}`: its tokenizer has {len(tokenizer)} tokens, {conf.model_name_or_path} has "
            f"room for {room}, and the adapter brings no embeddings for the rest; save it with "
            "save_embedding_layers=True, or merge it into a model with resized embeddings first"
        )

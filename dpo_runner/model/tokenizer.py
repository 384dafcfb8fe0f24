"""Tokenizers of the base and of an adapter, their chat templates, and the tokens that end an answer."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import AutoTokenizer

from dpo_runner.config.sections.model import ModelConf
from dpo_runner.data.templates.rendering import resolve_chat_template
from dpo_runner.errors import ConfigError
from dpo_runner.model.files.locations import loading_errors
from dpo_runner.model.vocabulary import add_tokens, choose_pad_token

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


ONE_ANSWER = {"num_return_sequences": 1, "num_beams": 1, "return_dict_in_generate": False}
"""Arguments of `generate` that override a model's generation_config: one row of ids for each prompt."""


def find_stop_ids(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", stop_id: int | None = None
) -> list[int]:
    """Return the ids that end an answer: the tokenizer's, the chat template's and the generation config's."""
    stops = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, stop_id, *(stops if isinstance(stops, list) else [stops])} - {None})


def load_base_tokenizer(conf: ModelConf, base: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of the model beneath all adapters.

    Raises:
        ConfigError: it cannot be loaded.
    """
    with loading_errors(conf.model_name_or_path, "model.model_name_or_path"):
        return AutoTokenizer.from_pretrained(base, revision=conf.revision, trust_remote_code=conf.trust_remote_code)


def load_adapter_tokenizer(conf: ModelConf, adapter: Path | None) -> "PreTrainedTokenizerBase | None":
    """Load the tokenizer in the SFT adapter's folder; None if there is none."""
    if not has_tokenizer(adapter):
        return None
    with loading_errors(str(conf.adapter), "model.adapter"):
        # Without the setting, transformers would prompt at the terminal before running an adapter's own code.
        return AutoTokenizer.from_pretrained(adapter, trust_remote_code=conf.trust_remote_code)


def has_tokenizer(adapter: Path | None) -> bool:
    """Return whether an adapter's folder holds a tokenizer."""
    return adapter is not None and (adapter / "tokenizer_config.json").exists()


def find_other_token(tokenizer: "PreTrainedTokenizerBase", conf: ModelConf, base: str, ids: set[int]) -> str | None:
    """Return the first of `ids` that is another token for a second model, in words; None if it has no tokenizer.

    Special tokens are left out: one model's may be spare in the other.

    Args:
        tokenizer: of the first model.
        conf: the `model` group of the second.
        base: folder or hub id of the second.
        ids: of tokens.
    """
    try:
        other = load_base_tokenizer(conf, base)
    except ConfigError:
        return None
    plain = ids - {*tokenizer.added_tokens_decoder, *other.added_tokens_decoder}
    for number in sorted(token for token in plain if token < len(other)):
        mine, its = (each.convert_ids_to_tokens(number) for each in (tokenizer, other))
        if mine != its:
            return f"{its!r} for {mine!r}"
    return None


def check_room(tokenizer: "PreTrainedTokenizerBase", conf: ModelConf, room: int) -> None:
    """Refuse an adapter's tokenizer with more tokens than the embeddings have rows.

    Args:
        tokenizer: the SFT adapter's.
        conf: the `model` group.
        room: rows of the embeddings, the base's or the adapter's.

    Raises:
        ConfigError: it has more tokens.
    """
    if len(tokenizer) > room:
        raise ConfigError(
            f"`model.adapter={conf.adapter}`: its tokenizer has {len(tokenizer)} tokens, {conf.model_name_or_path} has "
            f"room for {room}, and the adapter has no embeddings for the rest; save it with "
            "save_embedding_layers=True, or merge it into a model with resized embeddings first"
        )


def describe_template(conf: ModelConf, template: Any, from_adapter: bool, of_base: Any) -> str:
    """Return a short description of the origin of the chat template.

    Args:
        conf: the `model` group.
        template: the tokenizer's chat template.
        from_adapter: whether the tokenizer is the SFT adapter's.
        of_base: the chat template of the base's tokenizer.
    """
    if template is None:
        return "none"
    if conf.chat_template is not None:
        return f"model.chat_template={conf.chat_template}"
    if not from_adapter:
        return "the tokenizer's own"
    if template == of_base:
        return "the model's own"
    return f"the SFT adapter's ({conf.adapter}); {conf.model_name_or_path} has another one"


def finish_tokenizer(tokenizer: "PreTrainedTokenizerBase", conf: ModelConf, room: int) -> list[int]:
    """Set a tokenizer's chat template, added tokens and pad token from the `model` group.

    Returns:
        The ids of added tokens that the embeddings, of `room` rows, have not been trained on.
    """
    if conf.chat_template is not None:
        tokenizer.chat_template = resolve_chat_template(conf.chat_template)
    _check_template_names(tokenizer, conf)
    tokenizer.split_special_tokens = False  # else a template's control tokens would be split like text
    new_ids = add_tokens(tokenizer, conf.added_tokens, room)
    choose_pad_token(tokenizer, conf.pad_token)
    return new_ids


def _check_template_names(tokenizer: Any, conf: ModelConf) -> None:
    """Refuse template names that would save a template outside the result's folder, or not save it."""
    for name in tokenizer.chat_template if isinstance(tokenizer.chat_template, dict) else ():
        if not re.fullmatch(r"\w[\w .-]{0,99}", name):
            raise ConfigError(
                f"`model.model_name_or_path={conf.model_name_or_path}`: its tokenizer calls a chat template "
                f"{name[:100]!r}, which is not a valid file name; set model.chat_template"
            )

"""The vocabulary of a run: its pad token, added tokens, and embeddings resized for them."""

import copy
import json
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import TrainableTokensWrapper, match_target_against_key
from safetensors import safe_open
from transformers import AddedToken, AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from dpo_runner.config.sections.model import ModelConf
from dpo_runner.errors import ConfigError, reason_of
from dpo_runner.io.upstream import find_private
from dpo_runner.model.files.locations import loading_errors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PAD_TOKENS = ("<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|vision_pad|>", "<|endoftext|>")


@dataclass
class Vocabulary:
    """Requirements of the run's tokens on the base model.

    Attributes:
        rows: rows that the embeddings must have; None if the base has as many.
        brought: rows of the embeddings that the SFT adapter was trained on; None if the base has as many.
        new_ids: ids of the tokens in `model.added_tokens` that the tokenizer lacked.
        replaces_base: whether the SFT adapter's file holds embeddings that replace the base's.
    """

    rows: int | None = None
    brought: int | None = None
    new_ids: list[int] = field(default_factory=list)
    replaces_base: bool = False


def choose_pad_token(tokenizer: "PreTrainedTokenizerBase", wanted: str | None) -> None:
    """Set the tokenizer's pad token: `wanted`, its own, an unused one intended for padding, or else EOS.

    Raises:
        ConfigError: `wanted` is not in the vocabulary.
    """
    vocabulary = tokenizer.get_vocab()
    if wanted is not None:
        if wanted not in vocabulary:
            near = get_close_matches(wanted, vocabulary, n=1)
            hint = f"did you mean `{near[0]}`? Else" if near else "choose one, or"
            raise ConfigError(f"`model.pad_token={wanted}`: not in the vocabulary; {hint} add it by added_tokens")
        tokenizer.pad_token = wanted
    elif tokenizer.pad_token is None:
        template = str(tokenizer.chat_template)
        taken, made_for_it = (tokenizer.eos_token, tokenizer.bos_token), (*_PAD_TOKENS, tokenizer.unk_token)
        free = (t for t in made_for_it if t in vocabulary and t not in taken and t not in template)
        tokenizer.pad_token = next(free, tokenizer.eos_token)


def describe_padding(tokenizer: "PreTrainedTokenizerBase", stop_id: int | None) -> str:
    """Return the pad token and its other uses, in words.

    Args:
        tokenizer: has its pad token.
        stop_id: the token with which the chat template ends an answer, or None.
    """
    pad, token = tokenizer.pad_token_id, str(tokenizer.pad_token)
    if pad in (tokenizer.eos_token_id, stop_id):
        use = "ends answers"
    elif pad == tokenizer.bos_token_id:
        use = "begins texts"
    elif token in str(tokenizer.chat_template):
        use = "stands in the chat template"
    else:
        return token
    return f"{token}, which also {use}: padding is masked by position, never by value"


def add_tokens(tokenizer: "PreTrainedTokenizerBase", wanted: list[str], room: int) -> list[int]:
    """Make each of the tokens a special token of the tokenizer.

    Returns:
        The ids of those that were not tokens before, or lie beyond the `room` rows of the embeddings.

    Raises:
        ConfigError: one is empty or begins or ends with white space.
    """
    for token in wanted:
        if not token or token != token.strip():
            raise ConfigError(f"`model.added_tokens`: {token!r} must not be empty, nor begin or end with white space")
    known, special = tokenizer.get_vocab(), tokenizer.added_tokens_encoder
    # The tokenizer would split a vocabulary token that is not special when it encodes a rendered template.
    tokenizer.add_tokens(
        [AddedToken(token, special=True, normalized=False) for token in wanted if token not in special],
        special_tokens=True,
    )
    return [tokenizer.convert_tokens_to_ids(token) for token in dict.fromkeys(wanted) if known.get(token, room) >= room]


def load_model_config(conf: ModelConf, base: str) -> PretrainedConfig:
    """Load the config of the model beneath all adapters.

    Args:
        conf: the `model` group.
        base: folder or hub id of that model.

    Raises:
        ConfigError: it cannot be loaded.
    """
    revision = conf.revision if base == conf.model_name_or_path else None
    with loading_errors(base, "model.model_name_or_path"):
        return AutoConfig.from_pretrained(base, revision=revision, trust_remote_code=conf.trust_remote_code)


def build_meta_model(config: PretrainedConfig, conf: ModelConf) -> PreTrainedModel:
    """Return the model without weights, on the meta device.

    Raises:
        ConfigError: the config cannot be loaded, or `model.attn_implementation` is not to be had.
    """
    plain = copy.deepcopy(config)
    if hasattr(plain, "quantization_config"):
        del plain.quantization_config
    with torch.device("meta"), loading_errors(conf.model_name_or_path, "model.model_name_or_path"):
        model = AutoModelForCausalLM.from_config(plain, trust_remote_code=conf.trust_remote_code)
    kind, reason = type(model).__name__, None
    sees_all = any(getattr(layer, "is_causal", True) is False for layer in model.modules())
    if sees_all and getattr(model.config, "is_decoder", True) is False:  # as in BERT
        reason = f"is an encoder ({kind}), whose tokens see those after them; name a causal language model"
    elif model.base_model is model:  # Llama 4
        reason = f"TRL finds no backbone in {kind}, from which it takes hidden states; name a model of another family"
    if reason is not None:
        raise ConfigError(f"`model.model_name_or_path={conf.model_name_or_path}`: {reason}")
    if (attention := conf.attn_implementation) is not None:
        try:
            find_private("transformers", model, "_check_and_adjust_attn_implementation")(attention, is_init_check=True)
        except (ImportError, ValueError, OSError) as error:
            reason = reason_of(error).rstrip(".")
            raise ConfigError(f"`model.attn_implementation={attention}`: {reason}; use sdpa or eager") from None
    return model


def count_rows(model: PreTrainedModel) -> int:
    """Return the number of rows of the model's embeddings."""
    return int(model.get_input_embeddings().weight.shape[0])


def resize_embeddings(model: PreTrainedModel, rows: int) -> None:
    """Resize embeddings and head; each new row is the mean of the old rows, the same in every process.

    Raises:
        ConfigError: the head is quantized.
    """
    old = count_rows(model)
    if rows == old:
        return
    head = model.get_output_embeddings()
    if head is not None and type(head) is not torch.nn.Linear:
        raise ConfigError(
            f"`model`: its output head is a {type(head).__name__}, which cannot be resized from {old} to {rows} rows "
            "for new tokens; leave the head out of quantization, or name a model that has the tokens"
        )
    device = model.get_input_embeddings().weight.device
    # the values drawn here are overwritten, and must not change later draws
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        model.resize_token_embeddings(rows, mean_resizing=False)
    for module in _embeddings_of(model).values():
        for values in (module.weight, getattr(module, "bias", None)):
            if values is not None and rows > old:
                values.data[old:] = values.data[:old].mean(0, dtype=torch.float32).to(values.dtype)


def free_pad_row(model: PreTrainedModel) -> None:
    """Make the pad token's embedding trainable: torch gives the row `padding_idx` no gradient.

    A pad token that training needs, such as EOS, would silently stay untrained.
    """
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, torch.nn.Embedding):
        embeddings.padding_idx = None


def _embeddings_of(model: PreTrainedModel) -> dict[str, Any]:
    """Return by path the input embeddings and, if it is not tied to them, the output head."""
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    wanted = [embeddings]
    if head is not None and head.weight is not embeddings.weight:
        wanted.append(head)
    return {path: module for path, module in model.named_modules() if any(module is each for each in wanted)}


def read_brought_rows(folder: Path, meta: PreTrainedModel) -> tuple[int | None, bool]:
    """Find the size of the embeddings that an adapter was trained on, by the shapes in its file.

    Args:
        folder: the adapter's.
        meta: its base, on the meta device.

    Returns:
        The number of rows, None if it is the base's; and whether the file holds embeddings with which PEFT replaces
        the base's instead of keeping both, as for `modules_to_save`.

    Raises:
        ConfigError: it has new rows for only a part of the tokens.
    """
    file, config = folder / "adapter_model.safetensors", json.loads((folder / "adapter_config.json").read_text("utf-8"))
    if not file.exists():
        return None, False
    has, embeddings = count_rows(meta), _embeddings_of(meta)
    beside = config.get("modules_to_save") or []
    trained = config.get("trainable_token_indices") or {}
    trained = trained if isinstance(trained, dict) else {next(iter(embeddings)): trained}
    whole: dict[str, int] = {}
    single: dict[str, set[int]] = {}
    replaces_base = False
    with safe_open(file, "pt") as tensors:
        for key in sorted(tensors.keys()):
            path = next((p for p in embeddings if key.startswith(f"base_model.model.{p}.")), None)
            if path is None or ".lora_" in key:
                continue
            if key.endswith("trainable_tokens_delta"):
                single[path] = {token for name, ids in trained.items() if _names(name, path) for token in ids}
            elif key.endswith("weight"):
                whole[path] = int(tensors.get_slice(key).get_shape()[0])
                replaces_base = replaces_base or not any(_names(name, path) for name in beside)
    rows = max(whole.values(), default=max((max(ids) + 1 for ids in single.values() if ids), default=has))
    rows = rows if whole else max(rows, has)
    for path in embeddings:
        if whole.get(path, has) != rows and not set(range(has, rows)) <= single.get(path, set()):
            raise ConfigError(
                f"`model.adapter={folder}`: was trained on embeddings of {rows} rows, the base has {has}, and its file "
                f"lacks those of {path}; save it with save_embedding_layers=True"
            )
    return (rows if rows != has else None), replaces_base


def _names(name: str, path: str) -> bool:
    return path == name or path.endswith(f".{name}")


def train_new_rows(config: PeftConfig | None, model: PreTrainedModel, new_ids: list[int]) -> None:
    """Make the adapter train and save only the embedding rows of new tokens (PEFT's trainable tokens).

    Args:
        config: the new adapter's, changed in place; None in full fine-tuning, which trains them anyway.
        model: its base, possibly on the meta device.
        new_ids: ids of the new tokens.

    Raises:
        ConfigError: PEFT does not support it for this adapter or model.
    """
    if config is None or not new_ids:
        return
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            f"`model.added_tokens`: peft_type {config.peft_type.value} cannot train the embeddings of new tokens; use "
            "lora.peft_type=LORA, or lora=none to train all weights"
        )
    if config.trainable_token_indices is not None:
        raise ConfigError("`lora.config.trainable_token_indices`: is set by model.added_tokens; remove one of them")
    embeddings, head = _embeddings_of(model), model.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ConfigError(
            "`model.added_tokens`: the model's output head has a bias, which PEFT leaves out if it trains single "
            "rows; use lora=none to train all weights"
        )
    paths = {path for path, module in model.named_modules() if module is head} | set(embeddings)
    targets = config.target_modules
    for path in sorted(paths):
        if targets != "all-linear" and (
            match_target_against_key(targets, path)
            if isinstance(targets, str)
            else any(_names(name, path) for name in targets or [])
        ):
            raise ConfigError(f"`lora.target_modules`: {path} cannot have LoRA if model.added_tokens trains its rows")
    saved = {path for path in paths if any(_names(name, path) for name in config.modules_to_save or [])}
    if saved and len(embeddings) < len(paths):
        raise ConfigError(
            f"`lora.modules_to_save`: {', '.join(sorted(saved))} would be untied from the embeddings; remove it, "
            "model.added_tokens trains the new rows"
        )
    rows = {path: list(new_ids) for path in embeddings if path not in saved}
    config.trainable_token_indices = rows or None


def open_head(model: PreTrainedModel) -> None:
    """Set the attribute `bias` that TRL reads on a head with trained rows; PEFT's wrapper hides it.

    Raises:
        ConfigError: the head has a bias, which PEFT would leave out.
    """
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        if getattr(head.original_module, "bias", None) is not None:
            raise ConfigError("`model.adapter`: trains rows of an output head with a bias, which PEFT leaves out")
        head.bias = None

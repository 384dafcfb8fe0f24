"""GGUF files, dequantized once into an ordinary transformers folder: reading one takes ten times as long."""

import hashlib
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_runner.artifacts import cache_dir, write_folder_once
from dpo_runner.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HEAD_BYTES = 2**20


def load_gguf_path(file: Path) -> Path:
    """Return the folder of a GGUF file's dequantized weights (bf16) and tokenizer, made on first use.

    Raises:
        ConfigError: transformers cannot read it.
    """
    stat = file.stat()
    with file.open("rb") as opened:
        digest = hashlib.sha256(opened.read(_HEAD_BYTES))  # the header, which holds names, shapes and tokenizer
    digest.update(repr((file.name, stat.st_size, stat.st_mtime_ns)).encode())
    folder = cache_dir() / f"gguf-{digest.hexdigest()[:16]}"
    if not (folder / "config.json").exists():
        try:
            write_converted(file, folder, str(file))
        except (ValueError, OSError, NotImplementedError, KeyError, struct.error) as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ConfigError(f"`model.model_name_or_path={file}`: cannot be read as GGUF; {reason}") from None
    return folder


def write_converted(file: Path, folder: Path, name: str) -> None:
    """Dequantize a GGUF file to bf16 and write it as a transformers folder.

    Args:
        file: the GGUF file.
        folder: where the model goes; of several processes at it, the first to finish wins.
        name: what the model's config calls its origin.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # transformers refuses to save what it believes to be packed GGUF, although the weights are dense by now.
    model.config.quantization_config = None
    del model.config.quantization_config
    model.hf_quantizer = None
    model.config._name_or_path = name
    write_model(folder, model, tokenizer)


def write_model(folder: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write a model and its tokenizer into a folder of the cache."""

    def fill(staging: Path) -> None:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)

    write_folder_once(folder, fill)

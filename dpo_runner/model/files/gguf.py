"""GGUF files, dequantized once into a regular transformers folder, which loads ten times as fast."""

import hashlib
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_runner.errors import ConfigError, reason_of
from dpo_runner.io.console import show_each
from dpo_runner.io.files import cache_dir, write_folder_once
from dpo_runner.io.upstream import find_private

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_HEAD_BYTES = 2**20


def load_gguf_path(file: Path) -> Path:
    """Return the folder with a GGUF file's dequantized weights (bf16) and tokenizer, created on first use.

    Raises:
        ConfigError: transformers cannot read it.
        RunError: the cache cannot be written to.
    """
    stat = file.stat()
    with file.open("rb") as opened:
        digest = hashlib.sha256(opened.read(_HEAD_BYTES))  # the header: names, shapes and tokenizer
    digest.update(repr((file.name, stat.st_size, stat.st_mtime_ns)).encode())
    folder = cache_dir() / f"gguf-{digest.hexdigest()[:16]}"
    if not (folder / "config.json").exists():
        try:
            model, tokenizer = read_gguf(file, str(file))
        # raised by transformers and its GGUF reader for damaged files and unsupported architectures
        except (ValueError, OSError, NotImplementedError, KeyError, struct.error) as error:
            reason = reason_of(error)
            raise ConfigError(f"`model.model_name_or_path={file}`: cannot be read as GGUF; {reason}") from None
        write_model(folder, model, tokenizer)
    return folder


def read_gguf(file: Path, name: str) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Load the model in a GGUF file, dequantized to bf16, and its tokenizer.

    Args:
        file: the GGUF file.
        name: the model's origin, for `_name_or_path` in its config.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.quantization_config import GgufConfig

    with _own_bar(f"converting {file.name}, once"):
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
            trust_remote_code=False,
        )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
    # transformers takes the model for packed GGUF and refuses to save it, although its weights are now dense.
    model.config.quantization_config = None
    del model.config.quantization_config
    model.hf_quantizer = None
    model.config.name_or_path = name
    return model, tokenizer


@contextmanager
def _own_bar(what: str) -> Iterator[None]:
    """Show the conversion as other long steps are shown, instead of with transformers' bar."""
    from transformers import modeling_gguf_pytorch_utils as reader

    theirs = reader.tqdm
    reader.tqdm = lambda tensors, desc: show_each(tensors, what)
    try:
        yield
    finally:
        reader.tqdm = theirs


def write_model(folder: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Write a model and its tokenizer to a folder in the cache.

    If several processes do so at once, the first to finish wins. Each writes the whole model: with torch's process
    group open, transformers writes models in its first process alone, and another one's folder would lack them.

    Raises:
        RunError: the cache cannot be written to.
    """
    find_private("transformers", model, "should_save_on_this_rank")
    model.should_save_on_this_rank = lambda is_main_process: is_main_process

    def fill(staging: Path) -> None:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)

    write_folder_once(folder, fill)

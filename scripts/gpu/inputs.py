"""Models with random weights in the shapes of known models, and rows for them; no hub and no packaged model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.bench.inputs.shapes import Rows, write_rows
from scripts.bench.peers.sides import Job, vary, write_trl_dataset
from scripts.gpu.work import free_memory

_SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 128256,
    "tie_word_embeddings": True,
}
_MISTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
    "sliding_window": None,
}
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1024,
}
_SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tiny": ("a tiny Llama", "llama", _TINY),
    "135m": ("SmolLM2-135M", "llama", _SMOLLM2),
    "1b": ("Llama-3.2-1B", "llama", _LLAMA_1B),
    "7b": ("Mistral-7B", "mistral", _MISTRAL),
}
"""Name, architecture and config sizes of each shape."""

SIZES = ("7b-nf4", "7b", "135m", "1b", "135m-nf4", "tiny", "tiny-nf4")
"""Shapes, quantized to nf4 where the name ends with it. Most important first, because time may run out."""

_LARGEST_BYTES = 16e9
"""Disk space for the largest model."""


@dataclass(frozen=True)
class Task:
    """The settings of all parts of the check.

    Attributes:
        device: `cuda` or `cpu`.
        work: folder for models, rows, runs and caches.
        pairs: rows of the benchmark, whole steps of 8.
        seconds: time that the running part has, set anew for each part.
    """

    device: str
    work: str
    pairs: int
    seconds: float = 0.0

    @property
    def small(self) -> str:
        """The size of model on which exactness is checked."""
        return "135m" if self.device == "cuda" else "tiny"


def describe_size(size: str) -> str:
    """Return the name of the model whose shape a size has."""
    shape, _, quantization = size.partition("-")
    return f"{_SHAPES[shape][0]}, {quantization or 'bf16'}"


def prepare_job(task: Task, size: str, pairs: int, shape: str = "hh", length: int = 0) -> tuple[Job, Rows]:
    """Write a size's model and rows, and return the job that trains one on the other.

    Args:
        task: the settings.
        size: one of `SIZES`.
        pairs: number of rows.
        shape: shape of the rows; see `write_rows`.
        length: tokens of a row, for `synthetic`, half of them the prompt's.

    Raises:
        OSError: the disk has too little room for the model.
        ValueError: TRL makes other tokens from the rows.
    """
    work = Path(task.work)
    model = write_random_model(size, work / "models", task.device)
    folder = work / "rows" / f"{size}-{pairs}"
    folder.mkdir(parents=True, exist_ok=True)
    rows = write_rows(shape, pairs, model, folder, None, length, 0.5)
    write_trl_dataset(rows.path)
    job = Job(rows.path, pairs, rows.max_length, model, task.device, load_in_4bit=size.endswith("-nf4"))
    return vary(job, dtype=choose_dtype(task.device)), rows


def choose_dtype(device: str) -> str:
    """Return the 16-bit dtype of weights and autocast: float16 on a card without bf16."""
    import torch

    has_bf16 = device == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if has_bf16 else "float16"


def write_random_model(size: str, folder: Path, device: str) -> str:
    """Write a bf16 model of a size with seeded random weights, unless it is there, and return its folder.

    Its tokenizer has one token for each byte and a chat template; it takes no file. The embeddings have as many rows
    as those of the model after which the shape is named.

    Args:
        size: one of `SIZES`; sizes that differ only in quantization share a folder.
        folder: parent of the model's folder.
        device: device on which the weights are drawn.

    Raises:
        OSError: the disk has too little room.
    """
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from dpo_runner.model.files.gguf import write_model
    from dpo_runner.model.files.packaged import load_random_model_path

    shape = size.removesuffix("-nf4")
    _, kind, sizes = _SHAPES[shape]
    path = folder / shape
    if not (path / "config.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        if shape == "7b" and (free := shutil.disk_usage(folder).free) < _LARGEST_BYTES:
            raise OSError(f"{folder} has {free / 1e9:.1f} GB free, the model takes {_LARGEST_BYTES / 1e9:.0f}")
        tokenizer = AutoTokenizer.from_pretrained(load_random_model_path())
        special = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = AutoConfig.for_model(kind, **sizes, **special, max_position_embeddings=8192)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        write_model(path, model, tokenizer)
        del model
        free_memory()
    return str(path)

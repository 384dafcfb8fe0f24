"""Files that could run code when they are read: refused where safetensors will do, read for their numbers otherwise."""

import importlib
from pathlib import Path
from pickle import UnpicklingError

from dpo_runner.errors import ConfigError, reason_of


def refuse_pickled_adapter(folder: Path, setting: str | None = None) -> None:
    """Refuse an adapter whose weights are not in safetensors.

    Args:
        folder: the adapter's.
        setting: what names it in the configuration, such as `model.adapter=FOLDER`; None where nothing does.

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
    """Refuse a checkpoint with a pickle that is more than tensors and numbers, or with pickled weights.

    A checkpoint's digests say that it is whole, not who has written it. Its pickles are looked at, not loaded; what
    loads them later, torch with `weights_only=True`, would run nothing either, but tells of it in a dozen lines.

    Raises:
        ConfigError: naming the file, and what it asks for.
    """
    import torch
    from transformers.trainer_pt_utils import safe_globals
    from transformers.utils import is_torchao_available

    if is_torchao_available():
        importlib.import_module("torchao.optim")  # says that its optimizers' states, tensors of a kind, are safe
    for file in sorted(checkpoint.rglob("*")):
        if file.suffix == ".bin" and file.name.startswith(("pytorch_model", "adapter_model", "optimizer")):
            raise ConfigError(f"{file}: this program writes no such file, a pickle, which may run code; remove it")
        if file.suffix not in (".pt", ".pth"):
            continue
        try:
            with safe_globals():  # numpy's arrays, of its random numbers
                asked = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        except (ValueError, RuntimeError, EOFError, UnpicklingError) as error:
            raise ConfigError(f"{file}: is not what torch.save writes, and is not loaded; {reason_of(error)}") from None
        if asked:
            raise ConfigError(
                f"{file}: asks for {', '.join(sorted(asked))}, which could run code, and is not loaded; nothing but "
                "tensors and numbers belongs there"
            )

"""Locations of models and adapters: a folder, the hub, or a folder created on this machine first."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError

from safetensors import SafetensorError

from dpo_runner.config.adapter_config import read_adapter_base
from dpo_runner.config.sections.model import ModelConf
from dpo_runner.errors import ConfigError, reason_of
from dpo_runner.model.files.gguf import load_gguf_path
from dpo_runner.model.files.packaged import PYPI_PREFIX, RANDOM_PREFIX, load_default_model_path, load_random_model_path


def resolve_model_path(conf: ModelConf) -> str:
    """Return the folder or hub id to load; create the default or the random model first if it is named.

    A GGUF file is dequantized into the cache.

    Raises:
        ConfigError: the folder holds an adapter, or a local path does not exist.
    """
    name = conf.model_name_or_path
    if name.startswith(PYPI_PREFIX):
        return str(load_default_model_path(name))
    if name.startswith(RANDOM_PREFIX):
        return str(load_random_model_path(name))
    path = Path(name).expanduser()
    if is_adapter(name):
        raise ConfigError(
            f"`model.model_name_or_path={name}`: is an adapter; put it in model.adapter and its base model here"
        )
    if (path.is_absolute() and not path.exists()) or (name.startswith((".", "~")) and not path.exists()):
        raise ConfigError(f"`model.model_name_or_path={name}`: no such folder")
    if path.suffix == ".gguf" and path.is_file():
        return str(load_gguf_path(path))
    if conf.gguf_file is not None:
        return str(load_gguf_path(_find_gguf(name, path, conf.gguf_file, conf.revision)))
    if path.is_dir() and not (path / "config.json").exists() and (below := _look_below(path, "*config.json")):
        raise ConfigError(f"`model.model_name_or_path={name}`: has no config.json{below}")
    return str(path) if path.exists() else name


def _look_below(path: Path, file: str) -> str:
    """Return where in a folder's subfolders there is the file that the folder lacks, such as a run's adapter."""
    found = sorted({each.parent for depth in ("*", "*/*") for each in path.glob(f"{depth}/{file}")})
    return f"; there is one in {', '.join(map(str, found[:4]))}" if found else ""


def _find_gguf(name: str, path: Path, file: str, revision: str | None) -> Path:
    if path.is_dir():
        if not (path / file).is_file():
            there = ", ".join(sorted(found.name for found in path.glob("*.gguf"))) or "none"
            raise ConfigError(f"`model.gguf_file={file}`: not in {name}; GGUF files there: {there}")
        return path / file
    from huggingface_hub import hf_hub_download

    with loading_errors(name, "model.model_name_or_path"):
        return Path(hf_hub_download(name, file, revision=revision))


def is_adapter(name: str) -> bool:
    """Return whether a local path holds a PEFT adapter."""
    return (Path(name).expanduser() / "adapter_config.json").exists()


def resolve_adapter_path(conf: ModelConf) -> str:
    """Return the local folder of `model.adapter`, downloaded from the hub if it is not a folder.

    Raises:
        ConfigError: it does not exist, or is not an adapter.
    """
    name = str(conf.adapter)
    path = Path(name).expanduser()
    if path.exists():
        if not is_adapter(name):
            instead = (
                f"; name its folder, {path.parent}" if path.is_file() else _look_below(path, "adapter_config.json")
            )
            raise ConfigError(
                f"`model.adapter={name}`: not a PEFT adapter, because it has no adapter_config.json{instead}"
            )
        return str(path)
    from huggingface_hub import snapshot_download

    with loading_errors(name, "model.adapter"):
        return str(snapshot_download(name, revision=conf.adapter_revision))


def refuse_hub_adapter(conf: ModelConf) -> None:
    """Refuse an adapter's hub id in `model.model_name_or_path`, with the overrides to use instead.

    A local folder is recognised when the configuration is built, without access to the hub. transformers would put the
    adapter's layers into the model itself, where they cannot be separated from the reference.

    Raises:
        ConfigError: the hub id is an adapter's.
    """
    name = conf.model_name_or_path
    if name.startswith((PYPI_PREFIX, RANDOM_PREFIX)) or Path(name).expanduser().exists():
        return
    from transformers.utils.peft_utils import find_adapter_config_file

    with loading_errors(name, "model.model_name_or_path"):
        file = find_adapter_config_file(name, revision=conf.revision)
    if file is None:
        return
    base = f"model.model_name_or_path={read_adapter_base(Path(file)) or 'ITS_BASE'}"
    pinned = "" if conf.revision is None else f" model.adapter_revision={conf.revision} model.revision=null"
    instead = f"{base} model.adapter={name}{pinned}"
    if conf.adapter is not None:
        instead = f"{base}, since model.adapter names another one"
    raise ConfigError(f"`model.model_name_or_path={name}`: is an adapter, not a model; use {instead}")


@contextmanager
def loading_errors(name: str, key: str) -> Iterator[None]:
    """Turn a loader's long message about a missing model into one line."""
    try:
        yield
    except UnpicklingError:
        raise ConfigError(
            f"`{key}={name}`: holds a pickle with more than weights, which could run code; it was not loaded"
        ) from None
    except SafetensorError as error:
        raise ConfigError(
            f"`{key}={name}`: has a safetensors file that is damaged, cut off or only a Git LFS pointer ({error}); "
            "fetch it again"
        ) from None
    except (OSError, ValueError) as error:
        if "safetensors" in str(error) and "does not appear to have" in str(error):
            raise ConfigError(
                f"`{key}={name}`: has no safetensors weights, perhaps pickled ones, which may run code; "
                "model.use_safetensors=false allows pickles"
            ) from None
        if "instantiate the backend tokenizer" in str(error):
            raise ConfigError(
                f"`{key}={name}`: has no tokenizer that transformers can read; save the model's tokenizer there"
            ) from None
        if "no file named model.safetensors" in str(error):
            raise ConfigError(
                f"`{key}={name}`: holds no weights (model.safetensors); convert a DeepSpeed or FSDP checkpoint first "
                "(`zero_to_fp32.py --safe_serialization`, `accelerate merge-weights`)"
            ) from None
        if "Repo id must be" in str(error):
            raise ConfigError(f"`{key}={name}`: no such folder, and not a hub id such as OWNER/NAME") from None
        raise ConfigError(f"`{key}={name}`: cannot be loaded; {reason_of(error)}") from None

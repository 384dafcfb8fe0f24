"""The rules of any text in a configuration: what no file can be named, and no file of text can hold."""

from collections.abc import Iterator
from pathlib import Path

_PATHS = (
    *("run_dir", "path", "eval_path", "model_name_or_path", "adapter", "reference", "chat_template", "gguf_file"),
    "decontaminate",
)
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes, as Linux has it


def check_text(key: str, value: str) -> Iterator[str]:
    """Yield what is wrong with a text as the value of the dotted `key`."""
    name = key.rpartition(".")[2]
    is_path = name in _PATHS or key in ("sweep.dir", "wandb.dir")
    if not value and not key.startswith("training.") and name not in ("system_prompt", "notes"):
        yield f"`{key}=`: must not be empty; leave it out, or set it to null"
    elif not _is_unicode(value) or "\0" in value:
        yield f"`{key}={value}`: must be Unicode text, without NUL"
    elif (is_path or key == "run_name" or name == "name") and any(ord(character) < 32 for character in value):
        yield f"`{key}={value}`: must not hold control characters or line breaks"
    elif (is_path or key == "run_name") and max(len(part.encode()) for part in value.split("/")) > _LONGEST_NAME:
        yield f"`{key}={value}`: has a name of more than {_LONGEST_NAME} bytes, which no file can have"
    elif is_path and len(value.encode()) > _LONGEST_PATH:
        yield f"`{key}={value}`: has more than {_LONGEST_PATH} bytes, which no path can have"
    elif is_path and value.startswith("~") and not _has_home(value):
        yield f"`{key}={value}`: there is no such user; write the folder itself"


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _has_home(path: str) -> bool:
    try:
        Path(path).expanduser()
    except RuntimeError:
        return False
    return True

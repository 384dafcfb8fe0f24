"""dpo_runner: YAML-configured Direct Preference Optimization experiments."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dpo_runner.io.version import __version__

__all__ = ["RunConf", "__version__", "apply_chat_template", "load_conf", "run"]

if TYPE_CHECKING:
    from dpo_runner.config.compose import load_conf
    from dpo_runner.config.run_conf import RunConf
    from dpo_runner.data.templates.chat_template import apply_chat_template
    from dpo_runner.train import run

_HOME = {
    "RunConf": "dpo_runner.config.run_conf",
    "load_conf": "dpo_runner.config.compose",
    "apply_chat_template": "dpo_runner.data.templates.chat_template",
    "run": "dpo_runner.train",
}


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that `import dpo_runner` does not import torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)

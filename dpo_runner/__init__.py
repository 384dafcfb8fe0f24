"""dpo_runner: YAML-configured Direct Preference Optimization experiments."""

import sys

from dpo_runner import interrupts

if interrupts.is_command():
    interrupts.end_at_once_on_ctrl_c()  # before anything that takes time

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["RunConf", "__version__", "apply_chat_template", "load_conf", "run"]

if TYPE_CHECKING:
    from dpo_runner.config import RunConf, load_conf
    from dpo_runner.data.chat_template import apply_chat_template
    from dpo_runner.run import run

_HOME = {
    "RunConf": "dpo_runner.config",
    "load_conf": "dpo_runner.config",
    "apply_chat_template": "dpo_runner.data.chat_template",
}


def __getattr__(name: str) -> Any:
    """Import the public names on first use, so that `import dpo_runner` stays free of torch."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


class _Package(ModuleType):
    """Keeps `dpo_runner.run` the function: importing the module of that name would put the module in its place."""

    @property
    def run(self) -> Any:
        return import_module("dpo_runner.run").run

    @run.setter
    def run(self, module: ModuleType) -> None:
        """Leave the import system's assignment without effect; `from dpo_runner.run import …` works all the same."""


sys.modules[__name__].__class__ = _Package

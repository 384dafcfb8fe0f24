"""The text of `python -m dpo_runner --help`. Imports no torch."""

import textwrap

from dpo_runner.config.schema import SCHEMA
from dpo_runner.config.yaml_files import ConfigFiles
from dpo_runner.io.version import __version__


def build_help() -> str:
    """Return the text of `--help`: config groups, keys, options and examples."""
    files = ConfigFiles.over(None)
    groups = "\n".join(_align(group, "  ".join(files.options(group))) for group in files.groups())
    sections = {section: _field_names(section) for section, kind in SCHEMA.items() if kind is not None}
    sections[""] = [key for key, kind in SCHEMA.items() if "." not in key and kind is None]
    fields = "\n".join(_align(section, ", ".join(names)) for section, names in sections.items())
    return f"""\
dpo_runner {__version__}: Direct Preference Optimization from a YAML configuration.

Usage: python -m dpo_runner [GROUP=OPTION ...] [KEY=VALUE ...] [-m] [--config-dir DIR]

Without arguments it tunes the default model on the bundled data, offline, and prints a before and after.

Groups (GROUP=OPTION chooses a file of conf/GROUP/):
{groups}

Keys (KEY=VALUE sets one field):
{fields}

Options:
  -m, --multirun      run every combination of comma-separated values
  --cfg job           print the composed configuration and stop
  --config-dir DIR    look for GROUP/OPTION.yaml in DIR first
  --version, --help

Examples:
  python -m dpo_runner
  python -m dpo_runner model=tiny_random training=smoke
  python -m dpo_runner data=local_file data.path=pairs.jsonl training.beta=0.2
  python -m dpo_runner model=mistral quant=nf4
  python -m dpo_runner model.adapter=PATH_OR_HUB_ID
  python -m dpo_runner -m training.beta=0.05,0.1,0.3
  python -m dpo_runner run_dir=outputs/mine          # the same command continues what was interrupted
  python -m dpo_runner dry_run=true                  # the plan, and whether it will fit
  python -m dpo_runner.preview data=local_file data.path=pairs.jsonl   # what it would be trained on
  python -m dpo_runner.chat outputs/mine             # talk with the result
  python -m dpo_runner.compare outputs/sweeps        # runs side by side, the best one marked
  python -m dpo_runner.workspace outputs/sweeps/mine # a view of a sweep in Weights & Biases
  python -m dpo_runner.generate reward=length        # pairs from the model's own answers
  python -m dpo_runner.evaluate outputs/mine         # its evaluation against the model it started from
  python -m dpo_runner.export outputs/mine --out outputs/merged        # one folder to serve or publish
  python -m dpo_runner.cache                         # what is kept between runs, and how to clear it
"""


def _align(name: str, text: str) -> str:
    """Return a text to the right of its name, on lines of at most 80 characters."""
    return textwrap.fill(text, 80, initial_indent=f"  {name:<16}", subsequent_indent=" " * 18)


def _field_names(section: str) -> list[str]:
    names = [key.rpartition(".")[2] for key in SCHEMA if key.rpartition(".")[0] == section]
    if len(names) > 30:
        return ["every field of TRL's DPOConfig, such as beta, loss_type, learning_rate, max_length, max_steps"]
    return names

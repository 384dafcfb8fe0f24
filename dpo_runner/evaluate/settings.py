"""Overrides for the evaluation of a finished run, applied to the run's configuration."""

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from dpo_runner.config.compose import load_conf
from dpo_runner.config.run_conf import RunConf, config_keys
from dpo_runner.config.schema import SCHEMA, schema_key
from dpo_runner.config.sections.data import resolve_sources
from dpo_runner.config.yaml_files import ConfigFiles
from dpo_runner.errors import ConfigError
from dpo_runner.evaluate.judge import check_judge

SECTIONS = ("data", "samples", "judge", "reward", "benchmarks")
TRAINING_KEYS = ("training.max_length", "training.per_device_eval_batch_size")
ALLOWED = "data.…, samples.…, judge.…, reward.…, benchmarks.…, " + ", ".join(TRAINING_KEYS)
_LOCATION = ("path", "eval_path", "subset", "revision", "split", "eval_split")


def compose(run: RunConf, overrides: Sequence[str]) -> RunConf:
    """Return a run's configuration with an evaluation's overrides, checked like those of a run.

    An option of the `data` group replaces the run's data section; all other overrides are set on top of it. All pairs
    of data that the run did not use are evaluated: eval_fraction and max_train_samples apply only if they are set here.

    Args:
        run: the run's own configuration.
        overrides: as on the command line.

    Raises:
        ConfigError: one line per mistake, such as a key that an evaluation cannot change.
    """
    keys = [re.split("=", text.lstrip("+~"), maxsplit=1)[0].partition("@")[0] for text in overrides]
    groups = ConfigFiles.over(None).groups()
    refused = [
        f"`{text}`: is the run's own and cannot be changed for an evaluation; these can: {ALLOWED}"
        for text, key in zip(overrides, keys, strict=True)
        if (key in groups or schema_key(key) in SCHEMA)
        and key.partition(".")[0] not in SECTIONS
        and key not in TRAINING_KEYS
    ]
    if refused:
        raise ConfigError(refused)
    base = config_keys(run) | {"rounds": None, "rounds_patience": None, "rounds_reference": "previous"}
    if run.rounds and not any(key == "data" or key.startswith("data.") for key in keys):
        raise ConfigError("`data`: rounds hold out prompts, not pairs; name pairs (data=local_file data.path=FILE)")
    # An evaluation does not train: rules about evaluating and saving during training do not apply, nor do trackers.
    off = {"eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "report_to": "none"}
    base["training"] |= off
    if "data" in keys:
        del base["data"]
    with tempfile.TemporaryDirectory() as folder:
        # as an experiment, the run's settings take precedence over the defaults but not over the overrides
        (Path(folder) / "experiment").mkdir()
        text = "# @package _global_\n" + yaml.safe_dump(base, sort_keys=False, allow_unicode=True)
        (Path(folder) / "experiment" / "evaluated_run.yaml").write_text(text, encoding="utf-8")
        conf = load_conf(["experiment=evaluated_run", *overrides], folder)
    if is_foreign(conf, run):
        if "data.eval_fraction" not in keys:
            conf.data.eval_fraction = 0.0
        if "data.max_train_samples" not in keys:
            conf.data.max_train_samples = None
    if conf.judge.base_url is not None:
        check_judge(conf.judge)
        if conf.samples.num_prompts == 0:
            raise ConfigError("`samples.num_prompts=0`: leaves judge.base_url nothing to judge; must be above 0")
    elif any(key.startswith("judge.") and key != "judge.base_url" for key in keys):
        raise ConfigError("`judge`: has no effect without an endpoint; set judge.base_url, or leave the others out")
    return conf


def is_foreign(conf: RunConf, run: RunConf) -> bool:
    """Return whether the data differ from those that the run was trained and evaluated on."""

    def locations(conf: RunConf) -> list[list[Any]]:
        return [[getattr(source, key) for key in _LOCATION] for source in resolve_sources(conf.data).values()]

    return locations(conf) != locations(run)

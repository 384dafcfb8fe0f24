"""Fuzz the configuration check: each command line must compose or give printable errors.

    python -m scripts.torture.configs --cases 5000

Commands are drawn from the real schema: its keys with values of right and wrong types, misspelt keys, every form of
override, sweeps, flags, YAML files and text that is not YAML. Each must compose, or be refused with one printable line
per mistake, within seconds. A composed configuration must survive a round trip through YAML. Failed cases are printed,
and the exit code is 1.
"""

import argparse
import contextlib
import io
import random
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from dpo_runner.config.compose import load_conf
from dpo_runner.config.rules.fields import walk_fields
from dpo_runner.config.run_conf import config_keys
from dpo_runner.config.schema import SCHEMA
from dpo_runner.config.yaml_files import ConfigFiles
from dpo_runner.errors import ConfigError
from dpo_runner.io.exits import report
from dpo_runner.io.masking import mask_secrets
from dpo_runner.records.directory import resolve_run_dir
from dpo_runner.sweep.command_line import check_command_line
from scripts.torture.limits import Hang, time_limit

_SECONDS = 30
_GROUPS = ConfigFiles.over(None).groups()
_KEYS = [key for key in SCHEMA if "*" not in key]
_DEFAULTS = {
    key: str(value).lower() if isinstance(value, bool) else value
    for key, (_, value) in walk_fields(load_conf())
    if isinstance(value, (bool, int, float)) or (isinstance(value, str) and value.isalnum())
}
_NUMBERS = [key for key, value in _DEFAULTS.items() if isinstance(value, (int, float))]
_HYDRA_KEYS = [
    *("hydra.launcher", "hydra.launcher.x", "hydra.launcher._target_", "hydra/launcher", "hydra/sweeper", "hydra.mode"),
    *("hydra.callbacks.x._target_", "hydra.searchpath", "hydra.run.dir", "hydra.verbose", "hydra.job.env_set.X"),
    *("hydra/callbacks", "hydra.job_logging.root", "hydra.sweep.dir", "hydra.output_subdir", "hydra"),
]
_MAP_KEYS = [
    *("data.sources.a.path", "data.sources.a", "data.sources..path", "data.columns.q", "lora.config.x"),
    *("lora.rank_pattern.q", "lora.config._target_", "model.device_map.x", "training.lr_scheduler_kwargs.x"),
]
_VALUES = [
    *("", "0", "1", "-1", "0.5", "1e-4", "1e400", "-1e400", "nan", "-inf", "9" * 400, "9" * 5000, "0x10", "1_000"),
    *("true", "false", "null", "None", "???", "yes", "a", "nf4", "x.jsonl", "~nobody-9/x", "/" * 9, "a" * 300),
    *("[]", "[1]", "[a,[b]]", "{}", "{a:1}", "{a:{b:[c]}}", "{_target_:os.getcwd}", "[", "}", "'", '"', "'a'", '"a"'),
    *("\\", "a b", "a:b", "a=b", "$", "${", "${}", "${seed}", "${nope}", "${oc.env:HOME}", "${oc.env:NOT_SET_9}"),
    *("${oc.env:NOT_SET_9,1}", "${oc.decode:{a}", "${oc.create:{a:1}}", "${run_name}", "${training}", "${.beta}"),
    *("${nope:1}", "${hydra:run.dir}", "${now:%Y}", "1,2", "a,b", "choice(1,2)", "range(1,3)", "range(0,1e15)"),
    *("interval(0,1)", "tag(log,interval(1,2))", "glob(*)", "sort(2,1)", "shuffle(1,2)", "int(1)", "str(1)", "f()"),
    *("extend_list(1)", "(" * 50, "[" * 2000, "\x1b[31m", "\x00", "\r\n", "\u202e", "\ud800", "日本", "😀"),
]
_FLAGS = [
    *("-m", "--multirun", "--cfg", "job", "--cfg=job", "--cfg=hydra", "--resolve", "--info", "--info=all", "-p", "-x"),
    *("--config-dir=.", "--config-dir=/dev/null", "--config-dir", "--config-name=x", "--package=nope", "--nope", "--"),
    *("--experimental-rerun=x", "--run", "-r", "-sc", "--hydra-help", "-", ""),
]
_YAML = [
    *("# @package _global_", "# @package hydra", "# @package a b c", "---", "...", "defaults: [dpo, _self_]", "- a"),
    *(
        "defaults: {a: b}",
        "defaults: [1, {a: b, c: d}, [x], null]",
        "defaults: [/hydra/callbacks/x]",
        "<<: *a",
        "a: &a",
    ),
    *("defaults: [{/training: ipo}, {override /model: nope}, {training@x: dpo}, nope]", "? [a]", "a: *a", "b: &b [*b]"),
    *("hydra: {callbacks: {x: {_target_: os.getcwd}}}", "hydra: {mode: MULTIRUN, sweeper: {params: {seed: '1,2'}}}"),
    *(
        "hydra: null",
        "hydra: {sweeper: {params: [1]}}",
        "hydra: {job: {env_set: {A: b}}}",
        "x: !!python/object:os.x {}",
    ),
    *("x: !t 1", "\tx: 1", "1: 2", "null: 1", "true: false", "beta: ", "beta: [", 'beta: "${"', "beta: '", "{", "\x00"),
    *("training:", "training: {beta: 0.1, 1: 2}", "training: {<<: {beta: 1}}", "seed: 1\nseed: 2", "  seed: 1", "é: 1"),
]
_text = st.text(max_size=20)
_key = st.one_of(
    st.sampled_from(_KEYS),
    st.sampled_from(_KEYS),
    st.sampled_from([*_GROUPS, *_HYDRA_KEYS, *_MAP_KEYS]),
    st.builds(lambda key, at: key[:at] + key[at + 1 :], st.sampled_from(_KEYS), st.integers(0, 12)),
    _text,
)
_value = st.one_of(
    st.sampled_from(_VALUES),
    st.sampled_from([option for group in _GROUPS for option in ConfigFiles.over(None).options(group)]),
    st.floats().map(repr),
    st.integers().map(str),
    _text,
)
_override = st.one_of(
    *[st.builds("{}={}".format, _key, _value)] * 4,
    st.builds("{}{}={}".format, st.sampled_from(["+", "++", "~", "+++"]), _key, _value),
    st.builds("{}{}".format, st.sampled_from(["~", "", "+"]), _key),
    st.builds("{}@{}={}".format, _key, _key, _value),
    _text,
)
_sound = st.one_of(
    st.builds("{}={}".format, st.sampled_from(_NUMBERS), st.integers(1, 9) | st.floats(0.01, 0.9)),
    st.sampled_from([f"{key}={value}" for key, value in _DEFAULTS.items()]),
    st.sampled_from([f"{group}={option}" for group in _GROUPS for option in ConfigFiles.over(None).options(group)]),
    st.builds('{}="{}"'.format, st.sampled_from(["run_name", "wandb.notes", "data.system_prompt", "run_dir"]), _text),
)
_overrides = st.one_of(
    st.lists(_sound, max_size=3),
    st.tuples(_sound, _override).map(list),
    st.lists(_override, max_size=3),
)
_line = st.one_of(
    st.sampled_from(_YAML),
    st.builds("{}: {}".format, _key.map(lambda key: key.rpartition(".")[2]), _value),
    _text,
)
_file = st.tuples(st.sampled_from([*_GROUPS, "new"]), st.lists(_line, max_size=4).map("\n".join))


@dataclass
class FuzzOutcome:
    """Results of a series of cases.

    Attributes:
        composed: number of cases that composed.
        refused: number of cases refused with proper errors.
        slowest: time of the slowest case, in seconds.
        failures: one text per case that did neither.
    """

    composed: int = 0
    refused: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        cases = self.composed + self.refused + len(self.failures)
        return (
            f"configurations: {cases} cases, {self.composed} composed, {self.refused} refused in one line a mistake, "
            f"{len(self.failures)} otherwise; the slowest took {self.slowest:.1f} s"
        )


def fuzz_configs(cases: int, seed_number: int) -> FuzzOutcome:
    """Check `cases` commands drawn with a seed.

    Returns:
        The results. A failing case does not raise; Ctrl-C ends the series without raising.
    """
    outcome = FuzzOutcome()

    def check(overrides: list[str], flags: list[str], file: tuple[str, str] | None) -> None:
        begin = time.monotonic()
        try:
            with time_limit(_SECONDS):
                composed = check_case(overrides, flags, file)
        except (Exception, Hang, SystemExit, RecursionError) as error:
            outcome.failures.append(f"{overrides!r} {flags!r} {file!r}: {type(error).__name__}: {error}"[:1000])
        else:
            outcome.composed += composed
            outcome.refused += not composed
        outcome.slowest = max(outcome.slowest, time.monotonic() - begin)

    drawn: Callable[..., Any] = given(
        _overrides, st.one_of(*[st.just([])] * 4, st.lists(st.sampled_from(_FLAGS), max_size=2)), st.none() | _file
    )(check)
    drawn = settings(
        max_examples=cases,
        deadline=None,
        database=None,
        derandomize=False,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )(drawn)
    state = random.getstate()
    try:
        seed(seed_number)(drawn)()
    except KeyboardInterrupt:
        outcome.failures.append("stopped by Ctrl-C: the cases above are not all that were asked for")
    random.setstate(state)
    return outcome


def check_case(overrides: list[str], flags: list[str], file: tuple[str, str] | None) -> bool:
    """Check one command, its errors, and the YAML of its configuration.

    Args:
        overrides: `KEY=VALUE`, or malformed variants of it.
        flags: flags before the overrides.
        file: group and text of a user's YAML file that the command selects.

    Returns:
        Whether the command composes.

    Raises:
        AssertionError: the command neither composes nor gives proper errors.
    """
    with tempfile.TemporaryDirectory() as folder:
        chosen = list(overrides)
        config_dir = None
        if file is not None:
            group, text = file
            config_dir = folder
            (Path(folder) / group).mkdir()
            (Path(folder) / group / "fuzz.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
            chosen.insert(0, f"{group}=fuzz")
        given_flags = [*flags, *(["--config-dir", config_dir] if config_dir else [])]
        mistakes = check_command_line([*given_flags, *chosen])
        if mistakes:
            _check_refusal(mistakes, given=f"{chosen}{file}")
            return False
        if flags:
            return True  # sweeps and commands that only print have no single configuration
        try:
            conf = load_conf(chosen, config_dir)
        except ConfigError as error:  # a file with sweep settings makes a sweep without -m
            assert "sweep" in f"{chosen}{file}", error
            return True
    told = mask_secrets(config_keys(conf))
    written = yaml.safe_dump(told, sort_keys=False, allow_unicode=True).encode()
    assert repr(yaml.safe_load(written)) == repr(told), "what was written is not what is read"
    path = resolve_run_dir(conf)
    assert path.name not in ("", ".", "..") or conf.run_dir is not None, path
    return True


def _check_refusal(mistakes: list[str], given: str = "") -> None:
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = report(ConfigError(mistakes))
    assert code == 2
    lines = told.getvalue().removesuffix("\n").split("\n")
    assert len(lines) == len(mistakes), f"{len(mistakes)} mistakes in {len(lines)} lines"
    for line in lines:
        assert line.startswith("error: ") and len(line) > len("error: x"), line
        assert len(line) < 3000, f"a line of {len(line)} characters"
        assert not any(character != "\t" and not _is_shown(character) for character in line), repr(line)
        for inside in ("object at 0x", "Traceback"):
            assert inside not in line or inside in given, line


def _is_shown(character: str) -> bool:
    return character >= " " and not 0x7F <= ord(character) < 0xA0 and not 0xD800 <= ord(character) < 0xE000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    begin = time.monotonic()
    outcome = fuzz_configs(args.cases, args.seed)
    print(outcome, *outcome.failures, sep="\n  ")
    print(f"{time.monotonic() - begin:.0f} s")
    sys.exit(bool(outcome.failures))


if __name__ == "__main__":
    main()

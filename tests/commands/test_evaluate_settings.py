"""Overrides of an evaluation: allowed keys, and settings kept from the run."""

import pytest

from dpo_runner.config.compose import load_conf
from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import ConfigError
from dpo_runner.evaluate.__main__ import main
from dpo_runner.evaluate.settings import compose
from tests.support.common import run_main


@pytest.fixture
def run(tiny_run: list[str]) -> RunConf:
    return load_conf(tiny_run)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.beta=0.2", "`training.beta=0.2`: is the run's own and cannot be changed for an evaluation"),
        ("model=smollm2", "`model=smollm2`: is the run's own"),
        ("quant=nf4", "`quant=nf4`: is the run's own"),
        ("seed=1", "`seed=1`: is the run's own"),
        ("data.pth=x", "`data.pth`: no such field; did you mean `path`?"),
        ("training.max_lenght=5", "`training.max_lenght`: no such field; did you mean `max_length`?"),
        ("dta.path=x", "`dta`: no such field; did you mean `data`?"),
        ("data=local_fil", "`data=local_fil`: no such option; did you mean `local_file`?"),
        ("samples.max_new_tokens=0", "`samples.max_new_tokens=0`: must be at least 1"),
        ("data.eval_fraction=x", "`data.eval_fraction=x`: must be a number"),
        ("judge.model=x", "`judge`: has no effect without an endpoint"),
        ("judge.base_url=http://x/v1", "`judge.model`: must be set"),
        ("judge.base_url=file:///etc/passwd", "`judge.base_url=file:///etc/passwd`: must begin with http"),
        ("judge.timeout=0", "`judge.timeout=0.0`: must be above 0"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(run: RunConf, override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        compose(run, [override])
    assert caught.value.mistakes[0].startswith(words)
    assert len(caught.value.mistakes) == (2 if "file:" in override else 1)  # judge.model is missing too


def test_a_missing_run_is_all_that_the_usage_asks_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_main(main) == 2
    assert capsys.readouterr().err.endswith("the following arguments are required: run_dir\n")


@pytest.mark.parametrize("extra", [[], ["lora=none"], ["quant=nf4", "training.beta=0.3"]], ids=str)
def test_the_runs_own_settings_stay_beneath_the_overrides(extra: list[str], tiny_run: list[str]) -> None:
    run = load_conf([*tiny_run, *extra])
    conf = compose(run, ["samples.max_new_tokens=9", "training.max_length=99"])
    assert (conf.samples.max_new_tokens, conf.training.max_length) == (9, 99)
    assert (conf.model, conf.quant, conf.lora, conf.data) == (run.model, run.quant, run.lora, run.data)
    assert conf.training.beta == run.training.beta


def test_the_settings_of_a_mixture_stay_too(pairs: str) -> None:
    sources = ["data=local_file", f"data.sources.a.path={pairs}", f"data.sources.b.path={pairs}"]
    run = load_conf(["model=tiny_random", *sources, "data.sources.b.columns.q=prompt"])
    assert set(run.data.sources) == {"a", "b"}
    assert compose(run, []).data == run.data

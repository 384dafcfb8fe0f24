"""Settings that cannot be built are refused before weights are loaded, by dry_run too."""

import json
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from trl import DPOConfig
from trl.kernels import ChunkedLogProbFunction

from dpo_runner import run
from dpo_runner.config.compose import load_conf
from dpo_runner.errors import ConfigError
from dpo_runner.training.engine.packed.head import check_kernel
from dpo_runner.training.planning import rehearsal
from tests.support.common import ROWS

MIN_LR = "training.lr_scheduler_type=cosine_with_min_lr"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.metric_for_best_model=eval_f1"], "`training.metric_for_best_model=eval_f1`: no evaluation has it"),
        (["training.metric_for_best_model=rewards/acuracies"], "did you mean `rewards/accuracies`?"),
        ([MIN_LR], "`training.lr_scheduler_type=cosine_with_min_lr`: One of min_lr or min_lr_rate should be set"),
        ([MIN_LR, "training.lr_scheduler_kwargs={eta_min: 0.1}"], "there is no eta_min; lr_scheduler_kwargs for"),
        (
            ["training.lr_scheduler_type=constant_with_warmup", "training.lr_scheduler_kwargs={min_lr: 0.1}"],
            "there is no min_lr; lr_scheduler_kwargs for constant_with_warmup: none",
        ),
        (["training.lr_scheduler_kwargs=absent.json"], "`training.lr_scheduler_kwargs=absent.json`: must be a map"),
        (["training.lr_scheduler_kwargs={num_cycles: abc}"], "could not convert string to float: 'abc'"),
        (
            ["training.lr_scheduler_type=polynomial", "training.lr_scheduler_kwargs={power: -1}"],
            "0.0 cannot be raised to a negative power; lr_scheduler_kwargs for polynomial: lr_end, power",
        ),
        (
            ["training.load_best_model_at_end=true", "training.eval_steps=100", "training.save_steps=100"],
            "none of the 4 steps has an evaluation (eval_steps=100",
        ),
        (
            ["training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs={every_n_layers: 0}"],
            "every_n_layers must be at least 1",
        ),
        (
            ["training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs={nonsense: 1}"],
            "unexpected keyword argument 'nonsense'",
        ),
        (["training.accelerator_config=absent.json"], "`training`: No such file or directory (absent.json)"),
        (["training.optim_args='momentum=0.9'"], "momentum=0.9 changes nothing"),
        (
            ["training.optim=apollo_adamw", "training.optim_target_modules=[q_proj]"],
            "`training.optim=apollo_adamw`: You need to install",
        ),
        (["training.train_sampling_strategy=group_by_length"], "group_by_length`: Can only automatically infer"),
        (["training.train_sampling_strategy=batch_rebalance"], "'input_ids' key; use random"),
        (
            ["training.dataloader_drop_last=true", "training.per_device_train_batch_size=99"],
            "rows make no batch of per_device_train_batch_size=99",
        ),
        (
            ["training.dataloader_drop_last=true", "training.per_device_eval_batch_size=99"],
            "rows make no batch of per_device_eval_batch_size=99",
        ),
        (
            ["training.dataloader_persistent_workers=true"],
            "`training`: persistent_workers option needs num_workers > 0",
        ),
        (["training.save_strategy=best"], "`training.metric_for_best_model` must be provided"),
        (["quant=int8", "lora.use_dora=true"], "`quant=int8`: PEFT's DoRA cannot read the weights of int8 layers"),
        (["model.device_map=cuda:0"], "`model.device_map=cuda:0`: torch sees no GPU; leave it out"),
        (["training.router_aux_loss_coef=0.1"], "`training.router_aux_loss_coef=0.1`: "),
        (["training.use_liger_kernel=true"], "`training.use_liger_kernel=True`: "),
        (["training.optim=galore_adamw"], "`training.optim=galore_adamw`: You need to install"),
        (["training.optim_args='betas=(0.9,0.99)'"], "`training.optim_args=betas=(0.9,0.99)`: "),
        (["lora.target_modules=[lm_head]"], "`lora.target_modules=['lm_head']`: TRL reads the weights"),
        (
            ["lora.modules_to_save=[norm]", "training.bf16=false", "model.dtype=bfloat16"],
            "`lora.modules_to_save=['norm']`: are trained in float32",
        ),
        (["lora.target_modules=[input_layernorm]"], "is not supported. Currently, only the following modules"),
        (["lora.config.nonsense=1"], "LoraConfig has no such field; choose from alora_invocation_tokens"),
        (["model.attn_implementation=nonsense"], "`model.attn_implementation=nonsense`: "),
        (["model.attn_implementation=flash_attention_2"], "`model.attn_implementation=flash_attention_2`: "),
        (
            ["model.attn_implementation=flex_attention"],
            "`model.attn_implementation=flex_attention`: FlexAttention does",
        ),
    ],
)
def test_what_cannot_be_built_is_one_line_before_weights(overrides, expected, tiny_run, tmp_path) -> None:
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError) as caught:
        run(load_conf([*tiny_run, "dry_run=true", *overrides]))
    (line,) = caught.value.mistakes
    assert expected in line and "\n" not in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "overrides",
    [
        [MIN_LR, "training.lr_scheduler_kwargs={min_lr_rate: 0.1}"],
        ["training.metric_for_best_model=eval_rewards/margins", "training.save_strategy=best"],
        ["training.optim=paged_adamw_8bit", "training.lr_scheduler_type=reduce_lr_on_plateau"],
        ["lora=none", "training.optim=adafactor"],
        ["training.optim=ademamix", "training.optim_args='beta3=0.99, alpha=5.0'"],  # alpha's default
        ["training.lr_scheduler_type=warmup_stable_decay", "training.lr_scheduler_kwargs={num_decay_steps: 1}"],
        ["training.load_best_model_at_end=true", "training.liger_kernel_config={rope: true}"],
        ["training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs={every_n_layers: 2}"],
        ["lora.init_lora_weights=pissa"],
        ["lora.modules_to_save=[lm_head]"],
        ["quant=nf4", "model.attn_implementation=eager"],
    ],
)
def test_what_can_be_built_passes(overrides: list[str], tiny_run: list[str]) -> None:
    run(load_conf([*tiny_run, "dry_run=true", *overrides]))


def test_a_setting_without_effect_is_told(tiny_run: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ["training.num_train_epochs=2", "training.greater_is_better=true", "training.warmup_steps=9"]
    run(load_conf([*tiny_run, "dry_run=true", *overrides]), overrides)
    captured = capsys.readouterr()
    told = " ".join((captured.out + captured.err).split())
    assert "training.num_train_epochs: has no effect while training.max_steps is set" in told
    assert "training.greater_is_better: needs training.load_best_model_at_end=true" in told
    assert "never reached: the warm-up takes 9 steps" in told


@pytest.fixture
def tokens_without_rows(tiny_model: str, tmp_path: Path) -> Path:
    """Return a model whose tokenizer has two tokens more than its embeddings have rows."""
    folder = tmp_path / "outside"
    shutil.copytree(tiny_model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"<filler{n}>" for n in range(rows - len(tokenizer))])
    tokenizer.add_tokens(["outsideword"])
    tokenizer.add_tokens(["<outside>"], special_tokens=True)
    (tmp_path / "outside.jinja").write_text(tokenizer.chat_template.replace("<|im_start|>", "<outside>"))
    tokenizer.save_pretrained(folder)
    return folder


def test_a_token_without_a_row_in_the_embeddings_is_refused_or_added(tokens_without_rows, tiny_run) -> None:
    base = [*tiny_run, f"model.model_name_or_path={tokens_without_rows}"]
    run(load_conf([*base, "dry_run=true"]))  # not used
    with pytest.raises(
        ConfigError, match=r"token <outside> has the id \d+, and the embeddings of .+ have \d+ rows; set"
    ):
        run(load_conf([*base, "dry_run=true", 'model.pad_token="<outside>"']))
    rows = [*ROWS, {**ROWS[0], "chosen": "one outsideword more"}]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine = ["data.path=mine.jsonl", "data.eval_fraction=0", "training.eval_strategy=no", "dry_run=true"]
    with pytest.raises(
        ConfigError, match=rf"mine\.jsonl:{len(rows)}: holds the token outsideword, .*resize the model's"
    ):
        run(load_conf([*base, *mine]))
    templated = [*base, "model.chat_template=outside.jinja"]
    with pytest.raises(ConfigError, match=r"holds the token <outside>, .*; set 'model.added_tokens=\[\"<outside>\"\]'"):
        run(load_conf([*templated, "dry_run=true"]))
    run(load_conf([*templated, 'model.added_tokens=["<outside>"]', "run_dir=r"]))
    trained = json.loads(Path("r/adapter/adapter_config.json").read_text())["trainable_token_indices"]
    assert set(map(tuple, trained.values())) == {(len(AutoTokenizer.from_pretrained(tokens_without_rows)) - 1,)}


def test_a_machine_that_cannot_compile_for_its_gpu_is_told_before_weights(
    tiny_run: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[Exception] = [RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")]
    cpu = torch.device("cpu")

    def fail(*args: object) -> None:
        raise failures[-1]

    check_kernel(cpu)  # TRL takes these arguments
    monkeypatch.setattr(ChunkedLogProbFunction, "apply", fail)
    with monkeypatch.context() as patch:
        patch.setattr(DPOConfig, "device", property(lambda args: torch.device("cuda")))
        patch.setattr(rehearsal, "check_kernel", lambda device: check_kernel({"cuda": cpu}[device.type]))
        with pytest.raises(ConfigError, match=r"kernel for the GPU: .*; install a C compiler and Python's headers"):
            run(load_conf([*tiny_run, "dry_run=true"]))
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    failures.append(subprocess.CalledProcessError(1, ["gcc", "main.c"]))
    with pytest.raises(ConfigError, match=rf"GPU: {tmp_path}/Python\.h is missing; install"):
        check_kernel(cpu)
    (tmp_path / "Python.h").touch()
    with pytest.raises(ConfigError, match=r"GPU: Command .*gcc.* returned non-zero exit status 1; install"):
        check_kernel(cpu)
    failures.append(FileNotFoundError(2, "No such file or directory", "cc-9"))
    with pytest.raises(ConfigError, match=r"GPU: No such file or directory \(cc-9\); install"):
        check_kernel(cpu)
    failures.append(RuntimeError("CUDA error: no kernel image is available for execution on the device"))
    with pytest.raises(RuntimeError, match="no kernel image"):
        check_kernel(cpu)

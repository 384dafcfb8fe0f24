"""scripts.convert: other projects' DPO configurations, after their public examples, as our overrides."""

import json
from pathlib import Path

import pytest
import yaml

from dpo_runner.config.compose import load_conf
from dpo_runner.config.schema import SCHEMA
from dpo_runner.config.yaml_files import ConfigFiles
from scripts.convert.__main__ import PAGE, fill_tables, main
from scripts.convert.conversion import PROJECTS, TABLES, Converted, convert, recognise

# After examples/llama-3/instruct-dpo-lora-8b.yml.
AXOLOTL_LORA = """
rl: dpo
base_model: meta-llama/Llama-3.1-8B-Instruct
model_type: LlamaForCausalLM
chat_template: llama3
special_tokens: {pad_token: <|finetune_right_pad_id|>, eos_token: <|eot_id|>}
load_in_8bit: true
load_in_4bit: false
datasets:
  - {path: someone/messages_dpo, type: chat_template.default, field_messages: conversation, field_chosen: chosen}
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/llama
sequence_len: 4096
sample_packing: false
pad_to_sequence_len: true
adapter: lora
lora_model_dir:
lora_r: 32
lora_alpha: 64
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 2e-4
bf16: auto
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
saves_per_epoch: 1
"""
# After examples/mistral/mistral-dpo-qlora.yml.
AXOLOTL_QLORA = """
base_model: mistralai/Mistral-7B-Instruct-v0.2
load_in_4bit: true
rl: ipo
dpo_beta: 0.2
datasets:
  - {path: pairs/one.jsonl, ds_type: json, type: chatml.intel}
  - {path: someone/more, split: train_prefs, type: chatml.intel}
adapter: qlora
lora_r: 8
lora_alpha: 16
lora_target_modules: [q_proj, v_proj]
lora_modules_to_save: [embed_tokens, lm_head]
micro_batch_size: 16
num_epochs: 6
learning_rate: 0.0001
evals_per_epoch: 4
wandb_project: mine
early_stopping_patience: 3
"""
# After examples/train_lora/llama3_lora_dpo.yaml.
LLAMA_FACTORY = """
stage: dpo
do_train: true
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
finetuning_type: lora
lora_rank: 8
lora_target: q_proj, v_proj
quantization_bit: 4
pref_beta: 0.3
pref_loss: sigmoid
pref_ftx: 0.5
dataset: demo
template: llama3
cutoff_len: 2048
max_samples: 1000
overwrite_cache: true
preprocessing_num_workers: 16
output_dir: saves/dpo
logging_steps: 10
plot_loss: true
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 5.0e-6
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
val_size: 0.1
eval_strategy: steps
eval_steps: 500
deepspeed: examples/deepspeed/ds_z3_config.json
"""
# After the command of TRL's DPO page.
TRL = """
model_name_or_path: Qwen/Qwen3-0.6B
dataset_name: trl-lib/ultrafeedback_binarized
learning_rate: 5e-7
per_device_train_batch_size: 2
gradient_accumulation_steps: 8
eval_strategy: steps
eval_steps: 50
use_peft: true
lora_r: 32
output_dir: Qwen-DPO
"""
# After recipes/zephyr-7b-beta/dpo/config_qlora.yaml.
HANDBOOK = """
model_name_or_path: mistralai/Mistral-7B-v0.1
torch_dtype: bfloat16
use_peft: true
load_in_4bit: true
lora_r: 128
lora_alpha: 128
lora_dropout: 0.05
lora_target_modules: [q_proj, k_proj, v_proj, o_proj]
dataset_mixer: {HuggingFaceH4/ultrafeedback_binarized: 1.0}
dataset_splits: [train_prefs, test_prefs]
bf16: true
beta: 0.01
evaluation_strategy: steps
eval_steps: 100
gradient_checkpointing_kwargs: {use_reentrant: false}
hub_model_id: mine
learning_rate: 5.0e-6
max_prompt_length: 512
optim: paged_adamw_32bit
report_to: [wandb]
warmup_ratio: 0.1
"""
# After recipes/smollm3/dpo/apo.yaml.
HANDBOOK_MIXTURE = """
model_name_or_path: HuggingFaceTB/SmolLM3-3B
dataset_mixture:
  datasets:
    - {id: someone/prefs, config: Preference, split: no_think, columns: [chosen, rejected], weight: 0.5}
    - {id: someone/prefs, config: Preference, split: think, columns: [chosen, rejected], weight: 0.25}
  test_split_size: 0.1
eval_strategy: 'no'
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
loss_type: apo_zero
max_length: 24576
padding_free: true
save_steps: 0.5
use_liger_kernel: true
"""

EXPECTED = {
    AXOLOTL_LORA: (
        "axolotl",
        {
            **{"model.pad_token": "<|finetune_right_pad_id|>", "model.attn_implementation": "flash_attention_2"},
            **{"lora.r": 32, "lora.lora_alpha": 64, "lora.target_modules": "all-linear", "quant.load_in_8bit": True},
            **{"data.path": "someone/messages_dpo", "data.columns.conversation": "prompt", "data.eval_fraction": 0.05},
            **{"training.max_length": 4096, "training.per_device_train_batch_size": 2, "training.warmup_steps": 10},
            **{"training.eval_steps": 0.0625, "training.save_strategy": "epoch", "training.beta": 0.1},
            **{"training.learning_rate": 2e-4, "training.disable_dropout": True, "run_dir": "./outputs/llama"},
        },
        ["model_type", "chat_template", "special_tokens", "lora_dropout"],
    ),
    AXOLOTL_QLORA: (
        "axolotl",
        {
            **{"training.loss_type": "ipo", "training.beta": 0.2, "training.eval_strategy": "no"},
            **{"data.sources.source_1.path": "pairs/one.jsonl", "data.sources.source_2.split": "train_prefs"},
            **{"lora.modules_to_save": ["embed_tokens", "lm_head"], "lora.target_modules": ["q_proj", "v_proj"]},
            **{"quant.load_in_4bit": True, "wandb.mode": "online", "wandb.project": "mine", "data.eval_fraction": 0.0},
            **{"training.warmup_steps": 0.03, "training.max_length": 512, "training.save_total_limit": 4},
        },
        ["early_stopping_patience"],
    ),
    LLAMA_FACTORY: (
        "LLaMA-Factory",
        {
            **{"training.loss_type": ["sigmoid", "sft"], "training.loss_weights": [1.0, 0.5], "training.beta": 0.3},
            **{"lora.r": 8, "lora.lora_alpha": 16, "lora.target_modules": ["q_proj", "v_proj"]},
            **{"quant.bnb_4bit_quant_type": "nf4", "data.path": "data/demo.json", "data.max_train_samples": 1000},
            **{"data.eval_fraction": 0.1, "training.eval_steps": 500, "training.num_train_epochs": 3.0},
            **{"training.warmup_steps": 0.1, "training.dataset_num_proc": 16, "model.trust_remote_code": True},
        },
        ["template", "deepspeed"],
    ),
    TRL: (
        "TRL",
        {
            **{"model.dtype": "float32", "data.path": "trl-lib/ultrafeedback_binarized", "data.eval_split": "test"},
            **{
                "lora.r": 32,
                "lora.lora_alpha": 32,
                "lora.lora_dropout": 0.0,
                "lora.target_modules": ["q_proj", "v_proj"],
            },
            **{
                "training.learning_rate": 5e-7,
                "training.num_train_epochs": 3.0,
                "training.lr_scheduler_type": "linear",
            },
            **{"data.on_overlong": "trl", "training.warmup_steps": 0, "training.gradient_accumulation_steps": 8},
        },
        [],
    ),
    HANDBOOK: (
        "alignment-handbook",
        {
            **{"quant.bnb_4bit_quant_type": "nf4", "quant.bnb_4bit_use_double_quant": False, "lora.r": 128},
            **{"data.split": "train_prefs", "data.eval_split": "test_prefs", "model.dtype": "bfloat16"},
            **{"training.gradient_checkpointing_kwargs": {"use_reentrant": False}, "training.warmup_steps": 0.1},
            **{"training.optim": "paged_adamw_32bit", "training.eval_steps": 100, "wandb.mode": "online"},
        },
        ["lora_dropout", "hub_model_id", "max_prompt_length"],
    ),
    HANDBOOK_MIXTURE: (
        "alignment-handbook",
        {
            **{"data.sources.prefs_1.split": "no_think", "data.sources.prefs_2.subset": "Preference", "lora": None},
            **{"data.eval_fraction": 0.0, "training.lr_scheduler_kwargs": {"min_lr_rate": 0.1}},
            **{"training.loss_type": "apo_zero", "training.use_liger_kernel": True, "training.save_steps": 0.5},
        },
        ["dataset_mixture"],
    ),
}


@pytest.mark.parametrize("text", EXPECTED, ids=lambda text: recognise(yaml.safe_load(text)).name)
def test_an_example_becomes_a_configuration_and_names_what_has_no_counterpart(text: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps({"demo": {"file_name": "demo.json"}}))
    name, values, without = EXPECTED[text]
    config = yaml.safe_load(text)
    project = recognise(config)
    assert project.name == name
    converted = convert(config, project)
    conf = load_conf(converted.words)
    for key, value in values.items():
        found = conf
        for part in key.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        assert found == value, key
    assert [note.partition(":")[0] for note in converted.notes] == without


def test_the_command_of_the_shell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "trl.yaml"
    file.write_text(TRL + "no_such_key: 1\n")
    assert main([str(file)]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("python -m dpo_runner \\\n  ") and "  'lora.target_modules=[q_proj,v_proj]'" in out
    assert "note: no_such_key: 1: has no counterpart" in err
    file.write_text(LLAMA_FACTORY)  # without dataset_info.json
    assert main([str(file)]) == 1
    assert "note: dataset: demo: set data.path; " in capsys.readouterr().err
    for other in ("rl: kto\n", "stage: sft\n", "stage: dpo\npref_loss: simpo\n", "- a\n", "a: [\n"):
        file.write_text(other)
        assert main([str(file)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_texts_stay_texts_on_the_command_line() -> None:
    values = {"run_name": 'a "b", c', "wandb.notes": "null", "data.columns": {"question": "prompt"}}
    conf = load_conf(Converted(values, []).words)
    assert (conf.run_name, conf.wandb.notes, conf.data.columns) == ('a "b", c', "null", {"question": "prompt"})


def test_the_tables_of_the_docs_are_the_mapping_and_name_keys_that_exist() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert fill_tables(page) == page and page.count("<!-- table: ") == len(TABLES)
    for project in PROJECTS.values():
        for rule in project.rules.values():
            key, _, option = rule.ours.replace("NAME", "*").partition("=")
            assert not key or key in SCHEMA or option in ConfigFiles.over(None).options(key), rule.ours
            assert rule.ours or rule.note

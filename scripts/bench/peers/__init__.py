"""The commands of dpo_runner, `trl dpo` and LLaMA-Factory for the same job, and their comparison."""

"""`RunTrainer`: TRL's trainer on token ids, with the runner's mixins."""

import hashlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from datasets.fingerprint import Hasher
from peft import PeftModel, initialize_lora_eva_weights
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainerState
from trl import DPOConfig, DPOTrainer

from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.preferences import ID_COLUMNS, PreferenceData
from dpo_runner.errors import ConfigError, RunError, reason_of
from dpo_runner.io.upstream import check_names, find_attention, find_fingerprint, set_fingerprint
from dpo_runner.model.adapters import make_loadable
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.policy import Policy, Say
from dpo_runner.model.reference import silence_dropout
from dpo_runner.model.stacking import complete_reference, put_reference, read_initial_weights
from dpo_runner.model.vocabulary import open_head
from dpo_runner.records.checkpoints import find_damage, read_step
from dpo_runner.records.resume import read_epoch
from dpo_runner.training.engine.install import install_engine
from dpo_runner.training.engine.token_batches import TokenBatches
from dpo_runner.training.memory.device import is_of_device
from dpo_runner.training.mixins.evaluation import TimedEvaluation
from dpo_runner.training.mixins.nonfinite import FiniteSteps
from dpo_runner.training.mixins.saving import SealedCheckpoints
from dpo_runner.training.mixins.sharding import ShardedWeights
from dpo_runner.training.ranks.group import copy_from_first
from dpo_runner.training.ranks.sharding import local, shard

_EVA_ROWS = 64  # enough tokens for stable singular vectors at common ranks

check_names(
    "trl",
    DPOTrainer,
    _prepare_dataset="dataset processing_class args dataset_name",
    _precompute_ref_logps="dataset name batch_size",
)
check_names("transformers", DPOTrainer, _load_from_checkpoint="resume_from_checkpoint", _load_best_model="")


class RunTrainer(TimedEvaluation, FiniteSteps, SealedCheckpoints, TokenBatches, ShardedWeights, DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on pre-tokenized rows, with the engine installed.

    TRL tokenizes nothing: our `apply_chat_template` is stricter than TRL's templating.

    Args:
        policy: the model to train, and its reference.
        blueprint: the model's blueprint.
        data: the tokenized rows.
        conf: the run's configuration.
        args: TRL's settings.
        callbacks: trainer callbacks.
        say: shows one line to the user.

    Raises:
        ConfigError: TRL or peft rejects the combination of model and settings.
    """

    def __init__(
        self,
        policy: Policy,
        blueprint: Blueprint,
        data: PreferenceData,
        conf: RunConf,
        args: DPOConfig,
        callbacks: Sequence[TrainerCallback],
        say: Say,
    ) -> None:
        self.reference, self._identity = blueprint.reference, _identify_reference(blueprint)
        self._loaded = _copy_trained(policy.model)
        self._is_reference_set, self._is_divided = False, bool(conf.training.fsdp)
        self.attention = find_attention(policy.model.config)
        with _trl_errors():
            super().__init__(
                model=policy.model,
                ref_model=policy.ref_model,
                args=args,
                train_dataset=data.train,
                eval_dataset=data.eval_by_source if len(data.eval_by_source) > 1 else data.eval,
                processing_class=blueprint.tokenizer,
                peft_config=policy.peft_config,
                callbacks=list(callbacks),
                data=data,
                dumps=Path(args.output_dir).with_name("nonfinite"),
                max_skipped=conf.checks.max_skipped_batches if conf.checks.on_nonfinite == "skip_batch" else 0,
                say=say,
            )
            self._set_reference()
        self.remove_callback(PrinterCallback)
        if isinstance(self.model, PeftModel):
            if conf.lora is not None and conf.lora.init_lora_weights == "eva":
                self._initialize_eva()
            self._cast_adapter_to_fp32()
            make_loadable(self.model.peft_config["default"])
        copy_from_first(weight for weight in self.model.parameters() if weight.requires_grad)
        silence_dropout(self.model)
        if self._is_divided:
            shard(self.model, conf.training, args.device)
        self._install_engine(conf, blueprint)

    def _set_reference(self) -> None:
        if not isinstance(self.model, PeftModel):
            return
        open_head(self.model)
        if self.ref_model is None:
            complete_reference(self.model, self._loaded)
            if self.reference.is_within and not self._is_reference_set:
                put_reference(self.model, self.reference.folder)
            self._is_reference_set = True

    def _initialize_eva(self) -> None:
        """Set lora_A from the activations of the first training rows (EVA, arXiv 2410.07170); B stays 0.

        Raises:
            ConfigError: PEFT fails, for example with too few tokens for the rank.
        """
        rows = self.train_dataset.select(range(min(len(self.train_dataset), _EVA_ROWS)))
        loader = DataLoader(rows, self.args.per_device_train_batch_size, collate_fn=self.data_collator)
        batches = [
            {**{key: batch[key].to(self.model.device) for key in ("input_ids", "attention_mask")}, "use_cache": False}
            for batch in loader
        ]
        try:
            initialize_lora_eva_weights(self.model, batches, show_progress_bar=False)
        except (ValueError, RuntimeError) as error:
            if is_of_device(error):
                raise
            raise ConfigError(f"`lora.init_lora_weights=eva`: {reason_of(error)}") from None

    def _cast_adapter_to_fp32(self) -> None:
        """Cast the adapter to fp32.

        TRL casts a QLoRA adapter to bf16, where most small updates round to nothing. It has already rounded the
        adapter's loaded weights, but not the reference's copy, so the loaded values are restored.
        """
        loaded = self._loaded or read_initial_weights(self.model)
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(torch.float32)
                if name in loaded:  # copied: what is loaded may be the base's own weight
                    parameter.data.copy_(loaded[name])

    def _install_engine(self, conf: RunConf, blueprint: Blueprint) -> None:
        shape = self.data.shape().cut(self.args.max_length)
        engine = install_engine(self, conf.engine, blueprint, shape, self.say)
        self.max_tokens = engine.max_tokens
        if engine.has_reference_columns:
            self.train_dataset, self.eval_dataset = engine.train_dataset, engine.eval_dataset
            self.precompute_ref_logps, self.ref_model = True, None

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        if self.reference.is_stored:
            return dataset  # the engine adds the stored log-probabilities
        self._set_reference()  # TRL calls this from its constructor
        return super()._precompute_ref_logps(dataset, name, batch_size)

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: DPOConfig, dataset_name: str) -> Dataset:
        assert set(ID_COLUMNS) <= set(dataset.column_names), dataset.column_names
        # TRL caches precomputed reference log-probabilities by a fingerprint of rows and weights only. They also
        # depend on the settings below; TRL would return stale values after a change of any of them.
        prepared = dataset.select_columns(list(ID_COLUMNS))
        settings = (
            args.max_length,
            args.truncation_mode,
            args.ld_alpha,
            args.bf16,
            args.fp16,
            self.attention,
            self._identity,
        )
        set_fingerprint(prepared, Hasher.hash((find_fingerprint(dataset), settings)))
        return prepared

    def train_to_end(self, checkpoint: Path | None) -> dict[str, Any]:
        """Train to the end, starting from `checkpoint` if given.

        Returns:
            Steps, seconds, pairs per second, and which weights the model now has (last or best).

        Raises:
            RunError: the best checkpoint, which the run must end with, is gone.
        """
        start = time.monotonic()
        epochs_before = read_epoch(checkpoint) if checkpoint else 0.0
        if checkpoint is not None and read_step(checkpoint) >= count_steps(self.args, len(self.train_dataset)):
            # The run was stopped after its last step; Trainer would train one more.
            self.state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            self._load_from_checkpoint(str(checkpoint))
            self.finish_pending(checkpoint)
            if self.args.load_best_model_at_end and self.find_best() is not None:
                self._load_best_model()
        else:
            if checkpoint is not None:
                self.restore_at_start(checkpoint)
            # Trainer ignores TrainingArguments.resume_from_checkpoint: the checkpoint must be passed here.
            self.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        runtime = time.monotonic() - start
        pairs = (self.state.epoch - epochs_before) * len(self.train_dataset)
        best = self.args.load_best_model_at_end and self.state.best_model_checkpoint
        if self.args.load_best_model_at_end and self.state.best_global_step and not best:  # transformers fails silently
            raise RunError(f"{self.find_best()}: the best checkpoint is gone; the same command makes it again")
        return {
            "steps": self.state.global_step,
            "train_runtime": round(runtime, 3),
            "pairs_per_second": round(pairs / runtime, 4),
            "weights": f"best by {self.args.metric_for_best_model}: {Path(best).name}" if best else "last",
        }

    def _load_best_model(self) -> None:
        """Load the best checkpoint; if it is damaged, transformers would silently keep the last weights."""
        best = self.find_best()
        assert best is not None
        if damage := find_damage(best, whole=True):
            raise RunError(f"{best}: the best checkpoint cannot be loaded; {damage}; the same command makes it again")
        self.state.best_model_checkpoint = str(best)
        super()._load_best_model()

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: checkpoints get no model card; the run writes one for its result."""


def check_memory(trainer: RunTrainer) -> None:
    """Check that no trained weight lies in the memory of a frozen one, which would move with it.

    Raises:
        RunError: one does.
    """
    models = [model for model in (trainer.model, trainer.ref_model) if model is not None]
    weights = [each for model in models for each in (*model.named_parameters(), *model.named_buffers())]
    frozen = {local(weight).untyped_storage().data_ptr(): name for name, weight in weights if not weight.requires_grad}
    for name, weight in weights:
        address = local(weight).untyped_storage().data_ptr()
        if weight.requires_grad and address and address in frozen:
            raise RunError(f"{name} is trained in the memory of {frozen[address]}, so the reference would move with it")


def count_steps(training: Any, rows: int) -> int:
    """Return the number of optimizer steps over `rows` training rows, counted like transformers' Trainer.

    Args:
        training: the `DPOConfig`, or the section `training` that it was built from.
        rows: number of training rows.
    """
    if training.max_steps > 0:
        return int(training.max_steps)
    per_batch = training.per_device_train_batch_size
    batches = rows // per_batch if training.dataloader_drop_last else math.ceil(rows / per_batch)
    per_epoch = max(math.ceil(batches / training.gradient_accumulation_steps), 1)
    steps: int = math.ceil(training.num_train_epochs * per_epoch)
    return steps


@contextmanager
def _trl_errors() -> Iterator[None]:
    """Convert errors from the constructors of TRL and peft to a one-line ConfigError."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        # keep the cause, so that run.log has a traceback if the error is a bug
        raise ConfigError(f"`training`, `lora` or `model`: {reason_of(error)}") from error


def _copy_trained(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of a loaded adapter's trainable weights, by name; empty for a new adapter."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters() if p.requires_grad}


def _identify_reference(blueprint: Blueprint) -> str:
    """Identify the reference by description and file contents; TRL hashes only weights it has loaded."""
    reference = blueprint.reference
    folder = reference.folder if reference.is_within else None
    files = sorted(Path(folder).glob("adapter_*")) if folder is not None else []
    return " ".join([reference.described, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in files)])

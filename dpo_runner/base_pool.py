"""The base model kept between the runs of a sweep: a worker loads and quantizes it once, adapters come and go.

A run on a kept base is the run on a freshly loaded one, to the last bit: after each run everything about the base is
put back (`snapshot.py`), and before the next one its weights must have the bytes they were loaded with, else it is
loaded anew. One base is kept at most, and it is let go of before another is loaded. On a GPU a base that is not
quantized waits in the machine's own memory.

Refused, so that the base is loaded for the run and let go of after it: runs that train, or take a share out of, the
base's own weights (`lora=none`, `lora.modules_to_save`, `lora.init_lora_weights` other than true, `gaussian` and
`orthogonal`), that merge an adapter or resize the embeddings; weights spread by `model.device_map`; weights that are
partly drawn at random; kinds of weights whose bytes do not say all. `engine.keep_base_model=false` refuses all.
"""

import gc
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from dpo_runner.base_model import load_base_model
from dpo_runner.config import RunConf
from dpo_runner.locations import resolve_model_path
from dpo_runner.model_config import ModelConf, QuantConf
from dpo_runner.reference import settle_dtype, trains_all
from dpo_runner.snapshot import Snapshot
from dpo_runner.tokenizer import settle_vocabulary
from dpo_runner.vocabulary import load_model_config

_ON_TOP = ("adapter", "adapter_revision", "adapter_mode", "reference", "chat_template", "pad_token")
"""Keys of `model` that decide about what comes upon a base, once nothing is merged into it."""


@dataclass(frozen=True)
class _Kept:
    identity: str
    model: PreTrainedModel
    path: str
    snapshot: Snapshot


class BasePool:
    """Keeps the base model of the last run for the next one.

    It belongs to whoever executes several runs, one after another. What a run was given is taken from it by the next
    `load`, `put_back` or `clear`: its model is then the bare base again.
    """

    def __init__(self) -> None:
        self._kept: _Kept | None = None

    def load(self, conf: RunConf, tell: Callable[[str], None]) -> tuple[PreTrainedModel, str]:
        """Return what `load_base_model` returns for a run, kept from the run before where it is the same.

        Args:
            conf: the run.
            tell: shows one line to a person.

        Raises:
            ConfigError: it cannot be loaded.
        """
        model, quant = settle_dtype(conf), conf.quant
        reason = explain_refusal(conf)
        identity = None if reason else _identify(model, quant)
        if self._kept is not None and self._kept.identity == identity:
            self.put_back()
            if (change := self._kept.snapshot.find_change()) is None:
                tell("the base model is kept from the run before")
                return self._kept.model, self._kept.path
            tell(f"engine.keep_base_model: the base model is loaded anew; {change}")
        self.clear()
        before = _random_state()
        base, path = load_base_model(model, quant)
        if reason is None and identity is None:
            reason = "it is not known which commit of the hub's repository it is"
        if reason is None and before != _random_state():
            reason = "it has weights that are drawn at random, not loaded"
        if reason is None:
            assert identity is not None
            try:
                self._kept = _Kept(identity, base, path, Snapshot(base))
            except TypeError as error:
                reason = f"it has {error}"
        if reason is not None and conf.engine.keep_base_model:
            tell(f"engine.keep_base_model: the base model is not kept for the next run; {reason}")
        return base, path

    def put_back(self) -> None:
        """Take all that a run has put on the base off it, so that the run's memory can be freed."""
        if self._kept is not None:
            self._kept.snapshot.put_back()

    def clear(self) -> None:
        """Let go of the base."""
        if self._kept is not None:
            self._kept = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def explain_refusal(conf: RunConf) -> str | None:
    """Say why the base of a run cannot be another one's, or return None where it may."""
    if not conf.engine.keep_base_model:
        return "engine.keep_base_model=false"
    if trains_all(conf):
        return "its own weights are trained"
    if conf.model.adapter is not None and conf.model.adapter_mode == "merge":
        return "an adapter is merged into it"
    if conf.lora is not None and conf.lora.modules_to_save:
        return "modules of it are trained (lora.modules_to_save)"
    if conf.lora is not None and conf.lora.init_lora_weights not in (True, False, "gaussian", "orthogonal"):
        return f"lora.init_lora_weights={conf.lora.init_lora_weights} begins from its weights"
    vocabulary = settle_vocabulary(conf.model)
    if vocabulary.rows is not None or vocabulary.new_ids or vocabulary.replaces_base:
        return "its embeddings are resized or replaced"
    if conf.model.device_map is not None:
        return "model.device_map spreads it"
    return None


def _identify(conf: ModelConf, quant: QuantConf | None) -> str | None:
    """Return all that decides about what is loaded, files by size and time; None where that cannot be told."""
    path = resolve_model_path(conf)
    folder = Path(path)
    version: Any = getattr(load_model_config(conf), "_commit_hash", None)
    if folder.is_dir():
        files = sorted(file for file in folder.resolve().rglob("*") if file.is_file())
        version = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    if version is None:
        return None
    settings = {key: value for key, value in asdict(conf).items() if key not in _ON_TOP}
    return repr((path, version, settings, None if quant is None else asdict(quant)))


def _random_state() -> str:
    cuda = [state.tolist() for state in torch.cuda.get_rng_state_all()] if torch.cuda.is_available() else []
    kept = np.random.get_state(legacy=False)
    assert isinstance(kept, dict)
    numpy = (kept["state"]["key"].tolist(), kept["state"]["pos"])
    return repr((torch.get_rng_state().tolist(), cuda, numpy, random.getstate()))

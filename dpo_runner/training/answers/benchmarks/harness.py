"""A loaded model for lm-evaluation-harness. Imports the harness: import this module where it is used."""

import inspect
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from dpo_runner.config.sections.benchmarks import BenchmarksConf
from dpo_runner.io.logs import quiet_imports
from dpo_runner.io.processes import setting_variable
from dpo_runner.io.upstream import check_names
from dpo_runner.model.base import base_of
from dpo_runner.model.tokenizer import find_stop_ids
from dpo_runner.training.answers.benchmarks.prefixes import count_requests, find_common, score_continuations
from dpo_runner.training.answers.sampling import Sampling, can_select, find_cache_layers, sample_answers
from dpo_runner.training.ranks.watch import note_progress

with quiet_imports():
    import lm_eval
    from lm_eval.api import task as harness_task
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import normalize_gen_kwargs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BOOTSTRAPS = 1000
"""Resamples for the standard error of a metric that is not a mean."""
_SEEDS = {"random": 0, "numpy": 1234, "torch": 1234, "fewshot": 1234}  # the harness's own
_ONE_PROCESS = "DISABLE_MULTIPROC"
"""Environment variable that keeps the harness from forking this process, which has threads and perhaps a GPU."""

Request = tuple[Any, list[int], list[int]]
"""Its texts, and the tokens of context and continuation."""

_UNUSED_BY_GREEDY = {
    *("max_length", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "use_cache"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "cache_implementation", "transformers_version"),
    "_from_model_config",
}
"""Settings of `generate` that change no greedy answer of a given length."""
_NEUTRAL = dict.fromkeys(("repetition_penalty", "length_penalty", "num_beams", "num_return_sequences"), 1)
"""Values of further settings at which they have no effect."""

harness_task.tqdm = lambda items, **settings: items  # it reads no setting
check_names(
    "lm-eval",
    HFLM,
    _loglikelihood_tokens="requests disable_tqdm override_bs",
    _model_generate="context max_length stop",
)


class _Live:
    """A model as HFLM calls it. Not a `Module`, whose weights HFLM would tie again."""

    def __init__(self, model: "PreTrainedModel", stop_ids: Sequence[int]) -> None:
        self._model, self._stop_ids = model, stop_ids
        self.device, self.config, self.name_or_path = model.device, base_of(model).config, ""
        self.generation = model.generation_config.to_diff_dict()

    def get_base_model(self) -> "PreTrainedModel":
        return base_of(self._model)

    def __call__(self, *ids: torch.Tensor, **settings: Any) -> Any:
        note_progress()
        return self._model(*ids, **settings)

    def generate(self, **settings: Any) -> Any:
        note_progress()
        with torch.no_grad():
            return self._model.generate(**settings, eos_token_id=list(self._stop_ids), synced_gpus=False)


class LiveModel(HFLM):  # type: ignore[misc]
    """HFLM on a loaded model, with the same results, up to rounding, for less work: see `prefixes`.

    Args:
        model: in evaluation mode.
        tokenizer: with the chat template.
        batch_size: see `count_requests`.
        stop_id: the chat template's end of a turn.
    """

    def __init__(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", batch_size: int, stop_id: int | None
    ) -> None:
        self._stop_ids = find_stop_ids(model, tokenizer, stop_id)
        self._live = _Live(model, self._stop_ids)
        self._size, self._pad_id = batch_size, tokenizer.pad_token_id
        prompts = getattr(model, "active_peft_config", None)
        learned = prompts is not None and prompts.is_prompt_learning  # its virtual tokens are not in ids
        self._shares = not learned and can_select(base_of(model))
        self._shares_start = self._shares and _counts_by_position(base_of(model))
        self.has_template = bool(tokenizer.chat_template)
        kind = model.device.type
        super().__init__(
            self._live,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size,
            softmax_dtype="float32",
            mixed_precision_dtype=torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
        )

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return list(super().loglikelihood(requests, disable_tqdm=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        return list(super().loglikelihood_rolling(requests, disable_tqdm=True))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        longest, settings = 1, {}
        for context, given in (request.args for request in requests):
            settings = normalize_gen_kwargs(given, self.max_gen_toks)
            longest = max(longest, len(self.tok_encode(context)) + settings["max_gen_toks"])
        if not settings.get("do_sample"):  # samples depend on their batch
            self.batch_size_per_gpu = count_requests(self._size, longest)
        try:
            return list(super().generate_until(requests, disable_tqdm=True))
        finally:
            self.batch_size_per_gpu = self._size

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], attention_mask: torch.Tensor, **settings: Any
    ) -> torch.Tensor:
        """Return contexts and answers, padded; plain greedy answers by `sample_answers`."""
        used = _find_used(settings) | _find_used(self._live.generation)
        if not self._shares or used or settings.get("do_sample") or max_length <= context.shape[1]:
            settings["attention_mask"] = attention_mask
            answered: torch.Tensor = super()._model_generate(context, max_length, stop, **settings)
            return answered
        prompts = [ids[own == 1].tolist() for ids, own in zip(context, attention_mask, strict=True)]
        sampling = Sampling(max_length - context.shape[1], 0, stop=tuple(stop), decode=self.tokenizer.decode)
        seeds, common = [[0]] * len(prompts), find_common(prompts) if self._shares_start else 0
        rows = sample_answers(self._live, prompts, seeds, sampling, self._stop_ids, self._pad_id, common)
        answers = [context.new_tensor(answer) for [answer] in rows]
        return torch.cat([context, pad_sequence(answers, batch_first=True, padding_value=self._pad_id)], dim=1)

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Return log p of each continuation, and whether it is the greedy one."""
        if not self._shares:
            found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return found
        cut = [(context[-(self.max_length + 1 - len(answer)) :], answer) for _, context, answer in requests]
        pairs = [(tuple(context), tuple(answer)) for context, answer in cut]
        return score_continuations(self._live, pairs, override_bs or self._size, self._pad_id, self._shares_start)


def _counts_by_position(base: "PreTrainedModel") -> bool:
    """Return whether attention takes distances from `position_ids`, so that padding may lie behind a shared start.

    Sliding windows, GPT-Neo's local layers and MPT's ALiBi count places in the cache instead.
    """
    is_known = type(base).__module__.startswith("transformers.") and base.config.model_type != "gpt_neo"
    takes_positions = "position_ids" in inspect.signature(base.forward).parameters
    return is_known and takes_positions and find_cache_layers(base) <= {"DynamicLayer", "DummyLayer"}


def _find_used(settings: Mapping[str, Any]) -> set[str]:
    """Return the settings of `generate` that may change a greedy answer."""
    return {key for key, value in settings.items() if value and value != _NEUTRAL.get(key)} - _UNUSED_BY_GREEDY


def build_requests(lm: LiveModel, task: Any, conf: BenchmarksConf) -> list[Any]:
    """Return a task's requests and documents, everything that its score depends on besides the model."""
    with _own_random_numbers():
        _seed(task)
        task.build_all_requests(
            limit=_count(task, conf.limit),
            apply_chat_template=lm.has_template,
            fewshot_as_multiturn=lm.has_template,
            chat_template=lm.apply_chat_template if lm.has_template else None,
            tokenizer_name=lm.tokenizer_name,
        )
    return [[request.args, request.doc] for request in task.instances]


def _count(task: Any, limit: float | None) -> int | None:
    """Return how many documents a limit means, as the harness counts."""
    if limit is None:
        return None
    return math.ceil(len(task.eval_docs) * limit) if limit < 1 else int(limit)


def run_task(lm: LiveModel, task: Any, conf: BenchmarksConf) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the harness's figures of a task, and its record of each document."""
    with _own_random_numbers(), setting_variable(_ONE_PROCESS, "1"):
        _seed(task)
        found = lm_eval.evaluate(
            lm,
            {"tasks": {task.task_name: task}},
            limit=conf.limit,
            bootstrap_iters=BOOTSTRAPS,
            apply_chat_template=lm.has_template,
            fewshot_as_multiturn=lm.has_template,
        )
    return found["results"][task.task_name], found["samples"][task.task_name]


def _seed(task: Any) -> None:
    """Seed as the harness does before each evaluation, so that all models get the same examples."""
    random.seed(_SEEDS["random"])
    np.random.seed(_SEEDS["numpy"])
    torch.manual_seed(_SEEDS["torch"])
    task.set_fewshot_seed(seed=_SEEDS["fewshot"])


@contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Restore the state of all random numbers, which training goes on with."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])

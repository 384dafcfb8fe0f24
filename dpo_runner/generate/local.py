"""Answers of models in this process, in batches of prompts of similar length."""

import gc
import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dpo_runner.config.run_conf import RunConf, config_keys
from dpo_runner.config.sections.model import LoraConf, ModelConf
from dpo_runner.data.prompts import Prompt
from dpo_runner.data.templates.chat_template import ChatTemplate
from dpo_runner.errors import RowError
from dpo_runner.generate.ledger import Answer, Ledger, LeftOut, Work
from dpo_runner.model.base import load_base_model, place
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.files.locations import loading_errors
from dpo_runner.model.result import load_tuned_model
from dpo_runner.model.tokenizer import find_stop_ids
from dpo_runner.records.reading import check_finished, read_run_conf
from dpo_runner.training.answers.sampling import Sampling, derive_seed, sample_answers
from dpo_runner.training.memory.device import ANSWERING, LOADING, watch_memory

Encoded = tuple[Prompt, list[int]]


@dataclass
class LocalModel:
    """A model that answers: its name, its blueprint, and its run's directory if it is a run's result."""

    name: str
    blueprint: Blueprint
    run_dir: Path | None = None

    def load(self) -> Any:
        """Load the model in evaluation mode, on its device."""
        if self.run_dir is not None:
            return load_tuned_model(self.run_dir)[0]
        model = place(load_base_model(self.blueprint)[0], self.blueprint.conf)
        if self.blueprint.adapter is not None and self.blueprint.adapter_mode != "merge":
            from peft import PeftModel

            with loading_errors(str(self.blueprint.conf.adapter), "model.adapter"):
                model = PeftModel.from_pretrained(model, self.blueprint.adapter, torch_device="cpu")
        return model.eval()


class LocalSampler:
    """Samples answers from the configuration's model, or from those of `generate.models`.

    Args:
        conf: the configuration.

    Raises:
        ConfigError: a model does not exist, or a run is not finished.
    """

    def __init__(self, conf: RunConf) -> None:
        self._conf = conf
        self._models = find_models(conf)
        self._batches: dict[str, list[list[Encoded]]] = {}

    @property
    def models(self) -> list[str]:
        return [model.name for model in self._models]

    @cached_property
    def _templates(self) -> dict[str, ChatTemplate]:
        data = self._conf.data
        return {
            model.name: ChatTemplate(model.blueprint.tokenizer, data.system_prompt, data.on_no_system_role)
            for model in self._models
        }

    def describe(self) -> dict[str, Any]:
        """Return what the answers depend on beside the settings of `generate`."""
        conf = self._conf
        model = {f"model.{name}": getattr(conf.model, name) for name in ("revision", "adapter_mode", "chat_template")}
        runs = {
            f"the result of {model.name}": hashlib.sha256((model.run_dir / "summary.json").read_bytes()).hexdigest()[
                :12
            ]
            for model in self._models
            if model.run_dir is not None
        }
        return {
            "generate.batch_size": conf.generate.batch_size,
            "data.system_prompt": conf.data.system_prompt,
            "quant": None if conf.quant is None else config_keys(conf.quant),
            **model,
            "model.dtype": [str(model.blueprint.dtype).removeprefix("torch.") for model in self._models],
            **runs,
        }

    def plan(self, prompts: Sequence[Prompt], ledger: Ledger, left_out: LeftOut) -> Work:
        """Tokenize the prompts, count those that cannot be answered, and return the work that is left.

        A batch has prompts of similar length, the longest first, and is sampled as a whole: what has not been sampled
        yet does not depend on interruptions.
        """
        generate, work = self._conf.generate, Work(prompt_tokens=0)
        size = max(1, generate.batch_size // generate.num_answers)
        for model in self._models:
            encoded = sorted(self._encode(model, prompts, left_out), key=lambda pair: -len(pair[1]))
            batches = [encoded[start : start + size] for start in range(0, len(encoded), size)]
            self._batches[model.name] = batches
            for batch in batches:
                if missing := self._missing(model, batch, ledger):
                    work.answers += len(missing) * generate.num_answers
                    work.prompt_tokens = (work.prompt_tokens or 0) + sum(len(ids) for _, ids in batch)
        work.new_tokens = work.answers * generate.max_new_tokens
        return work

    def sample(self, ledger: Ledger, left_out: LeftOut, progress: Callable[[int], None]) -> None:
        """Sample what is missing, after `plan`.

        Raises:
            RunError: memory runs out.
        """
        for model in self._models:
            batches = [batch for batch in self._batches[model.name] if self._missing(model, batch, ledger)]
            if not batches:
                continue
            with watch_memory(LOADING):
                loaded = model.load()
            for batch in batches:
                answers = self._answer(model, loaded, batch)
                missing = self._missing(model, batch, ledger)
                ledger.append(model.name, [(prompt, answers[prompt.key]) for prompt in missing])
                progress(len(missing) * self._conf.generate.num_answers)
            del loaded
            gc.collect()

    def _encode(self, model: LocalModel, prompts: Sequence[Prompt], left_out: LeftOut) -> Iterator[Encoded]:
        generate, template = self._conf.generate, self._templates[model.name]
        context = getattr(model.blueprint.config.get_text_config(), "max_position_embeddings", None)
        longest = None if context is None else context - generate.max_new_tokens
        rule = f"the model's context leaves {longest:,} beside generate.max_new_tokens" if longest is not None else ""
        if generate.max_prompt_tokens is not None and (longest is None or generate.max_prompt_tokens <= longest):
            longest, rule = generate.max_prompt_tokens, f"generate.max_prompt_tokens={generate.max_prompt_tokens}"
        for prompt in prompts:
            try:
                ids = template.render_prompt(prompt.messages, **prompt.variables)
                if longest is not None and len(ids) > longest:
                    raise RowError("prompt too long", f"{len(ids):,} tokens; {rule}")
            except RowError as error:
                left_out.add(prompt, error, generate.num_answers)
                continue
            yield prompt, ids

    def _missing(self, model: LocalModel, batch: Sequence[Encoded], ledger: Ledger) -> list[Prompt]:
        wanted = self._conf.generate.num_answers
        return [prompt for prompt, _ in batch if len(ledger.find(prompt, model.name)) < wanted]

    def _answer(self, model: LocalModel, loaded: Any, batch: Sequence[Encoded]) -> dict[str, list[Answer]]:
        """Sample a batch's answers, and return them by the key of their prompt."""
        generate, tokenizer = self._conf.generate, model.blueprint.tokenizer
        stop_ids = find_stop_ids(loaded, tokenizer, self._templates[model.name].end_of_turn)

        def decode(ids: list[int]) -> str:
            return str(tokenizer.decode(ids, skip_special_tokens=True))

        sampling = Sampling(generate.max_new_tokens, generate.temperature, generate.top_p, tuple(generate.stop), decode)
        place, numbers = self._models.index(model), range(generate.num_answers)
        seeds = [[derive_seed(generate.seed, prompt.key, place, number) for number in numbers] for prompt, _ in batch]
        advice = f"try generate.batch_size={max(1, generate.batch_size // 2)}; what is done stays done"
        with watch_memory(ANSWERING, advice=advice):
            sampled = sample_answers(
                loaded, [ids for _, ids in batch], seeds, sampling, stop_ids, tokenizer.pad_token_id
            )
        return {
            prompt.key: [_finish(ids, decode, generate.stop, stop_ids) for ids in answers]
            for (prompt, _), answers in zip(batch, sampled, strict=True)
        }


def _finish(ids: list[int], decode: Callable[[list[int]], str], stop: Sequence[str], stop_ids: Sequence[int]) -> Answer:
    """Return an answer from its tokens, cut before the first text that ends it."""
    text = decode(ids)
    ends = [at for at in map(text.find, stop) if at >= 0]
    return Answer(text[: min(ends)] if ends else text, bool(ends) or ids[-1] in stop_ids).stripped()


def find_models(conf: RunConf) -> list[LocalModel]:
    """Return the models that answer in this process; no weights are loaded.

    Raises:
        ConfigError: a model does not exist, or a run is not finished.
    """
    found = []
    if not conf.generate.models:
        adapter = f" with {conf.model.adapter}" if conf.model.adapter else ""
        found.append(LocalModel(f"{conf.model.model_name_or_path}{adapter}", _draw(conf, conf.model)))
    for name in conf.generate.models:
        path = Path(name).expanduser()
        if (path / "status.json").exists():
            check_finished(path)
            run = read_run_conf(path)
            found.append(LocalModel(name, _draw(run, run.model), path))
        else:
            model = replace(conf.model, model_name_or_path=name, revision=None, gguf_file=None, adapter=None)
            found.append(LocalModel(name, _draw(conf, model)))
    return found


def _draw(conf: RunConf, model: ModelConf) -> Blueprint:
    """Return the blueprint of a model that is not trained here: in the dtype of its files, and its own reference."""
    model = replace(model, reference="initial", device_map="cpu" if conf.training.use_cpu else model.device_map)
    blueprint = Blueprint(model, conf.quant, conf.lora or LoraConf())
    _ = blueprint.config, blueprint.tokenizer  # refuse a model that does not exist before anything starts
    return blueprint

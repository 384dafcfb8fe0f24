"""The score of a sequence-classification model of transformers, local or from the hub."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpo_runner.config.sections.generate import RewardModelConf
from dpo_runner.data.layouts.messages import Message
from dpo_runner.errors import ConfigError, RowError, suggest
from dpo_runner.model.files.locations import loading_errors
from dpo_runner.training.answers.rewards.store import ScoreStore
from dpo_runner.training.answers.rewards.term import Answered, Scores, Watch
from dpo_runner.training.answers.rewards.texts import to_score
from dpo_runner.training.memory.device import EVALUATION, watch_memory

_KEY = "reward.reward_model.model_name_or_path"


class ClassifierTerm:
    """The single output of a reward model, or the probability of one label of a classifier.

    Raises:
        ConfigError: the model or its tokenizer cannot be loaded, or it has several labels and none is chosen.
    """

    def __init__(self, conf: RewardModelConf) -> None:
        from transformers import AutoConfig, AutoTokenizer

        self._conf = conf
        self._model: Any = None
        path = Path(name := str(conf.model_name_or_path)).expanduser()
        self._source = str(path) if path.exists() else name
        self._options = {"revision": conf.revision, "trust_remote_code": conf.trust_remote_code}
        with loading_errors(name, _KEY):
            config = AutoConfig.from_pretrained(self._source, **self._options)
            self._tokenizer = AutoTokenizer.from_pretrained(self._source, **self._options)
        self._label = _find_label(conf, config)
        longest = getattr(config.get_text_config(), "max_position_embeddings", None)
        self._longest = min((one for one in (conf.max_length, longest) if one is not None), default=None)
        self._pad = self._tokenizer.pad_token_id
        if self._pad == self._tokenizer.eos_token_id:  # the model could not tell padding from the end of the text
            self._pad = None
        files = sorted(path.iterdir()) if path.is_dir() else []
        stats = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        scorer = [self._source, conf.revision, conf.dtype, self._label, self._longest, stats]
        self._kept = ScoreStore("reward_model", *scorer)

    def count_steps(self, answered: Sequence[Answered]) -> int:
        return sum(len(one.answers) for one in answered)

    def count_calls(self, answered: Sequence[Answered]) -> int:
        return 0

    def score(self, answered: Sequence[Answered], watch: Watch) -> list[Scores]:
        """Return the model's scores; see `Term`. Each batch is kept as soon as it is scored.

        Raises:
            ConfigError: the model cannot be loaded, or lacks weights.
            RunError: memory runs out.
        """
        scores: list[Scores] = [[self._kept.find(one.messages, text) for text in one.answers] for one in answered]
        encoded: list[tuple[int, int, list[int]]] = []
        for number, one in enumerate(answered):
            for at, text in enumerate(one.answers):
                if scores[number][at] is None:
                    ids = self._encode(one.messages, text)
                    if self._longest is not None and len(ids) > self._longest:
                        detail = f"{len(ids):,} tokens with the prompt, and the limit is {self._longest:,}"
                        scores[number][at] = RowError("too long for the reward model", detail)
                    else:
                        encoded.append((number, at, ids))
                        continue
                kept = scores[number][at]
                watch(number, kept if isinstance(kept, RowError) else None)
        advice = f"try reward.reward_model.batch_size={max(1, self._conf.batch_size // 2)}"
        with watch_memory(EVALUATION, advice=advice):
            for batch in self._batches(encoded):
                for (number, at, _), value in zip(batch, self._run([ids for *_, ids in batch]), strict=True):
                    score = scores[number][at] = to_score(value, str(self._conf.model_name_or_path))
                    if not isinstance(score, RowError):
                        self._kept.keep(score, answered[number].messages, answered[number].answers[at])
                    watch(number, score if isinstance(score, RowError) else None)
        return scores

    def _encode(self, messages: list[Message], answer: str) -> list[int]:
        if self._tokenizer.chat_template is None:  # as such models are trained: two texts
            ids = self._tokenizer("\n\n".join(message["content"] for message in messages), answer)["input_ids"]
        else:
            conversation = [*messages, {"role": "assistant", "content": answer}]
            text = self._tokenizer.apply_chat_template(conversation, tokenize=False)
            ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return list(ids)

    def _batches(self, encoded: list[tuple[int, int, list[int]]]) -> Iterator[list[tuple[int, int, list[int]]]]:
        """Yield batches of similar lengths, the longest first; without a pad token one row at a time."""
        ordered = sorted(encoded, key=lambda row: -len(row[2]))
        size = 1 if self._pad is None else self._conf.batch_size
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]

    def _run(self, rows: list[list[int]]) -> list[float]:
        import torch

        model = self._load()
        width = max(map(len, rows))
        pad = 0 if self._pad is None else self._pad
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits.float()
        values = logits[:, 0] if self._label is None else logits.softmax(-1)[:, self._label]
        return [float(value) for value in values.tolist()]

    def _load(self) -> Any:
        """Load the model on first use, whole and without pickles."""
        if self._model is not None:
            return self._model
        import torch
        from transformers import AutoModelForSequenceClassification

        conf = self._conf
        with loading_errors(self._source, _KEY):
            model, found = AutoModelForSequenceClassification.from_pretrained(
                self._source,
                dtype=conf.dtype if conf.dtype == "auto" else getattr(torch, conf.dtype),
                use_safetensors=True,
                output_loading_info=True,
                **self._options,
            )
        if lacks := sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])}):
            raise ConfigError(
                f"`{_KEY}={conf.model_name_or_path}`: its files lack {', '.join(lacks[:3])}, which transformers would "
                "draw at random; name a model that was trained to score"
            )
        if self._pad is not None:
            model.config.pad_token_id = self._pad
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = model.eval().requires_grad_(False).to(device)
        return self._model


def _find_label(conf: RewardModelConf, config: Any) -> int | None:
    """Return the number of the label that is scored; None if the model has a single output."""
    labels = {int(number): str(name) for number, name in config.id2label.items()}
    key = "reward.reward_model.label"
    if len(labels) == 1:
        if conf.label is not None:
            raise ConfigError(
                f"`{key}={conf.label}`: has no effect, {conf.model_name_or_path} has one output; leave it out"
            )
        return None
    if conf.label is None:
        names = ", ".join(labels.values())
        raise ConfigError(f"`{key}`: must be set (`{key}=LABEL`); {conf.model_name_or_path} has the labels {names}")
    found = [number for number, name in labels.items() if name == conf.label]
    if not found:
        raise ConfigError(f"`{key}={conf.label}`: no such label{suggest(conf.label, labels.values())}")
    return found[0]

"""Settings with which a run needs less memory. Imports no torch."""

from collections.abc import Iterator, Mapping
from typing import Any

from dpo_runner.config.run_conf import RunConf, count_processes
from dpo_runner.training.memory.device import ANSWERING, BENCHMARKS, EVALUATION, TRAINING

Settings = Mapping[str, Any]

_TOKENS, _BATCH = "engine.max_tokens_per_micro_batch", "training.per_device_train_batch_size"
_ACCUMULATION, _EVAL_BATCH = "training.gradient_accumulation_steps", "training.per_device_eval_batch_size"


def find_smaller(conf: RunConf, part: str, tokens: int | None, largest: int) -> dict[str, int]:
    """Return settings with which a phase needs less memory for the same result; empty if there are none.

    Args:
        conf: the configuration as executed; see `Settled`.
        part: the phase, such as `TRAINING`.
        tokens: token limit of a micro-batch; None if rows are counted.
        largest: tokens of the largest pair, prompt counted once; the lower limit of a micro-batch.
    """
    training = conf.training
    if part in (EVALUATION, ANSWERING):
        batch = training.per_device_eval_batch_size
        return {_EVAL_BATCH: batch // 2} if batch > 1 else {}
    if part == BENCHMARKS:
        requests = conf.benchmarks.batch_size
        return {"benchmarks.batch_size": requests // 2} if requests > 1 else {}
    if part != TRAINING:
        return {}
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if tokens is not None:
        held = min(tokens, batch * accumulation * largest)
        return {_TOKENS: max(held // 2, largest)} if held > largest else {}
    if batch == 1 or training.dataloader_drop_last:  # smaller batches would drop other pairs
        return {}
    factor = next(n for n in range(2, batch + 1) if batch % n == 0)  # the effective batch stays the same
    return {_BATCH: batch // factor, _ACCUMULATION: accumulation // count_processes(conf) * factor}


def list_ways(conf: RunConf, part: str | None = None, smaller: Settings | None = None) -> list[str]:
    """Return overrides that reduce memory, those that do not change the result first.

    Args:
        conf: the configuration.
        part: the phase that ran out of memory; None if unknown.
        smaller: the result of `find_smaller` for that phase; None if not computed.
    """
    ways: list[str] = []
    if smaller is None:
        smaller = find_smaller(conf, TRAINING, None, 0)
        ways += [join_settings(each) for each in (smaller, find_smaller(conf, EVALUATION, None, 0)) if each]
    elif smaller:
        ways.append(join_settings(smaller))
    return [*ways, *_list_other_ways(conf, part)]


def _list_other_ways(conf: RunConf, part: str | None) -> Iterator[str]:
    if part in (None, TRAINING) and not conf.training.gradient_checkpointing:
        yield "training.gradient_checkpointing=true"
    if conf.quant is None and (conf.lora is not None or conf.model.adapter is not None):
        yield "quant=nf4"
    if part == ANSWERING:
        yield f"samples.max_new_tokens={max(conf.samples.max_new_tokens // 2, 1)}"
    elif conf.training.max_length is not None:
        yield f"training.max_length={max(conf.training.max_length // 2, 2)} (longer pairs are then left out)"


def join_settings(settings: Settings) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())

"""Whether a run fits into memory, and what becomes of it where it does not: advice, or the same run in smaller batches.

A run that goes on with smaller batches takes as many pairs to an optimizer step as before, so it is the run that had
such batches from the start. Where micro-batches are of so many tokens, that is all that is smaller; where rows are
counted, there are fewer of them, and as many more batches to a step.
"""

import dataclasses
import gc
import logging
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from dpo_runner.config.run_conf import RunConf
from dpo_runner.errors import ConfigError
from dpo_runner.io.console import RunConsole
from dpo_runner.io.logs import route_library_logs
from dpo_runner.training.memory.device import (
    ANSWERING,
    EVALUATION,
    TRAINING,
    OutOfMemory,
    format_bytes,
    is_out_of_memory,
)

if TYPE_CHECKING:
    from dpo_runner.data.splits import PairShape

logger = logging.getLogger(__name__)

Settings = Mapping[str, Any]
Records = list[dict[str, Any]]
Result = TypeVar("Result")

_TOKENS, _BATCH = "engine.max_tokens_per_micro_batch", "training.per_device_train_batch_size"
_ACCUMULATION, _EVAL_BATCH = "training.gradient_accumulation_steps", "training.per_device_eval_batch_size"


def show_memory(conf: RunConf, longest: int, largest: "PairShape", console: RunConsole) -> None:
    """Say whether a run will fit into memory."""
    from dpo_runner.training.memory.estimate import estimate_memory

    try:
        with route_library_logs(None):
            estimate = estimate_memory(conf, longest, largest)
    except ConfigError as error:
        console.warn(f"the memory that this run takes is not known: {error}")
    else:
        console.show_memory(estimate)


def run_within_memory(
    conf: RunConf,
    attempt: Callable[[Settings, Records], Result],
    records: Records,
    note: Callable[[Records], None],
    longest: int,
    largest: "PairShape",
    console: RunConsole,
) -> Result:
    """Let a run be tried, and where memory runs out tried again in smaller batches, if `conf.checks` says so.

    Args:
        conf: the run, as it is tried first.
        attempt: does it, with these settings changed, after what these records tell.
        records: of an earlier process that was interrupted after it had made batches smaller.
        note: is given all records, each time that there is one more.
        longest: tokens of the longest conversation.
        largest: the pair with the most tokens.
        console: where it is told.

    Returns:
        What `attempt` returns.

    Raises:
        OutOfMemory: no batch can be smaller, or none is to be; with sizes, and with settings that take less.
    """
    settings = {key: value for record in records for key, value in record["settings"].items()}
    if records:
        console.warn(f"memory ran out before; this run goes on with {_join(settings)}")
        note(records)
    while True:
        try:
            return attempt(settings, records)
        except OutOfMemory as error:
            logger.error("memory ran out\n%s", traceback.format_exc())
            failure = error
        console.stop_training()
        _let_go(failure)
        now = with_settings(conf, settings)
        smaller = find_smaller(now, failure.part, failure.tokens, sum(largest))
        if not smaller or conf.checks.on_out_of_memory == "stop":
            advice = f"try {', or '.join(list_ways(now, failure.part, smaller))}"
            if smaller:
                advice += "; checks.on_out_of_memory=smaller_batch tries smaller batches by itself"
            raise failure.advised(f"{_describe_estimate(now, longest, largest)}{advice}")
        settings |= smaller
        records = [*records, {"part": failure.part, "sizes": failure.sizes, "settings": smaller}]
        console.warn(f"{failure}; going on with {_join(smaller)}")
        note(records)


def find_smaller(conf: RunConf, part: str, tokens: int | None, largest: int) -> dict[str, int]:
    """Return settings with which a part of a run takes less memory for the same result; none where there are none.

    Args:
        conf: the run.
        part: of it.
        tokens: that a micro-batch has at most; None where rows are counted.
        largest: tokens of the largest pair, its prompt counted once: no micro-batch is smaller.
    """
    training = conf.training
    if part in (EVALUATION, ANSWERING):
        batch = training.per_device_eval_batch_size
        return {_EVAL_BATCH: batch // 2} if batch > 1 else {}
    if part != TRAINING:
        return {}
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    if tokens is not None:
        held = min(tokens, batch * accumulation * largest)
        return {_TOKENS: max(held // 2, largest)} if held > largest else {}
    if batch == 1 or training.dataloader_drop_last:  # other batches would drop other pairs
        return {}
    factor = next(n for n in range(2, batch + 1) if batch % n == 0)  # the effective batch stays the same
    return {_BATCH: batch // factor, _ACCUMULATION: accumulation * factor}


def list_ways(conf: RunConf, part: str | None = None, smaller: Settings | None = None) -> list[str]:
    """Return overrides that would make a run smaller, those that change no result first.

    Args:
        conf: the run.
        part: of it; None where it is not known.
        smaller: what `find_smaller` has found for that part; None where it was not asked.
    """
    ways: list[str] = []
    if smaller is None:
        smaller = find_smaller(conf, TRAINING, None, 0)
        ways += [_join(each) for each in (smaller, find_smaller(conf, EVALUATION, None, 0)) if each]
    elif smaller:
        ways.append(_join(smaller))
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


def with_settings(conf: RunConf, settings: Settings) -> RunConf:
    """Return a run with some of its settings, by their dotted keys, changed."""
    for key, value in settings.items():
        section, _, name = key.partition(".")
        changed = dataclasses.replace(getattr(conf, section), **{name: value})
        conf = dataclasses.replace(conf, **{section: changed})
    return conf


def _join(settings: Settings) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _let_go(error: BaseException | None) -> None:
    """Free what the functions that have failed held: the model, above all."""
    import torch

    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _describe_estimate(conf: RunConf, longest: int, largest: "PairShape") -> str:
    from dpo_runner.training.memory.estimate import estimate_memory

    try:
        estimate = estimate_memory(conf, longest, largest)
    except ConfigError:
        return ""
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return ""  # there is too little even for that
    return f"by the estimate the run takes {format_bytes(estimate.total)} at its peak, in its {estimate.phase}; "

"""The limit on unusable rows (`data.max_bad_fraction`) and its error."""

from dpo_runner.config.sections.data import DataConf
from dpo_runner.data.prepare.batches import Outcome
from dpo_runner.data.prepare.cache import Prepared
from dpo_runner.data.rows.sources import RowSource
from dpo_runner.data.templates.chat_template import describe_mismatch
from dpo_runner.errors import DataError


def check_outcome(outcome: Outcome, source: RowSource, data: DataConf) -> None:
    """Stop at a batch's first bad row or template mismatch, if the configuration allows none.

    Raises:
        DataError: names the row's location.
    """
    if outcome.bad and data.on_bad_row == "error":
        file, number, reason, detail = outcome.bad[0]
        raise DataError(f"{source.locate(file, number)}: {reason}{': ' if detail else ''}{detail}")
    if outcome.first_mismatch and data.on_template_mismatch == "error":
        _refuse_mismatch(outcome.first_mismatch, source)


def _refuse_mismatch(first: tuple[int, int, str], source: RowSource) -> None:
    file, number, mismatch = first
    raise DataError(f"{source.locate(file, number)}: {describe_mismatch(mismatch)}")


def check_bad_rows(prepared: Prepared, data: DataConf, key: str) -> None:
    """Stop if a source has more bad rows, found now or by an earlier run, than the configuration allows.

    Raises:
        DataError: gives counts by reason, and the first location.
    """
    facts, source = prepared.facts, prepared.source
    if facts["first_mismatch"] and data.on_template_mismatch == "error":
        _refuse_mismatch(facts["first_mismatch"], source)
    bad = sum(facts["bad"].values())
    if not bad:
        return
    file, number, problem = facts["first_bad"]
    first = f"{source.locate(file, number)}: {problem}"
    if data.on_bad_row == "error":
        raise DataError(first)
    if bad / facts["rows"] > data.max_bad_fraction:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in facts["bad"].items())
        raise DataError(
            f"`{key}`: {bad:,} of {facts['rows']:,} rows cannot be used, more than "
            f"data.max_bad_fraction={data.max_bad_fraction:g} ({reasons}); the first is {first}"
        )

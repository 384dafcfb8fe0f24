"""Terminal output of a run: the plan, a progress bar, and results before and after training."""

import logging
import re
import shlex
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from dpo_runner.io.masking import mask_text
from dpo_runner.io.streams import Guarded, silenced

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

_LINES_WITHOUT_TERMINAL = 20
_SECONDS_BETWEEN_REPORTS = 10
_LEAST_WIDTH_WITH_BAR = 100
_NOT_PLAIN = re.compile(r"[^\n\t\x20-\x7e]")
_REORDERING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def visible(text: str) -> str:
    """Return `text` with terminal control, bidirectional and unencodable characters made visible.

    C0 controls become control pictures (ESC is ␛); C1 controls, surrogates and bidirectional controls become escapes.
    Newlines and tabs stay.
    """
    return _NOT_PLAIN.sub(lambda match: _visible_character(match[0]), text)


def _visible_character(character: str) -> str:
    code = ord(character)
    if (code < 0x20 and character not in "\n\t") or code == 0x7F:
        return chr(0x2421 if code == 0x7F else 0x2400 + code)
    if 0x80 <= code < 0xA0 or 0xD800 <= code < 0xE000 or unicodedata.bidirectional(character) in _REORDERING:
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
    return character


def open_terminal(stderr: bool = False, soft_wrap: bool = False) -> Console:
    """Return a console that goes silent if writing to it fails; rich would exit the program."""
    file: Any = Guarded(sys.stderr if stderr else sys.stdout)
    return Console(file=file, highlight=False, soft_wrap=soft_wrap)


def show_each(items: Sequence[Item], what: str) -> Iterator[Item]:
    """Yield items one by one, with a progress bar on standard error, or one line where that is no terminal."""
    console, shown = open_terminal(stderr=True), escape(visible(what))
    if console.is_terminal:
        with _build_bar(console, TimeRemainingColumn()) as bar:
            yield from bar.track(items, description=shown)
    else:
        console.print(shown, soft_wrap=True)
        yield from items


@contextmanager
def count_progress(console: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` things are done and the time left: a bar, or a line now and then without a terminal.

    Yields:
        A function that counts so many more. The time left is estimated from what comes after its first call, which may
        count what an earlier program has done.
    """
    if console.is_terminal:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(escape(visible(what)), total=total)
            yield lambda count: progress.advance(task, count)
        return
    done, first, told = 0, (0.0, 0), time.monotonic()

    def count(more: int) -> None:
        nonlocal done, first, told
        done, now = done + more, time.monotonic()
        if first == (0.0, 0):
            first = now, done
        elif now - told > _SECONDS_BETWEEN_REPORTS and done > first[1]:
            told = now
            left = (total - done) * (now - first[0]) / (done - first[1])
            console.print(f"{escape(visible(what))}: {done:,} of {total:,}, {format_clock(left)} left", soft_wrap=True)

    yield count


def _build_bar(console: Console, *figures: ProgressColumn) -> Progress:
    bar = [BarColumn()] if console.width >= _LEAST_WIDTH_WITH_BAR else []  # the figures matter more
    return Progress(TextColumn("{task.description}"), *bar, MofNCompleteColumn(), *figures, console=console)


class FoldingTable(Table):
    """A table that folds what rich cuts off: words longer than their column, such as paths or a Chinese sentence.

    Right-aligned columns hold figures, which are never folded.
    """

    def add_column(self, *args: Any, justify: JustifyMethod = "left", **settings: Any) -> None:
        super().add_column(*args, justify=justify, **{"overflow": "fold", "no_wrap": justify == "right", **settings})


class RunConsole:
    """Print the progress and results of one run.

    Args:
        console: the output; the terminal by default.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or open_terminal(soft_wrap=True)
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._started = 0.0
        self._first = self._steps = self._pairs = 0
        self._with_bar = False
        self._source: str | None = None

    def note_trouble(self) -> None:
        """Record in run.log, once it exists, that standard output had failed before."""
        if 1 in silenced:
            logger.info("nothing is printed: %s", silenced[1])

    def say(self, text: str) -> None:
        self.console.print(escape(visible(mask_text(text))))

    def warn(self, text: str) -> None:
        self.console.print(f"[yellow]warning:[/] {escape(visible(mask_text(text)))}")

    def show_plan(self, plan: dict[str, str]) -> None:
        table = FoldingTable.grid("", "", padding=(0, 2))
        for key, value in plan.items():
            table.add_row(f"[bold]{escape(key)}[/]", escape(visible(mask_text(value))))
        self.console.print(table)

    def show_sizes(self, title: str, sizes: Mapping[str, int], totals: Mapping[str, int]) -> None:
        """Show a table of sizes in gigabytes, given in bytes; sizes of 0 are left out."""
        table = FoldingTable("", title=title, title_justify="left")
        table.add_column("GB", justify="right")
        for label, size in sizes.items():
            if size:
                table.add_row(label, f"{size / 1e9:.2f}")
        table.add_section()
        for label, size in totals.items():
            table.add_row(escape(visible(label)), f"{size / 1e9:.2f}")
        self.console.print(table)

    def show_preparing(self, source: str, rows: int) -> None:
        """Count `rows` more tokenized rows of a source, and report progress every few seconds."""
        now = time.monotonic()
        if self._source != source:
            self._source, self._rows, self._since, self._told = source, 0, now, now
        self._rows += rows
        if now - self._told > _SECONDS_BETWEEN_REPORTS:
            self._told = now
            self.say(f"tokenizing {source}: {self._rows:,} rows, {self._rows / (now - self._since):,.0f} rows/s")

    def start_training(self, first_step: int, steps: int, pairs_per_step: int, with_bar: bool) -> None:
        """Start the display for steps `first_step` to `steps`, each of `pairs_per_step` pairs."""
        self._started, self._first, self._steps, self._pairs = time.monotonic(), first_step, steps, pairs_per_step
        self._with_bar = with_bar
        if with_bar and self.console.is_terminal:
            figures = TextColumn("{task.fields[figures]}", table_column=Column())  # may fold, the others never do
            self._progress = _build_bar(self.console, figures, TimeRemainingColumn())
            self._task = self._progress.add_task("training", total=steps, completed=first_step, figures="")
            self._progress.start()

    def show_step(self, step: int, metrics: dict[str, Any] | None = None) -> None:
        """Show that `step` steps are done, with the figures of the newest log event if there is one."""
        done = step - self._first
        speed = done * self._pairs / max(time.monotonic() - self._started, 1e-9)
        figures = ""
        if metrics and "loss" in metrics:
            figures = (
                f"loss {metrics['loss']:.3f}  accuracy {_figure(metrics.get('rewards/accuracies', 0), 2)}  "
                f"margin {_figure(metrics.get('rewards/margins', 0), 2)}  {speed:.2f} pairs/s"
            )
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=step)
            if figures:
                self._progress.update(self._task, figures=figures)
        elif figures and self._with_bar:
            every = max(1, self._steps // _LINES_WITHOUT_TERMINAL)
            if step % every == 0 or step == self._steps:
                left = (self._steps - step) * (time.monotonic() - self._started) / max(done, 1)
                self.say(f"step {step}/{self._steps}  {figures}  {format_clock(left)} left")

    def stop_training(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def show_samples(self, samples: list[dict[str, Any]], who: tuple[str, str] = ("before", "after")) -> None:
        """Show each sample's two answers, stored under the names in `who`, side by side."""
        for sample in samples:
            question = escape(visible(sample["prompt"][-1]["content"]))
            table = FoldingTable(title=question, title_justify="left", expand=True, show_lines=True)
            for name in who:
                answer = sample[name]
                cut = "" if answer["complete"] else ", cut off"
                table.add_column(f"{name} ({answer['tokens']} tokens{cut})", ratio=1)
            table.add_row(*(escape(visible(sample[name]["text"])) for name in who))
            self.console.print(table)

    def show_summary(self, summary: dict[str, Any], labels: Mapping[str, str]) -> None:
        """Show a run's figures, or texts in their place, before and after training.

        Args:
            summary: the contents of summary.json.
            labels: the label of each key to show.
        """
        table = FoldingTable("", "before", "after")
        for key, label in labels.items():
            before, after = summary["before"].get(key), summary["after"].get(key)
            if before is not None and after is not None:
                table.add_row(label, _figure(before, 3), _figure(after, 3))
        self.console.print(table)
        self.say(
            f"{summary['steps']} steps in {format_clock(summary['train_runtime'])}, "
            f"{summary['pairs_per_second']:.2f} pairs/s, at most {summary['peak_memory_gb']:.1f} GB of memory"
        )

    def show_rounds(self, before: Mapping[str, Any], rounds: Sequence[Mapping[str, Any]], best: int) -> None:
        """Show the reward of held-out prompts and the KL divergence after each round."""
        table = FoldingTable("round", "reward", "±", "KL", "better than before", "pairs")
        for number, figures in enumerate([before, *rounds]):
            keys = ("eval_reward", "eval_reward_ci95", "eval_reward_kl", "eval_reward_win_rate")
            cells = [_figure(figures[key], 3) if key in figures and number else "" for key in keys]
            cells[:2] = [_figure(figures[key], 3) for key in keys[:2]]
            pairs = f"{figures['pairs']:,}" if number else ""
            table.add_row(f"{number or 'before'}{' (best)' if number == best else ''}", *cells, pairs)
        self.console.print(table)

    def show_next_steps(self, run_dir: Path, weights: Path, commands: Mapping[str, str]) -> None:
        """Show where the results are, and the commands that use them; `commands` has further ones by their use."""
        quoted = shlex.quote(str(run_dir))
        lines = {
            "results": run_dir,
            "weights": weights,
            "talk to it": f"python -m dpo_runner.chat {quoted}",
            "compare": f"python -m dpo_runner.chat {quoted} --compare",
            "evaluate": f"python -m dpo_runner.evaluate {quoted}",
            "export": f"python -m dpo_runner.export {quoted} --out DIR",
            **commands,
        }
        self.say("")
        for use, command in lines.items():
            self.say(f"{use:<12}{command}")


def _figure(value: float | str, digits: int) -> str:
    return value if isinstance(value, str) else f"{value:z.{digits}f}"  # z: no -0.000


def format_clock(seconds: float) -> str:
    """Return a duration in seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

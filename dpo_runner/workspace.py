"""Save a view that compares a sweep's runs in W&B: `python -m dpo_runner.workspace SWEEP_DIR`."""

import argparse
import contextlib
import io
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dpo_runner.io.interrupts import end_at_once, on_ctrl_c

with on_ctrl_c(end_at_once):
    from dpo_runner.config.rules.sweep import read_direction
    from dpo_runner.config.schema import shorten_keys
    from dpo_runner.config.sections.sweep import SearchConf
    from dpo_runner.errors import ConfigError, RunError, reason_of
    from dpo_runner.io.exits import honest_exit
    from dpo_runner.io.streams import put
    from dpo_runner.io.upstream import check_names
    from dpo_runner.records.differences import find_differing, find_ignored
    from dpo_runner.records.runs import read_runs
    from dpo_runner.records.tracking import OBJECTIVE
    from dpo_runner.records.wandb_files import find_folder, list_commands
    from dpo_runner.sweep.directory import read_record

_EXTRA = "pip install 'wandb-workspaces>=0.4.8,<1' (or the extra: pip install 'dpo-runner[workspace]')"
_CURVES = ("train/loss", "eval/rewards/accuracies", "eval/rewards/margins")
_STEP = "train/global_step"
_MOST_RUNS = 200
_NOT_IN_NAMES = ("So", "Sk", "Sm", "Sc", "Cs")
"""Unicode categories that W&B treats as emojis and rejects in a view's name; "=" and "<" are among them."""


@dataclass(frozen=True)
class View:
    """A view that compares a sweep's runs in W&B.

    Attributes:
        name: the view's name.
        entity: the user or team; None for the account's default.
        project: the W&B project.
        group: the W&B group of the sweep's runs.
        settings: dotted configuration keys that differ between the runs.
        logarithmic: the keys of `settings` to show on a logarithmic axis.
        metric: the sweep's objective, under TRL's name.
        minimize: whether lower is better.
        folder: the folder of W&B's files.
        running: whether any run is still running.
    """

    name: str
    entity: str | None
    project: str
    group: str
    settings: list[str]
    logarithmic: set[str]
    metric: str
    minimize: bool
    folder: Path
    running: bool


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exit codes: 0 done, 1 W&B did not save the view, 2 nothing to compare, 130 interrupted.
    """
    parser = argparse.ArgumentParser(prog="python -m dpo_runner.workspace", description=__doc__, allow_abbrev=False)
    parser.add_argument("sweep_dir", type=Path, metavar="SWEEP_DIR", help="a sweep's directory")
    args = parser.parse_args(argv)
    with honest_exit("interrupted"):
        view = read_view(args.sweep_dir)
        put(f"saved  {save_view(view)}")
        if command := list_commands(view.folder).get("upload"):
            if view.running:  # W&B would mark a half-uploaded run as failed
                put("the sweep is still running; it ends by printing what uploads the runs that the server lacks")
            else:
                put(f"runs that the server lacks appear there after  {command}")


def read_view(sweep_dir: Path) -> View:
    """Return the view of a sweep.

    Raises:
        ConfigError: the folder is not a sweep's, its runs were not recorded by W&B, or nothing differs between them.
    """
    if not sweep_dir.is_dir() or read_record(sweep_dir) is None:
        raise ConfigError(f"{sweep_dir}: is not a sweep's directory (no sweep.json)")
    begun = [run for run in read_runs([sweep_dir])[0] if run.config]
    if not begun:
        raise ConfigError(f"{sweep_dir}: none of its runs has begun")
    tracked = [run for run in begun if run.config["wandb.mode"] != "disabled"]
    if not tracked:
        raise ConfigError(f"{sweep_dir}: its runs were not recorded by W&B (wandb=disabled); see compare.html there")
    newest = tracked[-1].config
    settings = find_differing([run.config for run in tracked], find_ignored(tracked))
    if not settings:
        raise ConfigError(f"{sweep_dir}: nothing differs between the runs that have begun, {len(tracked)} of them")
    search = SearchConf(objective=newest["sweep.search.objective"], direction=newest["sweep.search.direction"])
    return View(
        "".join("_" if unicodedata.category(letter) in _NOT_IN_NAMES else letter for letter in newest["wandb.group"]),
        newest["wandb.entity"],
        newest["wandb.project"],
        newest["wandb.group"],
        settings,
        {key for key in settings if _is_logarithmic([run.config.get(key) for run in tracked])},
        search.objective,
        read_direction(search) == "minimize",
        find_folder(newest["wandb.dir"], sweep_dir),
        any(run.state == "running" for run in tracked),
    )


def save_view(view: View) -> str:
    """Save a view in W&B and return its address.

    Raises:
        ConfigError: `wandb-workspaces` is not installed.
        RunError: there is no API key, or the server cannot be reached or refuses.
    """
    try:
        version("wandb-workspaces")
    except PackageNotFoundError:
        raise ConfigError(f"needs wandb-workspaces; {_EXTRA}") from None
    import wandb

    try:
        with contextlib.redirect_stderr(io.StringIO()):  # W&B logs errors there, which are raised here in one line
            entity = view.entity or wandb.Api().default_entity
            workspace = build_workspace(view, entity)
            workspace.save()
            return str(workspace.url)
    except wandb.errors.AuthenticationError as error:
        raise RunError(f"W&B cannot be reached, or not with this key (`wandb login`): {reason_of(error)}") from error
    except Exception as error:  # three libraries raise their own types
        raise RunError(f"W&B did not take the view: {reason_of(error)}") from error


def build_workspace(view: View, entity: str) -> Any:
    """Return the view as a `wandb_workspaces.workspaces.Workspace`, not yet saved."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    short = shorten_keys(view.settings)
    columns = [
        wr.ParallelCoordinatesPlotColumn(wr.Config(key), display_name=short[key], log=key in view.logarithmic or None)
        for key in view.settings
    ]
    columns.append(wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(OBJECTIVE), display_name=view.metric))
    scatters = [
        wr.ScatterPlot(
            title=f"{view.metric} over {short[key]}",
            x=wr.Config(key),
            y=wr.SummaryMetric(OBJECTIVE),
            log_x=key in view.logarithmic or None,
        )
        for key in view.settings
    ]
    workspace = ws.Workspace(
        entity=entity,
        project=view.project,
        name=view.name,
        sections=[
            ws.Section(
                name="What the settings do",
                panels=[
                    wr.ParallelCoordinatesPlot(columns=columns),
                    wr.ParameterImportancePlot(with_respect_to=OBJECTIVE),
                    *scatters,
                ],
                is_open=True,
            ),
            ws.Section(
                name="Curves", panels=[wr.LinePlot(title=name, x=_STEP, y=[name]) for name in _CURVES], is_open=True
            ),
            ws.Section(name="Runs", panels=[wr.RunComparer(diff_only=True)], is_open=True),
        ],
        settings=ws.WorkspaceSettings(x_axis=_STEP, max_runs=_MOST_RUNS),
        runset_settings=ws.RunsetSettings(
            order=[expr.Ordering(expr.Summary(OBJECTIVE), ascending=view.minimize)],
            pinned_columns=[*map(_column, view.settings), f"summary:{OBJECTIVE}", "summary:state"],
        ),
    )
    check_names("wandb-workspaces", workspace, "_stashed_filters_v2", "_stashed_filter_string")
    # Set privately: the official way, a filter string, doubles or changes "=", "<" and ">" in values.
    workspace._stashed_filters_v2 = expr.filters_tree_to_v2(expr.And(expr.Metric("Group") == view.group).to_model())
    workspace._stashed_filter_string = workspace.runset_settings.filters
    return workspace


def _column(key: str) -> str:
    """Return the name of the column for a configuration key in the table of runs."""
    section, _, rest = key.partition(".")
    return f"config:{section}.value.{rest}" if rest else f"config:{section}.value"


def _is_logarithmic(values: Sequence[Any]) -> bool:
    """Return whether values suit a log scale: positive numbers, the largest at least ten times the smallest."""
    numbers = [value for value in values if isinstance(value, (int, float)) and not isinstance(value, bool)]
    return len(numbers) == len(values) and min(numbers) > 0 and max(numbers) >= 10 * min(numbers)


if __name__ == "__main__":
    main()

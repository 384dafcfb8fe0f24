"""The trackers of `training.report_to`, fed through transformers' own callbacks. Their failures never fail a run."""

import contextlib
import io
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_runner.config.keys import Effect, effect_of
from dpo_runner.config.rules.training import list_trackers
from dpo_runner.config.run_conf import RunConf, config_keys
from dpo_runner.errors import RunPruned
from dpo_runner.io.files import write_text
from dpo_runner.io.masking import mask_secrets, mask_text
from dpo_runner.records.directory import RunDirectory
from dpo_runner.records.runs import flatten
from dpo_runner.records.tracking import Tracker, track
from dpo_runner.records.wandb_files import find_folder
from dpo_runner.records.wandb_run import describe_error

logger = logging.getLogger(__name__)


@dataclass
class _Place:
    """Where a tracker writes, and as which run.

    Attributes:
        folder: the run's directory.
        shared: the directory of the run's sweep; of a single run, its own.
        run_name: the run's name.
        step: the first step to be logged; what an earlier start of the run logged of it and of later ones is void.
        outcome: the state of MLflow that the run ends with.
    """

    folder: Path
    shared: Path
    run_name: str
    step: int = 0
    outcome: str = "FINISHED"


class _Settings:
    """The settings that a tracker records, W&B's ones: without secrets, names and paths; `training` as TRL's fields.

    Args:
        args: TRL's settings, which supply all other attributes.
        conf: the run's configuration.
        run_name: the tracker's name of the run.
        recorded: whether an earlier start of the run recorded them; MLflow refuses to change any.
    """

    def __init__(self, args: Any, conf: RunConf, run_name: str, recorded: bool) -> None:
        self._args, self._conf, self._recorded = args, conf, recorded
        self.run_name, self.project = run_name, mask_text(conf.wandb.project)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._args, name)

    def to_dict(self) -> dict[str, Any]:
        told = {} if self._recorded else config_keys(self._conf)
        settings = {key: value for key, value in flatten(told) if effect_of(key) is not Effect.PLACES}
        return {
            key.removeprefix("training."): mask_secrets(value, key.rpartition(".")[2])
            for key, value in settings.items()
        }

    def to_json_string(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


class Trackers:
    """The trackers besides W&B. No method raises if one of them fails.

    Args:
        conf: the run's configuration, which names the trackers.
        directory: the run's directory.
        warn: shows one line on the terminal.
    """

    def __init__(self, conf: RunConf, directory: RunDirectory, warn: Callable[[str], None]) -> None:
        self._conf, self._warn = conf, warn
        shared = find_folder(conf.wandb.dir, directory.path).parent
        run_name = mask_text(f"{conf.wandb.name or conf.run_name}/{directory.path.name}")
        self._place = _Place(directory.path.absolute(), shared.absolute(), run_name)
        self._opened: dict[str, tuple[Any, AbstractContextManager[Any]]] = {}
        self._working = list_trackers(conf.training)

    def log(self, args: Any, state: Any, control: Any, event: dict[str, Any]) -> None:
        """Pass one event on, under its names in metrics.jsonl, as transformers does for its callbacks."""

        def begin(callback: Any, recorded: bool = False) -> None:
            settings = _Settings(args, self._conf, self._place.run_name, recorded)
            callback.on_train_begin(settings, state, control, model=None)

        for name in list(self._working):
            with self._surviving(name):
                if name not in self._opened:
                    # A pending evaluation of the checkpoint's step is not yet another step.
                    self._place.step = state.global_step + ("loss" not in event)
                    context = _OPEN[name](self._place, begin)
                    self._opened[name] = context.__enter__(), context
                self._opened[name][0].on_log(args, state, control, model=None, logs=event)

    def close(self, outcome: str) -> None:
        self._place.outcome = outcome
        for name, (_, context) in self._opened.items():
            with self._surviving(name):
                context.__exit__(None, None, None)

    @contextmanager
    def _surviving(self, name: str) -> Iterator[None]:
        """Log what a tracker prints; after its first failure, say so and go on without it."""
        printed = io.StringIO()
        try:
            with contextlib.redirect_stdout(printed):
                yield
        except Exception as error:
            logger.exception("%s failed", name)
            if name in self._working:
                self._working.remove(name)
                self._warn(
                    f"{name}: {describe_error(error)}; the run goes on without it, and metrics.jsonl has all figures"
                )
        finally:
            for line in filter(None, printed.getvalue().splitlines()):
                logger.info("%s: %s", name, line)


_Begin = Callable[..., None]


@contextmanager
def _tensorboard(place: _Place, begin: _Begin) -> Iterator[Any]:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    given = os.environ.get("TENSORBOARD_LOGGING_DIR")
    own = (place.folder.parent.name, place.folder.name)
    folder = Path(given).expanduser().joinpath(*own) if given else place.folder / "tensorboard"
    writer = SummaryWriter(str(folder), purge_step=place.step)
    with contextlib.closing(writer):
        begin(callback := TensorBoardCallback(writer))
        yield callback


@contextmanager
def _mlflow(place: _Place, begin: _Begin) -> Iterator[Any]:
    import mlflow
    from transformers.integrations import MLflowCallback

    id_file = place.folder / "mlflow_run_id.txt"
    # MLflow's own limits let a run wait many minutes for a server that does not answer.
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20"}
    earlier = {"MLFLOW_RUN_ID": id_file.read_text(encoding="utf-8")} if id_file.exists() else {}
    with _environment(patience | earlier):
        placed, is_own = not mlflow.is_tracking_uri_set(), mlflow.active_run() is None
        if placed:
            place.shared.mkdir(parents=True, exist_ok=True)
            mlflow.set_tracking_uri(f"sqlite:///{place.shared}/mlflow.db")
        callback = MLflowCallback()
        try:
            begin(callback, recorded=bool(earlier))
            write_text(id_file, mlflow.active_run().info.run_id)
            yield callback
        finally:
            vars(callback)["_auto_end_run"] = False  # else its __del__ ends the run that is active at that time
            try:
                mlflow.flush_async_logging()
                if is_own:
                    mlflow.end_run(place.outcome)
            finally:
                if placed:
                    mlflow.set_tracking_uri(None)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables that are not set, and undo all changes to MLflow's at the end."""
    given = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_")}
    os.environ.update({key: value for key, value in variables.items() if key not in given})
    try:
        yield
    finally:
        for key in [key for key in os.environ if key.startswith("MLFLOW_")]:
            del os.environ[key]
        os.environ.update(given)


@contextmanager
def _trackio(place: _Place, begin: _Begin) -> Iterator[Any]:
    import trackio
    from transformers.integrations import TrackioCallback

    if "TRACKIO_DIR" not in os.environ:  # Trackio reads it on import, and a sweep's worker imports it once
        for name, module in list(sys.modules.items()):
            if name.partition(".")[0] == "trackio" and hasattr(module, "TRACKIO_DIR"):
                vars(module)["TRACKIO_DIR"] = place.shared / "trackio"
    begin(callback := TrackioCallback())
    try:
        yield callback
    finally:
        trackio.finish()


_OPEN: dict[str, Callable[[_Place, _Begin], AbstractContextManager[Any]]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "trackio": _trackio,
}


@contextmanager
def follow(conf: RunConf, directory: RunDirectory, warn: Callable[[str], None]) -> Iterator[Tracker]:
    """Open W&B's run and, with the first event, the other trackers; close all with the run's outcome."""
    with track(conf, directory, warn) as tracker:
        tracker.further, outcome = Trackers(conf, directory, warn), "FAILED"
        try:
            yield tracker
            outcome = "FINISHED"
        except (KeyboardInterrupt, RunPruned):
            outcome = "KILLED"
            raise
        finally:
            tracker.further.close(outcome)

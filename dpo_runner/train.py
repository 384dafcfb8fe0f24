"""One run, told from top to bottom: a configuration becomes a DPO-tuned adapter and everything around it.

plan -> data -> model -> trainer -> step-0 check -> train -> evaluate -> sample -> save -> summary"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.preferences import PreferenceData, load_preferences
from dpo_runner.errors import ConfigError
from dpo_runner.io.console import RunConsole
from dpo_runner.io.logs import quiet_imports, route_library_logs
from dpo_runner.model.files.pickles import refuse_pickled_code
from dpo_runner.records.checkpoints import open_last_checkpoint, read_step
from dpo_runner.records.directory import RunDirectory, resolve_run_dir
from dpo_runner.records.reading import read_status, read_summary
from dpo_runner.records.resume import check_continuable, check_free, check_same_inputs, check_unused, read_logged
from dpo_runner.records.tracking import Tracker
from dpo_runner.training.memory.device import LOADING, PREPARING, watch_memory
from dpo_runner.training.memory.retry import Records, Settings, run_within_memory, show_memory, with_settings
from dpo_runner.training.plan import build_plan, count_steps
from dpo_runner.training.session import recorded
from dpo_runner.training.trainer import _train_steps

with quiet_imports():
    from transformers import TrainerCallback, set_seed
    from trl import DPOConfig

    from dpo_runner.model.adapters import find_other_bases
    from dpo_runner.model.policy import check_model, load_policy
    from dpo_runner.model.reference import describe_reference, is_initial
    from dpo_runner.model.result import save_weights
    from dpo_runner.model.tokenizer import describe_chat_template, load_tokenizer
    from dpo_runner.model.vocabulary import describe_padding
    from dpo_runner.sweep.base_pool import BasePool
    from dpo_runner.training.answers import measure_model, pair_answers
    from dpo_runner.training.build import build_dpo_config, build_trainer
    from dpo_runner.training.callbacks.events import RunEvents
    from dpo_runner.training.callbacks.movement import MovementCheck
    from dpo_runner.training.callbacks.stopping import Stopping
    from dpo_runner.training.engine.install import describe_engine
    from dpo_runner.training.environment import collect_environment, measure_peak_memory, reset_peak_memory
    from dpo_runner.training.memory.settle import explain_checkpointing, switch_on
    from dpo_runner.training.step0 import check_reference, check_trainable


def run(
    conf: RunConf,
    overrides: Sequence[str] = (),
    console: RunConsole | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    bases: BasePool | None = None,
) -> dict[str, Any] | None:
    """Run one configuration to its end, continuing what its run directory holds.

    Args:
        conf: what to run; see `load_conf`.
        overrides: the overrides that `conf` was composed from, kept in overrides.yaml.
        console: where progress is shown; the terminal unless told otherwise.
        callbacks: of the trainer, besides the run's own and after them.
        bases: of whoever executes several runs in this process, to keep their base model.

    Returns:
        What summary.json holds, or None after `dry_run=true`.

    Raises:
        ConfigError: the configuration, or a file or model that it names, cannot be used. Nothing was trained.
        RunError: the run itself failed. status.json says how, run.log has the traceback.
        RunPruned: one of `callbacks` has given the run up.
        RunInterrupted: SIGINT, SIGTERM or SIGUSR1; the training has finished its step and written a checkpoint before,
            unless SIGINT came after it. The same command with run_dir set continues from the last checkpoint.
    """
    console = console or RunConsole()
    path = resolve_run_dir(conf)
    if (status := read_status(path)) is not None:
        check_free(path, status)
    if _is_finished(path, status, conf, console):
        return read_summary(path)
    with route_library_logs(None):
        args = build_dpo_config(conf, path / "checkpoints")
        model_config, without_weights = check_model(conf)
        tokenizer = load_tokenizer(conf.model)
        origin = describe_chat_template(conf.model, tokenizer)
        data = load_preferences(conf, tokenizer, origin, console.show_preparing)
        padding = describe_padding(tokenizer, data.stop_id)
    own_quantization = getattr(model_config, "quantization_config", None)
    reference = describe_reference(conf)
    longest, largest = data.longest(), data.largest()
    engine = describe_engine(conf, without_weights, longest)
    with route_library_logs(None):
        checkpointing = explain_checkpointing(conf, args, without_weights, longest, largest)
        settled = switch_on(conf) if checkpointing is not None else conf
    plan = build_plan(conf, data, path, reference, padding, engine, checkpointing, own_quantization)
    console.show_plan(plan)
    for warning in [*find_other_bases(conf.model), *data.report.warnings]:
        console.warn(warning)
    if conf.dry_run:
        show_memory(settled, longest, largest, console)
        return None
    stopping = Stopping()
    with RunDirectory(path).claim() as directory:
        status = read_status(path)  # another process may have been here while the data was prepared
        if _is_finished(path, status, conf, console):
            return read_summary(path)
        records = (status or {}).get("out_of_memory", []) if conf.checks.on_out_of_memory == "smaller_batch" else []
        details = {"out_of_memory": records} if records else {}
        with recorded(directory, conf, overrides, console, stopping, details) as tracker:
            further = [*callbacks, stopping]

            def attempt(smaller: Settings, records: Records) -> tuple[dict[str, Any], Path]:
                stopping.end_training()  # of an attempt before, which memory has ended
                return _train(
                    directory,
                    with_settings(conf, smaller),
                    build_dpo_config(with_settings(settled, smaller), path / "checkpoints"),
                    tokenizer,
                    data,
                    console,
                    tracker,
                    further,
                    bases,
                    records,
                )

            def note(records: Records) -> None:
                directory.note(out_of_memory=records)
                tracker.log_out_of_memory(records)

            largest = largest.cut(min(filter(None, (longest, conf.training.max_length))))
            summary, weights = run_within_memory(settled, attempt, records, note, longest, largest, console)
        directory.write_status("finished", adapter=summary["weights"])  # W&B is closed by now
    console.show_next_steps(path, weights, tracker.commands())
    return summary


def _is_finished(path: Path, status: dict[str, Any] | None, conf: RunConf, console: RunConsole) -> bool:
    """Check that a directory may be written to, and say so where its run has nothing left to do."""
    if status is None:
        check_unused(path)
        return False
    check_continuable(path, status, conf)
    if status["state"] != "finished":
        return False
    console.say(f"{path} is finished; its results are in {path / 'summary.json'}")
    return True


def _train(
    directory: RunDirectory,
    conf: RunConf,
    args: DPOConfig,
    tokenizer: Any,
    data: PreferenceData,
    console: RunConsole,
    tracker: Tracker,
    further: Sequence[TrainerCallback],
    bases: BasePool | None,
    records: Records,
) -> tuple[dict[str, Any], Path]:
    """Model, trainer, step-0 check, train, evaluate, sample, save, summary. Return the summary, and the weights."""
    console.say("loading the model")
    reset_peak_memory()
    set_seed(conf.seed)
    with watch_memory(LOADING):
        policy = load_policy(conf, bases, console.say)
    checkpoint = open_last_checkpoint(
        directory.checkpoints,
        console.warn,
        needs_best=conf.training.load_best_model_at_end,
        examine_all=conf.training.save_total_limit is not None,
    )
    if checkpoint is not None:
        refuse_pickled_code(checkpoint)
    environment = collect_environment(conf, data, policy.base, policy.model)
    if checkpoint is not None:
        check_same_inputs(directory.path, environment, console.warn)
    directory.write_environment(environment)
    directory.write_data_report(data.report.to_dict(), data.dropped())
    tracker.log_data_report(data.report)

    events = RunEvents(directory, tracker, console, show_progress=not conf.training.disable_tqdm)
    movement = [MovementCheck(conf.checks.on_nonfinite == "skip_batch")] if conf.checks.step0 else []
    callbacks = [events, *movement, *further]
    with watch_memory(PREPARING):
        trainer = build_trainer(conf, args, policy, data, tokenizer, callbacks, console.say)

    if conf.checks.step0:
        check_trainable(trainer)
        with watch_memory(PREPARING):
            difference = check_reference(trainer, is_initial=is_initial(conf))
        console.say(f"step-0 check: the reference, {describe_reference(conf)}, differs by {difference:.2g} per token")

    if checkpoint is not None and conf.training.sync_ref_model:
        raise ConfigError(
            "`training.sync_ref_model=True`: such a run cannot be continued, checkpoints lack its reference"
        )
    step, logged = (read_step(checkpoint), read_logged(checkpoint)) if checkpoint else (-1, set())
    directory.keep_metrics_until(step, logged)

    console.say("measuring the model as it is")
    events.silent = checkpoint is not None  # a resumed run has logged this before
    before, first_answers = measure_model(trainer, tokenizer, data, conf)
    events.silent = False

    if checkpoint is not None:
        console.say(f"continuing from {checkpoint}")
    trained = _train_steps(trainer, count_steps(conf, len(data.train)), checkpoint)

    console.say("measuring the tuned model")
    after, last_answers = measure_model(trainer, tokenizer, data, conf)

    samples = pair_answers(data.prompts, first_answers, last_answers)
    directory.write_samples(samples)
    tracker.log_samples(samples)

    summary = {"before": before, "after": after, **trained, "peak_memory_gb": round(measure_peak_memory(), 3)}
    summary |= {"out_of_memory": records} if records else {}
    weights = save_weights(directory, trainer.model, tokenizer, conf, policy, summary, console.warn)
    directory.write_summary(summary)
    tracker.log_summary(summary, conf.sweep.search.objective)

    console.show_samples(samples[: conf.samples.show])
    console.show_summary(summary)
    return summary, weights

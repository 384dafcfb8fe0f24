"""One run: from a configuration to a DPO-tuned adapter with metrics, samples and records.

blueprint -> data -> settle -> plan | lock -> model -> trainer -> check -> measure -> train -> measure -> save

With several processes all of them run this; those of `launch.processes` are started after the plan.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from dpo_runner.config.run_conf import RunConf
from dpo_runner.io.console import RunConsole
from dpo_runner.io.logs import quiet_imports, route_library_logs
from dpo_runner.records.directory import resolve_run_dir
from dpo_runner.records.reading import read_summary

with quiet_imports():
    from transformers import TrainerCallback, set_seed

    from dpo_runner.data.preferences import PreferenceData, load_preferences
    from dpo_runner.model.blueprint import Blueprint, draw_blueprint
    from dpo_runner.model.card.facts import read_facts
    from dpo_runner.model.policy import LoadBase, load_fresh, load_policy
    from dpo_runner.model.result import save_result
    from dpo_runner.training.answers.measuring import measure_model, pair_answers
    from dpo_runner.training.build import build_trainer, undo_global_settings
    from dpo_runner.training.environment import collect_environment, measure_peak_memory, reset_peak_memory
    from dpo_runner.training.memory.device import LOADING, PREPARING, watch_memory
    from dpo_runner.training.memory.retry import attempts, launch_attempts
    from dpo_runner.training.memory.settle import Settled, settle
    from dpo_runner.training.planning.plan import show_plan
    from dpo_runner.training.planning.rehearsal import rehearse
    from dpo_runner.training.ranks.group import do_first, first_before_others, gather, is_first, is_launched, share
    from dpo_runner.training.ranks.launch import starts_processes
    from dpo_runner.training.ranks.watch import over_processes
    from dpo_runner.training.session import Session, open_session, read_finished
    from dpo_runner.training.step0 import check_before, check_start, choose_texts


@undo_global_settings()
@over_processes
def run(
    conf: RunConf,
    overrides: Sequence[str] = (),
    console: RunConsole | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    load_base: LoadBase = load_fresh,
    held: int = 0,
) -> dict[str, Any] | None:
    """Run one configuration to its end, or continue the interrupted run in its run directory.

    Args:
        conf: the configuration; see `load_conf`.
        overrides: the overrides `conf` was composed from, recorded in overrides.yaml.
        console: progress output; the terminal by default.
        callbacks: additional trainer callbacks, called after the run's own.
        load_base: loads the base model; a sweep worker keeps it between runs.
        held: bytes of a base model that `load_base` takes over or frees, on the device that the run trains on.

    Returns:
        The contents of summary.json, or None after `dry_run=true`.

    Raises:
        ConfigError: the configuration, or a file or model that it names, is unusable. Nothing was trained.
        RunError: the run failed. status.json has the error, run.log the traceback.
        RunPruned: one of `callbacks` pruned the run.
        RunInterrupted: SIGINT, SIGTERM, SIGUSR1 or SIGHUP. During training the step is finished and a checkpoint
            written first, unless another SIGINT follows. The same command with run_dir set continues from the last
            checkpoint.
    """
    console = console or RunConsole()
    path = share(resolve_run_dir(conf))  # nothing is written yet
    if (summary := do_first(lambda: read_finished(path, conf, console))) is not None:
        return summary

    # ---- Model, data, settings and plan, before any weight is loaded
    with route_library_logs(None), first_before_others():
        blueprint = draw_blueprint(conf)
        data = load_preferences(conf, blueprint.tokenizer, blueprint.template_origin, console.show_preparing)
    with route_library_logs(None):
        settled = share(settle(conf, blueprint, data.shape(), path / "checkpoints", held))
        rehearse(settled.args, blueprint, data)
    if is_first() and not is_launched():
        show_plan(settled, blueprint, data, path, overrides, console)
    if conf.dry_run:
        return None
    if starts_processes(conf):
        job = partial(run, replace(conf, run_dir=str(path)), overrides, None, callbacks)
        launch_attempts(job, settled, path, console.warn)
        return read_summary(path)

    # ---- Lock the run directory; from here on status.json, run.log and W&B record the run
    with open_session(path, conf, overrides, console, callbacks) as session:
        if session is None:  # another process finished the run during data preparation
            return read_summary(path)
        for attempt in attempts(settled, blueprint, session):  # more than one only if memory runs out
            with attempt:
                _train(attempt.settled, blueprint, data, session, load_base)
    if is_first():
        session.show_next_steps()
    return share(session.summary)


def _train(settled: Settled, blueprint: Blueprint, data: PreferenceData, session: Session, load_base: LoadBase) -> None:
    """Load the model, build and check the trainer, measure, train, measure, save."""
    conf = settled.asked

    # ---- Model, and the checkpoint to continue from
    session.say("loading the model")
    reset_peak_memory(settled.args.device)
    set_seed(conf.seed)
    with watch_memory(LOADING):
        policy = load_policy(blueprint, load_base, session.say)
    checkpoint = session.open_checkpoint()
    session.record_inputs(do_first(lambda: collect_environment(conf.seed, data, blueprint, policy)), data, checkpoint)

    # ---- Trainer: TRL's, with our mixins and engine
    with watch_memory(PREPARING):
        trainer = build_trainer(settled.conf, settled.args, blueprint, policy, data, session.callbacks, session.say)
    if conf.checks.step0:
        check_start(trainer, blueprint.reference, session.say)
    session.rewind_metrics(checkpoint)

    # ---- Measure, train, measure
    session.say("measuring the model as it is")
    with session.muted(checkpoint is not None):  # a continued run has already logged this
        before = measure_model(trainer, data, conf)
    if conf.checks.step0:
        check_before(trainer, blueprint.reference.is_initial, before.metrics)
    if checkpoint is not None:
        session.say(f"continuing from {checkpoint}")
    trained = trainer.train_to_end(checkpoint)
    session.say("measuring the tuned model")
    after = measure_model(trainer, data, conf, before)

    # ---- Save the result
    peak, model = max(gather(measure_peak_memory(settled.args.device))), trainer.make_whole()
    if not is_first():
        return
    samples = pair_answers(data.prompts, before.answers, after.answers)
    session.write_samples(samples)
    summary = {"before": before.metrics, "after": after.metrics, **trained}
    summary |= {"peak_memory_gb": round(peak, 3)}
    summary |= session.further_records(after.metrics)
    facts = read_facts(session.directory.path, conf, blueprint.reference.described, summary)
    texts = choose_texts(trainer.train_dataset)
    weights = save_result(session.directory, model, policy, blueprint, facts, texts, session.warn)
    session.conclude(summary, weights, samples)

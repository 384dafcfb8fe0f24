"""One generation: from prompts and a reward to scored answers that `data=local_file` reads.

reward -> prompts -> models | folder -> plan -> sample -> collect -> score -> pair -> write
"""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from dpo_runner.config.overrides import write_override
from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.prompts import Prompts, read_prompts
from dpo_runner.errors import ConfigError
from dpo_runner.generate.ledger import LeftOut, Work, open_ledger
from dpo_runner.generate.local import LocalSampler
from dpo_runner.generate.report import Summary, build_page, summarize
from dpo_runner.generate.scoring import build_row, collect, count_steps, make_pairs, score
from dpo_runner.generate.served import ServedSampler
from dpo_runner.io.console import RunConsole, count_progress, open_terminal
from dpo_runner.io.files import find_fresh_folder, write_json, write_lines, write_text
from dpo_runner.io.masking import mask_secrets
from dpo_runner.io.version import __version__
from dpo_runner.model.card.facts import PROVENANCE
from dpo_runner.training.answers.rewards.reward import Reward, build_reward, describe_reward
from dpo_runner.training.answers.rewards.term import Answered

OUTPUT, REPORT, LEFT_OUT = "scored.jsonl", "report.html", "left_out.jsonl"
_SAMPLING = ("num_answers", "temperature", "top_p", "max_new_tokens", "stop", "seed")
"""Fields of `generate` that answers depend on."""


def generate(conf: RunConf, console: Console | None = None, prompts: Prompts | None = None) -> dict[str, Any] | None:
    """Sample answers to the prompts of `data`, score them, and write them as rows of the layout `scored`.

    Args:
        conf: the configuration; `generate.dir` names the folder, in which an interrupted generation continues.
        console: the output for plan, progress and results; None for the terminal.
        prompts: the prompts, in place of those of `data`.

    Returns:
        The content of provenance.json, or None after `dry_run=true`.

    Raises:
        ConfigError: the configuration, the prompts, a model or the reward cannot be used. Nothing was sampled.
        RunError: too many answers are lost, an endpoint cannot be used, or memory ran out. What is done is
            kept, and the same command goes on.
    """
    screen = RunConsole(console or open_terminal(soft_wrap=True))

    # ---- Reward, prompts, models and plan, before any weight is loaded
    reward = build_reward(conf.reward)
    prompts = prompts or read_prompts(conf.data)
    sampler = LocalSampler(conf) if conf.generate.endpoint.base_url is None else ServedSampler(conf)
    settings = _describe_settings(conf, sampler)
    folder = find_fresh_folder(Path("outputs/generated"))
    folder = folder if conf.generate.dir is None else Path(conf.generate.dir).expanduser()
    asked_for = len(prompts.prompts) * len(sampler.models) * conf.generate.num_answers
    left_out = LeftOut(asked_for, conf.generate.max_bad_fraction)
    with open_ledger(folder, settings, only_read=conf.dry_run) as ledger:
        work = sampler.plan(prompts.prompts, ledger, left_out)
        screen.show_plan(_describe_plan(conf, sampler, prompts, left_out, work, reward, folder))
        if conf.dry_run:
            return None

        # ---- Sample what is missing; each answer is on disk as soon as it is there
        with count_progress(screen.console, "sampling answers", work.answers) as progress:
            sampler.sample(ledger, left_out, progress)

        # ---- Score; kept scores are not computed or paid for again
        candidates = collect(prompts.prompts, sampler.models, ledger, conf, left_out)
        with count_progress(screen.console, "scoring answers", count_steps(candidates, reward)) as progress:
            scored = score(candidates, reward, left_out, progress)
        if not scored:
            raise ConfigError(f"no prompt of {len(prompts.prompts):,} has two scored answers; see generate.on_cut_off")

        # ---- Pair, write, report
        rows = [build_row(one, conf) for one in scored]
        summary = summarize(scored, list(make_pairs(rows, conf.data)), left_out, len(prompts.prompts))
        write_lines(folder / OUTPUT, map(json.dumps, rows))
        write_lines(folder / LEFT_OUT, map(json.dumps, left_out.records()))
        return _report(folder, conf, settings, prompts, summary, screen)


def _describe_settings(conf: RunConf, sampler: LocalSampler | ServedSampler) -> dict[str, Any]:
    """Return everything that the answers depend on beside the prompts, by the keys that set it."""
    sampling = {f"generate.{name}": getattr(conf.generate, name) for name in _SAMPLING}
    return {"generate.models": sampler.models, **sampling, **sampler.describe()}


def _describe_plan(
    conf: RunConf,
    sampler: LocalSampler | ServedSampler,
    prompts: Prompts,
    left_out: LeftOut,
    work: Work,
    reward: Reward,
    folder: Path,
) -> dict[str, str]:
    generate, count = conf.generate, len(prompts.prompts)
    drawn = f"temperature {generate.temperature:g}, top_p {generate.top_p:g}" if generate.temperature else "greedy"
    per_prompt = generate.num_answers * len(sampler.models)
    done = count * per_prompt - work.answers
    tokens = f"at most {work.new_tokens:,} new tokens"
    tokens += "" if work.prompt_tokens is None else f", {work.prompt_tokens:,} of prompts"
    unasked = [Answered(one.messages, [str(number) for number in range(per_prompt)]) for one in prompts.prompts]
    calls = [f"{work.calls:,} or more for answers"] if work.calls else []
    calls += [f"up to {judged:,} for scores"] if (judged := reward.count_calls(unasked)) else []
    bad = f"; {len(prompts.bad):,} rows cannot be used" if prompts.bad else ""
    bad += f"; {prompts.repeated:,} repeat a prompt" if prompts.repeated else ""
    weights = " + ".join(f"{weight:g} x {name}" for name, weight in reward.weights.items())
    return {
        "prompts": f"{count:,} of {', '.join(prompts.files)}" + bad,
        "models": ", ".join(sampler.models),
        "answers": f"{work.answers:,}, {per_prompt} to each prompt; {drawn}"
        + (f"; {done:,} are there" if done else ""),
        "tokens": tokens,
        "requests": ", ".join(calls) or "none",
        "reward": weights,
        "pairs": conf.data.pairing,
        **({"left out": ", ".join(f"{n:,} {why}" for why, n in left_out.count().items())} if left_out.found else {}),
        "folder": str(folder),
    }


def _report(
    folder: Path, conf: RunConf, settings: dict[str, Any], prompts: Prompts, summary: Summary, screen: RunConsole
) -> dict[str, Any]:
    """Write the report and the provenance, and show the results."""
    facts = {
        "prompts": ", ".join(prompts.files),
        "models": ", ".join(settings["generate.models"]),
        "reward": ", ".join(f"{name} ({term['weight']:g})" for name, term in describe_reward(conf.reward).items()),
        "pairs": conf.data.pairing,
    }
    write_text(folder / REPORT, build_page(summary, facts))
    provenance = {
        "file": OUTPUT,
        "sha256": hashlib.sha256((folder / OUTPUT).read_bytes()).hexdigest(),
        "made_by": f"dpo_runner {__version__}",
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "prompts": prompts.files,
        "sampling": settings,
        "reward": describe_reward(conf.reward),
        "counts": summary.counts,
    }
    write_json(folder / PROVENANCE, provenance)
    for line in summary.describe():
        screen.say(line)
    for warning in summary.warnings:
        screen.warn(warning)
    screen.say(f"report      {folder / REPORT}")
    screen.say(f"train on it python -m dpo_runner data=local_file {write_override('data.path', folder / OUTPUT)}")
    return dict(mask_secrets(provenance))

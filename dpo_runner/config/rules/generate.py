"""Rules of the sections `generate` and `reward`. Imports no torch."""

import dataclasses
import os
import re
from collections.abc import Iterator

from dpo_runner.config.rules.training import find_vain_evaluation, may_have_evaluation
from dpo_runner.config.sections.generate import RewardConf, RewardTermConf
from dpo_runner.config.sections.run import RunFields
from dpo_runner.io.masking import mask_secrets

_NEEDED = {"function": "name", "reward_model": "model_name_or_path", "judge": "model"}
"""For each term of the reward, the key without which it cannot score."""


def used_terms(reward: RewardConf) -> dict[str, RewardTermConf]:
    """Return the terms of a reward that have a weight, by name."""
    terms = {field.name: getattr(reward, field.name) for field in dataclasses.fields(reward)}
    return {name: term for name, term in terms.items() if term.weight != 0}


def check_generate(conf: RunFields) -> Iterator[str]:
    """Yield one line per broken rule of `conf.generate` and `conf.reward`."""
    generate, reward = conf.generate, conf.reward
    yield from check_endpoint(generate.endpoint.base_url, generate.endpoint.api_key_env, "generate.endpoint")
    if generate.endpoint.base_url is not None and not generate.models:
        yield "`generate.models`: must be set with generate.endpoint.base_url (`generate.models=[NAME]`), names there"
    if len(set(generate.models)) < len(generate.models):
        yield f"`generate.models={generate.models}`: names a model twice; generate.num_answers is the number of answers"
    if generate.temperature == 0 and generate.num_answers > 1:
        yield (
            f"`generate.num_answers={generate.num_answers}`: greedy answers (generate.temperature=0) are all the same; "
            "sample them, or use generate.num_answers=1 with several generate.models"
        )
    if generate.temperature == 0 and generate.top_p != 1:
        yield f"`generate.top_p={generate.top_p:g}`: has no effect with generate.temperature=0; leave it out"
    if conf.samples.reward and not used_terms(reward):
        yield f"`samples.reward={conf.samples.reward}`: needs what scores the answers, such as reward=length"
    if conf.samples.reward and not conf.samples.num_prompts:
        yield f"`samples.reward={conf.samples.reward}`: needs prompts; use samples.num_prompts=24"
    for name, term in used_terms(reward).items():
        if name in _NEEDED and getattr(term, _NEEDED[name]) is None:
            key = f"reward.{name}.{_NEEDED[name]}"
            yield f"`{key}`: must be set (`{key}=VALUE`), since reward.{name}.weight is not 0"
    if reward.function.name is not None and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", reward.function.name):
        yield f"`reward.function.name={reward.function.name}`: must be package.module:function"
    if reward.judge.weight != 0 and reward.judge.base_url is None:
        yield "`reward.judge.base_url`: must be set (`reward.judge.base_url=URL`), since reward.judge.weight is not 0"
    yield from check_endpoint(reward.judge.base_url, reward.judge.api_key_env, "reward.judge")


def check_rounds(conf: RunFields) -> Iterator[str]:
    """Yield one line per broken rule of `rounds`."""
    if not conf.rounds:
        return
    rounds, generate, samples = f"`rounds={conf.rounds}`", conf.generate, conf.samples
    if not used_terms(conf.reward):
        yield f"{rounds}: needs what scores the answers, such as reward=length"
    if generate.endpoint.base_url is not None or generate.models:
        key = "endpoint.base_url" if generate.endpoint.base_url is not None else "models"
        yield f"`generate.{key}`: each round samples from the policy of the last one; leave it out"
    if generate.dir is not None:
        yield f"`generate.dir={generate.dir}`: each round has a folder in run_dir; leave it out"
    if generate.num_answers < 2:
        yield f"`generate.num_answers={generate.num_answers}`: a pair needs two answers; must be at least 2 with rounds"
    if not samples.num_prompts:
        yield f"`samples.num_prompts={samples.num_prompts}`: rounds are compared by the reward of held-out prompts"
    if samples.prompts is None and not may_have_evaluation(conf.data):
        yield "`data.eval_fraction=0`: rounds hold out prompts; raise it, or set samples.prompts or data.eval_path"
    if conf.model.adapter is not None and conf.model.adapter_mode != "continue":
        advice = "merge it first with python -m dpo_runner.export, or use model.adapter_mode=continue"
        yield f"`model.adapter_mode={conf.model.adapter_mode}`: cannot be continued by the next round; {advice}"
    if conf.model.reference != "initial" and conf.rounds_reference == "previous":
        yield f"`model.reference={conf.model.reference}`: needs rounds_reference=initial, or leave it out"
    if conf.lora is None and conf.model.adapter is None and conf.model.revision and conf.rounds_reference == "initial":
        yield f"`model.revision={conf.model.revision}`: a reference has no revision; download it, and name its folder"
    if conf.sweep.search.pruner is not None:
        yield f"`sweep.search.pruner={conf.sweep.search.pruner}`: stops single runs, not rounds; leave it out"
    yield from find_vain_evaluation(
        conf.training, "rounds have held-out prompts and no pairs to evaluate; leave it out"
    )


def check_endpoint(base_url: str | None, api_key_env: str, key: str) -> Iterator[str]:
    """Yield what is wrong with an endpoint's URL and the variable of its API key, keys of the section `key`."""
    if base_url is None:
        return
    if not re.match(r"https?://[^/]", base_url):
        yield f"`{key}.base_url={mask_secrets(base_url)}`: must begin with http:// or https://, and end with /v1"
    value = os.environ.get(api_key_env, "")
    if not value.isascii() or not value.isprintable():
        yield f"`{key}.api_key_env={api_key_env}`: that variable holds no key, but control characters"

"""Export of a finished run's result to a folder to serve or publish."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_runner.config.run_conf import RunConf
from dpo_runner.config.sections.model import ModelConf
from dpo_runner.errors import ConfigError, RunError, reason_of
from dpo_runner.export.lineage import digest_weights, trace_origins
from dpo_runner.io.files import write_folder, write_json, write_text
from dpo_runner.io.masking import mask_secrets
from dpo_runner.records.reading import read_summary

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from dpo_runner.model.card.facts import RunFacts


ROUNDING_TOLERANCE = {"float32": 1e-6, "bfloat16": 0.05, "float16": 0.005}
"""Limit on the change of the next-token distribution by a saved dtype: mean KL divergence in nats, some five times
that of a 135M model tuned for a few steps."""

_FIXED_PROMPT = [{"role": "user", "content": "Name three things that a good explanation has, and say why."}]
_PROMPTS, _PROMPT_TOKENS, _COMPARED_TOKENS = 4, 256, 64
_WEIGHTS = ("config.json", "generation_config.json", "adapter_*", "*.safetensors*")


def export_run(
    run_dir: Path,
    out: Path,
    *,
    adapter_only: bool = False,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    name: str | None = None,
    say: Callable[[str], None] = print,
) -> Path:
    """Write a finished run's model, or only its adapter, with tokenizer, model card and lineage.json.

    Args:
        run_dir: the run's directory.
        out: the folder to write atomically; must be missing or empty.
        adapter_only: copy the adapter instead of merging it into the unquantized base.
        dtype: dtype of the saved weights; None for the base checkpoint's (full fine-tuning: the tuned weights').
        max_shard_size: the limit on the size of a weight file, such as `5GB`.
        name: the name of the folder in the model card's code; None for `out`'s name.
        say: called with the results of the weight checks.

    Returns:
        `out` as an absolute path.

    Raises:
        ConfigError: the run is not finished, `out` is not empty, or a model that the run names is missing.
        RunError: the merged model's logits differ from the adapter's, or writing failed. Nothing was written.
    """
    from dpo_runner.model.blueprint import Blueprint
    from dpo_runner.model.card.card import PLOTS, write_card
    from dpo_runner.model.card.facts import read_facts
    from dpo_runner.records.reading import read_run_conf

    out = out.expanduser().resolve()
    tuned = _find_tuned(run_dir, out, adapter_only)
    conf = read_run_conf(run_dir)
    facts = read_facts(run_dir, conf, Blueprint.of_run(conf).describe_reference(), read_summary(run_dir))
    if commit := facts.environment["model"]["commit"]:  # the branch may have moved since
        conf = replace(conf, model=replace(conf.model, revision=commit))
    lineage = trace_origins(conf, run_dir, tuned, facts.environment)
    model, measured = (None, {}) if adapter_only else _build_model(conf, run_dir, tuned, dtype, say)
    lineage["export"] |= measured

    def fill(staging: Path) -> None:
        left_out = shutil.ignore_patterns("README.md", PLOTS, *(() if model is None else _WEIGHTS))
        shutil.copytree(tuned, staging, ignore=left_out, dirs_exist_ok=True)
        if model is not None:
            model.save_pretrained(staging, max_shard_size=max_shard_size)
        else:
            _name_base(staging / "adapter_config.json", facts)
        lineage["export"]["sha256"] = digest_weights(staging)
        write_json(staging / "lineage.json", lineage)
        write_card(staging, facts, name or out.name, lineage, say)

    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_folder(out, fill)
    except (OSError, ValueError) as error:  # ValueError: a generation config that transformers does not save
        raise RunError(f"--out {out}: cannot be written; {reason_of(error)}") from None
    return out


def _find_tuned(run_dir: Path, out: Path, adapter_only: bool) -> Path:
    """Return the folder of a run's result, after checking the run, `out`, and that the result can be exported so."""
    from dpo_runner.model.files.fit import check_result
    from dpo_runner.records.reading import check_finished

    check_finished(run_dir)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ConfigError(f"--out {out}: is there and not empty; name a folder that is not there yet")
    tuned = run_dir / ("model" if (run_dir / "model").is_dir() else "adapter")
    if adapter_only and tuned.name == "model":
        raise ConfigError(f"--adapter-only: {run_dir} tuned all weights and has no adapter; leave it out")
    if tuned.name == "adapter":
        check_result(tuned)
    return tuned


def _name_base(adapter_config: Path, facts: "RunFacts") -> None:
    """Write the base's hub id into adapter_config.json, instead of the name from this machine or the SFT adapter.

    An adapter on top of a merged SFT adapter keeps its base folder: on the bare base it would be silently wrong.
    """
    from dpo_runner.model.card.facts import hub_base

    base, model = hub_base(facts.conf, facts.environment), facts.conf.model
    if base is None or (model.adapter is not None and model.adapter_mode == "merge"):
        return
    config = json.loads(adapter_config.read_text(encoding="utf-8"))
    write_text(adapter_config, json.dumps(config | {"base_model_name_or_path": base}, indent=2))


def _build_model(
    conf: RunConf, run_dir: Path, tuned: Path, dtype: str | None, say: Callable[[str], None]
) -> "tuple[PreTrainedModel, dict[str, Any]]":
    """Return the tuned model, merged in float32 and cast to the dtype to save, and the measurements."""
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from dpo_runner.data.templates.chat_template import ChatTemplate
    from dpo_runner.model.base import load_base_model
    from dpo_runner.model.blueprint import Blueprint
    from dpo_runner.model.files.locations import loading_errors
    from dpo_runner.model.tokenizer import find_stop_ids

    full, trust = tuned.name == "model", conf.model.trust_remote_code
    source = ModelConf(model_name_or_path=str(tuned), trust_remote_code=trust) if full else conf.model
    # In the training dtype: merging an SFT adapter in another dtype would give a different base.
    blueprint = Blueprint(source)
    model: Any = load_base_model(blueprint)[0]
    if getattr(model.config, "quantization_config", None) is not None:
        key = f"`model.model_name_or_path={source.model_name_or_path}`"
        raise ConfigError(f"{key}: is itself quantized, so nothing can be merged into it; use --adapter-only")
    saved = AutoConfig.from_pretrained(
        blueprint.base, revision=source.revision, trust_remote_code=trust
    ).get_text_config()
    dtype = dtype or str(saved.dtype or model.dtype).removeprefix("torch.")
    usual, loaded = model.dtype, {key: tensor.dtype for key, tensor in model.state_dict().items()}
    _place(model.float(), conf)

    with loading_errors(str(tuned), "run_dir"):
        tokenizer = AutoTokenizer.from_pretrained(tuned, trust_remote_code=trust)
    template = ChatTemplate(tokenizer, None, conf.data.on_no_system_role)
    lines = (run_dir / "samples.jsonl").read_text(encoding="utf-8").splitlines()[:_PROMPTS]
    messages = [json.loads(line)["prompt"] for line in lines] or [_FIXED_PROMPT]
    prompts = [torch.tensor([template.render_prompt(prompt)[-_PROMPT_TOKENS:]]) for prompt in messages]
    check: dict[str, Any] = {"prompts": len(prompts)}
    if not full:
        model, check["merge"] = _merge(model, tuned, prompts, say)
    expected = _compute_logits(model, prompts)
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():  # tensors that the model keeps in a dtype of their own keep it
            tensor.data = tensor.data.to(getattr(torch, dtype) if loaded.get(key, usual) == usual else loaded[key])
    rounded = _compute_logits(model, prompts)
    moved, allowed, effect = _compute_kl(expected, rounded), ROUNDING_TOLERANCE[dtype], check.get("merge", {}).get("kl")
    check["rounding"] = {"kl": moved, "tolerance": allowed, "largest_difference": _max_abs(rounded - expected)}
    of_tuning = f"; the adapter itself moves it by {effect:.3g}" if effect is not None else ""
    say(
        f"saving as {dtype} moves the distribution of the next token by {moved:.3g} nats (KL; tolerance "
        f"{allowed:.3g}{of_tuning})"
    )
    if not moved <= allowed:  # NaN included
        raise RunError(
            f"--dtype {dtype}: moves the next token's distribution by {moved:.3g} > {allowed:.3g} nats, nothing "
            "written; use --dtype float32"
        )
    if effect is not None and moved > effect / 10:
        say(f"{dtype} rounds away a part of what was tuned; --dtype float32, or --adapter-only, keeps all of it")
    # A plain `generate` must stop where the run's own samples and chat do.
    stops = find_stop_ids(model, tokenizer, template.end_of_turn)
    model.generation_config.eos_token_id = stops if len(stops) > 1 else stops[0]
    return model, {"dtype": dtype, "check": check}


def _place(model: "PreTrainedModel", conf: RunConf) -> None:
    """Move a float32 model to the run's device, unless that lacks the memory; the CPU then takes longer."""
    from dpo_runner.model.base import place
    from dpo_runner.training.memory.device import read_memory

    needed = 1.25 * sum(parameter.nbytes for parameter in model.parameters())
    if not conf.training.use_cpu and needed < read_memory(of_host=False)[2]:
        place(model, conf.model)


def _merge(
    base: Any, adapter: Path, prompts: "list[Tensor]", say: Callable[[str], None]
) -> "tuple[PreTrainedModel, dict[str, float]]":
    """Merge the adapter and check, in float32, that the logits equal those with the unmerged adapter.

    The tolerance is 1% of the adapter's effect on the logits, which detects an adapter merged not at all, twice or
    with a wrong scale, however little it was trained; at most 1e-3 of the largest logit, and at least float32 noise.
    """
    from peft import PeftModel

    from dpo_runner.model.base import merge_adapter

    model: Any = PeftModel.from_pretrained(base, adapter, torch_device="cpu").eval()
    expected = _compute_logits(model, prompts)
    with model.disable_adapter():
        untuned = _compute_logits(model, prompts)
        effect = _max_abs(untuned - expected)
    try:
        model = merge_adapter(model, safe_merge=True)
    except ValueError as error:
        raise RunError(f"{adapter}: cannot be merged; {reason_of(error)}; nothing was written") from None
    moved, scale = _max_abs(_compute_logits(model, prompts) - expected), _max_abs(expected)
    allowed = min(max(effect / 100, scale * 1e-5), scale * 1e-3)
    say(
        f"merging, in float32, moves the logits of {len(prompts)} prompts by at most {moved:.3g} "
        f"(tolerance {allowed:.3g}; the adapter itself moves them by {effect:.3g})"
    )
    if not moved <= allowed:  # NaN included
        raise RunError(
            f"{adapter}: merged, logits differ by {moved:.3g} > {allowed:.3g}; nothing was written; try --adapter-only"
        )
    measured = {"largest_difference": moved, "tolerance": allowed, "adapter_effect": effect, "largest_logit": scale}
    return model, measured | {"kl": _compute_kl(expected, untuned)}


def _compute_logits(model: Any, prompts: "list[Tensor]") -> "Tensor":
    """Return the logits at the last positions of each prompt, concatenated."""
    import torch

    with torch.no_grad():
        each = [model(input_ids=ids.to(model.device), use_cache=False).logits[0, -_COMPARED_TOKENS:] for ids in prompts]
    return torch.cat(each).float().cpu()


def _compute_kl(expected: "Tensor", logits: "Tensor") -> float:
    """Return the mean over positions of KL(expected || logits) in nats, for logits of shape [positions, vocabulary]."""
    before, after = expected.double().log_softmax(-1), logits.double().log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())


def _max_abs(logits: "Tensor") -> float:
    return float(logits.abs().max())  # NaN if any is NaN


def push_to_hub(folder: Path, repo_id: str, public: bool = False) -> str:
    """Upload an exported folder to a hub model repository, created (private unless `public`) if it is missing.

    Returns:
        The repository's URL.

    Raises:
        RunError: the hub refused the upload or cannot be reached; `folder` stays.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    try:
        url = api.create_repo(repo_id, private=not public, exist_ok=True)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Export of dpo_runner")
    except Exception as error:  # the hub client passes on exceptions of its transports
        reason = mask_secrets(reason_of(error))
        raise RunError(f"--push-to-hub {repo_id}: {reason}; {folder} is written and stays") from None
    return str(url)

"""A run on a kept base model equals, to the last bit, a run on a freshly loaded one; nothing leaks."""

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpo_runner import run, train
from dpo_runner.config.compose import load_conf
from dpo_runner.config.run_conf import RunConf
from dpo_runner.data.preferences import PreferenceData, load_preferences
from dpo_runner.errors import RunPruned
from dpo_runner.model.base import load_base_model
from dpo_runner.model.blueprint import Blueprint
from dpo_runner.model.policy import load_fresh, load_policy
from dpo_runner.sweep import base_pool as module
from dpo_runner.sweep.base_pool import BasePool, Snapshot, why_not_kept
from dpo_runner.sweep.executor import choose_loader, perform
from dpo_runner.training.answers.measuring import generate_answers
from dpo_runner.training.build import build_dpo_config, build_trainer
from dpo_runner.training.callbacks.movement import MovementCheck
from dpo_runner.training.memory import settle as settling
from dpo_runner.training.memory.device import Device
from dpo_runner.training.step0 import check_reference
from tests.support.families import make_family
from tests.support.sweeps import finish, furnish, start

_OF_THE_MACHINE = ("time", "runtime", "per_second", "memory", "preparation")
KEPT = "the base model is kept from the run before"

WITH, WITHOUT = "training.gradient_checkpointing=true", "training.gradient_checkpointing=false"

OTHERS = [  # each modifies the base in a different way
    [WITH, "lora.r=4", "training.beta=0.5", "seed=7"],
    [WITHOUT, "lora.use_dora=true", "engine.shared_prefix=false"],
    [WITH, "lora.target_modules=[q_proj,embed_tokens]", "engine.reference_store=false", "samples.max_new_tokens=9"],
    [WITHOUT, "training.disable_dropout=false", "lora.lora_dropout=0.3", "training.bf16=false"],
]


def read_result(folder: Path) -> dict[str, Any]:
    """Return all results of a run except times and memory."""

    def keep(entries: dict[str, Any]) -> dict[str, Any]:
        return {
            key: keep(value) if isinstance(value, dict) else value
            for key, value in entries.items()
            if not any(part in key for part in _OF_THE_MACHINE)
        }

    return {
        "weights": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "metrics": [keep(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "samples": (folder / "samples.jsonl").read_text(),
        "summary": keep(json.loads((folder / "summary.json").read_text())),
    }


class Runner:
    """Runs one small configuration after another, and records which of them had a kept base."""

    def __init__(self, overrides: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        self.overrides, self.count, self._capsys = overrides, 0, capsys
        self.kept: list[bool] = []
        self.said = ""

    def __call__(self, changes: list[str], bases: BasePool | None = None) -> dict[str, Any]:
        self.count += 1
        folder = Path(f"run-{self.count}")
        self._capsys.readouterr()
        run(
            load_conf([*self.overrides, *changes, f"run_dir={folder}"]),
            load_base=bases.load if bases is not None else load_fresh,
        )
        self.said = self._capsys.readouterr().out
        self.kept.append(KEPT in self.said)
        return read_result(folder)


@pytest.fixture
def runner(tiny_run: list[str], capsys: pytest.CaptureFixture[str]) -> Runner:
    return Runner([*tiny_run, "training.max_steps=2"], capsys)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list of the number of models that the pool holds at each load."""
    held: list[int] = []

    def count(*args: Any) -> Any:
        held.append(sum(isinstance(each, Snapshot) for each in gc.get_objects()))
        return load_base_model(*args)

    monkeypatch.setattr(module, "load_base_model", count)
    return held


@pytest.mark.parametrize(
    "quantized",
    [[], ["quant=nf4"], pytest.param(["quant=int8"], marks=pytest.mark.slow)],
    ids=["unquantized", "nf4", "int8"],
)
def test_a_run_after_others_is_the_run_alone(quantized: list[str], runner: Runner, loads: list[int]) -> None:
    runner.overrides += quantized
    alone = {way: runner([way]) for way in (WITH, WITHOUT)}
    bases = BasePool()
    for changes in OTHERS:
        if "quant=int8" not in quantized or "lora.use_dora=true" not in changes:  # PEFT cannot do this on a CPU
            runner(changes, bases)
    for way in (WITH, WITHOUT, WITHOUT, WITH):
        assert runner([way], bases) == alone[way]
    assert runner.kept == [False] * 3 + [True] * (runner.count - 3)
    assert len(loads) == 1


@pytest.mark.parametrize("mode", ["continue", "stack"])
def test_a_run_from_an_sft_adapter_shares_the_base_with_others(mode: str, runner: Runner, sft_adapter: str) -> None:
    from_adapter = [f"model.adapter={sft_adapter}", f"model.adapter_mode={mode}"]
    plain, tuned = runner([]), runner(from_adapter)
    bases = BasePool()
    results = [runner(changes, bases) for changes in (from_adapter, [], from_adapter)]
    assert results == [tuned, plain, tuned]
    assert runner.kept[-3:] == [False, True, True]


@pytest.mark.parametrize(
    ("family", "embedding"), [("qwen2", "embed_tokens"), ("gpt2", "wte"), ("gemma3", "embed_tokens")]
)
def test_other_families_are_kept_too(
    family: str, embedding: str, runner: Runner, tokenizer: Any, tmp_path: Path
) -> None:
    runner.overrides += [f"model.model_name_or_path={make_family(family, tokenizer, tmp_path / family)}"]
    if family == "qwen2":
        runner.overrides.append("quant=nf4")  # its layers have biases, which bitsandbytes casts in place
    alone, bases = runner([]), BasePool()
    assert runner(["training.bf16=false", WITH, f"lora.target_modules=[{embedding}]"], bases) != alone
    assert runner([], bases) == alone
    assert runner.kept == [False, False, True]


def test_a_run_after_one_that_was_pruned_is_the_run_alone(runner: Runner) -> None:
    from transformers import TrainerCallback

    class Prune(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            raise RunPruned(1, 4)

    alone, bases = runner([]), BasePool()
    with pytest.raises(RunPruned):
        run(load_conf([*runner.overrides, *OTHERS[2], "run_dir=pruned"]), callbacks=[Prune()], load_base=bases.load)
    assert runner([], bases) == alone
    assert runner.kept[-1]


def count_live() -> dict[str, int]:
    gc.collect()
    alive = gc.get_objects()
    modules = [each for each in alive if issubclass(type(each), torch.nn.Module)]
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": len(modules),
        "hooks": sum(len(getattr(each, name)) for each in modules for name in hooks),
        "tensors": sum(issubclass(type(each), torch.Tensor) for each in alive),
        "objects": len(alive),
    }


@pytest.mark.parametrize("runs", [9, pytest.param(50, marks=pytest.mark.slow)])
def test_many_runs_leave_nothing(runs: int, tiny_run: list[str]) -> None:
    conf = load_conf([*tiny_run, "training.max_steps=1", "training.eval_strategy=no", "training.save_strategy=no"])
    data = load_preferences(conf, Blueprint(conf.model).tokenizer)
    bases, said, live = BasePool(), [], []
    for number in range(runs):
        for key, value in (("training.gradient_checkpointing", bool(number % 2)), ("lora.r", 1 + number % 3)):
            group, _, name = key.partition(".")
            setattr(getattr(conf, group), name, value)
        train_once(conf, data, bases, said)
        bases.put_back()
        if number in (1, runs - 1):  # objects created on first use exist by the second run
            live.append(count_live())
    settled, last = live
    assert last["objects"] - settled["objects"] < (runs - 2) * 100
    assert {**last, "objects": 0} == {**settled, "objects": 0}
    assert said == [KEPT] * (runs - 1)


def train_once(conf: RunConf, data: PreferenceData, bases: BasePool, said: list[str]) -> None:
    blueprint = Blueprint.of_run(conf)
    policy, args = load_policy(blueprint, bases.load, said.append), build_dpo_config(conf, Path("checkpoints"))
    trainer = build_trainer(conf, args, blueprint, policy, data, [MovementCheck()])
    for work in (check_reference, lambda trainer: trainer.train()):
        work(trainer)
        trainer.evaluate()
        generate_answers(trainer.model, blueprint.tokenizer, data.prompts, 2, 4, data.stop_id)


def leave_hook(base: Any) -> None:
    base.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 2)


def leave_forward(base: Any) -> None:
    base.lm_head.forward = lambda hidden: -torch.nn.functional.linear(hidden, base.lm_head.weight)


def freeze(base: Any) -> None:
    base.requires_grad_(False)
    base.train()


def change_config(base: Any) -> None:
    base.config.rms_norm_eps = 0.5
    base.config.pad_token_id = 1
    base.generation_config.eos_token_id = 5
    base.model.norm.variance_epsilon = 0.5


def cast(base: Any) -> None:
    base.to(torch.bfloat16)


def swap_layers(base: Any) -> None:
    first, second = base.model.layers
    base.model.layers[0], base.model.layers[1] = second, first
    base.model.norm.__class__ = torch.nn.Identity


def move_weight(base: Any) -> None:
    base.model.layers[1].self_attn.q_proj.weight.data[0, 0] += 1e-6


def move_buffer(base: Any) -> None:
    base.model.rotary_emb.inv_freq[3] = 0.5


PUT_BACK = (leave_hook, leave_forward, freeze, change_config, cast, swap_layers)
LET_GO = {move_weight: "model.layers.1.self_attn.q_proj.weight", move_buffer: "model.rotary_emb.inv_freq"}


@pytest.fixture(scope="module")
def alone() -> list[dict[str, Any]]:
    """Return a list for the result that all cases of the next test compare with."""
    return []


@pytest.mark.parametrize("tamper", [*PUT_BACK, *LET_GO], ids=lambda tamper: tamper.__name__)
def test_whatever_was_done_to_the_base_the_next_run_is_the_run_alone(
    tamper: Any, runner: Runner, alone: list[dict[str, Any]]
) -> None:
    """Everything but weights is restored; a base with modified weights is reported and loaded again."""
    if not alone:
        alone.append(runner([]))
    bases = BasePool()
    base, _ = bases.load(Blueprint.of_run(load_conf([*runner.overrides])), print)
    tamper(base)
    assert [runner([], bases)] == alone
    assert runner.kept[-1] == (tamper in PUT_BACK)
    if tamper in LET_GO:
        assert f"engine.keep_base_model: the base model is loaded anew; {LET_GO[tamper]} has changed" in runner.said


def test_a_constant_of_the_quantization_that_has_changed_is_noticed(tiny_run: list[str]) -> None:
    conf, said = load_conf([*tiny_run, "quant=nf4"]), []
    bases = BasePool()
    base, _ = bases.load(Blueprint.of_run(conf), said.append)
    base.model.layers[0].mlp.up_proj.weight.quant_state.state2.absmax.mul_(1.01)
    assert bases.load(Blueprint.of_run(conf), said.append)[0] is not base
    assert said == ["engine.keep_base_model: the base model is loaded anew; a constant of its quantization has changed"]


@pytest.mark.parametrize(
    "changes",
    [
        ["quant=nf4"],
        ["model.dtype=bfloat16"],
        ["model.attn_implementation=eager"],
        ["model.trust_remote_code=true"],
        ["lora=none"],
    ],
    ids="+".join,
)
def test_another_base_takes_the_place_of_the_one_before(
    changes: list[str], tiny_run: list[str], loads: list[int]
) -> None:
    bases = BasePool()
    for overrides in ([], [], changes, []):
        bases.load(Blueprint.of_run(load_conf([*tiny_run, *overrides])), print)
    assert loads == [0, 0, 0], "of two models one would be in memory for nothing"


def test_a_job_that_keeps_no_base_frees_the_one_before(tiny_run: list[str], loads: list[int]) -> None:
    bases = BasePool()
    assert choose_loader(load_conf(tiny_run), bases) == bases.load
    bases.load(Blueprint.of_run(load_conf(tiny_run)), print)
    assert choose_loader(load_conf([*tiny_run, "engine.keep_base_model=false"]), bases) is load_fresh
    bases.load(Blueprint.of_run(load_conf(tiny_run)), print)
    assert loads == [0, 0], "the kept base was freed, and loaded again"


def test_a_kept_base_does_not_count_twice_in_what_fits(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that it takes is not free, and the next run, whose estimate has its weights, takes it over."""
    seen: list[int] = []
    monkeypatch.setattr(train, "run", lambda *args, held, **kwargs: seen.append(held))
    conf = load_conf([*tiny_run, "quant=nf4", "run_dir=r"])
    bases = BasePool()
    perform(conf, [], bases=bases)
    base, _ = bases.load(Blueprint.of_run(conf), print)
    perform(conf, [], bases=bases)
    quantized = [each for each in base.parameters() if not each.is_floating_point()]
    held = sum(each.nbytes for each in quantized)
    assert held <= seen[1] < 1.1 * held, "and its absmax"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert bases.count_bytes(use_cpu=False) == 0, "the GPU holds nothing of it"
    assert bases.count_bytes(use_cpu=True) == seen[1]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    perform(load_conf([*tiny_run, "engine.keep_base_model=false", "run_dir=r"]), [], bases=bases)
    bases.load(Blueprint.of_run(load_conf(tiny_run)), print)
    perform(load_conf([*tiny_run, "run_dir=r"]), [], bases=bases)
    assert seen[0] == seen[2] == seen[3] == 0, "none, freed, mapped from a file"


def test_what_a_run_gives_up_counts_as_free(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(settling, "read_device", lambda args, held: seen.append(held) or Device("CPU", 10**12, 10**12))
    run(load_conf([*tiny_run, "dry_run=true"]), held=7)
    assert seen == [7]


def test_files_that_have_changed_are_read_again(
    tiny_run: list[str], tokenizer: Any, tmp_path: Path, loads: list[int]
) -> None:
    folder = make_family("llama", tokenizer, tmp_path / "llama")
    conf = load_conf([*tiny_run, f"model.model_name_or_path={folder}"])
    bases = BasePool()
    first, _ = bases.load(Blueprint.of_run(conf), print)
    assert bases.load(Blueprint.of_run(conf), print)[0] is first
    make_family("llama", tokenizer, tmp_path / "llama", rms_norm_eps=0.1)
    assert bases.load(Blueprint.of_run(conf), print)[0].model.norm.variance_epsilon == 0.1
    assert len(loads) == 2


def test_a_base_whose_loading_draws_random_numbers_is_loaded_for_each_run(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(blueprint: Blueprint) -> Any:
        torch.rand(1)
        return load_base_model(blueprint)

    monkeypatch.setattr(module, "load_base_model", load)
    bases = BasePool()
    first = runner(["seed=2"], bases)
    assert "is not kept for the next run; loading it draws random numbers" in runner.said
    assert runner(["seed=2"], bases) == first


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (["lora=none"], "its own weights are trained"),
        (["model.adapter=SFT", "model.adapter_mode=merge"], "an adapter is merged into it"),
        (["lora.modules_to_save=[lm_head]"], "modules of it are trained (lora.modules_to_save)"),
        (["lora.init_lora_weights=pissa"], "lora.init_lora_weights=pissa begins from its weights"),
        (["lora.init_lora_weights=eva"], "lora.init_lora_weights=eva begins from its weights"),
        (["model.added_tokens=[new_token]"], "its embeddings are resized or replaced"),
        (["model.device_map=auto"], "model.device_map spreads it"),
        (["training.use_cpu=true"], None),
        (["lora.init_lora_weights=gaussian", "model.adapter=SFT", "model.adapter_mode=stack"], None),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_what_may_change_the_base_is_given_one_of_its_own(
    changes: list[str], reason: str | None, tiny_run: list[str], sft_adapter: str
) -> None:
    conf = load_conf([*tiny_run, *(change.replace("SFT", sft_adapter) for change in changes)])
    blueprint = Blueprint.of_run(conf)
    assert why_not_kept(blueprint) == reason
    if reason is not None:
        bases, said = BasePool(), []
        assert bases.load(blueprint, said.append)[0] is not bases.load(blueprint, said.append)[0]
        told = f"engine.keep_base_model: the base model is not kept for the next run; {reason}"
        assert said == [told, told]


def test_a_model_of_unknown_parts_is_not_kept(tiny_run: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Opaque:
        pass

    def load(*args: Any) -> Any:
        base, path = load_base_model(*args)
        base.model.layers[0].memory = Opaque()
        return base, path

    monkeypatch.setattr(module, "load_base_model", load)
    bases, said = BasePool(), []
    blueprint = Blueprint.of_run(load_conf(tiny_run))
    first, _ = bases.load(blueprint, said.append)
    assert bases.load(blueprint, said.append)[0] is not first
    assert "not kept for the next run; it has a tests.sweep.test_base_pool" in said[0] and "Opaque" in said[0]


def test_the_jobs_of_a_sweep_share_the_base(tmp_path: Path) -> None:
    results = {}
    for keep in ("true", "false"):
        (tmp_path / keep).mkdir()
        folder = furnish(tmp_path / keep)
        arguments = ["training.beta=0.1,0.3,0.6", "sweep.dir=s", f"engine.keep_base_model={keep}"]
        code, out, err = finish(start(folder, *arguments))
        assert code == 0, out + err
        jobs = sorted(folder.glob("s/*-*/"), key=lambda path: int(path.name.split("-")[0]))
        results[keep] = [read_result(path) for path in jobs]
        kept = [KEPT in (path / "job.log").read_text() for path in jobs]
        assert kept == ([False, True, True] if keep == "true" else [False] * 3)
    assert results["true"] == results["false"]

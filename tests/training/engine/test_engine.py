"""The engine gives the losses, metrics, gradients and trained weights of TRL's own forward."""

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from trl import DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from dpo_runner.config.compose import load_conf
from dpo_runner.model.blueprint import draw_blueprint
from dpo_runner.training.engine.install import describe_engine
from dpo_runner.training.engine.packed import forward as shared_prefix
from dpo_runner.training.engine.packed.forward import is_certain
from dpo_runner.training.engine.packed.packing import pack_pairs
from tests.support.engines import PACKED, PLAIN, assert_same, batches, is_packed, train
from tests.support.families import FAMILIES, make_config, make_family
from tests.support.trainers import build

SETTINGS = [
    *(
        [f"training.loss_type={loss}"]
        for loss in (
            *("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
            *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
        )
    ),
    ["training.loss_type=robust", "training.label_smoothing=0.1"],
    ["training.loss_type=exo_pair", "training.label_smoothing=0.1"],
    ["training.loss_type=[sigmoid,bco_pair,sft]", "training.loss_weights=[0.8,0.2,1.0]"],
    ["training.use_weighting=true"],
    *([f"training.f_divergence_type={kind}"] for kind in ("forward_kl", "js_divergence", "alpha_divergence")),
    ["training.ld_alpha=0.5"],
    ["training.ld_alpha=0.0"],
    *(
        ["data.on_overlong=trl", f"training.truncation_mode={mode}", "training.max_length=48"]
        for mode in ("keep_start", "keep_end")
    ),
    ["data.on_overlong=trl", "training.truncation_mode=keep_end", "training.max_length=9"],
    ["training.gradient_checkpointing=true"],
    ["training.gradient_checkpointing=true", "training.gradient_checkpointing_kwargs={use_reentrant:true}"],
    ["training.gradient_accumulation_steps=4"],
    ["training.pad_to_multiple_of=16"],
    ["lora=none"],
    ["lora.use_dora=true"],
    ["lora.modules_to_save=[lm_head]"],
]


def test_every_loss_of_trl_is_compared() -> None:
    """Losses of a newer TRL are noticed too: the names are read from the comparisons in TRL's code."""
    known = set(re.findall(r'loss_type == "(\w+)"', inspect.getsource(DPOTrainer._compute_loss)))
    compared = {name for setting in SETTINGS for name in re.findall(r"\w+", setting[0].partition("loss_type=")[2])}
    assert len(known) > 10 and known == compared


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: "+".join(settings).replace("training.", ""))
def test_packed_training_is_trls(settings: list[str], tiny_run: list[str], tmp_path: Path) -> None:
    plain, weights, _ = train([*tiny_run, *settings, *PLAIN], tmp_path, steps=4)
    packed, other, trainer = train([*tiny_run, *settings, *PACKED], tmp_path, steps=4)
    assert is_packed(trainer)
    # TRL's own gradient norms differ by 3e-5 between two padding widths under these losses, whose derivatives are steep
    steep = any(kind in settings[0] for kind in ("discopop", "forward_kl", "alpha_divergence"))
    assert_same(plain, packed, 5e-5 if steep else 1e-5)
    assert (other - weights).norm() <= 1e-5 * weights.norm()


FALLBACKS = [
    (["lora.lora_dropout=0.1"], "dropout is on"),
    (["model.attn_implementation=eager"], "attn_implementation is eager"),
    (
        ["lora.peft_type=LOHA", "lora.config={r: 4, rank_dropout: 0.5}", "training.disable_dropout=true"],
        "the LOHA adapter has dropout",
    ),
]


@pytest.mark.parametrize("settings, reason", FALLBACKS)
def test_where_packing_is_not_exact_trls_forward_is_taken_and_the_reason_told(
    settings: list[str], reason: str, tiny_run: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        trainer = build([*tiny_run, *settings, *PACKED], tmp_path)
    assert not is_packed(trainer)
    assert [reason in record.message for record in caplog.records if "shared_prefix" in record.message] == [True]


EXACT: dict[str, dict[str, Any]] = {
    **{family: {} for family in ("llama", "qwen2", "qwen3", "phi3", "olmo2", "gpt_neox")},
    **{family: {"sliding_window": 96} for family in ("mistral", "gemma3")},
    "mixtral": {"router_aux_loss_coef": 0.0},
}
"""Families whose packed rows are exact, with the config changes that this requires."""


def use_family(family: str, changes: dict[str, Any], tokenizer: Any, tmp_path: Path) -> list[str]:
    folder = make_family(family, tokenizer, tmp_path / family, **changes)
    return [f"model.model_name_or_path={folder}", "data.on_overlong=trl", "training.max_length=96"]


@pytest.mark.parametrize("family", EXACT)
def test_packed_training_of_a_family_is_trls(family: str, tiny_run: list[str], tokenizer: Any, tmp_path: Path) -> None:
    overrides = [*tiny_run, *use_family(family, EXACT[family], tokenizer, tmp_path)]
    plain, weights, _ = train([*overrides, *PLAIN], tmp_path, steps=3)
    packed, other, trainer = train([*overrides, *PACKED], tmp_path, steps=3)
    assert_same(plain, packed)
    assert (other - weights).norm() <= 1e-5 * weights.norm()
    assert is_packed(trainer) and is_certain(trainer.model.get_base_model())


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {key for key, changes in EXACT.items() if not changes}))
def test_every_other_family_is_refused(family: str, tiny_run: list[str], tokenizer: Any, tmp_path: Path) -> None:
    """They have short windows, capped scores, routers, or custom attention."""
    assert not is_packed(build([*tiny_run, *use_family(family, {}, tokenizer, tmp_path), *PACKED], tmp_path))


def test_the_plan_promises_what_is_compared_here() -> None:
    assert {make_config(family).model_type for family in EXACT} == shared_prefix._COMPARED


@given(batches())
def test_packing_gives_every_token_the_context_of_its_own_row(
    batch_of: tuple[list[dict[str, list[int]]], int | None, str],
) -> None:
    """Rows include no common prefix, one row a prefix of the other, the same row twice, and single tokens."""
    rows, limit, mode = batch_of
    batch = DataCollatorForPreference(0, limit, mode)(rows)
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    labels = ids.masked_fill(batch["completion_mask"] == 0, -100)
    packing = pack_pairs(ids, batch["attention_mask"], labels)

    packed = packing.input_ids[0].tolist()
    assert len(packed) == sum(pair.chosen + pair.tail for pair in packing.pairs)
    seen: list[list[int]] = []  # by packed position, the tokens of its row up to there
    start = 0
    for index, pair in enumerate(packing.pairs):
        chosen = ids[index][real[index]].tolist()
        rejected = ids[index + len(rows)][real[index + len(rows)]].tolist()
        assert packed[start : start + pair.chosen] == chosen
        tail = packed[start + pair.chosen : start + pair.chosen + pair.tail]
        assert chosen[: pair.prefix] + tail == rejected
        assert pair.prefix == len(rejected) or pair.prefix == len(chosen) or chosen[pair.prefix] != tail[0]
        seen += [chosen[: place + 1] for place in range(pair.chosen)]
        seen += [rejected[: pair.prefix + place + 1] for place in range(pair.tail)]
        start += pair.chosen + pair.tail
    assert packing.position_ids[0].tolist() == [len(row) - 1 for row in seen]
    wanted = [(row, place) for row in range(len(ids)) for place in range(1, ids.size(1)) if labels[row, place] != -100]
    assert [seen[source] for source in packing.source] == [ids[row, :place].tolist() for row, place in wanted]
    assert packing.targets.tolist() == [ids[row, place].item() for row, place in wanted]


PLANS = [
    ([], "shared prefixes, micro-batches by tokens, reference from the store"),
    (["engine.reference_store=false"], "shared prefixes, micro-batches by tokens, reference run along"),
    (["lora=none", "training.sync_ref_model=true"], "shared prefixes, micro-batches by tokens, reference run along"),
    (["engine.shared_prefix=false"], "TRL's forward (engine.shared_prefix=false), reference from the store"),
    (["model.attn_implementation=eager"], "TRL's forward (model.attn_implementation is eager, not sdpa), "),
    (["lora.lora_dropout=0.1"], "TRL's forward (dropout is on, "),
    (["lora.peft_type=LOKR", "lora.config={r: 4, module_dropout: 0.5}"], "TRL's forward (the LOKR adapter has dropout"),
]


@pytest.mark.parametrize("overrides, told", PLANS)
def test_the_plan_says_what_is_on_and_why_the_rest_is_not(overrides: list[str], told: str, tiny_run: list[str]) -> None:
    conf = load_conf([*tiny_run, *overrides])
    assert describe_engine(conf, draw_blueprint(conf), 100).startswith(told)


def test_the_plan_knows_windows_that_are_too_short(tiny_run: list[str], tokenizer: Any, tmp_path: Path) -> None:
    conf = load_conf([*tiny_run, f"model.model_name_or_path={make_family('mistral', tokenizer, tmp_path / 'm')}"])
    model = draw_blueprint(conf)
    assert describe_engine(conf, model, 64).startswith("shared prefixes")
    assert "sliding window of 64 tokens is shorter than the longest row, 65" in describe_engine(conf, model, 65)

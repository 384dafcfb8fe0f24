"""The points of a sweep: combinations of axes, refused and merged points, names of jobs."""

import re

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from dpo_runner.config.compose import load_conf
from dpo_runner.config.keys import NO_OPS, find_no_op
from dpo_runner.config.overrides import values_of
from dpo_runner.config.schema import ONLY_POINT, label_point
from dpo_runner.config.sections.sweep import SweepConf
from dpo_runner.config.yaml_files import ConfigFiles
from dpo_runner.errors import ConfigError
from dpo_runner.sweep.axes import Axis, combine, defer_sections, merge_axes, read_axis
from dpo_runner.sweep.command_line import check_command_line, find_override_mistakes
from dpo_runner.sweep.points import Point, assign_names, build_points, digest_config

BETAS = Axis("training.beta", ("training.beta=0.1", "training.beta=0.2", "training.beta=0.3"))
RATES = Axis("training.learning_rate", tuple(f"training.learning_rate={rate}" for rate in ("1e-5", "2e-5", "3e-5")))
SEEDS = Axis("seed", ("seed=1", "seed=2"))


def axis(key: str, *values: str) -> Axis:
    return Axis(key, tuple(f"{key}={value}" for value in values))


def points_of(*axes: Axis) -> list[Point]:
    return build_points(axes, None)[0]


def test_a_grid_has_every_combination_and_the_last_axis_varies_fastest() -> None:
    points = combine([BETAS, axis("lora.r", "8"), SEEDS], SweepConf())
    assert points[:3] == [
        ("training.beta=0.1", "lora.r=8", "seed=1"),
        ("training.beta=0.1", "lora.r=8", "seed=2"),
        ("training.beta=0.2", "lora.r=8", "seed=1"),
    ]
    assert len(points) == len(set(points)) == 6


def test_paired_axes_move_together_and_cross_the_others() -> None:
    points = combine([BETAS, SEEDS, RATES], SweepConf(paired=["training.beta", "training.learning_rate"]))
    assert len(points) == 6
    assert {(point[0][-1], point[2][-4]) for point in points} == {("1", "1"), ("2", "2"), ("3", "3")}
    two = SweepConf(paired=[["training.beta", "training.learning_rate"], ["seed", "lora.r"]])
    assert len(combine([BETAS, SEEDS, RATES, axis("lora.r", "4", "8")], two)) == 6


@pytest.mark.parametrize(
    ("paired", "expected"),
    [
        (["training.beta", "seed"], "must be equally long; training.beta has 3 values, seed has 2 values"),
        (["training.beta", "training.betta"], "training.betta has no list of values in this sweep"),
    ],
)
def test_pairs_that_cannot_be_are_refused(paired: list[str], expected: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(expected)):
        combine([BETAS, SEEDS], SweepConf(paired=paired))


def test_a_sample_is_repeatable_and_a_larger_one_begins_with_it() -> None:
    many = axis("seed", *map(str, range(1000)))
    grid = [many, axis("training.max_steps", *map(str, range(1, 1001)))]
    ten = combine(grid, SweepConf(sample=10))
    assert len(set(ten)) == 10
    assert combine(grid, SweepConf(sample=25))[:10] == ten == combine(grid, SweepConf(sample=10))
    assert combine(grid, SweepConf(sample=10, sample_seed=1)) != ten
    assert sorted(combine([BETAS, SEEDS], SweepConf(sample=50))) == sorted(combine([BETAS, SEEDS], SweepConf()))


def test_the_command_line_outdoes_a_sweep_file() -> None:
    assert merge_axes([BETAS, SEEDS, axis("training.beta", "0.5")]) == [axis("training.beta", "0.5"), SEEDS]


def test_points_that_compute_the_same_are_merged() -> None:
    points, merged = build_points([axis("training.beta", "0.1", "0.10", "0.2")], None)
    assert ([point.conf.training.beta for point in points], merged) == ([0.1, 0.2], 1)
    # sft does not read beta, sigmoid does: three distinct computations.
    points, merged = build_points([axis("training.loss_type", "sft", "sigmoid"), BETAS], None)
    assert (len(points), merged) == (4, 2)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["training.beta=0.1,0.2", "training.loss_type=sft"], "`training.beta`: training.loss_type=sft does not"),
        (["lora.lora_dropout=0.0,0.1", "training.disable_dropout=true"], "has no effect with training.disable_dropout"),
        (["training.label_smoothing=0.0,0.1"], "has no effect on loss_type=['sigmoid']"),
        (["training.discopop_tau=0.05,0.1"], "`training.discopop_tau`: has no effect on this training.loss_type"),
        (["training.num_train_epochs=1,2", "training.max_steps=5"], "while training.max_steps is set"),
        (["training.warmup_steps=0,5", "training.lr_scheduler_type=constant"], "use constant_with_warmup"),
        (["training.ref_model_sync_steps=64,128"], "needs training.sync_ref_model=true"),
        (["wandb.notes=a,b"], "`wandb.notes`: does not change what is computed"),
        (["run_name=a,b"], "`run_name`: does not change what is computed"),
        (["seed=1,2", "run_name=../../x"], "`run_name=../../x`: names one folder under outputs/"),
        (["seed=1,2", "resume=never"], "use a new sweep.dir instead"),
        (["seed=1,2", "sweep.workers=1,2"], "`sweep.workers`: is the same for all runs"),
        (["seed=1,2", "sweep.workers=0"], "`sweep.workers=0`: must be at least 1"),
        (["seed=1,2", "sweep.dir=a", "sweep.resume=last"], "set one of them"),
        (["seed=1,2", "sweep.on_error=stop", "sweep.max_failures=3"], "with sweep.on_error=stop it is 1"),
        (["seed=1,2", "sweep.paired=[seed]"], "must be a list of two or more keys"),
        (["seed=1,2", "hydra.sweep.dir=x"], "use sweep.dir=PATH"),
    ],
)
def test_what_would_run_in_vain_is_refused_before_anything_starts(overrides: list[str], expected: str) -> None:
    mistakes = check_command_line(["-m", *overrides])
    assert len(mistakes) == 1 and expected in mistakes[0], mistakes


def test_keys_of_a_sweep_are_refused_without_one() -> None:
    assert find_override_mistakes(["sweep.workers=2"]) == [
        "`sweep.workers`: is of a sweep, which takes -m or sweep=NAME"
    ]


def test_no_ops_name_fields_that_exist_and_know_when_they_are_read() -> None:
    from dpo_runner.config.schema import SCHEMA

    assert all(rule.key in SCHEMA for rule in NO_OPS)
    read = load_conf(
        [
            "training.loss_type=[discopop,robust]",
            "training.label_smoothing=0.1",
            "lora=none",
            "training.sync_ref_model=true",
            "training.f_divergence_type=alpha_divergence",
            "training.use_liger_kernel=true",
            "training.optim=galore_adamw",
            "training.load_best_model_at_end=true",
            "training.save_steps=0.5",
        ]
    )
    left = [rule.key for rule in NO_OPS if rule.applies(read)]
    assert left == ["rounds_patience", "rounds_reference", "training.fsdp_config"]
    assert find_no_op("rounds_patience", [load_conf(["rounds=2", "data=reviews", "reward=length"])]) is None
    assert find_no_op("training.fsdp_config", [load_conf(["distributed=fsdp2", "launch.processes=2"])]) is None


def test_names_say_nothing_of_values() -> None:
    values = ("../../elsewhere/x.jsonl", "/etc/x.jsonl", ("a" * 200 + "/") * 15 + "x.jsonl", "x y,z.jsonl")
    quoted = [f'"{value}"' for value in values]
    points = points_of(axis("data", "local_file"), axis("data.path", *quoted))
    names = assign_names([point.digest for point in points], {})
    assert len(set(names)) == len(values)
    assert all(re.fullmatch(r"\d-[0-9a-f]{8}", name) for name in names)


def test_the_hash_is_of_what_is_computed_and_of_nothing_else() -> None:
    digest = digest_config(load_conf())
    for same in ("wandb=online", "wandb.group=g", "run_name=other", "run_dir=x", "dry_run=true"):
        assert digest_config(load_conf([same])) == digest, same
    others = ("training.beta=0.2", "seed=1", "data.max_train_samples=5", "samples.num_prompts=3", "quant=nf4")
    assert len({digest, *(digest_config(load_conf([other])) for other in others)}) == len(others) + 1


def test_a_changed_grid_keeps_names_and_counts_on() -> None:
    first = assign_names(["a" * 64, "b" * 64], {})
    assert first == ["0-aaaaaaaa", "1-bbbbbbbb"]
    existing = dict(zip(first, ["a" * 64, "b" * 64], strict=True))
    assert assign_names(["c" * 64, "b" * 64, "d" * 64], existing) == ["2-cccccccc", "1-bbbbbbbb", "3-dddddddd"]
    # Equal in eight digits only: a different configuration, hence a different directory.
    assert assign_names(["a" * 63 + "b"], existing) == ["2-aaaaaaaa"]


def test_fields_of_a_section_that_only_the_points_bring_wait_for_them() -> None:
    texts = ["quant=nf4,fp4", "quant.bnb_4bit_use_double_quant=false", "lora.r=4,8", "lora.target_modules=[a,b]"]
    assert defer_sections(texts) == [
        "quant=nf4,fp4",
        "quant.bnb_4bit_use_double_quant=choice(false)",
        "lora.r=4,8",
        "lora.target_modules=choice([a,b])",
    ]


def test_a_point_is_named_by_what_it_varies_with_short_keys_where_these_are_clear() -> None:
    assert label_point(["training.beta=0.1", "training.learning_rate=5e-6"]) == "beta=0.1 learning_rate=5e-6"
    assert label_point(["lora.r=8", "++data.sources.a.weight=1", "++data.sources.b.weight=2"]) == (
        "r=8 a.weight=1 b.weight=2"
    )
    assert label_point(["training.beta=0.123456789", "quant=nf4"]) == "beta=0.1235 quant=nf4"
    assert label_point([]) == ONLY_POINT


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("range(0.1,0.4,0.1)", ["0.1", "0.2", "0.3"]),
        ("range(0.3,0.0,-0.1)", ["0.3", "0.2", "0.1"]),
        ("range(0,1,0.25)", ["0.0", "0.25", "0.5", "0.75"]),
        ("range(1,4)", ["1", "2", "3"]),
    ],
)
def test_a_range_leaves_out_its_end(values: str, expected: list[str]) -> None:
    override = OverridesParser.create().parse_override(f"training.beta={values}")
    assert read_axis(override).texts == tuple(f"training.beta={value}" for value in expected)
    assert list(values_of(override, ConfigFiles(()))) == [float(value) for value in expected]

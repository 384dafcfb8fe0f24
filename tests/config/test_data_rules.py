"""Rules of the `data` section that need no data, and its map entries on the command line."""

import pytest

from dpo_runner.config.compose import expand_overrides, load_conf
from dpo_runner.config.schema import schema_key
from dpo_runner.config.sections.data import resolve_sources
from dpo_runner.errors import ConfigError

TWO = ["data=local_file", "data.sources.a.path=a.jsonl", "data.sources.b.path=b.jsonl"]


@pytest.mark.parametrize(
    ("overrides", "mistake"),
    [
        (["training.truncation_mode=keep_end"], "`training.truncation_mode=keep_end`: has no effect with data.on_over"),
        (["training.max_length=null", "data.on_overlong=truncate_completion"], "needs training.max_length"),
        (["data.near_duplicate_threshold=0.9"], "needs data.deduplicate=near"),
        (["data.deduplicate=near", "data.near_duplicate_threshold=0.3"], "must be at least 0.5 and at most 1"),
        (["data.decontaminate_ngram=8"], "`data.decontaminate_ngram=8`: needs data.decontaminate"),
        (["data.max_bad_fraction=2"], "must be at least 0 and at most 1"),
        (["data.on_overlong=cut"], "`data.on_overlong=cut`: no such choice"),
        (["data.deduplicate=fuzzy"], "`data.deduplicate=fuzzy`: no such choice"),
        (["data=local_file"], "`data.path`: must be set"),
        (["data.sources.a.path=a.jsonl"], "`data.path=bundled:concise`: contradicts data.sources"),
        ([*TWO, "data.format=hh"], "`data.format=hh`: contradicts data.sources; set data.sources.NAME.format"),
        (["data=local_file", "data.sources.a.weight=1"], "`data.sources.a.path`: must be set"),
        (["data=local_file", "data.sources.train.path=a"], "`data.sources.train`: a name is made of"),
        ([*TWO, "data.sources.a.weight=1"], "`data.sources.b.weight`: must be set, since a has one"),
        ([*TWO, "data.sources.a.weight=-1"], "`data.sources.a.weight=-1.0`: must be above 0"),
        ([*TWO, "data.sources.a.max_train_samples=0"], "`data.sources.a.max_train_samples=0`: must be at least 1"),
        ([*TWO, "data.sources.a.wieght=1"], "did you mean `weight`"),
        ([*TWO, "data.sources.a.weight=much"], "`data.sources.a.weight=much`: must be a number"),
        (["data.eval_path=a", "data.eval_split=b"], "contradicts data.eval_path=a"),
        (["data.columns.q=promt"], "`data.columns.q=promt`: no such column of ours; did you mean `prompt`"),
        (["data.columns.q=prompt", "data.columns.p=prompt"], "maps two columns to the same name"),
        (["data.formatter=my_rows"], "`data.formatter=my_rows`: must be package.module:function"),
        (["data.roles.narrator=sytem"], "`data.roles.narrator=sytem`: no such role; did you mean `system`?"),
        (["data.format=alpaca", "data.pairing=best_vs_rest"], "`data.pairing=best_vs_rest`: has no effect with"),
        (["data.format=hh", "data.pairing=all_pairs"], "`data.pairing=all_pairs`: has no effect with format=hh"),
    ],
)
def test_a_rule_that_is_broken_is_one_line(overrides: list[str], mistake: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_conf(overrides)
    assert len(caught.value.mistakes) == 1 and mistake in caught.value.mistakes[0]


def test_the_flat_fields_are_sugar_for_one_source() -> None:
    conf = load_conf(["data=local_file", "data.path=a.jsonl", "data.columns.q=prompt", "data.min_score_gap=2"])
    (source,) = resolve_sources(conf.data).values()
    assert (source.path, source.columns, source.min_score_gap) == ("a.jsonl", {"q": "prompt"}, 2.0)


def test_entries_of_maps_are_named_without_marks() -> None:
    conf = load_conf([*TWO, "data.sources.a.columns.q=prompt", "data.sources.b.seed=3"])
    sources = resolve_sources(conf.data)
    assert list(sources) == ["a", "b"]
    assert (sources["a"].columns, sources["b"].seed) == ({"q": "prompt"}, 3)
    whole = load_conf(["data=local_file", "data.sources={a:{path:a.jsonl,weight:1},b:{path:b.jsonl,weight:2}}"])
    assert [source.weight for source in whole.data.sources.values()] == [1.0, 2.0]
    changed = load_conf(["data=mixture", "data.sources.orca.weight=5"])
    assert (changed.data.sources["orca"].weight, changed.data.sources["orca"].path) == (5.0, "Intel/orca_dpo_pairs")


def test_only_what_hydra_wants_marked_is_marked_and_flags_stay_where_they_are() -> None:
    typed = ["-m", "training.beta=0.1,0.2", "data.sources.a.path=x", "++data.columns.q=prompt", "--cfg", "job"]
    assert expand_overrides(typed) == [
        "-m",
        "training.beta=0.1,0.2",
        "++data.sources={a:{}}",
        "++data.sources.a.path=x",
        "++data.columns.q=prompt",
        "--cfg",
        "job",
    ]
    assert expand_overrides(["data.path=x", "lora.r=4"]) == ["data.path=x", "lora.r=4"]


def test_a_maps_own_names_stand_under_a_star() -> None:
    assert schema_key("data.sources.mine.path") == "data.sources.*.path"
    assert schema_key("data.sources.mine.columns.q") == "data.sources.*.columns.*"
    assert schema_key("training.beta") == "training.beta"

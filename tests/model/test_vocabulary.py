"""Pad tokens without side effects, added and trained tokens, and adapters on resized embeddings."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpo_runner.chat import Chat
from dpo_runner.config.compose import load_conf
from dpo_runner.config.sections.model import ModelConf
from dpo_runner.errors import ConfigError
from dpo_runner.export.export import export_run
from dpo_runner.model.base import load_base_model
from dpo_runner.model.blueprint import Blueprint, draw_blueprint
from dpo_runner.model.result import load_tuned_model, untuned
from dpo_runner.model.vocabulary import describe_padding, resize_embeddings
from dpo_runner.train import run
from dpo_runner.training.step0 import check_reference
from tests.support.adapters import EXACT, MODES, close, load_by_hand
from tests.support.common import make_adapter
from tests.support.families import make_family
from tests.support.trainers import build, first_rows, logps_of, score_both

MODEL = "random:tiny-llama"
NEW = ["<|user|>", "<|assistant|>"]
FAST = ["training.learning_rate=1e-2", "training.warmup_steps=0"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture
def added(tmp_path: Path) -> list[str]:
    """Overrides for a chat template with two tokens that the tiny model lacks."""
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    return [f"model.added_tokens={json.dumps(NEW)}", f"model.chat_template={tmp_path / 'chat.jinja'}"]


@pytest.fixture(scope="session")
def tied_model(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny Llama with its head tied to the embeddings."""
    return make_family("llama", tokenizer, tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)


def on(model: str, overrides: list[str]) -> list[str]:
    return [o for o in overrides if o != "model=tiny_random"] + [f"model.model_name_or_path={model}"]


# ---- the pad token


@pytest.mark.parametrize(
    ("extra", "eos", "template", "expected"),
    [
        ([], "<|im_end|>", None, "<|endoftext|>"),
        (["[PAD]"], "<|im_end|>", None, "[PAD]"),
        ([], "<|endoftext|>", None, "<|endoftext|>"),
        (["<|pad|>"], "<|im_end|>", "<|pad|>{{ messages }}", "<|endoftext|>"),
    ],
)
def test_a_tokenizer_without_a_pad_token_gets_a_free_one(extra, eos, template, expected, tiny_model, tmp_path) -> None:
    shutil.copytree(tiny_model, tmp_path / "bare")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.add_tokens(extra, special_tokens=True)
    tokenizer.pad_token, tokenizer.eos_token, tokenizer.chat_template = None, eos, template
    tokenizer.save_pretrained(tmp_path / "bare")
    assert AutoTokenizer.from_pretrained(tmp_path / "bare").pad_token is None
    assert Blueprint(ModelConf(str(tmp_path / "bare"))).tokenizer.pad_token == expected


def test_a_configured_pad_token_must_be_a_token() -> None:
    assert Blueprint(ModelConf(MODEL, pad_token="<|im_end|>")).tokenizer.pad_token == "<|im_end|>"
    assert Blueprint(ModelConf(MODEL, pad_token="<pad>", added_tokens=["<pad>"])).tokenizer.pad_token == "<pad>"
    with pytest.raises(
        ConfigError, match=r"`model\.pad_token=<\|endoftxt\|>`: not in the vocabulary.*mean `<\|endoftext\|>`"
    ):
        assert Blueprint(ModelConf(MODEL, pad_token="<|endoftxt|>")).tokenizer


def test_the_plan_says_what_else_the_pad_token_is() -> None:
    def padding(token: str | None, stop_id: int | None = None) -> str:
        return describe_padding(Blueprint(ModelConf(MODEL, pad_token=token)).tokenizer, stop_id)

    assert padding(None) == "<|endoftext|>"
    assert padding("<|im_end|>").startswith("<|im_end|>, which also ends answers: padding is masked by position")
    assert "also begins texts" in padding("<|im_start|>")
    assert "also ends answers" in padding(None, Blueprint(ModelConf(MODEL)).tokenizer.pad_token_id)
    assert "also stands in the chat template" in padding("m")


@pytest.mark.parametrize("lora", ["r16", "none"])
def test_losses_and_scores_do_not_depend_on_the_pad_token(lora, tiny_run, tmp_path) -> None:
    """They are bitwise equal, with rows of several lengths in a batch: masks are built from lengths."""
    seen = []
    for pad in ("<|endoftext|>", "<|im_end|>"):
        overrides = [*tiny_run, *EXACT, *FAST, f"lora={lora}", f"model.pad_token='{pad}'", f"run_dir=r{len(seen)}"]
        trainer = build(overrides, tmp_path / pad)
        assert trainer.processing_class.pad_token == pad
        assert len({len(row["chosen_ids"]) for row in first_rows(trainer)} | {0}) > 1
        scores = score_both(trainer, first_rows(trainer))[:2]
        summary = run(load_conf(overrides))
        name = "adapter/adapter_model" if lora == "r16" else "model/model"
        weights = load_file(tmp_path / f"r{len(seen)}" / f"{name}.safetensors")
        samples = (tmp_path / f"r{len(seen)}" / "samples.jsonl").read_text()
        results = {key: value for key, value in summary["after"].items() if "num_tokens" not in key}
        seen.append((scores, results, weights, samples))
    for scores, results, weights, samples in seen[1:]:
        assert all(torch.equal(*pair) for pair in zip(scores, seen[0][0], strict=True))
        assert (results, samples) == (seen[0][1], seen[0][3])
        assert all(torch.equal(weight, seen[0][2][name]) for name, weight in weights.items())


@pytest.mark.parametrize("extra", [["lora=none"], ["lora.modules_to_save=[embed_tokens]"]], ids=["full", "modules"])
def test_the_end_of_turn_token_is_trained_though_it_is_the_pad_token(extra, tiny_run, tiny_model, tmp_path) -> None:
    """`nn.Embedding` gives the row `padding_idx`, the model's pad_token_id, no gradient."""
    shutil.copytree(tiny_model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    end = Blueprint(ModelConf(MODEL)).tokenizer.eos_token_id
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"pad_token_id": end}))
    overrides = [*on(str(tmp_path / "model"), tiny_run), *EXACT, *FAST, *extra, "model.pad_token='<|im_end|>'"]
    trainer = build([*overrides, "training.weight_decay=0"], tmp_path)
    # it has a gradient only inside the text: at the end of a turn that is followed by another
    before = trainer.model.get_input_embeddings().weight[end].clone()
    assert any(end in row["prompt_ids"] for row in first_rows(trainer))
    trainer.train()
    assert not torch.equal(trainer.model.get_input_embeddings().weight[end], before)


# ---- added tokens


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("quant", ["none", "nf4"])
def test_added_tokens_are_trained_and_saved_with_the_adapter(
    quant, tied, added, tiny_run, tiny_model, tied_model, tmp_path
) -> None:
    name = tied_model if tied else tiny_model
    overrides = [*on(name, tiny_run), *EXACT, *FAST, *added, f"quant={quant}"]
    trainer = build(overrides, tmp_path)
    rows = first_rows(trainer)
    base = load_by_hand(name, quant)
    resize_embeddings(base, 261)
    old = load_by_hand(name).get_input_embeddings().weight
    assert torch.allclose(base.get_input_embeddings().weight[259:], old.mean(0), atol=1e-7)
    policy, reference, _ = score_both(trainer, first_rows(trainer))
    assert torch.equal(policy, reference) and close(reference, logps_of(base, rows), quant)
    assert check_reference(trainer) == 0
    trained = {n.split("trainable_tokens_delta")[0] for n, p in trainer.model.named_parameters() if "delta" in n}
    assert len(trained) == (1 if tied else 2)
    trainer.train()
    after, kept, _ = score_both(trainer, first_rows(trainer))
    assert torch.equal(kept, reference) and not torch.equal(after, policy)

    run(load_conf([*overrides, "run_dir=r"]))
    weights = load_file(tmp_path / "r" / "adapter" / "adapter_model.safetensors")
    new = {key: weight for key, weight in weights.items() if "lora_" not in key}
    assert len(new) == len(trained) and all(weight.shape == (2, 64) for weight in new.values())
    rows_of_embeddings = next(weight for key, weight in new.items() if "embed_tokens" in key)
    assert not torch.allclose(rows_of_embeddings[0], rows_of_embeddings[1])  # each token has learnt a different row
    assert "model.resize_token_embeddings(261)" in (tmp_path / "r" / "adapter" / "README.md").read_text()
    plain = load_by_hand(name, quant)
    plain.resize_token_embeddings(261)  # transformers' own, with its random draw
    plain = PeftModel.from_pretrained(plain, tmp_path / "r" / "adapter").eval()
    tuned, tokenizer = load_tuned_model(tmp_path / "r")
    assert close(logps_of(plain, rows), after, quant) and close(logps_of(tuned, rows), after, quant)
    if quant == "none":
        assert torch.equal(logps_of(plain, rows), logps_of(tuned, rows))
    assert tokenizer.convert_tokens_to_ids(NEW) == [259, 260]


def test_checkpointed_gradients_reach_added_tokens(added, tiny_run, tmp_path) -> None:
    weights = []
    for checkpointing in ("true", "false"):
        extra = [f"training.gradient_checkpointing={checkpointing}", f"run_dir=r-{checkpointing}"]
        run(load_conf([*tiny_run, *EXACT, *FAST, *added, *extra]))
        weights.append(load_file(tmp_path / f"r-{checkpointing}" / "adapter" / "adapter_model.safetensors"))
    assert all(torch.allclose(weights[0][key], weights[1][key], atol=1e-5) for key in weights[0])


@pytest.mark.parametrize("extra", [[], ["lora=none"], ["lora.init_lora_weights=pissa"]], ids=["lora", "full", "pissa"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_export_with_added_tokens_answers_as_chat_does(
    tied, extra, added, tiny_run, tiny_model, tied_model, tmp_path
) -> None:
    name = tied_model if tied else tiny_model
    run(load_conf([*on(name, tiny_run), *EXACT, *FAST, *added, *extra, "run_dir=r"]))
    export_run(tmp_path / "r", tmp_path / "out", dtype="float32", say=lambda text: None)
    exported, own = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "out"),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    assert exported.get_input_embeddings().weight.shape[0] == exported.config.vocab_size == len(own) == 261
    ids = own.apply_chat_template(
        [{"role": "user", "content": "Hello."}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answer = exported.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :]
    said = Chat(tmp_path / "r", max_new_tokens=24).ask("Hello.", lambda piece: None)
    assert own.decode(answer, skip_special_tokens=True).strip() == said
    if not extra:
        export_run(tmp_path / "r", tmp_path / "only", adapter_only=True, say=lambda text: None)
        assert "model.resize_token_embeddings(261)" in (tmp_path / "only" / "README.md").read_text()


def test_spare_rows_are_used_and_nothing_is_resized(tokenizer, tiny_run, added, tmp_path) -> None:
    model = make_family("llama", tokenizer, tmp_path / "family")
    roomy = AutoModelForCausalLM.from_pretrained(model)
    roomy.resize_token_embeddings(320)
    roomy.save_pretrained(model)
    overrides = [*on(model, tiny_run), *EXACT, *FAST, *added]
    vocabulary = Blueprint(load_conf(overrides).model).vocabulary
    assert (vocabulary.rows, vocabulary.new_ids) == (None, [259, 260])
    run(load_conf([*overrides, "run_dir=r"]))
    weights = load_file(tmp_path / "r" / "adapter" / "adapter_model.safetensors")
    assert {tuple(weight.shape) for key, weight in weights.items() if "lora_" not in key} == {(2, 64)}
    assert "resize_token_embeddings" not in (tmp_path / "r" / "adapter" / "README.md").read_text()
    assert load_tuned_model(tmp_path / "r")[0].get_base_model().config.vocab_size == 320


def test_a_token_that_is_there_already_adds_nothing(tiny_run) -> None:
    conf = load_conf([*tiny_run, 'model.added_tokens=["<|im_end|>"]'])
    assert Blueprint(conf.model).vocabulary.rows is None and Blueprint(conf.model).vocabulary.new_ids == []
    assert len(Blueprint(conf.model).tokenizer) == 259


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (["lora.peft_type=LOHA"], "LOHA cannot train the embeddings of new tokens"),
        (["lora.target_modules=[q_proj,embed_tokens]"], r"embed_tokens cannot have LoRA"),
        (["lora.config.trainable_token_indices=[1]"], "is set by model.added_tokens"),
        (["lora=none", "model.adapter=ADAPTER"], "use model.adapter_mode=merge"),
        (["model.adapter_mode=stack", "model.adapter=ADAPTER"], "use model.adapter_mode=merge"),
        (["model.added_tokens=['a b ']"], "begin or end with white space"),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_trained_is_refused_before_weights_are_loaded(
    extra, match, added, tiny_run, sft_adapter
) -> None:
    extra = [each.replace("ADAPTER", sft_adapter) for each in extra]
    with pytest.raises(ConfigError, match=match):
        draw_blueprint(load_conf([*tiny_run, *added, *extra]))


def test_tied_embeddings_are_not_parted(added, tiny_run, tied_model) -> None:
    with pytest.raises(ConfigError, match="would be untied from the embeddings"):
        draw_blueprint(load_conf([*on(tied_model, tiny_run), *added, "lora.modules_to_save=[lm_head]"]))


def test_a_head_with_a_bias_is_refused(added, tiny_run, tokenizer, tmp_path) -> None:
    config = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    from transformers import PhiConfig, PhiForCausalLM

    PhiForCausalLM(PhiConfig(**config, num_attention_heads=4, pad_token_id=0)).save_pretrained(tmp_path / "phi")
    tokenizer.save_pretrained(tmp_path / "phi")
    with pytest.raises(ConfigError, match="output head has a bias"):
        draw_blueprint(load_conf([*on(str(tmp_path / "phi"), tiny_run), *added]))


def test_another_models_embeddings_are_resized_to_be_the_reference(added, tiny_run, tiny_model, tmp_path) -> None:
    other = load_by_hand(tiny_model)
    other.model.layers[0].mlp.down_proj.weight.data *= 2
    other.save_pretrained(tmp_path / "other")
    trainer = build([*tiny_run, *EXACT, *added, f"model.reference={tmp_path / 'other'}"], tmp_path)
    resize_embeddings(other, 261)
    assert close(score_both(trainer, first_rows(trainer))[1], logps_of(other, first_rows(trainer)))


# ---- SFT adapters on resized embeddings

SHAPES = {
    # by TRL's SFTTrainer from an untied model with chat_template_path
    "trl": {"trainable_token_indices": {"embed_tokens": [259, 260]}, "modules_to_save": ["lm_head"]},
    # resized beforehand and saved whole, but not trained
    "whole": {},
    "rows": {"trainable_token_indices": {"embed_tokens": [259, 260], "lm_head": [259, 260]}},
    "modules": {"modules_to_save": ["embed_tokens", "lm_head"]},
}


def make_sft(base: str, folder: Path, shape: str) -> tuple[str, PeftModel]:
    """Save an adapter with perturbed instead of trained weights; return its folder and the model."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tied = model.config.tie_word_embeddings
    fields = json.loads(json.dumps(SHAPES[shape]))
    if tied and "trainable_token_indices" in fields:
        fields = {"trainable_token_indices": {"embed_tokens": [259, 260]}}
    model.resize_token_embeddings(261)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **fields)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_A" not in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    if shape == "whole":
        model.get_input_embeddings().weight.data[259:] += 0.3
        model.get_output_embeddings().weight.data[259:] -= 0.2
    model.save_pretrained(folder, save_embedding_layers=False if shape == "rows" else "auto")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(NEW, special_tokens=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return str(folder), model.eval()


CASES = [  # each shape in two modes, and each mode with most shapes
    ("none", "trl", "continue"),
    pytest.param("none", "trl", "merge", marks=pytest.mark.slow),
    ("none", "whole", "stack"),
    pytest.param("none", "whole", "merge", marks=pytest.mark.slow),
    ("none", "rows", "continue"),
    pytest.param("none", "rows", "stack", marks=pytest.mark.slow),
    ("none", "modules", "stack"),
    pytest.param("none", "modules", "merge", marks=pytest.mark.slow),
    pytest.param("none", "tied-rows", "merge", marks=pytest.mark.slow),
    ("none", "tied-rows", "stack"),
    ("none", "tied-whole", "continue"),
    ("nf4", "trl", "stack"),
]


@pytest.mark.parametrize(("quant", "shape", "mode"), CASES)
def test_the_reference_of_an_adapter_on_resized_embeddings_is_the_sft_model(
    shape, mode, quant, tiny_run, tiny_model, tied_model, tmp_path
) -> None:
    tied, shape = shape.startswith("tied-"), shape.removeprefix("tied-")
    base = tied_model if tied else tiny_model
    folder, sft = make_sft(base, tmp_path / "sft", shape)
    overrides = [*on(base, tiny_run), *EXACT, *FAST, *MODES[mode], f"model.adapter={folder}", f"quant={quant}"]
    trainer = build(overrides, tmp_path)
    rows = first_rows(trainer)
    assert any(259 in row["prompt_ids"] for row in rows) and any(260 in row["prompt_ids"] for row in rows)
    if mode == "merge":
        sft.merge_and_unload().save_pretrained(tmp_path / "merged")
        expected = logps_of(load_by_hand(str(tmp_path / "merged"), quant), rows)
    else:
        plain = load_by_hand(base, quant)
        plain.resize_token_embeddings(261)
        expected = logps_of(PeftModel.from_pretrained(plain, folder).eval(), rows)
    policy, reference, _ = score_both(trainer, first_rows(trainer))
    assert close(reference, expected, quant) and close(policy, expected, quant)
    assert check_reference(trainer) < 1e-2
    trainer.train()
    after, kept, _ = score_both(trainer, first_rows(trainer))
    assert torch.equal(kept, reference) and not torch.equal(after, policy)

    run(load_conf([*overrides, "run_dir=r"]))
    tuned = load_tuned_model(tmp_path / "r")[0]
    assert close(logps_of(tuned, rows), after, quant)
    with untuned(tuned):
        assert close(logps_of(tuned, rows), expected, quant)
    if mode != "merge":
        plain = load_by_hand(base, quant)
        plain.resize_token_embeddings(261)
        served = PeftModel.from_pretrained(plain, tmp_path / "r" / "adapter").eval()
        assert close(logps_of(served, rows), after, quant)
        assert "model.resize_token_embeddings(261)" in (tmp_path / "r" / "adapter" / "README.md").read_text()


@pytest.mark.parametrize("mode", MODES)
def test_the_result_on_resized_embeddings_can_be_exported(mode, tiny_run, tiny_model, tmp_path) -> None:
    folder, _ = make_sft(tiny_model, tmp_path / "sft", "trl")
    run(load_conf([*tiny_run, *EXACT, *FAST, *MODES[mode], f"model.adapter={folder}", "run_dir=r"]))
    export_run(tmp_path / "r", tmp_path / "out", dtype="float32", say=lambda text: None)
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[259, 5, 6, 7, 257, 260]])
    with torch.no_grad():
        assert torch.allclose(
            exported(input_ids=ids).logits, load_tuned_model(tmp_path / "r")[0](input_ids=ids).logits, atol=1e-4
        )


def test_tokens_can_be_added_to_a_merged_adapter(added, tiny_run, tiny_model, tmp_path) -> None:
    folder, _ = make_sft(tiny_model, tmp_path / "sft", "whole")
    extra = ["model.added_tokens=['<|user|>','<tool>']", *MODES["merge"], f"model.adapter={folder}"]
    conf = load_conf([*tiny_run, *EXACT, *FAST, *extra, "run_dir=r"])
    vocabulary = Blueprint(conf.model).vocabulary
    assert (vocabulary.brought, vocabulary.rows, vocabulary.new_ids) == (261, 262, [261])
    run(conf)
    with safe_open(tmp_path / "r" / "adapter" / "adapter_model.safetensors", "pt") as file:
        shapes = {tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys()) if "delta" in key}
    assert shapes == {(1, 64)}
    assert "resize_token_embeddings(262)" in (tmp_path / "r" / "adapter" / "README.md").read_text()


def test_an_adapter_with_half_of_its_new_rows_is_refused(tiny_run, tiny_model, tmp_path) -> None:
    folder, _ = make_sft(tiny_model, tmp_path / "sft", "rows")
    file = Path(folder) / "adapter_config.json"
    config = json.loads(file.read_text())
    config["trainable_token_indices"]["lm_head"] = [260]
    file.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"its file lacks those of lm_head; save it with save_embedding_layers=True"):
        assert Blueprint(ModelConf(MODEL, adapter=folder)).vocabulary


def test_a_reference_adapter_must_not_change_the_policys_embeddings(tiny_run, tiny_model, tmp_path) -> None:
    folder, _ = make_sft(tiny_model, tmp_path / "sft", "whole")
    conf = load_conf([*tiny_run, *EXACT, f"model.reference={folder}"])
    with pytest.raises(ConfigError, match="brings embeddings of its own"):
        draw_blueprint(conf)


def test_the_base_of_such_an_adapter_is_resized_alike_each_time(tiny_run, tiny_model, tmp_path) -> None:
    folder, _ = make_sft(tiny_model, tmp_path / "sft", "rows")
    conf = load_conf([*tiny_run, *EXACT, *MODES["continue"], f"model.adapter={folder}"])
    one, other = (load_base_model(Blueprint(conf.model))[0] for _ in range(2))
    assert torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)
    assert one.config.vocab_size == 261


def test_weights_named_as_their_adapter_reach_the_reference(tiny_run, tiny_model, tmp_path) -> None:
    """TRL copies `.default.`, not `lora_embedding_A.default`: its reference would be the bare base."""
    torch.manual_seed(5)
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"], task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32), config)
    for name, parameter in model.named_parameters():
        if "_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "sft", save_embedding_layers=False)
    trainer = build([*tiny_run, *EXACT, *MODES["continue"], f"model.adapter={tmp_path / 'sft'}"], tmp_path)
    expected = logps_of(model.eval(), first_rows(trainer))
    policy, reference, _ = score_both(trainer, first_rows(trainer))
    assert close(policy, expected) and close(reference, expected)


@pytest.mark.parametrize("targets", [["q_proj", "embed_tokens"], ["lm_head"]], ids=["embeddings", "head"])
def test_merging_into_one_of_two_tied_modules_leaves_the_other(targets, tied_model, tmp_path) -> None:
    random = {"r": 4, "init_lora_weights": False}
    sft = make_adapter(tied_model, tmp_path / "sft", 1, 0.1, target_modules=targets, **random)
    ids = torch.arange(40)[None]
    merged = load_base_model(Blueprint(ModelConf(tied_model, adapter=sft, adapter_mode="merge", dtype="float32")))[0]
    with torch.no_grad():
        expected = PeftModel.from_pretrained(load_by_hand(tied_model), sft).eval()(ids).logits
        assert torch.allclose(merged(ids).logits, expected, atol=1e-4)


def test_copies_that_are_tied_are_refused_because_peft_ties_only_the_first(tiny_run, tied_model, tmp_path) -> None:
    tie = {"ensure_weight_tying": True, "modules_to_save": ["embed_tokens"]}
    sft = make_adapter(tied_model, tmp_path / "sft", 1, 0.1, r=4, target_modules=["q_proj"], **tie)
    new = ["lora.config.ensure_weight_tying=true", "lora.modules_to_save=[embed_tokens]"]
    for used, cure in (
        ([*MODES["continue"], f"model.adapter={sft}"], "use model.adapter_mode=merge"),
        ([f"model.reference={sft}"], "merge it into its base, and name that model"),
        (new, "leave it out, and list the output head too"),
    ):
        with pytest.raises(ConfigError, match=rf"^`\S+`: ensure_weight_tying=True ties .*; {cure}$"):
            draw_blueprint(load_conf([*on(tied_model, tiny_run), *used]))
    draw_blueprint(load_conf([*on(tied_model, tiny_run), *MODES["merge"], f"model.adapter={sft}"]))

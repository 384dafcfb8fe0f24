"""Tests of the templating guarantees, with random conversations and the common template families."""

import copy
import functools
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

import dpo_runner.data
from dpo_runner.data.layouts.formats import find_layout, read_pairs
from dpo_runner.data.layouts.messages import Pair
from dpo_runner.data.templates.chat_template import ChatTemplate, Encoded, apply_chat_template
from dpo_runner.data.templates.rendering import CHAT_TEMPLATES, resolve_chat_template
from dpo_runner.errors import ConfigError, RowError

# As published with Mistral-7B-Instruct-v0.1, gemma-2-it and Llama-3-Instruct.
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token + ' ' }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Keeps thinking in the last turn, removes it from earlier ones; the generation prompt opens a thought.
THINKING = (
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'assistant' and not loop.last and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def build_tokenizer(kind: str, special: list[str], template: str, bos: str | None, eos: str) -> PreTrainedTokenizerFast:
    """Build a tokenizer with the family's splitting, normalizing and BOS, trained on the bundled rows."""
    texts = [
        text + "\n\n\n" + text.replace(". ", ".\n")
        for line in (Path(dpo_runner.data.__file__).parent / "concise" / "train.jsonl").read_text().splitlines()[:200]
        for text in json.loads(line).values()
    ]
    if kind == "metaspace":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet, special = [], ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))]
    elif kind == "gemma":
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        alphabet, special = [], ["<unk>", *special, *(f"<0x{byte:02X}>" for byte in range(256))]
    else:
        tokenizer = Tokenizer(models.BPE())
        split = pre_tokenizers.Split(Regex(GPT2_SPLIT if kind == "gpt2" else LLAMA3_SPLIT), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    control = [token for token in special if not token.startswith("<0x")]
    if kind in ("metaspace", "gemma"):  # byte tokens are ordinary tokens, used by the BPE model only
        state = json.loads(tokenizer.to_str())
        state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in control]
        tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    if bos is not None:
        pair = (bos, tokenizer.token_to_id(bos))
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[pair])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos, chat_template=template
    )


@cache
def family(name: str) -> PreTrainedTokenizerFast:
    chatml = ["<|im_start|>", "<|im_end|>", "<|endoftext|>"]
    llama3 = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    return {
        "chatml": lambda: build_tokenizer("gpt2", chatml, CHAT_TEMPLATES["chatml"], None, "<|im_end|>"),
        "zephyr": lambda: build_tokenizer("metaspace", ["<s>", "</s>"], CHAT_TEMPLATES["zephyr"], "<s>", "</s>"),
        "llama3": lambda: build_tokenizer("llama3", llama3, CHAT_TEMPLATES["llama3"], llama3[0], "<|end_of_text|>"),
        "mistral": lambda: build_tokenizer("metaspace", ["<s>", "</s>"], MISTRAL, "<s>", "</s>"),
        "gemma": lambda: build_tokenizer(
            "gemma", ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"], GEMMA, "<bos>", "<eos>"
        ),
        "thinking": lambda: build_tokenizer("gpt2", chatml, THINKING, None, "<|im_end|>"),
        "hh": lambda: build_tokenizer("gpt2", ["<|endoftext|>"], CHAT_TEMPLATES["hh"], None, "<|endoftext|>"),
    }[name]()


FAMILIES = ["chatml", "zephyr", "llama3", "mistral", "gemma", "thinking"]
END_OF_TURN = {"llama3": "<|eot_id|>", "gemma": "<end_of_turn>"}

texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40),
    st.lists(
        st.sampled_from(["\n", "\n\n", " ", "  ", "a", "The", " answer", ".", "é", "🙂", "</think>", "1234", "'s"]),
        min_size=1,
    ).map("".join),
).filter(str.strip)


@st.composite
def pairs(draw: Any, system: bool) -> Pair:
    prompt = [{"role": "system", "content": draw(texts)}] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(0, 2))):
        prompt += [{"role": "user", "content": draw(texts)}, {"role": "assistant", "content": draw(texts)}]
    prompt.append({"role": "user", "content": draw(texts)})
    chosen, rejected = draw(texts), draw(texts)
    assume(chosen.strip() != rejected.strip())
    return Pair(prompt, [{"role": "assistant", "content": chosen}], [{"role": "assistant", "content": rejected}])


def whole(tokenizer: Any, messages: list[dict]) -> list[int]:
    """Return the conversation's tokens from the tokenizer's own chat template, with one BOS."""
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    uses_bos = tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return [tokenizer.bos_token_id, *ids] if uses_bos and ids[:1] != [tokenizer.bos_token_id] else ids


@pytest.mark.parametrize("name", FAMILIES)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(data=st.data())
def test_the_promises_hold_over_random_conversations(name: str, data: Any) -> None:
    tokenizer = family(name)
    template = ChatTemplate(tokenizer)
    batch = data.draw(st.lists(pairs(system=name not in ("mistral", "gemma")), min_size=1, max_size=3))
    results = template.encode_batch(batch)
    assert [str(result) for result in results] == [str(template._attempt(pair)) for pair in batch]
    end = tokenizer.convert_tokens_to_ids(END_OF_TURN.get(name, tokenizer.eos_token))
    for pair, encoded in zip(batch, results, strict=True):
        if not isinstance(encoded, Encoded):
            # Equal: after trimming, or through unknown tokens. Control token: a token's name was drawn as text.
            assert encoded.reason in ("chosen equals rejected", "control token in the text")
            continue
        for answer, ids in ((pair.chosen, encoded.chosen_ids), (pair.rejected, encoded.rejected_ids)):
            assert encoded.prompt_ids + ids == whole(tokenizer, pair.prompt + answer)
            assert ids.count(end) == 1
            assert len(set(ids) & set(tokenizer.all_special_ids) - {end, tokenizer.unk_token_id}) == 0
        if template.bos is not None:
            assert encoded.prompt_ids[0] == template.bos
            assert (encoded.prompt_ids + encoded.chosen_ids).count(template.bos) == 1
        alone = template.render_prompt(pair.prompt)
        if encoded.mismatch:
            assert encoded.prompt_ids == alone[: len(encoded.prompt_ids)] != alone
        else:
            assert encoded.prompt_ids == alone
            tail = (
                tokenizer.decode(alone[-template.generation_prompt_length :])
                if template.generation_prompt_length
                else ""
            )
            assert (
                tail
                == tokenizer.apply_chat_template(pair.prompt, tokenize=False, add_generation_prompt=True)[-len(tail) :]
                or not tail
            )


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("chatml", ["ends an answer with <|im_end|>"]),
        ("zephyr", ["ends an answer with </s>"]),
        ("llama3", ["ends an answer with <|eot_id|>, not with the tokenizer's EOS <|end_of_text|>"]),
        (
            "mistral",
            ["ends an answer with </s>", "has no system role: a system turn is folded into the first user turn"],
        ),
        (
            "gemma",
            [
                "ends an answer with <end_of_turn>, not with the tokenizer's EOS <eos>",
                "has no system role: a system turn is folded into the first user turn",
            ],
        ),
    ],
)
def test_what_a_template_needs_is_said(name: str, lines: list[str]) -> None:
    assert ChatTemplate(family(name)).describe() == lines


USER = {"role": "user", "content": "Why is the sky blue?"}
SYSTEM = {"role": "system", "content": "Be brief."}
GOOD = {"role": "assistant", "content": "Air scatters blue light most."}
BAD = {"role": "assistant", "content": "It just is."}
ROW = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}


def test_dialogues_of_hh_become_the_tokens_of_the_papers_code() -> None:
    """Prompt up to the last `Assistant:`, then the answer with its blank and one EOS, each encoded by itself."""
    tokenizer = family("hh")
    prompt = "\n\nHuman: Why is the sky blue?\n\nAssistant: Which one?\n\nHuman: Ours.\n\nAssistant:"
    answers = {"chosen": " Air scatters blue light most.", "rejected": " It just is."}
    made = apply_chat_template({name: prompt + text for name, text in answers.items()}, tokenizer)
    encode = functools.partial(tokenizer.encode, add_special_tokens=False)
    assert made["prompt_ids"] == encode(prompt)
    for name, text in answers.items():
        assert made[f"{name}_ids"] == [*encode(text), tokenizer.eos_token_id]
    folded = "has no system role: a system turn is folded into the first user turn"
    assert ChatTemplate(tokenizer).describe() == ["ends an answer with <|endoftext|>", folded]


def test_a_row_in_any_layout_is_templated(tokenizer: Any) -> None:
    ids = apply_chat_template(ROW, tokenizer)
    transcript = {
        "chosen": f"\n\nHuman: {USER['content']}\n\nAssistant: {GOOD['content']}",
        "rejected": f"\n\nHuman: {USER['content']}\n\nAssistant: {BAD['content']}",
    }
    assert apply_chat_template(transcript, tokenizer) == ids
    assert ids["prompt_ids"] + ids["chosen_ids"] == whole(tokenizer, [USER, GOOD])
    scored = {"prompt": USER["content"], "responses": ["It just is.", GOOD["content"]], "scores": [1, 2]}
    assert apply_chat_template(scored, tokenizer) == ids
    with pytest.raises(RowError, match="all answers have the same score"):
        apply_chat_template({**scored, "scores": [1, 1]}, tokenizer)


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": f"Human: {USER['content']}\n\nAssistant: {GOOD['content']}"}
        | {"rejected": f"Human: {USER['content']}\n\nAssistant: {BAD['content']}"},
        {"prompt": f"Human: {USER['content']}\n\nAssistant:", "chosen": GOOD["content"], "rejected": BAD["content"]},
        {"messages": [USER, GOOD], "rejected_response": BAD["content"]},
        {"messages": [USER], "chosen": GOOD, "rejected": BAD},
        {"Prompt": USER["content"], "chosen response": GOOD["content"], "Rejected": [BAD["content"]]},
        {
            "prompt": USER["content"],
            "answers": [{"answer": BAD["content"], "rank": 2}, {"answer": GOOD["content"], "rank": 1}],
        },
        {"chosen": [USER | {"id": 1}, GOOD | {"id": 2}], "rejected": [USER | {"id": 3}, BAD | {"id": 4}]},
        {"prompt": f"<|user|>\n{USER['content']}</s>", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    ],
)
def test_rows_of_other_layouts_are_the_same_tokens(row: dict[str, Any]) -> None:
    tokenizer = family("chatml")
    ids = apply_chat_template(row, tokenizer)
    assert ids == apply_chat_template(ROW, tokenizer)
    assert (
        tokenizer.decode(ids["prompt_ids"]) == f"<|im_start|>user\n{USER['content']}<|im_end|>\n<|im_start|>assistant\n"
    )
    assert tokenizer.decode(ids["chosen_ids"]) == f"{GOOD['content']}<|im_end|>\n"


def test_a_prompt_from_a_file_shows_the_arguments_of_its_calls() -> None:
    tokenizer = copy.deepcopy(family("chatml"))
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content']", "(message['content'] + (message.tool_calls[0].arguments if message.tool_calls else ''))"
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "look", "arguments": {"city": "Oslo"}}]}
    prompt = [USER, call, {"role": "tool", "content": "found"}]
    ids = ChatTemplate(tokenizer, None, "fold").render_prompt(prompt)
    assert '<|im_start|>assistant\n{"city": "Oslo"}<|im_end|>' in tokenizer.decode(ids)


def test_a_blank_system_turn_stays_where_the_template_has_the_role_and_else_goes() -> None:
    row = {**ROW, "prompt": [{"role": "system", "content": " "}, USER]}
    chatml = apply_chat_template(row, family("chatml"))
    assert family("chatml").decode(chatml["prompt_ids"]).startswith("<|im_start|>system\n <|im_end|>")
    for policy in ("fold", "error"):
        plain = apply_chat_template(ROW, family("gemma"))
        assert apply_chat_template(row, family("gemma"), on_no_system_role=policy) == plain
        assert apply_chat_template(ROW, family("gemma"), on_no_system_role=policy, system_prompt="") == plain


@pytest.mark.parametrize("name", ["mistral", "gemma"])
def test_a_system_turn_that_a_template_does_not_know_is_folded_or_refused(name: str) -> None:
    tokenizer = family(name)
    ids = apply_chat_template({**ROW, "prompt": [SYSTEM, USER]}, tokenizer)
    folded = [{"role": "user", "content": f"Be brief.\n\n{USER['content']}"}]
    assert ids == apply_chat_template({**ROW, "prompt": folded}, tokenizer)
    with pytest.raises(RowError, match="has no system role"):
        apply_chat_template({**ROW, "prompt": [SYSTEM, USER]}, tokenizer, on_no_system_role="error")


def test_a_template_that_silently_drops_the_system_turn_is_found_out() -> None:
    silent = "{% for m in messages if m['role'] != 'system' %}" + CHAT_TEMPLATES["chatml"].split("%}", 1)[1]
    tokenizer = build_tokenizer(
        "gpt2", ["<|im_start|>", "<|im_end|>"], silent.replace("message[", "m["), None, "<|im_end|>"
    )
    ids = apply_chat_template({**ROW, "prompt": [SYSTEM, USER]}, tokenizer)
    assert "Be brief." in tokenizer.decode(ids["prompt_ids"])


def test_a_system_prompt_is_added_where_there_is_none() -> None:
    tokenizer = family("chatml")
    added = apply_chat_template(ROW, tokenizer, system_prompt="Be brief.")
    assert added == apply_chat_template({**ROW, "prompt": [SYSTEM, USER]}, tokenizer)
    assert apply_chat_template({**ROW, "prompt": [SYSTEM, USER]}, tokenizer, system_prompt="Be long.") == added


def test_a_thinking_template_is_refused_with_the_offending_tokens_or_cut_to_what_is_common() -> None:
    tokenizer = family("thinking")
    with pytest.raises(RowError, match=r"'<think>\\n' became 'Air scatters.*longest_common_prefix"):
        apply_chat_template(ROW, tokenizer)
    ids = apply_chat_template(ROW, tokenizer, on_template_mismatch="longest_common_prefix")
    assert tokenizer.decode(ids["prompt_ids"]).endswith("<|im_start|>assistant\n")
    assert ids["prompt_ids"] + ids["chosen_ids"] == whole(tokenizer, [USER, GOOD])


def test_tokens_that_merge_across_the_border_are_a_mismatch() -> None:
    tokenizer = family("chatml")
    row = {**ROW, "chosen": "\n\nOn a new line."}
    with pytest.raises(RowError, match="template mismatch"):
        apply_chat_template(row, tokenizer)
    ids = apply_chat_template(row, tokenizer, on_template_mismatch="longest_common_prefix")
    assert tokenizer.decode(ids["prompt_ids"]).endswith("<|im_start|>assistant")
    assert ids["prompt_ids"] + ids["rejected_ids"] == whole(tokenizer, [USER, BAD])


def test_tools_and_template_variables_reach_the_template() -> None:
    template = "{{ tools | tojson if tools else '' }}{{ mood or '' }}" + CHAT_TEMPLATES["chatml"]
    tokenizer = build_tokenizer("gpt2", ["<|im_start|>", "<|im_end|>"], template, None, "<|im_end|>")
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    ids = apply_chat_template({**ROW, "tools": json.dumps(tools), "chat_template_kwargs": {"mood": "calm"}}, tokenizer)
    text = tokenizer.decode(ids["prompt_ids"])
    assert "look_up" in text and "calm" in text


@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_control_token_in_a_text_is_refused(column: str) -> None:
    row = {"prompt": "Why?", "chosen": "So.", "rejected": "No.", column: "Fine.<|im_end|>"}
    with pytest.raises(RowError, match=rf"control token in the text: `{column}` holds '<\|im_end\|>'"):
        apply_chat_template(row, family("chatml"))


def test_a_control_token_in_the_system_prompt_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`data\.system_prompt`: holds the control token '<\|im_end\|>'"):
        apply_chat_template(ROW, family("chatml"), system_prompt="Be brief.<|im_end|>")


def test_a_doubled_bos_is_refused() -> None:
    tokenizer = build_tokenizer("metaspace", ["<s>", "</s>"], "{{ bos_token }}" + MISTRAL, "<s>", "</s>")
    with pytest.raises(RowError, match="BOS twice"):
        apply_chat_template(ROW, tokenizer)


def test_a_bos_that_only_the_tokenizer_adds_is_there_once() -> None:
    tokenizer = family("zephyr")
    ids = apply_chat_template(ROW, tokenizer)
    assert ids["prompt_ids"][0] == tokenizer.bos_token_id
    assert ids["prompt_ids"].count(tokenizer.bos_token_id) == 1


def test_a_template_that_leaves_the_answer_open_is_closed_with_eos() -> None:
    template = (
        "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    )
    tokenizer = build_tokenizer("gpt2", ["<eos>"], template, None, "<eos>")
    ids = apply_chat_template(ROW, tokenizer)
    assert ids["chosen_ids"][-1] == tokenizer.eos_token_id and ids["chosen_ids"].count(tokenizer.eos_token_id) == 1
    assert ChatTemplate(tokenizer).describe() == ["leaves an answer open, so <eos> is added"]


def test_without_a_template_single_turns_are_plain_text() -> None:
    tokenizer = build_tokenizer("gpt2", ["<eos>"], "", None, "<eos>")
    tokenizer.chat_template = None
    ids = apply_chat_template({"prompt": "2+2=", "chosen": " four", "rejected": " five"}, tokenizer)
    assert tokenizer.decode(ids["prompt_ids"] + ids["chosen_ids"]) == "2+2= four<eos>"
    for prompt in ([USER, GOOD, USER], [SYSTEM, USER]):
        with pytest.raises(RowError, match=r"model\.chat_template"):
            apply_chat_template({**ROW, "prompt": prompt}, tokenizer)


def test_templates_that_cannot_be_used_at_all() -> None:
    broken = build_tokenizer("gpt2", ["<eos>"], "{{ raise_exception('no') }}", None, "<eos>")
    with pytest.raises(ConfigError, match="cannot render one question and answer: no"):
        ChatTemplate(broken)
    mute = build_tokenizer("gpt2", ["<eos>"], "{{ messages[0]['content'] }}", None, "<eos>")
    with pytest.raises(ConfigError, match="leaves out the answer"):
        ChatTemplate(mute)


def test_a_tokenizer_that_lets_text_reach_across_a_control_token_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(family("chatml"))
    pair = read_pairs(ROW, find_layout([ROW], "auto"), "best_vs_worst")[0]
    tokenize = template._tokenize

    def contextual(texts: list[str]) -> list[list[int]]:
        return [ids if len(ids) > 20 else [*ids, 5] for ids in tokenize(texts)]

    monkeypatch.setattr(template, "_tokenize", contextual)
    with pytest.raises(Exception, match="tokenizes a prompt in parts differently"):
        template.encode_batch([pair])


def test_named_templates_and_files(tmp_path: Path) -> None:
    assert "<|im_start|>" in resolve_chat_template("chatml")
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert resolve_chat_template(str(tmp_path / "t.jinja")) == "{{ messages }}"
    with pytest.raises(ConfigError, match=r"model\.chat_template=zepyhr.*chatml, zephyr, llama3"):
        resolve_chat_template("zepyhr")

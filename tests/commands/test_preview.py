"""The data preview: terminal output, the page in a real browser, and the list of dropped rows."""

import html
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape
from rich.console import Console

from dpo_runner.data.report import PARTS, DataReport, LengthBias, Lengths, SourceReport, SplitReport
from dpo_runner.data.templates.rendering import find_special_ids
from dpo_runner.io.console import visible
from dpo_runner.io.pages import escape_label
from dpo_runner.preview.__main__ import main
from dpo_runner.preview.page import Piece, Row, build_page
from dpo_runner.preview.screen import draw_bars, show_report, show_rows, split_pieces
from tests.support.browser import open_page
from tests.support.common import run_main

SCRIPT = "<script>document.title='pwned'</script>"
IMAGE = "</script><img src=x onerror=\"document.title='pwned'\">"
MARKUP = "<b>x</b> &lt;i&gt; $y$ %{y}"
STEERING = "\x1b[31m\x07\x9b2J\u202ered\r"


def piece(text: str, token_id: int = 5) -> Piece:
    return Piece(text, (token_id,), special=False)


def split_report(kept: int) -> SplitReport:
    lengths = {part: np.arange(kept) % (7 + index) + 3 for index, part in enumerate(PARTS)}
    return SplitReport(
        pairs=kept + 4,
        kept=kept,
        by_source={SCRIPT: kept},
        dropped={f"too long {IMAGE}": 2, MARKUP: 1},
        unused=1,
        truncated={"lose the end of an answer": 3},
        duplicates=2,
        lengths={part: Lengths.of(values) for part, values in lengths.items()},
        length_bias=LengthBias.of(lengths["chosen"], lengths["rejected"]),
    )


@pytest.fixture
def report() -> DataReport:
    """A report whose names and reasons all contain scripts or terminal control sequences."""
    files = [f"data/{IMAGE}.jsonl".replace("</script>", ""), f"{STEERING}.jsonl"]
    return DataReport(
        template=[f"folded {SCRIPT}"],
        sources=[
            SourceReport("data", "train", files, "preference", 40, 34, {f"not JSON {SCRIPT}": 4}, {MARKUP: 2}),
            SourceReport(SCRIPT, "eval", ["eval.jsonl"], "preference", 14, 14, mismatched=3, unread=["margin", SCRIPT]),
        ],
        splits={"train": split_report(30), "eval": replace(split_report(10), dropped={}, unused=0)},
        warnings=[f"beware {IMAGE} {STEERING}"],
    )


@pytest.fixture
def rows() -> list[Row]:
    hostile = [
        Piece("<|im_start|>", (1,), special=True),
        *map(piece, (SCRIPT, IMAGE, STEERING, "日本", "\n\n", "ende")),
    ]
    return [Row(f"{IMAGE}.jsonl:12", {"prompt": hostile, "chosen": [piece("yes")], "rejected": hostile})]


@pytest.fixture
def console() -> Console:
    return Console(record=True, width=300, highlight=False)


def test_control_characters_become_visible() -> None:
    assert visible("a\tb\nc") == "a\tb\nc"
    assert visible("\x1b[2J\x00\r\x7f") == "␛[2J␀␍␡"
    assert visible("\x9b1m\u202e\u2066\ud800") == "\\x9b1m\\u202e\\u2066\\ud800"
    assert visible("héllo 日本語 🙂 שלום") == "héllo 日本語 🙂 שלום"


def test_bars_show_every_bin_that_holds_something() -> None:
    assert draw_bars([0, 1, 8, 1000]) == " ▁▁█"
    assert draw_bars([4]) == "█"
    assert draw_bars([1] * 40, width=24) == "█" * 20
    assert len(draw_bars(list(range(39)), width=24)) == 20


TEXTS = (
    "Hello there, world.\n\n\tIndented",
    "日本語 🙂🏽‍🚀 naïve Ωμέγα",
    "literal \ufffd\ufffd and after \ufffd",
    "\ufffd" * 100 + "日",
    " leading and trailing ",
    "",
)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_are_whole_characters(tokenizer, text: str) -> None:
    ids = tokenizer(f"{text}<|im_end|>\n")["input_ids"]
    pieces = split_pieces(ids, tokenizer)
    assert "".join(piece.text for piece in pieces) == f"{text}<|im_end|>\n"
    assert [token for piece in pieces for token in piece.token_ids] == ids
    assert [piece.text for piece in pieces if piece.special] == ["<|im_end|>"]
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece.text for piece in pieces)


def test_a_character_cut_in_the_middle_ends_the_pieces(tokenizer) -> None:
    ids = tokenizer("ab🙂")["input_ids"]
    pieces = split_pieces(ids[:-1], tokenizer)
    assert pieces[-1].text == "\ufffd" and len(pieces) > 1
    eos = tokenizer.eos_token_id
    assert [piece.special for piece in split_pieces([*ids[:-1], eos], tokenizer)][-2:] == [False, True]
    assert split_pieces([], tokenizer) == []


def test_spaces_survive_tokenizers_that_drop_a_leading_one() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<s>": 0, "<unk>": 1, "▁Hello": 2, "▁my": 3, "▁friend": 4, "[INST]": 5, "▁": 6}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    model.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", unk_token="<unk>")
    ids = [2, 3, 4]
    assert tokenizer.decode([3]) == "my"  # the leading space is dropped
    assert [piece.text for piece in split_pieces(ids, tokenizer)] == ["Hello", " my", " friend"]
    assert [piece.text for piece in split_pieces(ids[1:], tokenizer, before=ids[:1])] == [" my", " friend"]


def test_a_chat_templates_own_tokens_are_special_too(tokenizer) -> None:
    from copy import deepcopy

    from tokenizers import AddedToken

    extended = deepcopy(tokenizer)
    extended.add_tokens([AddedToken("<|header|>", special=True), AddedToken("<plain>", special=False)])
    special = find_special_ids(extended)
    assert extended.convert_tokens_to_ids("<|header|>") in special
    assert extended.convert_tokens_to_ids("<plain>") not in special
    assert extended.eos_token_id in special


def test_the_terminal_shows_the_report_and_obeys_nothing_in_it(report, rows, console) -> None:
    show_report(report, console)
    show_rows(rows, console)
    text = console.export_text()
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)
    assert "␛[31m" in text and "<|im_start|>" in text and "日本↵" in text
    flat = "".join(character for character in text if character not in " \n│")
    for expected in (
        "4bad:notJSON",
        "2leftout:<b>x</b>",
        "3withthepromptcut",
        "1notdrawn",
        "lengthbias,train",
        "██",
        "columnsnotused:margin,",
    ):
        assert expected in flat


def test_special_tokens_are_inverse_and_parts_coloured(rows) -> None:
    console = Console(record=True, width=120, force_terminal=True, color_system="standard", highlight=False)
    show_rows(rows, console)
    styled = console.export_text(styles=True)
    assert "\x1b[7;34m<|im_start|>" in styled
    assert "\x1b[32myes" in styled


def test_the_page_holds_data_as_text_only(report, rows) -> None:
    page = build_page(report, rows, {"model": f"m{SCRIPT}"})
    ours = page.replace(re.search(r"<script nonce=[^>]+>/\*\*.*?</script>", page, re.DOTALL)[0], "")
    assert len(re.findall(r"<script", ours)) == 1 == ours.count("</script>")
    assert "<img" not in ours and SCRIPT not in ours and "<b>x</b>" not in ours
    assert str(escape(SCRIPT)) in ours and "columns not used: margin, " in ours
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", ours)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", ours)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)[1]
    assert policy.startswith("default-src 'none'; script-src 'nonce-")
    assert page.count("plotly.js v") == 1, "plotly.js is inlined once"


def test_pages_share_no_nonce(report) -> None:
    nonces = {re.search(r"'nonce-([^']+)'", build_page(report, [], {}))[1] for _ in range(2)}
    assert len(nonces) == 2


def test_a_report_with_nothing_left_is_a_page_too(report, console) -> None:
    report.splits = {"train": replace(split_report(30), kept=0, lengths={}, length_bias=None)}
    report.sources, report.warnings = [], []
    assert "training pairs" in build_page(report, [], {})
    show_report(report, console)


def test_plot_labels_are_one_short_line_without_markup() -> None:
    assert escape_label("<b>a</b>\n&amp;") == "&lt;b&gt;a&lt;/b&gt; &amp;amp;"
    assert len(escape_label("x" * 200)) == 60


def test_a_real_browser_draws_the_page_and_runs_nothing_of_the_data(report, rows, tmp_path: Path) -> None:
    dom, complaints = open_page(build_page(report, rows, {"model": SCRIPT}), tmp_path)
    title = re.search(r"<title>(.*?)</title>", dom)[1]
    assert "pwned" in title and "preference data" in title and title != "pwned"
    assert complaints == []

    assert "<img" not in dom and not re.search(r"(src|href)=\"http", dom)
    drawn = re.findall(r'<div class="plot js-plotly-plot".*?<svg class="main-svg"', dom, flags=re.DOTALL)
    # two sources, two splits with three parts each, and the length bias
    assert len(drawn) == dom.count(" data-figure=") == 2 + 2 + 6 + 1
    assert dom.count('class="point"') > 30

    texts = [html.unescape(re.sub(r"<[^>]*>", "", text)) for text in re.findall(r"<text.*?</text>", dom, re.DOTALL)]
    assert any(text.endswith(f"left out: {MARKUP}") for text in texts), "plot labels show markup as it is"
    assert any(SCRIPT in text for text in texts)
    shown = html.unescape(re.sub(r"<[^>]*>", "", dom[dom.index("<pre>") : dom.rindex("</pre>")]))
    assert SCRIPT + IMAGE + "␛[31m␇\\x9b2J\\u202ered␍日本↵\n↵\nende" in shown


def run_preview(*arguments: str) -> int:
    return run_main(main, "model=tiny_random", *arguments)


@pytest.fixture
def few_pairs(tmp_path: Path) -> str:
    """Overrides for forty pairs, two of them unusable."""
    rows = [{"prompt": f"Q{n}\x1b[31m 日本?", "chosen": f"It is {n}. 🙂", "rejected": "No."} for n in range(38)]
    rows += [{"prompt": "Same?", "chosen": "yes", "rejected": "yes"}, {"prompt": "Gone?", "chosen": "yes"}]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "data.path=few.jsonl"


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch, tiny_model: str) -> None:
    """Fail if weights are loaded; the tiny model is in the cache already."""
    import transformers

    import dpo_runner.model.policy

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("weights are loaded")

    for name in ("load_policy", "load_base_model"):
        monkeypatch.setattr(dpo_runner.model.policy, name, refuse)
    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", refuse)
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)


def test_the_command_shows_the_data_and_loads_no_weights(few_pairs, no_weights, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    # overrides and options in any order, as in the run command
    assert (
        run_preview("data=local_file", "--html", "page.html", few_pairs, "--dropped", "dropped.jsonl", "--rows=2") == 0
    )
    output = capsys.readouterr()
    assert output.err == ""
    assert "\x1b" not in output.out and "␛[31m 日本?<|im_end|>↵" in output.out and "It is" in output.out
    assert len(set(re.findall(r"few\.jsonl:\d+ ─", output.out))) == 2
    assert re.search(
        r"length bias, train: chosen is longer in 100% of pairs, .* on average \d+\.\d tokens longer", output.out
    )
    assert "chat template: the tokenizer's own" in output.out

    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>few.jsonl</h1>" in page and page.count('<article class="row">') == 2
    dropped = [json.loads(line) for line in (tmp_path / "dropped.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["line"] for row in dropped] == [39, 40]
    assert {"source", "split", "file", "line", "reason", "detail"} == set(dropped[0])


def test_no_rows_and_no_files_are_asked_for(pairs, no_weights, tmp_path, capsys) -> None:
    assert run_preview("data=local_file", f"data.path={pairs}", "--rows", "0") == 0
    assert "<|im_start|>" not in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["pairs.jsonl"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.pth=x"], "`data.pth`: no such field; did you mean `path`?"),
        (["data=local_file", "data.path=gone.jsonl"], "gone.jsonl"),
        (["--rows", "-1"], "--rows -1: must be 0 or more"),
        (["--html", "no/page.html"], "--html no/page.html: no such folder no"),
        (["--html", "."], "--html .: is a folder; name a file"),
        (["--dropped", "x", "--html", "x"], "--html and --dropped: both name x"),
        (["data=local_file", "data.path=pairs.jsonl", "--dropped", "pairs.jsonl"], "pairs.jsonl: is the data itself"),
        (["data=local_file", "data.path=.", "--html", "./pairs.jsonl"], "pairs.jsonl: is the data itself"),
        (["data=local_file", "data.path=pairs.jsonl", "--config-dir", "nowhere"], "--config-dir=nowhere: No such file"),
    ],
)
def test_mistakes_are_one_line_and_exit_with_2(pairs, no_weights, capsys, arguments, message) -> None:
    assert run_preview(*arguments) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert Path(pairs).stat().st_size > 0


def test_data_that_stop_a_run_stop_the_preview(few_pairs, no_weights, capsys) -> None:
    assert run_preview("data=local_file", few_pairs, "data.on_bad_row=error") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "few.jsonl:39" in error and len(error.splitlines()) == 1


def test_a_file_that_cannot_be_written_is_one_line(pairs, no_weights, capsys, monkeypatch) -> None:
    def fail(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dpo_runner.io.pages.write_text", fail)
    assert run_preview("data=local_file", f"data.path={pairs}", "--html", "page.html") == 2
    assert capsys.readouterr().err == "error: --html page.html: cannot be written; No space left on device\n"


def test_dropped_rows_with_half_a_character_can_be_written(pairs, no_weights, tmp_path, monkeypatch) -> None:
    from dpo_runner.data.preferences import PreferenceData

    row = {"source": "data", "split": "train", "file": "\udc80.jsonl", "line": 1, "reason": "日本", "detail": ""}
    monkeypatch.setattr(PreferenceData, "dropped", lambda self: iter([row]))
    assert run_preview("data=local_file", f"data.path={pairs}", "--dropped", "dropped.jsonl") == 0
    text = (tmp_path / "dropped.jsonl").read_text(encoding="utf-8")
    assert "日本" in text and json.loads(text) == row

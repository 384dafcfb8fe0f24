"""The comparison page in a real browser: complete, runs nothing from the data, fast with 200 runs."""

import html
import itertools
import json
import re
import time
from pathlib import Path

import pytest

from dpo_runner.compare.comparison import DEFAULT_OBJECTIVE, choose_objective, compare_runs
from dpo_runner.compare.page import build_page, rebuild_page
from dpo_runner.records.runs import read_runs
from tests.support.browser import open_page
from tests.support.browser_data import read_payload
from tests.support.run_folders import write_run, write_samples

SCRIPT = "<script>document.title='pwned'</script>"
IMAGE = "</script><img src=x onerror=\"document.title='pwned'\">"
MARKUP = "<b>x</b> &lt;i&gt; $y$ %{y}"
STEERING = "\x1b[31m\x07\x9b2J\u202ered\r"


def page_of(folder: Path) -> str:
    runs, _ = read_runs([folder])
    return build_page(compare_runs(runs, choose_objective(DEFAULT_OBJECTIVE, None, runs)))


@pytest.fixture
def hostile(tmp_path: Path) -> str:
    """A page of runs whose texts all contain scripts or control sequences."""
    for index, text in enumerate((SCRIPT, IMAGE, MARKUP)):
        name = f"{index}-{text}".replace("/", "∕")
        run = write_run(tmp_path / "runs" / name, training__loss_type=text + STEERING, training__beta=0.1 * (index + 1))
        write_samples(run, [(f"{SCRIPT}{IMAGE}", f"{STEERING} 日本", f"{MARKUP} {IMAGE}")])
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 1, f"eval_{text}": 1.0}) + "\n")
    failed = write_run(tmp_path / "runs" / "3-failed", state="failed")
    (failed / "status.json").write_text(json.dumps({"state": SCRIPT, "error": f"{IMAGE}{STEERING}"}))
    (failed / "samples.jsonl").write_text("{")
    return page_of(tmp_path / "runs")


def test_the_page_holds_data_as_text_only(hostile: str) -> None:
    ours = hostile.replace(re.search(r"<script nonce=[^>]+>/\*\*.*?</script>", hostile, re.DOTALL)[0], "")
    assert len(re.findall(r"<script", ours)) == 2 == ours.count("</script>"), "the data and the page's own"
    assert "<img" not in ours and "<b>x</b>" not in ours
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", ours)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", ours)
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', hostile)[1]
    assert policy.startswith("default-src 'none'; script-src 'nonce-") and "unsafe-eval" not in policy
    assert hostile.count("plotly.js v") == 1


CHOOSE_ALL = """
for (const box of ["curve", "x", "y"])
  for (const option of document.getElementById(box).options) {
    document.getElementById(box).value = option.value;
    document.getElementById(box).dispatchEvent(new Event("change"));
  }
for (const which of ["a", "b"])
  for (const option of document.getElementById(which).options) {
    document.getElementById(which).value = option.value;
    document.getElementById(which).dispatchEvent(new Event("change"));
  }
for (const heading of document.querySelectorAll("th.sortable")) document.querySelectorAll("th.sortable")[0].click();
for (const which of ["a", "b"]) choose(which, 0);
"""


def test_a_real_browser_draws_it_all_and_runs_nothing_of_the_data(hostile: str, tmp_path: Path) -> None:
    dom, complaints = open_page(hostile, tmp_path, CHOOSE_ALL)
    assert complaints == []
    title = re.search(r"<title>(.*?)</title>", dom)[1]
    assert title == "runs · comparison of runs"
    assert "<img" not in dom and not re.search(r"(src|href)=\"http", dom)
    drawn = re.findall(r'<div class="plot js-plotly-plot".*?<svg class="main-svg"', dom, flags=re.DOTALL)
    assert len(drawn) == 3
    table = re.search(r'<table id="runs">.*?</table>', dom, re.DOTALL)[0]
    assert table.count("<tr") == 5
    text = html.unescape(re.sub(r"<[^>]*>", "", dom))
    assert f"{MARKUP} {IMAGE}" in text and "␛[31m␇\\x9b2J\\u202ered␍ 日本" in text
    labels = [html.unescape(re.sub(r"<[^>]*>", "", label)) for label in re.findall(r"<text.*?</text>", dom, re.DOTALL)]
    assert any(label.startswith("<b>x</b>") for label in labels), "plot labels show markup as it is"


INTERACT = """
window.requestAnimationFrame = (draw) => setTimeout(draw, 0);  // a headless browser may draw no frame for long
const report = {}, count = (selector) => document.querySelectorAll(selector).length;
const rows = () => [...document.querySelectorAll("#runs tbody tr")].filter((row) => !row.hidden);
const texts = (at) => rows().map((row) => row.cells[at].textContent);
const set = (id, property, value, event) => { byId(id)[property] = value; byId(id).dispatchEvent(new Event(event)); };
report.joined = rows().length;
set("per-seed", "checked", true, "change");
report.singly = rows().length;
set("per-seed", "checked", false, "change");
const at = [...document.querySelectorAll("#runs thead th")].findIndex((cell) => cell.textContent === "drift");
document.querySelectorAll("#runs thead th")[at].click();
report.falling = texts(at).map(parseFloat);
document.querySelectorAll("#runs thead th")[at].click();
report.rising = texts(at).map(parseFloat);
set("filter", "value", "beta=0.3", "input");
report.filtered = rows().length;
set("filter", "value", "", "input");
document.querySelector("#runs tbody input").click();
const mouse = (kind, x, y) => document.elementFromPoint(x, y).dispatchEvent(
  new MouseEvent(kind, {bubbles: true, cancelable: true, clientX: x, clientY: y, buttons: 1, view: window}));
const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));
async function until(condition) {
  for (let tries = 0; tries < 20 && !condition(); tries++) await pause(100);
}
(async () => {
  await until(() => byId("curves").data.length === 4);
  report.curves = byId("curves").data.length;
  byId("all").click();
  await until(() => byId("scatter").data.at(-1).x.length === 6);
  byId("parallel").scrollIntoView();
  const area = byId("parallel").querySelector(".nsewdrag").getBoundingClientRect();
  const x = area.left + area.width * 0.1 / (axes.length - 0.8);
  mouse("mousedown", x, area.top + area.height * 0.1);
  for (const part of [0.12, 0.18, 0.2]) {
    mouse("mousemove", x + 15 * part, area.top + area.height * part);
    await pause(60);
  }
  mouse("mouseup", x + 3, area.top + area.height * 0.2);
  await until(() => byId("scatter").data.at(-1).x.length === 2);
  report.brushed = byId("scatter").data.at(-1).x.length;
  report.axis = state.brushes.map((brush) => brush.axis.key);
  report.low = Math.min(...runs.filter((run, index) => isShown(index)).map((run) => axes[0].of(run)));
  report.pair = [state.a, state.b].map((index) => runs[index].name);
  [...document.querySelectorAll("#runs tbody tr")].at(-1).querySelector("[data-which=b]").click();
  report.chosen = runs[state.b].name;
  report.diff = [...document.querySelectorAll("#diff tbody tr")].map((row) => row.cells[0].textContent);
  report.answers = [...document.querySelectorAll("#answers .answers pre")].map((text) => text.textContent);
  document.body.dataset.report = JSON.stringify(report);
})();
"""


def test_sorting_filtering_brushing_and_choosing_work(tmp_path: Path) -> None:
    for beta, seed in itertools.product((0.05, 0.1, 0.3), (1, 2)):
        write_run(tmp_path / "runs" / f"{beta}-{seed}", seed=seed, training__beta=beta, accuracy=beta)
    dom, complaints = open_page(page_of(tmp_path / "runs"), tmp_path, INTERACT)
    assert complaints == []
    report = json.loads(html.unescape(re.search(r'data-report="([^"]*)"', dom)[1]))
    assert (report["joined"], report["singly"], report["filtered"]) == (3, 6, 1)
    assert report["falling"] == sorted(report["falling"], reverse=True) != report["rising"] == sorted(report["rising"])
    assert report["curves"] == 4, "the two seeds of a row are no longer drawn"
    assert report["axis"] == ["training.beta"] and report["brushed"] == 2 and report["low"] == 0.3
    assert report["pair"][0].startswith("0.3-") and report["pair"][1].startswith("0.1-")
    assert report["chosen"].startswith("0.05-")
    assert "training.beta" in report["diff"] and "accuracy" in report["diff"]
    assert not {"lora.r", "run_dir", "wandb.name"} & set(report["diff"])
    assert report["answers"][:2] == ["Long answer 0.", f"Answer of {report['pair'][0]}."]
    assert report["answers"][2] == f"Answer of {report['chosen']}."


def test_a_page_of_two_hundred_runs_is_small_and_quick(tmp_path: Path) -> None:
    settings = itertools.product((0.01, 0.05, 0.1, 0.3, 0.5), (5e-6, 1e-5, 5e-5, 1e-4), (1, 2, 3, 4, 5), (8, 64))
    for index, (beta, rate, seed, rank) in enumerate(settings):
        path = tmp_path / "runs" / f"{index:03}"
        write_run(path, seed=seed, training__beta=beta, training__learning_rate=rate, lora__r=rank, steps=1000)
        write_samples(path, [(f"Question {n}?", "long " * 80, f"{index} short " * 40) for n in range(24)])
    before = time.process_time()
    page = rebuild_page(tmp_path / "runs").read_text(encoding="utf-8")
    assert time.process_time() - before < 6
    assert len(page) < 12_000_000
    measure = """
    const loaded = performance.now();
    byId("none").click();
    byId("all").click();
    for (const draw of [drawTable, drawCurves, drawScatter, drawParallel]) draw();
    const drawn = ["curves", "parallel"].map((id) => byId(id).data.length);
    document.body.dataset.report = JSON.stringify([loaded, performance.now() - loaded, ...drawn]);
    """
    dom, complaints = open_page(page, tmp_path, measure, real_time=True)
    assert complaints == []
    loaded, redrawn, curves, lines = json.loads(re.search(r'data-report="([^"]*)"', dom)[1])
    assert (curves, lines) == (200, 201)
    assert 0 < redrawn < 5_000 and loaded < 10_000, "milliseconds"
    assert dom.count("<tr") > 40


def test_long_curves_and_answers_are_cut_to_what_a_page_bears(tmp_path: Path, monkeypatch) -> None:
    path = write_run(tmp_path / "runs" / "a")
    lines = [json.dumps({"step": step, "loss": 1 / step}) for step in range(1, 5001)]
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    write_samples(path, [(f"Q{n}", "x" * 9_000, f"y{n}" * 1_500) for n in range(20)])
    monkeypatch.setattr("dpo_runner.compare.page._ANSWERS", 50_000)
    payload = read_payload(page_of(tmp_path / "runs"))
    _, steps, values = payload["curves"]["loss"][0]
    assert len(steps) == len(values) == 400 and (steps[0], steps[-1]) == (1, 5000)
    assert sum(map(len, payload["texts"])) < 60_000 and len(payload["runs"][0]["answers"]) == 7
    assert payload["texts"][1].endswith("… (9,000 characters)")


def test_the_page_of_a_sweep_is_rebuilt_in_its_folder_whatever_its_runs_are(tmp_path: Path) -> None:
    assert rebuild_page(tmp_path) == tmp_path / "compare.html"
    (tmp_path / "0-a").mkdir()
    (tmp_path / "0-a" / "status.json").write_text('{"state": "pending"}')
    write_run(tmp_path / "1-b", state="failed")
    half = write_run(tmp_path / "2-c", state="running", steps=10)
    (half / "config.yaml").unlink()
    for name in ("metrics.jsonl", "status.json"):
        (half / name).write_text((half / name).read_text()[:-9])
    foreign = tmp_path / "trl" / "checkpoint-3"
    foreign.mkdir(parents=True)
    history = [{"step": 3, "rewards/margins": 0.5}]
    (foreign / "trainer_state.json").write_text(json.dumps({"global_step": 3, "max_steps": 9, "log_history": history}))
    (tmp_path / "4-d").mkdir()
    (tmp_path / "4-d" / "status.json").mkdir()
    rebuild_page(tmp_path)
    shown = {run["name"]: run["state"] for run in read_payload((tmp_path / "compare.html").read_text())["runs"]}
    assert shown == {"0-a": "pending", "1-b": "failed", "2-c": "unknown", "trl": "unknown"}
    _, complaints = open_page((tmp_path / "compare.html").read_text(), tmp_path)
    assert complaints == []
    assert [path.name for path in sorted(tmp_path.iterdir()) if path.name.startswith(".")] == []


def test_an_empty_page_works_too(tmp_path: Path) -> None:
    dom, complaints = open_page(rebuild_page(tmp_path).read_text(), tmp_path)
    assert "No runs yet." in dom
    assert complaints == []

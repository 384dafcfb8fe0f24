"use strict";
// Draws the page out of the JSON in #data. Whatever comes from there becomes text: textContent in the document,
// escaped in plots, where plotly takes some tags as markup.

const data = JSON.parse(document.getElementById("data").textContent);
const runs = data.runs;
const byId = (id) => document.getElementById(id);
const PALETTE = ["#3f78c9", "#d9642e", "#1f9d76", "#c9455b", "#8b6fc7", "#c99a1e", "#2aa3b5", "#b5589c", "#7f9430", "#8b93a1"];
const SCALE = ["#d9a12e", "#7fae3f", "#1f9d76", "#2f8fb0", "#3f78c9", "#6a5cb8", "#8b5a94"]; // best first
const CONFIG = {responsive: true, displayModeBar: false, typesetMath: false, doubleClick: "reset"};
const MANY_SETTINGS = 6; // more than these stand behind the figures, and on no axis of the parallel coordinates
const LOG_FROM = 20; // settings that span such a factor get a logarithmic axis
const state = {off: new Set(), brushes: [], drag: null, filter: "", joined: data.rows.length > 0, sort: null, a: 0, b: 0};

function format(value) {
  if (value === null || value === undefined) return "–";
  if (typeof value === "number") {
    const rounded = Number(value.toPrecision(4)), size = Math.abs(rounded);
    return size > 0 && (size < 1e-3 || size >= 1e7) ? rounded.toExponential() : String(rounded);
  }
  return typeof value === "string" ? value : JSON.stringify(value);
}

function escapeLabel(text, longest = 60) {
  const line = String(text).replace(/\s+/g, " ").trim();
  const cut = line.length > longest ? line.slice(0, longest - 1) + "…" : line;
  return cut.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
}

function make(tag, text, properties) {
  const element = document.createElement(tag);
  if (text !== undefined) element.textContent = text;
  return Object.assign(element, properties);
}

function mix(position) {
  const scaled = position * (SCALE.length - 1), low = Math.min(Math.floor(scaled), SCALE.length - 2), part = scaled - low;
  const channel = (colour, at) => parseInt(colour.slice(1 + 2 * at, 3 + 2 * at), 16);
  const mixed = [0, 1, 2].map((at) => Math.round(channel(SCALE[low], at) * (1 - part) + channel(SCALE[low + 1], at) * part));
  return `rgb(${mixed.join(",")})`;
}

const colours = runs.map((run, index) => (runs.length <= PALETTE.length ? PALETTE[index] : mix(index / (runs.length - 1))));
const searched = runs.map((run) =>
  [run.name, run.path, run.state, run.error, ...data.settings.map((setting, at) => `${setting.label}=${format(run.settings[at])}`)].join(" ").toLowerCase());

// ---- columns: what a run can be sorted, plotted and filtered by
const columns = [
  ...data.settings.map((setting, at) => ({...setting, setting: true, at, of: (run) => run.settings[at]})),
  ...data.metrics.map((metric, at) => ({...metric, setting: false, at, of: (run) => run.metrics[at]})),
].map((column) => {
  const values = runs.map(column.of).filter((value) => value !== null && value !== undefined);
  const numeric = values.length > 0 && values.every((value) => typeof value === "number");
  const low = Math.min(...(numeric ? values : [0])), high = Math.max(...(numeric ? values : [0]));
  const distinct = [...new Set(numeric ? values : values.map(format))].sort(compareValues);
  return {...column, values: distinct, numeric, log: numeric && column.setting && low > 0 && high / low >= LOG_FROM, low, high};
});
const tableMetrics = columns.filter((column) => !column.setting).slice(0, data.columns);
const tableSettings = columns.filter((column) => column.setting);

function passesBrushes(run) {
  const axes = new Map();
  for (const brush of state.brushes) {
    const position = axisPosition(brush.axis, run);
    const inside = position !== null && position >= brush.low && position <= brush.high;
    axes.set(brush.axis, axes.get(brush.axis) || inside);
  }
  return [...axes.values()].every(Boolean);
}

const matches = (index) => state.filter.split(/\s+/).every((word) => searched[index].includes(word));
const isShown = (index) => !state.off.has(index) && matches(index) && passesBrushes(runs[index]);

// ---- the table
function listRows() {
  if (state.joined) {
    return data.rows.map((row) => ({...row, first: runs[row.runs[0]], error: row.runs.map((index) => runs[index].error).filter(Boolean).join("; ")}));
  }
  return runs.map((run, index) => ({
    runs: [index], name: run.name, state: run.state, best: run.best, front: run.front, first: run, error: run.error,
    metrics: tableMetrics.map((column) => [column.of(run), null]),
  }));
}

function listHeadings() {
  const seedColumn = (column) => state.joined && column.key === "seed";
  const settings = tableSettings.filter((column) => !seedColumn(column)).map((column) => ({
    label: column.label, title: column.key, of: (row) => column.of(row.first), number: column.numeric}));
  const metrics = tableMetrics.map((column, at) => ({
    label: column.label, title: column.key, of: (row) => row.metrics[at][0], error: (row) => row.metrics[at][1], number: true}));
  const count = state.joined ? [{label: "n", of: (row) => row.n, number: true}] : [];
  return [
    {label: "", of: null}, {label: "", of: null}, {label: "run", of: (row) => row.name}, {label: "state", of: (row) => row.state},
    ...(settings.length > MANY_SETTINGS ? [...count, ...metrics, ...settings] : [...settings, ...count, ...metrics]),
    {label: "", of: null},
  ];
}

function compareValues(first, second) {
  const lacks = (value) => value === null || value === undefined;
  if (lacks(first) || lacks(second)) return lacks(first) - lacks(second);
  if (typeof first === "number" && typeof second === "number") return first - second;
  return format(first).localeCompare(format(second), undefined, {numeric: true});
}

function drawTable() {
  const headings = listHeadings(), rows = listRows(), sort = state.sort;
  if (sort) {
    const of = headings[sort.at].of;
    rows.sort((first, second) => {
      const order = compareValues(of(first), of(second));
      const lacking = [of(first), of(second)].some((value) => value === null || value === undefined);
      return sort.descending && !lacking ? -order : order;
    });
  }
  const head = make("tr");
  headings.forEach((heading, at) => {
    const cell = make("th", heading.label, {title: heading.title || ""});
    if (heading.number) cell.classList.add("number");
    if (heading.of) {
      cell.classList.add("sortable");
      cell.tabIndex = 0;
      if (sort && sort.at === at) cell.ariaSort = sort.descending ? "descending" : "ascending";
      const turn = () => {
        const again = state.sort && state.sort.at === at;
        state.sort = {at, descending: again ? !state.sort.descending : Boolean(heading.number)};
        drawTable();
      };
      cell.addEventListener("click", turn);
      cell.addEventListener("keydown", (event) => event.key === "Enter" && turn());
    }
    head.append(cell);
  });
  byId("runs").tHead.replaceChildren(head);
  byId("runs").tBodies[0].replaceChildren(...rows.map((row) => buildRow(row, headings)));
  markRows();
}

function buildRow(row, headings) {
  const line = make("tr", undefined, {className: row.best ? "best" : ""});
  line.runs = row.runs;
  const box = make("input", undefined, {type: "checkbox", checked: row.runs.some((index) => !state.off.has(index))});
  box.ariaLabel = `show ${row.name}`;
  box.addEventListener("change", () => {
    for (const index of row.runs) box.checked ? state.off.delete(index) : state.off.add(index);
    update();
  });
  const swatch = make("span", undefined, {className: "swatch"});
  swatch.style.background = colours[row.runs[0]];
  const marks = make("span", (row.best ? " ★" : "") + (row.front ? " ◆" : ""), {className: "mark"});
  const cells = [make("td"), make("td"), make("th", row.name, {title: row.first.path}), make("td", row.state, {className: `state-${/^\w+$/.test(row.state) ? row.state : "mixed"}`})];
  cells[0].append(box);
  cells[1].append(swatch, marks);
  if (row.error) cells[2].append(make("span", row.error, {className: "error", title: row.error}));
  for (const heading of headings.slice(4, -1)) {
    const error = heading.error ? heading.error(row) : null;
    const cell = make("td", format(heading.of(row)));
    if (error !== null) cell.append(make("span", ` ± ${Number(error.toPrecision(2))}`, {className: "spread"}));
    if (heading.number) cell.classList.add("number");
    cells.push(cell);
  }
  const picks = make("td");
  for (const which of ["a", "b"]) {
    const button = make("button", which.toUpperCase(), {className: "pick", title: `compare as ${which.toUpperCase()}`});
    button.dataset.which = which;
    button.addEventListener("click", () => choose(which, pickRun(row)));
    picks.append(button, " ");
  }
  line.append(...cells, picks);
  return line;
}

/** Show in the table what is shown, chosen and filtered, without building it again. */
function markRows() {
  for (const line of byId("runs").tBodies[0].rows) {
    line.hidden = !line.runs.some(matches);
    line.classList.toggle("off", !line.runs.some(isShown));
    line.querySelector("input").checked = line.runs.some((index) => !state.off.has(index));
    for (const button of line.querySelectorAll(".pick")) button.ariaPressed = String(line.runs.includes(state[button.dataset.which]));
  }
  const count = runs.filter((run, index) => isShown(index)).length;
  byId("shown").textContent = count === runs.length ? "" : `${count} of ${runs.length} runs in the plots`;
}

// ---- plots
const layoutOf = (extra) => ({
  template: "none", margin: {l: 64, r: 16, t: 12, b: 46}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
  font: {family: "system-ui, sans-serif", size: 13}, autosize: true, showlegend: false, hovermode: "closest", ...extra,
});

function drawCurves() {
  const name = byId("curve").value, series = data.curves[name] || [];
  const few = series.filter(([index]) => isShown(index)).length <= 12;
  const traces = series.filter(([index]) => isShown(index)).map(([index, steps, values]) => ({
    type: "scatter", mode: values.length < 2 || (few && values.length <= 30) ? "lines+markers" : "lines", x: steps, y: values,
    line: {color: colours[index], width: few ? 2 : 1.2}, marker: {size: 5}, opacity: few ? 1 : 0.8,
    text: escapeLabel(runs[index].name), hovertemplate: "%{text}<br>step %{x}: %{y:.4~g}<extra></extra>",
  }));
  const positive = series.length > 0 && series.every(([, , values]) => values.every((value) => value === null || value > 0));
  byId("curve-log").disabled = !positive;
  Plotly.react("curves", traces, layoutOf({
    xaxis: {title: {text: "step"}, zeroline: false},
    yaxis: {title: {text: escapeLabel(name)}, zeroline: false, type: positive && byId("curve-log").checked ? "log" : "linear"},
  }), CONFIG);
}

function axisOf(column) {
  const axis = {title: {text: escapeLabel(column.label)}, zeroline: false};
  if (column.numeric) return {...axis, type: column.log ? "log" : "linear"};
  const labels = column.values.map((value) => escapeLabel(value, 16));
  return {...axis, type: "linear", tickvals: column.values.map((value, at) => at), ticktext: labels, tickangle: 0, range: [-0.5, labels.length - 0.5]};
}

const plotted = (column, run) => {
  const value = column.of(run);
  if (column.numeric || value === null || value === undefined) return value;
  return column.values.indexOf(format(value));
};

function drawScatter() {
  const [x, y] = ["x", "y"].map((id) => columns[byId(id).value]);
  if (!x || !y) return;
  const shown = runs.map((run, index) => index).filter(isShown);
  const told = [...new Set([...tableSettings.slice(0, 8), x, y])];
  const about = (run) => [escapeLabel(run.name), ...told.map((c) => `${escapeLabel(c.label)} = ${escapeLabel(format(c.of(run)))}`)].join("<br>");
  const traces = [{
    type: "scatter", mode: "markers", x: shown.map((index) => plotted(x, runs[index])), y: shown.map((index) => plotted(y, runs[index])),
    text: shown.map((index) => about(runs[index])), hovertemplate: "%{text}<extra></extra>",
    marker: {
      color: shown.map((index) => colours[index]), size: shown.map((index) => (runs[index].best ? 15 : 10)), opacity: 0.9,
      symbol: shown.map((index) => (runs[index].best ? "star" : runs[index].front ? "diamond" : runs[index].state === "finished" ? "circle" : "circle-open")),
    },
  }];
  const isFront = x.key === data.distance && y.key === data.gain;
  if (isFront) traces.unshift(buildFront(x, y));
  byId("front").textContent = isFront ? `dashed: the largest ${y.label} for each ${x.label}${data.rows.length ? ", means over seeds" : ""}` : "";
  Plotly.react("scatter", traces, layoutOf({margin: {l: y.numeric ? 64 : 140, r: 16, t: 12, b: 46}, xaxis: axisOf(x), yaxis: axisOf(y)}), CONFIG);
}

function buildFront(x, y) {
  const joined = data.rows.length > 0;
  const points = joined
    ? data.rows.filter((row) => row.front).map((row) => [row.metrics[tableMetrics.indexOf(x)][0], row.metrics[tableMetrics.indexOf(y)][0]])
    : runs.filter((run) => run.front).map((run) => [x.of(run), y.of(run)]);
  points.sort((first, second) => first[0] - second[0]);
  return {type: "scatter", mode: "lines", x: points.map((p) => p[0]), y: points.map((p) => p[1]), hoverinfo: "skip",
    line: {color: "#1f9d76", width: 1.5, dash: "dash", shape: "hv"}};
}

// Parallel coordinates out of plain lines: plotly's own need WebGL and code made at run time, which the page forbids.
const varies = (column) => column.values.length > 1;
const axes = [...tableSettings.filter(varies).slice(0, MANY_SETTINGS + 2), ...tableMetrics.filter(varies)];

function scaleTo(axis, value) {
  if (!axis.numeric) return axis.values.length > 1 ? axis.values.indexOf(format(value)) / (axis.values.length - 1) : 0.5;
  const [low, high, at] = [axis.low, axis.high, value].map((v) => (axis.log ? Math.log(v) : v));
  return high > low ? (at - low) / (high - low) : 0.5;
}

function axisPosition(axis, run) {
  const value = axis.of(run);
  return value === null || value === undefined ? null : scaleTo(axis, value);
}

function listTicks(axis) {
  if (axis.values.length <= 8) return axis.values;
  if (!axis.numeric) return axis.values.filter((value, at) => at % Math.ceil(axis.values.length / 8) === 0);
  const back = (part) => (axis.log ? axis.low * (axis.high / axis.low) ** part : axis.low + (axis.high - axis.low) * part);
  return [0, 0.25, 0.5, 0.75, 1].map(back);
}

function drawParallel() {
  const place = byId("parallel");
  if (axes.length < 2) return;
  const lineOf = (run) => axes.map((axis) => axisPosition(axis, run));
  const at = axes.map((axis, index) => index);
  const shown = runs.map((run, index) => index).filter(isShown);
  const faded = {x: [], y: []};
  runs.forEach((run, index) => {
    if (!isShown(index)) { faded.x.push(...at, null); faded.y.push(...lineOf(run), null); }
  });
  const traces = [
    {type: "scatter", mode: "lines", ...faded, hoverinfo: "skip", opacity: 0.25, line: {color: "#8b93a1", width: 0.8}},
    ...shown.reverse().map((index) => ({
      type: "scatter", mode: "lines", x: at, y: lineOf(runs[index]), connectgaps: true, opacity: shown.length > 40 ? 0.75 : 0.95,
      line: {color: colours[index], width: runs[index].best ? 3.5 : shown.length > 40 ? 1.2 : 2},
      text: axes.map((axis) => `${escapeLabel(runs[index].name)}<br>${escapeLabel(axis.label)}: ${escapeLabel(format(axis.of(runs[index])))}`),
      hovertemplate: "%{text}<extra></extra>",
    })),
  ];
  const room = Math.floor(place.clientWidth / axes.length / 7.5); // characters between two axes
  const crowded = axes.some((axis) => axis.label.length > room);
  const annotations = axes.flatMap((axis, index) => [
    {x: index, y: 1.05, yanchor: "bottom", yshift: crowded && index % 2 ? 18 : 0, showarrow: false,
      text: `<b>${escapeLabel(axis.label, crowded ? 2 * room - 2 : 60)}</b>`},
    ...listTicks(axis).map((tick) => ({
      x: index, y: scaleTo(axis, tick), text: escapeLabel(format(tick), Math.max(room, 6)), showarrow: false, xanchor: "left", xshift: 3, font: {size: 11}})),
  ]);
  Plotly.react(place, traces, layoutOf({
    margin: {l: 46, r: 70, t: 16, b: 12}, dragmode: "select", annotations, selections: [],
    shapes: [
      ...at.map((index) => ({type: "line", x0: index, x1: index, y0: 0, y1: 1, line: {width: 1, color: "#8b93a1"}})),
      ...state.brushes.map(({axis, low, high}) => ({
        type: "rect", x0: axes.indexOf(axis) - 0.05, x1: axes.indexOf(axis) + 0.05, y0: low, y1: high,
        fillcolor: "#8b93a1", opacity: 0.35, line: {width: 1, color: "#8b93a1"}})),
    ],
    xaxis: {visible: false, range: [-0.1, axes.length - 0.9], fixedrange: true}, yaxis: {visible: false, range: [-0.05, 1.2], fixedrange: true},
  }), {...CONFIG, doubleClick: false});
  for (const outline of place.querySelectorAll(".select-outline")) outline.remove();
}

function nearestAxis(position) {
  return Math.max(0, Math.min(axes.length - 1, Math.round(position)));
}

/** Remember where a drag begins: plotly tells of one that goes straight up or down as if it were over the whole width. */
function rememberDrag(event, touch) {
  const area = byId("parallel").querySelector(".nsewdrag").getBoundingClientRect();
  state.drag = {axis: nearestAxis((touch.clientX - area.left) / area.width * (axes.length - 0.8) - 0.1), more: event.shiftKey};
}

function addBrushes(event) {
  if (!event || !event.range) return;
  const [left, right] = event.range.x, [low, high] = event.range.y;
  const all = right - left > axes.length - 0.9;
  const inside = axes.filter((axis, index) => !all && index >= left && index <= right);
  const brushed = inside.length ? inside : [axes[state.drag.axis]];
  brush([...(state.drag.more ? state.brushes : []), ...brushed.map((axis) => ({axis, low, high}))]);
}

function brush(brushes) {
  state.brushes = brushes;
  byId("unbrush").hidden = brushes.length === 0;
  update();
}

// ---- two runs in full
/** Return which of a row's runs stands for it: the best, or else one that finished. */
function pickRun(row) {
  const of = (wanted) => row.runs.find((index) => wanted(runs[index]));
  return of((run) => run.best) ?? of((run) => run.state === "finished") ?? row.runs[0];
}

function choose(which, index) {
  state[which] = index;
  byId(which).value = index;
  markRows();
  drawPair();
}

function drawPair() {
  const pair = [runs[state.a], runs[state.b]];
  const head = make("tr");
  head.append(make("th", "setting or result"), ...pair.map((run, at) => make("th", `${"AB"[at]}: ${run.name}`)));
  byId("diff").tHead.replaceChildren(head);
  const lines = [], add = (name, values) => {
    const line = make("tr");
    line.append(make("th", name), ...values.map((value) => make("td", format(value))));
    lines.push(line);
  };
  if (pair.some((run) => run.config === null)) add("settings", pair.map((run) => (run.config === null ? "not known" : "known")));
  const keys = new Set([...tableSettings.map((column) => column.key), ...pair.flatMap((run) => Object.keys(run.config || {}))]);
  const same = (values) => JSON.stringify(values[0]) === JSON.stringify(values[1]);
  const valueOf = (run, key) => (run.config && Object.hasOwn(run.config, key) ? run.config[key] : undefined);
  for (const key of keys) {
    const values = pair.map((run) => valueOf(run, key));
    if (!same(values) || byId("equal").checked) add(key, values.map((value) => (value === null ? "null" : value)));
  }
  if (byId("equal").checked) for (const [key, value] of Object.entries(data.common)) add(key, [value, value]);
  for (const column of tableMetrics) add(column.label, pair.map(column.of));
  byId("diff").tBodies[0].replaceChildren(...lines);
  drawAnswers(pair);
}

function drawAnswers(pair) {
  const second = new Map(pair[1].answers.map(([prompt, , after]) => [prompt, after]));
  const articles = pair[0].answers.filter(([prompt]) => second.has(prompt)).map(([prompt, before, after]) => {
    const article = make("article", undefined, {className: "row"}), answers = make("div", undefined, {className: "answers"});
    const part = (kind, heading, text) => {
      const block = make("div", undefined, {className: `part ${kind}`});
      block.append(make("h4", heading), make("pre", text === null ? "–" : data.texts[text]));
      return block;
    };
    if (before !== null) answers.append(part("", "before training", before));
    answers.append(part("chosen", `A: ${pair[0].name}`, after), part("rejected", `B: ${pair[1].name}`, second.get(prompt)));
    article.append(part("prompt", "prompt", prompt), answers);
    return article;
  });
  const note = "No prompt was answered by both runs.";
  byId("answers").replaceChildren(...(articles.length ? articles : [make("p", note, {className: "empty"})]));
}

// ---- begin
let scheduled = false;
function update() {
  markRows();
  if (scheduled) return;
  scheduled = true;
  requestAnimationFrame(() => { scheduled = false; drawCurves(); drawScatter(); drawParallel(); });
}

function fill(id, options, chosen, changed) {
  byId(id).append(...options.map(([value, label]) => make("option", label, {value})));
  if (chosen !== undefined && chosen !== null) byId(id).value = chosen;
  byId(id).addEventListener("change", changed);
}

const numbered = columns.map((column, at) => [at, column.label]);
const indexOf = (key, otherwise) => { const at = columns.findIndex((column) => column.key === key); return at < 0 ? otherwise : at; };
fill("curve", Object.keys(data.curves).map((name) => [name, name]), null, drawCurves);
fill("x", numbered, indexOf(data.distance, 0), drawScatter);
fill("y", numbered, indexOf(data.gain, Math.min(1, columns.length - 1)), drawScatter);
byId("seeds").hidden = data.rows.length === 0;
byId("per-seed").addEventListener("change", (event) => { state.joined = !event.target.checked; state.sort = null; drawTable(); });
byId("filter").addEventListener("input", (event) => { state.filter = event.target.value.trim().toLowerCase(); update(); });
byId("all").addEventListener("click", () => { state.off.clear(); update(); });
byId("none").addEventListener("click", () => { runs.forEach((run, index) => state.off.add(index)); update(); });
byId("curve-log").addEventListener("change", drawCurves);
byId("equal").addEventListener("change", drawPair);
[state.a, state.b] = [0, 1].map((at) => pickRun(listRows()[at] || listRows()[0]));
for (const which of ["a", "b"]) fill(which, runs.map((run, at) => [at, run.name]), state[which], (event) => choose(which, Number(event.target.value)));
byId("parallel").style.minWidth = `${axes.length * 5.5}rem`;
drawTable();
drawCurves();
drawScatter();
drawParallel();
drawPair();
if (axes.length >= 2) {
  byId("parallel").addEventListener("mousedown", (event) => rememberDrag(event, event), true);
  byId("parallel").addEventListener("touchstart", (event) => rememberDrag(event, event.touches[0]), {capture: true, passive: true});
  byId("parallel").on("plotly_selected", addBrushes);
  byId("unbrush").addEventListener("click", () => brush([]));
} else {
  byId("parallel").replaceWith(make("p", "Too little differs between these runs.", {className: "empty"}));
}

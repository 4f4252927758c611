// Draws what the JSON block holds: the graph, the unit panel, the evaluation and the tables.
// Units are numbers, layer by layer; edges stand in the order in which the slider reveals them.
"use strict";
const root = document.documentElement;
addEventListener("error", (event) => { root.dataset.error = event.message; });
addEventListener("unhandledrejection", (event) => { root.dataset.error = String(event.reason); });

const $ = (id) => document.getElementById(id);
const data = JSON.parse($("data").textContent);
const SVG = document.querySelector("svg").namespaceURI;
const HEAD = 56, PAD = 24, MIN_LIT = 8, LISTED = 12, CHUNK = 3000;

// ---------------------------------------------------------------- small words

function make(tag, attributes = {}, ...children) {
  const isSvg = ["svg", "path", "line", "circle", "rect", "text", "g", "title", "polygon"].includes(tag);
  const node = isSvg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) node.style.setProperty(key, String(value));
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}
const count = (n) => Number(n).toLocaleString("en");
const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;
const known = (value) => typeof value === "number" && Number.isFinite(value);
const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
function figure(x) {
  if (!known(x)) return "–";
  const size = Math.abs(x);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return x.toExponential(1).replaceAll("-", "−");
  return String(Number(x.toPrecision(3))).replace("-", "−");
}
const percent = (share) => (share >= 0.0995 || share === 0 ? Math.round(share * 100) : (share * 100).toPrecision(1)) + "\u202f%";
const address = (thing) => (thing && typeof thing === "object" ? thing.address ?? thing.name ?? null : thing ?? null);

// ---------------------------------------------------------------- the circuit

const units = [];
data.layers.forEach((layer, l) => layer.units.forEach((index, i) => {
  units.push({ id: units.length, layer: l, index, score: layer.scores[i], chosen: layer.chosen[i], name: `${layer.name}:${index}`, ins: [], outs: [] });
}));
const edges = data.edges.source.map((source, i) => ({
  place: i, source, target: data.edges.target[i], score: data.edges.score[i], signed: data.edges.signed[i], share: data.edges.share[i], chosen: data.edges.chosen[i],
}));
const strongestOf = new Map();
const pairOf = (edge) => `${units[edge.source].layer}>${units[edge.target].layer}`;
edges.forEach((edge) => {
  units[edge.source].outs.push(edge);
  units[edge.target].ins.push(edge);
  strongestOf.set(pairOf(edge), Math.max(strongestOf.get(pairOf(edge)) ?? 0, edge.share));
});
edges.forEach((edge) => { edge.strength = Math.sqrt(edge.share / (strongestOf.get(pairOf(edge)) || 1)); });
units.forEach((unit) => [unit.ins, unit.outs].forEach((list) => list.sort((a, b) => b.share - a.share)));
const covered = [0];
edges.forEach((edge) => covered.push(covered.at(-1) + edge.share / (strongestOf.size || 1)));
const byName = new Map(units.map((unit) => [unit.name, unit]));
data.layers.forEach((layer) => layer.order.forEach((id, rank) => { units[id].rank = rank; }));

const verb = (edge) => (edge.signed > 0 ? "excites" : edge.signed < 0 ? "inhibits" : "reaches");
const draws = data.selection.confidence?.draws;
const sureness = (thing) => (known(thing.chosen) && draws ? `chosen in ${Math.round(thing.chosen * draws)} of ${draws} bootstrap draws` : "");
const unsure = (edge) => known(edge.chosen) && edge.chosen < 0.5;
const shotsOf = (unit) => data.pictures[unit.id] ?? [];
const nameOf = (shot) => data.names[shot[1]];

function picture(shot, alt) {
  const { columns } = data.sprite;
  return make("i", { class: "pic", "--x": shot[0] % columns, "--y": Math.floor(shot[0] / columns), ...(alt ? { role: "img", "aria-label": alt } : {}) });
}
function face(unit, many) {
  const shots = shotsOf(unit);
  if (!shots.length) return [make("i", { class: "bare" }, String(unit.index))];
  return shots.slice(0, many).map((shot) => picture(shot));
}
function describe(unit) {
  const shots = shotsOf(unit);
  const score = known(unit.score) ? `, score ${figure(unit.score)}` : "";
  const seen = shots.length ? `; excited most by a region of ${shots.map(nameOf).join(", ")}` : data.sprite ? "; no image excites it" : "";
  const sure = sureness(unit);
  return `Unit ${unit.index} of ${data.layers[unit.layer].name}${score}${sure ? `, ${sure}` : ""}${seen}`;
}

// ---------------------------------------------------------------- layout: a column, or a few, for each layer

const view = { size: 64, shown: 0, chosen: null, hovered: null, columns: [], width: 0, height: 0 };
const largest = Math.max(1, ...data.layers.map((layer) => layer.units.length));
const subColumns = (layer) => Math.ceil(layer.units.length / 30) || 1;
const label = () => (view.size >= 40 ? 17 : 4);
const gutter = () => (view.size >= 48 ? 8 : 4);

function startSize() {
  const room = $("scroll").clientWidth - 2 * PAD - (data.layers.length - 1) * 44;
  const fits = room / sum(data.layers.map(subColumns)) - 6;
  const rows = Math.ceil(largest / Math.max(...data.layers.map(subColumns)));
  const most = rows <= 10 ? 92 : rows <= 16 ? 76 : 60;
  return Math.round(Math.min(most, Math.max(fits, units.length > 400 ? 36 : 52)) / 4) * 4;
}

function place() {
  const size = view.size, step = size + gutter(), rowStep = size + label() + (size >= 48 ? 5 : 2);
  const widths = data.layers.map((layer) => subColumns(layer) * step - gutter());
  const room = $("scroll").clientWidth - 2 * PAD - sum(widths);
  const gap = Math.max(44, Math.min(190, room / Math.max(1, widths.length - 1)));
  const rows = Math.max(...data.layers.map((layer) => Math.ceil(layer.units.length / subColumns(layer))));
  const used = sum(widths) + gap * (widths.length - 1);
  let left = Math.max(PAD, ($("scroll").clientWidth - used) / 2);
  view.columns = data.layers.map((layer, l) => {
    const sub = subColumns(layer), mine = Math.ceil(layer.units.length / sub);
    const top = HEAD + ((rows - mine) * rowStep) / 2;
    layer.order.forEach((id, rank) => {
      units[id].x = left + (rank % sub) * step;
      units[id].y = top + Math.floor(rank / sub) * rowStep;
      units[id].port = ((rank % sub) + 1) / (sub + 1);
    });
    const column = { x: left, width: widths[l] };
    left += widths[l] + gap;
    return column;
  });
  view.width = Math.max($("scroll").clientWidth, left - gap + PAD);
  view.height = Math.max($("scroll").clientHeight - 2, HEAD + rows * rowStep + 12);
  root.style.setProperty("--s", `${size}px`);
  root.style.setProperty("--label", `${label()}px`);
  $("stage").classList.toggle("tiny", size < 40);
  Object.assign($("stage").style, { width: `${view.width}px`, height: `${view.height}px` });
  units.forEach((unit) => Object.assign(unit.node.style, { left: `${unit.x}px`, top: `${unit.y}px` }));
  $("heads").replaceChildren(...data.layers.map((layer, l) => {
    const { x, width } = view.columns[l], wide = width + Math.min(gap - 10, 120);
    return make("div", { style: `left:${x - (wide - width) / 2}px;width:${wide}px`, title: layer.name },
      make("b", {}, make("bdi", {}, layer.name)), `${count(layer.units.length)} of ${count(layer.width)}`);
  }));
  [$("edges"), $("lit")].forEach(fitCanvas);
  drawAll();
  light();
}

function fitCanvas(canvas) {
  const dense = Math.min(devicePixelRatio || 1, 2, Math.sqrt(12e6 / (view.width * view.height)), 8000 / Math.max(view.width, view.height));
  canvas.width = Math.ceil(view.width * dense);
  canvas.height = Math.ceil(view.height * dense);
  Object.assign(canvas.style, { width: `${view.width}px`, height: `${view.height}px` });
  canvas.getContext("2d").setTransform(dense, 0, 0, dense, 0, 0);
}

// ---------------------------------------------------------------- edges

const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
let colours = {};
function readColours() { colours = { excite: colour("--excite"), inhibit: colour("--inhibit"), neutral: colour("--soft") }; }

function stroke(context, edge, strong) {
  const a = units[edge.source], b = units[edge.target], size = view.size;
  const from = view.columns[a.layer], to = view.columns[b.layer];  // edges leave a whole column, so that none hides beneath its units
  const x0 = from.x + from.width, y0 = a.y + a.port * size, x1 = to.x, y1 = b.y + b.port * size, bend = Math.max(24, (x1 - x0) * 0.5);
  context.strokeStyle = edge.signed > 0 ? colours.excite : edge.signed < 0 ? colours.inhibit : colours.neutral;
  context.lineWidth = 0.5 + edge.strength * (strong ? 6 : 4.5);
  context.globalAlpha = (strong ? 0.35 + 0.6 * edge.strength : 0.12 + 0.6 * edge.strength ** 1.5) * (unsure(edge) ? 0.45 : 1);
  context.setLineDash(edge.signed < 0 ? [4 + 2 * context.lineWidth, 3 + context.lineWidth] : []);
  context.beginPath();
  context.moveTo(x0, y0);
  context.bezierCurveTo(x0 + bend, y0, x1 - bend, y1, x1, y1);
  context.stroke();
}

let drawing = 0;
function drawAll() {
  const context = $("edges").getContext("2d"), turn = ++drawing;
  context.clearRect(0, 0, view.width, view.height);
  context.globalCompositeOperation = "destination-over";  // weaker ones, drawn later, lie beneath
  const some = (from) => {
    if (turn !== drawing) return;
    const to = Math.min(view.shown, from + CHUNK);
    for (let i = from; i < to; i++) stroke(context, edges[i], false);
    if (to < view.shown) requestAnimationFrame(() => some(to));
  };
  some(0);
}

function show(n) {
  view.shown = Math.max(0, Math.min(edges.length, Math.round(n)));
  const slider = $("amount");
  slider.value = view.shown <= 1 ? view.shown * 40 : 40 + (960 * Math.log(view.shown)) / Math.log(Math.max(2, edges.length));
  const text = `${count(view.shown)} of ${count(data.n_edges)} · ${percent(Math.min(1, covered[view.shown]))} of attribution`;
  $("shown").textContent = edges.length ? text : "no edges";
  slider.setAttribute("aria-valuetext", text);
  drawAll();
  light();
}
const fromSlider = (value) => (value < 20 ? 0 : Math.exp(((value - 40) / 960) * Math.log(Math.max(2, edges.length))));

function around(unit) {
  const drawn = [unit.ins, unit.outs].flatMap((list) => list.filter((edge, i) => i < MIN_LIT || edge.place < view.shown));
  return drawn.sort((a, b) => a.strength - b.strength);
}

let litNow = [], litFrom = 0, litTo = Infinity;
function light() {
  const context = $("lit").getContext("2d"), unit = view.hovered ?? view.chosen;
  context.clearRect(litFrom, 0, Math.min(litTo, view.width) - litFrom, view.height);  // the whole canvas is large
  litNow.forEach((other) => other.node.classList.remove("lit"));
  litNow = [];
  $("stage").classList.toggle("dim", Boolean(unit));
  if (!unit) return;
  const mine = around(unit);
  mine.forEach((edge) => stroke(context, edge, true));
  litNow = [unit, ...mine.flatMap((edge) => [units[edge.source], units[edge.target]])];
  litNow.forEach((other) => other.node.classList.add("lit"));
  litFrom = Math.min(...litNow.map((other) => view.columns[other.layer].x)) - 8;
  litTo = Math.max(...litNow.map((other) => view.columns[other.layer].x + view.columns[other.layer].width)) + 8;
}

// ---------------------------------------------------------------- hover, focus, keys

let waiting = 0;
function hover(unit) {
  clearTimeout(waiting);
  waiting = setTimeout(() => { view.hovered = unit; light(); showCard(unit); }, unit ? 45 : 90);
}

function showCard(unit) {
  const card = $("card");
  card.hidden = !unit || unit === view.chosen;
  if (card.hidden) return;
  const shots = shotsOf(unit).slice(0, 4).map((shot) => picture(shot));
  card.replaceChildren(...(shots.length ? [make("div", { class: "shots" }, shots)] : []),
    make("p", {}, make("b", {}, unit.name), known(unit.score) ? ` score ${figure(unit.score)}` : "", shots.length || !data.sprite ? "" : ", no image excites it"));
  const box = unit.node.getBoundingClientRect(), wide = card.offsetWidth, high = card.offsetHeight;
  const left = box.right + 12 + wide < innerWidth ? box.right + 12 : Math.max(4, box.left - 12 - wide);
  Object.assign(card.style, { left: `${left}px`, top: `${Math.max(8, Math.min(box.top - 8, innerHeight - high - 8))}px` });
}

function choose(unit, { move = true } = {}) {
  if (view.chosen) { view.chosen.node.classList.remove("chosen"); view.chosen.node.removeAttribute("aria-current"); }
  view.chosen = unit;
  view.hovered = null;
  $("card").hidden = true;
  $("close").hidden = !unit;
  $("side").classList.toggle("sheet", Boolean(unit));
  remember(unit);
  if (unit) {
    unit.node.classList.add("chosen");
    unit.node.setAttribute("aria-current", "true");
    units.forEach((other) => { other.node.tabIndex = other === unit ? 0 : -1; });
    if (move) { unit.node.focus({ preventScroll: true }); unit.node.scrollIntoView({ block: "nearest", inline: "nearest" }); }
    $("status").textContent = describe(unit);
  }
  fillUnit(unit);
  openTab(unit ? "unit" : "evaluation");
  light();
}

function remember(unit) {
  try { history.replaceState(null, "", unit ? `#${encodeURIComponent(unit.name)}` : location.pathname + location.search); } catch { /* some browsers forbid it from disk */ }
}

function step(key) {
  const unit = view.chosen;
  if (!unit) return choose(units[(data.layers.find((layer) => layer.order.length) ?? { order: [] }).order[0]] ?? null);
  const column = data.layers[unit.layer].order;
  const next = {
    ArrowRight: () => unit.outs[0] && units[unit.outs[0].target],
    ArrowLeft: () => unit.ins[0] && units[unit.ins[0].source],
    ArrowDown: () => units[column[unit.rank + 1]],
    ArrowUp: () => units[column[unit.rank - 1]],
  }[key]();
  if (next) choose(next);
  else $("status").textContent = "No edge leads further that way.";
}

const KEYS = [
  ["→ ←", "along the strongest edge to the next or the previous layer"], ["↑ ↓", "to the unit above or below"],
  ["+ −", "more or fewer edges"], ["M", "one picture or four on each unit"], ["/", "find a unit"], ["Esc", "clear"], ["?", "these keys"],
];
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target.matches("input[type=search], input[type=range]");
  if (event.key === "Escape") { if (!$("keys").open) { event.target.blur?.(); choose(null); } return; }
  if (typing || $("keys").open || event.target.closest("[role=tablist], summary, [role=tabpanel], code") && event.key.startsWith("Arrow")) return;
  const act = {
    "?": () => $("keys").showModal(), "/": () => $("find").focus(), m: () => $("four").click(), M: () => $("four").click(),
    "+": () => show(Math.max(view.shown + 1, view.shown * 1.25)), "=": () => show(Math.max(view.shown + 1, view.shown * 1.25)), "-": () => show(view.shown / 1.25),
  }[event.key] ?? (event.key.startsWith("Arrow") ? () => step(event.key) : null);
  if (act) { event.preventDefault(); act(); }
});

function find() {
  const text = $("find").value.trim();
  if (!text) return;
  const unit = byName.get(text) ?? units.find((other) => other.name.endsWith(text) || String(other.index) === text);
  if (unit) { choose(unit); return; }
  $("status").textContent = `No unit ${text} in the circuit.`;
  $("find").setCustomValidity(`No unit ${text} in the circuit; write layer:index, for example ${units[0]?.name}`);
  $("find").reportValidity();
}

// ---------------------------------------------------------------- side panel

function openTab(name) {
  ["evaluation", "unit"].forEach((other) => {
    $(other).hidden = other !== name;
    $(`tab-${other}`).setAttribute("aria-selected", String(other === name));
    $(`tab-${other}`).tabIndex = other === name ? 0 : -1;
  });
}

function edgeRow(edge, other, total) {
  return make("button", { class: "row", type: "button", onclick: () => choose(other) },
    shotsOf(other).length ? picture(shotsOf(other)[0]) : make("i", { class: "bare" }, String(other.index)),
    make("span", {}, make("b", {}, other.name), make("br"), make("em", { class: verb(edge) }, verb(edge)), known(edge.chosen) && draws ? ` · ${Math.round(edge.chosen * draws)} of ${draws} draws` : "",
      make("s", { class: verb(edge), "--w": `${((100 * edge.share) / (total || 1)).toFixed(1)}%` })),
    make("span", {}, figure(edge.score), make("br"), percent(edge.share / (total || 1))));
}
function edgeList(title, list, end) {
  if (!list.length) return [];
  const total = sum(list.map((edge) => edge.share));
  const more = list.length > LISTED ? `The ${LISTED} strongest of ${count(list.length)}. ` : "";
  return [make("h3", {}, title), make("p", { class: "note" }, `${more}Score, and its share of this unit's ${end === "source" ? "incoming" : "outgoing"} score.`),
    ...list.slice(0, LISTED).map((edge) => edgeRow(edge, units[edge[end]], total))];
}
function fillUnit(unit) {
  const panel = $("unit");
  panel.scrollTop = 0;
  if (!unit) { panel.replaceChildren(make("p", { class: "note" }, "Click a unit, or press an arrow key, to see what excites it and what it is connected to.")); return; }
  const layer = data.layers[unit.layer], shots = shotsOf(unit);
  const rank = known(unit.score) ? 1 + layer.scores.filter((score) => score > unit.score).length : null;
  panel.replaceChildren(
    make("h2", {}, unit.name),
    make("p", { class: "note" }, rank ? `Score ${figure(unit.score)}, number ${rank} of the ${layer.units.length} units the circuit has in this layer.` : "No score.", sureness(unit) ? ` It is ${sureness(unit)}.` : ""),
    shots.length
      ? make("div", { class: "shots" }, shots.slice(0, 8).map((shot) => make("figure", {},
          picture(shot, `Region of ${nameOf(shot)} that excites ${unit.name} to ${figure(shot[2])}`), make("figcaption", { title: nameOf(shot) }, `${figure(shot[2])} · ${nameOf(shot)}`))))
      : make("p", { class: "note" }, data.sprite ? "No image excites this unit." : "This page was made without pictures."),
    shots.length ? make("p", { class: "note" }, "Its strongest regions, with its activation there.") : null ?? "",
    ...edgeList("Strongest incoming", unit.ins, "source"), ...edgeList("Strongest outgoing", unit.outs, "target"));
}

// ---------------------------------------------------------------- evaluation

const MEASURES = {
  accuracy: { word: "accuracy", share: true, sentence: (v) => `recognises ${v}` },
  agreement: { word: "agreement with the untouched network", share: true, sentence: (v) => `answers as the untouched network does on ${v}` },
  cosine: { word: "cosine similarity to the untouched network", share: false, sentence: (v) => `keeps a cosine similarity of ${v}` },
};
const evaluation = data.evaluation;
const measure = { key: evaluation?.measure ?? "accuracy", ...(MEASURES[evaluation?.measure ?? "accuracy"] ?? { word: evaluation.measure, share: false, sentence: (v) => `has a mean ${evaluation.measure} of ${v}` }) };
const read = (part) => part?.[measure.key] ?? part?.accuracy ?? null;
const amount = (x) => (!known(x) ? "–" : measure.share ? `${Math.round(x * 100)}\u202f%` : figure(x));
const points = (x) => (!known(x) ? "–" : (measure.share ? String(Math.round(x * 100)) : figure(x)).replace("-", "−"));
const band = (e, write) => (known(e?.low) && known(e?.high) ? `[${write(e.low)}, ${write(e.high)}]` : "");

function change(before, after) {
  const at = (x) => 4 + 76 * Math.max(0, Math.min(1, x));
  if (!known(before) || !known(after)) return "";
  return make("svg", { class: "change", viewBox: "0 0 84 9", "aria-hidden": "true" },
    make("line", { x1: 4, x2: 80, y1: 4.5, y2: 4.5, stroke: "var(--line)", "stroke-width": 1 }),
    make("line", { x1: at(before), x2: at(after), y1: 4.5, y2: 4.5, stroke: "var(--ink)", "stroke-width": 2 }),
    make("circle", { cx: at(before), cy: 4.5, r: 3, fill: "var(--page)", stroke: "var(--ink)", "stroke-width": 1.2 }),
    make("circle", { cx: at(after), cy: 4.5, r: 3.5, fill: "var(--ink)" }));
}

function verdict() {
  const ours = evaluation.circuits?.find((row) => row.name === "circuit") ?? evaluation.circuits?.[0];
  const before = read(evaluation.baseline?.concept), after = read(ours?.concept);
  if (!known(after?.value)) return make("p", { class: "verdict" }, "The effect of removing the circuit was not measured.");
  const otherBefore = read(evaluation.baseline?.others), otherAfter = read(ours?.others);
  const of = measure.share ? " of the concept's test images" : " on the concept's test images";
  const parts = ["Without this circuit the network ", ...measure.sentence("\u0000").split("\u0000").flatMap((text, i) => (i ? [make("b", {}, amount(after.value)), text] : [text])), of];
  if (known(before?.value)) parts.push(`, before ${amount(before.value)}`);
  if (known(otherAfter?.value)) parts.push(measure.share ? "; of other images " : "; on other images ", make("b", {}, amount(otherAfter.value)), known(otherBefore?.value) ? `, before ${amount(otherBefore.value)}.` : ".");
  else parts.push(". Other images were not measured.");
  return make("p", { class: "verdict" }, parts);
}

function effectTable() {
  const rows = evaluation.circuits ?? [];
  if (!rows.length) return "";
  const cell = (row, part) => {
    const before = read(evaluation.baseline?.[part]), after = read(row[part]);
    return make("td", {}, known(after?.value) ? `${amount(before?.value)} → ${amount(after.value)}` : "not measured",
      known(after?.value) ? make("small", {}, band(after, points)) : null, measure.share || measure.key === "cosine" ? change(before?.value, after?.value) : "");
  };
  return make("table", {},
    make("thead", {}, make("tr", {}, ["Removed", "Concept", "Others", "Selectivity"].map((text, i) => make("th", { scope: "col", class: i === 3 ? "n" : null }, text)))),
    make("tbody", {}, rows.map((row) => make("tr", { class: row.name === "circuit" ? "ours" : null },
      make("th", { scope: "row" }, row.name === "circuit" ? "this circuit" : row.name, row.draws > 1 ? make("small", { class: "note" }, ` mean of ${row.draws}`) : null),
      cell(row, "concept"), cell(row, "others"),
      make("td", { class: "n" }, points(row.selectivity?.value), make("small", {}, band(row.selectivity, points)))))));
}

function imagesUsed() {
  const made = data.provenance, found = made.images, reference = made.reference, tested = evaluation?.images;
  const n = (set) => set?.n ?? set?.n_images ?? set?.names?.length;
  const tell = (set, otherwise) => {
    if (!set) return otherwise;
    const skipped = Array.isArray(set.skipped) ? set.skipped.length : set.skipped;
    return [known(n(set)) ? plural(n(set), "image") : null, address(set), skipped ? `${skipped} skipped` : null].filter(Boolean).join(" · ") || otherwise;
  };
  const who = found?.digests && tested?.concept?.digests ? "digests" : "names";
  const used = new Set(found?.[who] ?? []), both = (tested?.concept?.[who] ?? []).filter((each) => used.has(each)).length;
  const first = typeof found === "string" ? [known(made.n_images) ? plural(made.n_images, "image") : null, found].filter(Boolean).join(" · ") : tell(found, known(made.n_images) ? plural(made.n_images, "image") : "not recorded");
  return [make("h3", {}, "Images"), make("dl", { class: "images" },
    make("dt", {}, "Used to find"), make("dd", {}, first),
    reference ? [make("dt", {}, "Set against"), make("dd", {}, typeof reference === "string" ? reference : tell(reference, ""))] : null,
    make("dt", {}, "Used to test"), make("dd", {}, tested?.concept ? `concept: ${tell(tested.concept, "not recorded")}` : evaluation ? "not recorded" : "none"),
    tested?.others ? [make("dt", {}), make("dd", {}, `others: ${tell(tested.others, "not recorded")}`)] : null),
    both ? make("p", { class: "note" }, make("strong", {}, `${plural(both, "test image")} also served to find the circuit.`), " The figures are that much too kind.") : ""];
}

// ---------------------------------------------------------------- charts

const PENS = [
  { colour: "var(--ink)", dash: "", mark: "disc" }, { colour: "var(--inhibit)", dash: "5 3", mark: "square" }, { colour: "var(--accent)", dash: "2 3", mark: "ring" },
  { colour: "var(--excite)", dash: "8 3 2 3", mark: "triangle" }, { colour: "var(--soft)", dash: "1 2", mark: "cross" },
];
const pen = (i) => PENS[i % PENS.length];
function mark(kind, x, y, stroke, text) {
  const shapes = {
    disc: () => make("circle", { cx: x, cy: y, r: 3, fill: stroke }), ring: () => make("circle", { cx: x, cy: y, r: 3, fill: "var(--page)", stroke, "stroke-width": 1.5 }),
    square: () => make("rect", { x: x - 2.7, y: y - 2.7, width: 5.4, height: 5.4, fill: stroke }),
    triangle: () => make("polygon", { points: `${x},${y - 3.6} ${x + 3.4},${y + 2.6} ${x - 3.4},${y + 2.6}`, fill: stroke }),
    cross: () => make("path", { d: `M${x - 3} ${y - 3}l6 6m0 -6l-6 6`, stroke, "stroke-width": 1.5 }),
  };
  const node = shapes[kind]();
  if (text) node.append(make("title", {}, text));
  return node;
}
function ticks(low, high) {
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const stepSize = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= rough);
  const list = [];
  for (let t = Math.ceil(low / stepSize - 1e-9) * stepSize; t <= high + stepSize * 1e-6; t += stepSize) list.push(Math.abs(t) < 1e-12 ? 0 : t);
  return list;
}

function chart({ title, xTitle, yTitle, x, series, range, write, width = 360, height = 156 }) {
  const drawn = series.map((s, i) => ({ ...s, pen: pen(s.pen ?? i), dots: (s.values ?? []).map((v, j) => ({ ...v, x: x[j] })).filter((v) => known(v.value) && known(v.x)) })).filter((s) => s.dots.length);
  if (!drawn.length) return null;
  const all = drawn.flatMap((s) => s.dots.flatMap((d) => [d.value, d.low, d.high])).filter(known);
  const low = Math.min(range[0], ...all), high = Math.max(range[1], ...all);
  const left = 40, right = 8, top = 8, bottom = 34, x0 = Math.min(...x), x1 = Math.max(...x);
  const px = (v) => left + ((v - x0) / (x1 - x0 || 1)) * (width - left - right), py = (v) => height - bottom - ((v - low) / (high - low || 1)) * (height - top - bottom);
  const line = (dots, key) => dots.map((d) => `${px(d.x).toFixed(1)},${py(d[key]).toFixed(1)}`);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}. ${drawn.map((s) => `${s.name}: ${s.dots.map((d) => `${percent(d.x)} ${write(d.value)}`).join(", ")}`).join(". ")}` });
  ticks(low, high).forEach((t) => svg.append(make("line", { x1: left, x2: width - right, y1: py(t), y2: py(t), stroke: "var(--line)", "stroke-width": t === 0 ? 1.4 : 0.8 }), make("text", { x: left - 6, y: py(t) + 4, "text-anchor": "end" }, write(t))));
  ticks(x0, x1).forEach((t) => svg.append(make("text", { x: px(t), y: height - bottom + 15, "text-anchor": "middle" }, percent(t))));
  svg.append(make("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, xTitle));
  drawn.forEach((s) => { if (s.dots.every((d) => known(d.low) && known(d.high))) svg.append(make("polygon", { points: [...line(s.dots, "high"), ...line(s.dots, "low").reverse()].join(" "), fill: s.pen.colour, "fill-opacity": 0.13 })); });
  [...drawn].reverse().forEach((s) => {
    svg.append(make("path", { d: `M${line(s.dots, "value").join("L")}`, fill: "none", stroke: s.pen.colour, "stroke-width": 1.8, "stroke-dasharray": s.pen.dash || null }));
    s.dots.forEach((d) => svg.append(mark(s.pen.mark, px(d.x), py(d.value), s.pen.colour, `${s.name}, ${percent(d.x)}: ${write(d.value)} ${band(d, write)}`)));
  });
  return make("figure", {}, make("h4", {}, title), make("figcaption", {}, yTitle), svg);
}
function key(names) {
  return make("div", { class: "key", role: "list", "aria-label": "Legend" }, names.map((name, i) => make("span", { role: "listitem" },
    make("svg", { viewBox: "0 0 34 10", "aria-hidden": "true" }, make("line", { x1: 0, x2: 34, y1: 5, y2: 5, stroke: pen(i).colour, "stroke-width": 1.8, "stroke-dasharray": pen(i).dash || null }), mark(pen(i).mark, 17, 5, pen(i).colour)), name)));
}
function curve(it, heading, xTitle) {
  if (!it?.x?.length || !it.series?.length) return [];
  const parts = [["concept", "On images of the concept", measure.word], ["others", "On other images", measure.word], ["selectivity", "Selectivity", `fall on the concept − fall on the others${measure.share ? ", points" : ""}`]];
  const charts = parts.map(([part, title, yTitle]) => chart({
    title, xTitle, yTitle: yTitle[0].toUpperCase() + yTitle.slice(1), x: it.x, range: part === "selectivity" ? [0, 0.2] : [0, 1], write: part === "selectivity" ? points : amount,
    series: it.series.map((s, i) => ({ name: s.name, values: s[part], pen: i })),
  })).filter(Boolean);
  return charts.length ? [make("h3", {}, heading), key(it.series.map((s) => s.name)), ...charts] : [];
}

function confidence() {
  const found = data.selection.confidence, stopped = data.provenance.stopped;
  if (!found) return [];
  const { mean, low, high } = found.with_circuit;
  const needed = stopped ? ` ${stopped.stable ? "Images were taken in until that was" : "All images were taken in and it did not become"} at least ${figure(stopped.rule.overlap)} at ${stopped.rule.patience} looks in a row.` : "";
  return [make("h3", {}, "Would other images give this circuit?"),
    make("p", { class: "note" }, `Circuits from ${count(found.draws)} bootstrap draws of the images that found it share `, make("b", {}, figure(found.overlap)),
      ` of their units with one another (Jaccard), and ${figure(mean)} [${figure(low)}, ${figure(high)}] with this circuit. The first is about what as many other images of the kind would give, or somewhat more.${needed}`)];
}

function fillEvaluation() {
  const panel = $("evaluation");
  if (!evaluation) {
    panel.replaceChildren(make("p", { class: "verdict" }, make("b", {}, "Not measured.")),
      make("p", { class: "note" }, "This page shows which units were chosen, not what they do. ", make("code", {}, "viscircuits evaluate"), " removes them on other images and measures what is lost."), ...confidence(), ...imagesUsed().filter(Boolean));
    return;
  }
  const edge = evaluation.edge_curve, share = (e, name, text) => (known(e?.value) ? [make("dt", {}, name), make("dd", {}, `${figure(e.value)} ${band(e, figure)} `, make("span", { class: "note" }, text))] : [make("dt", {}, name), make("dd", {}, "not measured")]);
  const ablation = evaluation.ablation ?? "an unrecorded";
  panel.replaceChildren(verdict(),
    make("p", { class: "note" }, `${evaluation.ablation ? ablation[0].toUpperCase() + ablation.slice(1) : "Unrecorded"} ablation; ${measure.word}. Brackets and bands are 95 % intervals.`),
    make("h3", {}, "What is lost, beside controls of the same size"), effectTable(),
    make("p", { class: "note" }, `Selectivity: fall on the concept − fall on the others${measure.share ? ", in percentage points" : ""}. Hollow: before; filled: after.`),
    ...imagesUsed().filter(Boolean), ...confidence(), make("h3", {}, "The circuit by itself"), make("dl", { class: "images" },
      share(evaluation.faithfulness, "Faithfulness", "what it recovers alone; 1 is all"), share(evaluation.completeness, "Completeness", "what is left without it; 0 is complete")),
    ...curve(evaluation.unit_curve, "Removing more and more of the units", "share of the circuit's units removed"),
    ...curve(edge, edge ? `Pruning edges ${edge.source ?? ""} → ${edge.target ?? ""}` : "", "share of these edges pruned"));
}

// ---------------------------------------------------------------- header and tables

function fillHeader() {
  const made = data.provenance, tested = evaluation?.images, nFound = made.images?.n ?? made.images?.n_images ?? made.images?.names?.length ?? made.n_images;
  const n = (set) => (known(set?.n) ? count(set.n) : "?");
  const facts = [
    ["Model", address(made.model)], ["Found on", known(nFound) ? plural(nFound, "image") : null],
    ["Tested on", evaluation ? (tested ? tested.others ? `${n(tested.concept)} + ${n(tested.others)} other images` : `${n(tested.concept)} images` : null) : "not measured"],
    ["Circuit", `${plural(units.length, "unit")} of ${count(sum(data.layers.map((layer) => layer.width)))} in ${plural(data.layers.length, "layer")}`],
    ["Score", made.score ?? made.options?.score], ["Ablation", evaluation?.ablation ?? made.ablation ?? made.options?.ablation],
  ];
  $("facts").replaceChildren(...facts.filter(([, value]) => value).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
  $("command").textContent = data.command;
  $("copy").addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(data.command); } catch {
      getSelection().selectAllChildren($("command"));
      document.execCommand("copy");
    }
    $("copy").textContent = "Copied";
    setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
  });
  const sample = (name, dash) => make("svg", { viewBox: "0 0 30 10", "aria-hidden": "true" }, make("line", { x1: 0, x2: 30, y1: 5, y2: 5, stroke: `var(--${name})`, "stroke-width": 3, "stroke-dasharray": dash }));
  const cut = data.n_edges > edges.length ? make("span", {}, `The page holds the strongest ${count(edges.length)} of ${count(data.n_edges)} edges; circuit.json has them all.`) : "";
  $("legend").replaceChildren(make("span", {}, sample("excite", null), "excites"), make("span", {}, sample("inhibit", "7 4"), "inhibits (dashed)"),
    make("span", {}, "Thickness: √ of the edge's share of the attribution between its two layers"), known(units[0]?.score) ? make("span", {}, "Bar: score within the layer") : "",
    edges.some(unsure) ? make("span", {}, "Pale: chosen in less than half of the bootstrap draws") : "", cut);
}

function table(caption, head, rows) {
  return make("table", {}, make("caption", {}, caption), make("thead", {}, make("tr", {}, head.map((text) => make("th", { scope: "col" }, text)))),
    make("tbody", {}, rows.map((row) => make("tr", {}, row.map((cell, i) => make(i ? "td" : "th", i ? {} : { scope: "row" }, cell))))));
}
function lazily(id, fill) {
  const details = $(id);
  details.addEventListener("toggle", () => { if (details.open && !details.lastElementChild.childNodes.length) details.lastElementChild.append(...fill()); });
}
function unitTables() {
  const strongest = (list, end) => list.slice(0, 3).map((edge) => `${verb(edge) === "inhibits" ? "−" : "+"} ${units[edge[end]].name} (${figure(edge.score)})`).join(", ") || "–";
  const tables = data.layers.map((layer) => table(`${layer.name}: ${layer.units.length} of ${layer.width} units`, ["Unit", "Score", ...(draws ? [`Draws that choose it, of ${draws}`] : []), "Images that excite it most", "Strongest incoming", "Strongest outgoing"],
    layer.order.map((id) => units[id]).map((unit) => [String(unit.index), figure(unit.score), ...(draws ? [known(unit.chosen) ? String(Math.round(unit.chosen * draws)) : "–"] : []), shotsOf(unit).map(nameOf).join(", ") || "–", strongest(unit.ins, "source"), strongest(unit.outs, "target")])));
  const few = edges.slice(0, 200);
  return [make("p", { class: "note" }, "+ excites, − inhibits; the score in brackets."), ...tables,
    table(`The ${few.length} edges shown first, of ${count(data.n_edges)}`, ["Source", "Target", "Effect", "Score", "Signed", "Share of its layer pair"], few.map((e) => [units[e.source].name, units[e.target].name, verb(e), figure(e.score), figure(e.signed), percent(e.share)]))];
}
function figureTables() {
  if (!evaluation) return [make("p", { class: "note" }, "Not measured.")];
  const show = (e) => (known(e?.value) ? `${figure(e.value)} ${band(e, figure)}` : "not measured");
  const kinds = [...new Set([evaluation.baseline, ...(evaluation.circuits ?? [])].flatMap((row) => ["concept", "others"].flatMap((part) => Object.keys(row?.[part] ?? {}))))];
  const line = (name, row) => [name, ...["concept", "others"].flatMap((part) => kinds.map((kind) => show(row?.[part]?.[kind]))), row.selectivity ? show(row.selectivity) : "–"];
  const curves = [["Removing units", evaluation.unit_curve], ["Pruning edges", evaluation.edge_curve]].filter(([, it]) => it?.x?.length).map(([caption, it]) =>
    table(caption, ["Series", "Measured", ...it.x.map(percent)], (it.series ?? []).flatMap((s) => ["concept", "others", "selectivity"].filter((part) => s[part]).map((part) => [s.name, part, ...s[part].map(show)]))));
  return [table("Each circuit removed", ["Circuit", ...["concept", "others"].flatMap((part) => kinds.map((kind) => `${part}: ${kind}`)), "selectivity"],
    [...(evaluation.baseline ? [line("nothing removed", evaluation.baseline)] : []), ...(evaluation.circuits ?? []).map((row) => line(row.name, row))]), ...curves];
}
function madeTables() {
  const rows = (object) => Object.entries(object).map(([name, value]) => [name, make("pre", {}, typeof value === "string" ? value : JSON.stringify(value, null, typeof value === "object" && JSON.stringify(value)?.length > 80 ? 1 : 0))]);
  return [table("Provenance", ["What", "Value"], rows(data.provenance)), table("Selection", ["What", "Value"], rows(data.selection))];
}

// ---------------------------------------------------------------- start

function build() {
  if (data.sprite) {
    // a rule, not a custom property: browsers cut those off at two megabytes
    document.head.append(make("style", {}, `.pic { background-image: url(${data.sprite.uri}); }`));
    root.style.setProperty("--columns", data.sprite.columns);
    root.style.setProperty("--rows", data.sprite.rows);
  }
  const most = data.layers.map((layer) => Math.max(...layer.scores.map(Math.abs), 1e-30)), faces = units.length > 600 ? 1 : 4;
  units.forEach((unit) => {
    unit.node = make("button", { class: "unit", type: "button", tabindex: unit.id ? -1 : 0, "aria-label": describe(unit) }, make("span", {}, face(unit, faces)),
      make("small", {}, shotsOf(unit).length ? String(unit.index) : "", known(unit.score) ? make("i", { "--score": Math.max(0, unit.score) / most[unit.layer] }) : null));
    unit.node.unit = unit;
  });
  data.layers.forEach((layer) => $("nodes").append(...layer.order.map((id) => units[id].node)));
  $("units").append(...units.map((unit) => make("option", { value: unit.name })));
  if (faces === 1 || !data.sprite) $("four").closest("label").hidden = true;
  $("keys").append(make("h2", {}, "Keys"), make("dl", {}, KEYS.flatMap(([name, what]) => [make("dt", {}, name.split(" ").flatMap((k) => [make("kbd", {}, k), " "])), make("dd", {}, what)])),
    make("form", { method: "dialog" }, make("button", {}, "Close")));
}

function listen() {
  const under = (event) => event.target.closest?.(".unit")?.unit ?? null;
  $("nodes").addEventListener("pointerover", (event) => { if (event.pointerType === "mouse") hover(under(event)); });
  $("nodes").addEventListener("pointerleave", () => hover(null));
  $("nodes").addEventListener("click", (event) => { if (under(event)) choose(under(event)); });
  $("scroll").addEventListener("scroll", () => { if (!$("card").hidden) hover(null); }, { passive: true });
  $("amount").addEventListener("input", (event) => show(fromSlider(Number(event.target.value))));
  $("size").addEventListener("input", (event) => { view.size = Number(event.target.value); place(); });
  $("four").addEventListener("change", (event) => $("stage").classList.toggle("mosaic", event.target.checked));
  $("find").addEventListener("change", find);
  $("find").addEventListener("input", () => { $("find").setCustomValidity(""); if (byName.has($("find").value)) find(); });
  $("help").addEventListener("click", () => $("keys").showModal());
  $("close").addEventListener("click", () => choose(null));
  ["evaluation", "unit"].forEach((name) => $(`tab-${name}`).addEventListener("click", () => openTab(name)));
  document.querySelector(".tabs").addEventListener("keydown", (event) => {
    if (!["ArrowLeft", "ArrowRight"].includes(event.key)) return;
    const other = $("unit").hidden ? "unit" : "evaluation";
    openTab(other);
    $(`tab-${other}`).focus();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColours(); drawAll(); light(); });
  let width = innerWidth;
  addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; place(); } });
}

readColours();
build();
fillHeader();
fillEvaluation();
fillUnit(null);
listen();
lazily("tables", unitTables);
lazily("figures", figureTables);
lazily("made", madeTables);
view.size = startSize();
$("size").value = view.size;
if (view.size >= 72 && !$("four").closest("label").hidden) $("four").click();
place();
show(Math.min(edges.length, Math.max(60, Math.round(1.5 * units.length))));
openTab("evaluation");
const asked = units.find((unit) => `#${encodeURIComponent(unit.name)}` === location.hash || `#${unit.name}` === location.hash);
if (asked) choose(asked);
root.dataset.ready = "1";

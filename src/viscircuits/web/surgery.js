// Surgery: units and edges are taken out of the real network, and what it then answers is shown at once.
import { data, edges, on, REPLACEMENTS, set, state, units } from "viscircuits/store.js";
import { announce, called, count, figure, known, make, percent, plural } from "viscircuits/words.js";
import { copyButton, download, fileName, goTo, openEdge, refill, selected, thumb, unitButton } from "viscircuits/pieces.js";
import { diverging, pairedBars } from "viscircuits/bars.js";
import { changesOn, inView, nameOfProbe, network, portrait, setAfter } from "viscircuits/probe.js";
import { HOW_TO_SERVE, ask, follow, served, stop } from "viscircuits/remote.js";
import { command, python } from "viscircuits/recipe.js";

const LISTED = 8, CHANGED = 0.005;
const WORDS = { zero: "zero", mean: "mean over reference images", resample: "the unit's value on another image", noise: "noise with the reference's mean and variance" };
const past = [], future = [];
let element, asked = {}, everything = false, answers = null, measured = null, measuring = null;  // measuring: {done, of} while accuracy is on its way
let basket = snapshot();
const trouble = make("div", { class: "trouble" }), untold = make("div"), exported = make("div");

export const panel = {
  name: "surgery",
  title: "Surgery",
  available: () => true,
  mount(place) {
    element = make("div");
    place.append(element);
    on(["selected", "replacement"], changed);
    on(["probe", "probe2", "probes"], () => { fill(); operate(); });
    on(["notes"], fill);
    addEventListener("pagehide", () => stop("accuracy"));
    if (served) network().then(learn);
    fill();
    operate();
  },
};

function learn(answer) {
  if (!answer) return;
  asked = answer;
  const [usual] = answer.ablations, wanted = state.replacement;
  if (answer.ablations.includes(wanted)) { fill(); return; }
  basket = { ...basket, replacement: usual };  // before the store tells us, so that it is no new step
  set({ replacement: usual });
  settle(basket);
  announce(`This network can be shown with ${usual} in place of what is taken out, not with ${wanted}.`);
}

// ---------------------------------------------------------------- the basket

/** What is taken out, and what stands in its place: an edit, which undo brings back whole. */
function snapshot() { return { units: [...state.selected.units], edges: [...state.selected.edges], replacement: state.replacement }; }
const same = (a, b) => a.replacement === b.replacement && ["units", "edges"].every((kind) => a[kind].length === b[kind].length && a[kind].every((id) => b[kind].includes(id)));
const size = (which) => which.units.length + which.edges.length;

function changed() {
  const now = snapshot();
  if (same(now, basket)) return;
  past.push(basket);
  future.length = 0;
  settle(now);
}

function settle(now) {
  basket = now;
  measured = null;
  callOff();
  [trouble, untold, exported].forEach((place) => place.replaceChildren());
  answers = null;  // what was answered to another edit
  setAfter(new Map());
  fill();
  operate();
}

function put({ units: some, edges: cut, replacement = state.replacement }) { set({ selected: { units: new Set(some), edges: new Set(cut) }, replacement }); }

function travel(from, to, word) {
  const there = from.pop();
  if (!there) return;
  to.push(basket);
  basket = there;  // before the store tells us, so that it is no new step
  put(there);
  settle(there);
  announce(`${word}; the basket holds ${size(there)}, replaced by ${WORDS[there.replacement]}.`);
}
const undo = () => travel(past, future, "Undone");
const redo = () => travel(future, past, "Done again");

/** What is done to the network, as the server takes it. */
function edit() {
  const { units: some, edges: cut } = selected();
  const pair = (unit) => [data.layers[unit.layer].name, unit.index];
  return { units: some.map(pair), edges: cut.map((edge) => [pair(units[edge.source]), pair(units[edge.target])]), ablation: state.replacement };
}

// ---------------------------------------------------------------- asking the network

async function operate() {
  if (!served || !size(basket) || !inView().length) { stop("surgery"); return; }
  const answer = await ask("/api/surgery", { json: { edit: edit(), probes: inView() }, topic: "surgery", into: trouble });
  if (!answer) return;
  answers = answer;
  setAfter(new Map(answer.probes.map(({ id, activations }) => [id, activations])));
  fill();
  announce(answer.probes.map(spoken).join(" "));
}

function spoken({ id, before, after }) {
  if (!before.length || !after.length) return `The network ran on ${nameOfProbe(id)}.`;
  const first = after[0], was = before[0];
  return first.index === was.index ? `${nameOfProbe(id)}: still ${first.label}, ${percent(was.probability)} before, ${percent(first.probability)} now.` : `${nameOfProbe(id)}: ${was.label} before, ${first.label} now.`;
}

async function measure() {
  measuring = { done: 0, of: 0 };
  fill();
  const last = await follow("/api/accuracy", (line) => { if (known(line.done)) { measuring = line; showProgress(); } }, { json: { edit: edit() }, topic: "accuracy", into: untold });
  measuring = null;
  if (last?.after) { measured = last; announce("Accuracy measured."); }
  fill();
}

function callOff() {
  if (!measuring) return;
  stop("accuracy");
  measuring = null;
}

async function exportAs(kind) {
  if (!served) { showText(kind, kind === "python" ? python(edit()) : command(edit())); return; }
  const read = (response) => (kind === "weights" ? response.blob() : response.text());
  const answer = await ask("/api/export", { json: { edit: edit(), kind, probes: inView() }, topic: "export", into: exported, read });
  if (answer === null) return;
  if (kind === "weights") { download(fileName("-edited.safetensors"), answer); announce("The weights are being downloaded."); }
  else showText(kind, answer);
}

// ---------------------------------------------------------------- what shows

function fill() {
  if (!element) return;
  refill(element, make("h2", {}, "Surgery"), lead(), tools(), chips(), trouble, served ? results() : null, served && size(basket) ? accuracy() : null, size(basket) ? exports_() : null);
}

function lead() {
  const what = "Select units and edges, in the graph or in their panels.";
  if (served) return make("p", { class: "note" }, `${what} The network is run without them, at once, on the image in view; nothing on disk changes.`);
  return make("p", { class: "note" }, `${what} This page cannot run the network: open it with `, make("code", {}, HOW_TO_SERVE), " to see what it does without them. The basket can be exported all the same.");
}

function tools() {
  const focused = units[state.focus];
  const button = (text, key, act, off = false) => make("button", { type: "button", class: "tool", "data-key": key, disabled: off, onclick: act }, text);
  const offered = served ? asked.ablations : REPLACEMENTS;
  const choice = offered ? make("label", { class: "choice" }, make("span", {}, "Replaced by"), make("select", { "data-key": "ablation", onchange: (event) => set({ replacement: event.target.value }) },
    offered.map((name) => make("option", { value: name, selected: name === state.replacement }, WORDS[name] ?? name)))) : null;
  return [make("div", { class: "toolrow" }, button("Undo", "undo", undo, !past.length), button("Redo", "redo", redo, !future.length), button("Clear", "clear", () => put({ units: [], edges: [] }), !size(basket)),
    size(basket) ? null : focused ? button(`Select ${called(focused) || focused.name}`, "focused", () => put({ units: [focused.id], edges: [] })) : null,
    size(basket) ? null : button("Select the whole circuit", "whole", () => put({ units: units.map((unit) => unit.id), edges: [] }))), choice];
}

function chips() {
  const { units: some, edges: cut } = selected();
  if (!some.length && !cut.length) return make("p", { class: "note empty" }, "Nothing is selected.");
  const chip = (kind, id, content, words, open) => make("li", { class: "chip" }, make("button", { type: "button", class: "what", onclick: open }, content),
    make("button", { type: "button", class: "drop-it", "aria-label": `Take out ${words}`, "data-key": `out-${kind}${id}`, onclick: () => put({ units: basket.units.filter((each) => kind !== "units" || each !== id), edges: basket.edges.filter((each) => kind !== "edges" || each !== id) }) }, "×"));
  const label = (unit) => called(unit) || unit.name;
  const all = [...some.map((unit) => () => chip("units", unit.id, [thumb(unit), label(unit)], label(unit), () => goTo(unit))),
    ...cut.map((edge) => () => { const words = `${label(units[edge.source])} → ${label(units[edge.target])}`; return chip("edges", edge.place, words, words, () => openEdge(edge)); })];
  const more = all.length - LISTED;
  return make("ul", { class: "chips", "aria-label": "Selected for surgery" }, (everything ? all : all.slice(0, LISTED)).map((each) => each()),
    more > 0 ? make("li", {}, make("button", { type: "button", class: "more", "data-key": "everything", "aria-expanded": everything, onclick: () => { everything = !everything; fill(); } }, everything ? "show fewer" : `and ${count(more)} more`)) : null);
}

function results() {
  if (!inView().length) return make("p", { class: "note empty" }, "No image to try it on: add one under Probe.");
  const seen = (answers?.probes ?? []).filter(({ id }) => inView().includes(id));
  if (!size(basket) || !seen.length) return null;
  const { forward, all } = answers.milliseconds ?? {};
  return make("section", { class: "operated" }, make("h3", {}, "What the network answers"), make("p", { class: "note" }, make("span", { class: "swatch old" }), " before  ", make("span", { class: "swatch new" }), " after, with the change in percentage points."),
    seen.map((probe) => [make("div", { class: "seen", "data-probe": probe.id }, portrait(probe.id), make("div", {}, make("h4", {}, nameOfProbe(probe.id)), pairedBars(probe.before, probe.after))), changes(probe.id)]),
    known(all) ? make("p", { class: "note" }, `Answered in ${Math.round(all)} ms${known(forward) ? `, of which the forward pass took ${Math.round(forward)} ms` : ""}.`) : null);
}

/** The units whose activation changes most on a probe: before and after, as shares of their largest. */
function changes(id) {
  const { before, after } = changesOn(id) ?? { before: [], after: [] }, by = (unit) => after[unit.id] - before[unit.id];
  const some = units.filter((unit) => Math.abs(by(unit)) >= CHANGED).sort((a, b) => Math.abs(by(b)) - Math.abs(by(a)));
  if (!some.length) return make("p", { class: "note" }, "No unit of the circuit changes its activation on it by half a percent or more.");
  return [make("h4", {}, `Units that change most on ${nameOfProbe(id)}`), make("p", { class: "note" }, `Activation before → after, as a share of each unit's largest${some.length > LISTED ? `; ${count(some.length)} change` : ""}. ▲ and ▼ mark them in the graph.`),
    make("ul", { class: "excited changed" }, some.slice(0, LISTED).map((unit) => make("li", {}, unitButton(unit), diverging(by(unit)), make("span", { class: "n" }, `${percent(before[unit.id])} → ${percent(after[unit.id])}`))))];
}

// ---------------------------------------------------------------- accuracy

function accuracy() {
  const sets = asked.evaluated_on ?? {}, n = Object.values(sets).reduce((a, b) => a + b, 0);
  if (measuring) return make("section", { class: "measuring" }, make("h3", {}, "Accuracy"), progressBar(), make("button", { type: "button", class: "tool", "data-key": "cancel", onclick: () => { callOff(); announce("Called off."); fill(); } }, "Cancel"));
  return make("section", {}, make("h3", {}, "Accuracy"), untold, ...(measured ? measuredTable() : []),
    n ? make("button", { type: "button", class: "tool", "data-key": "cancel", onclick: measure }, `${measured ? "Measure again" : "Measure accuracy"} on ${Object.entries(sets).map(([name, some]) => `${count(some)} ${name === "concept" ? plural(some, "image").replace(/^\S+ /, "") + " of the concept" : "others"}`).join(" and ")}`)
      : make("p", { class: "note" }, "The folder names no images to measure accuracy on."));
}

function progressBar() {
  return make("div", { class: "progress" }, make("progress", { "aria-label": "Images measured", max: measuring.of || 1, value: measuring.of ? measuring.done : null }), make("span", { class: "note" }, progressWords()));
}
const progressWords = () => (measuring.of ? `${count(measuring.done)} of ${count(measuring.of)} images` : "starting…");
function showProgress() {
  const bar = element.querySelector(".measuring progress");
  if (!bar) return;
  bar.max = measuring.of || 1;
  bar.value = measuring.done;
  element.querySelector(".measuring .progress .note").textContent = progressWords();
}

function measuredTable() {
  const share = ["accuracy", "agreement"].includes(measured.measure), points = (x) => (share ? (100 * x).toFixed(1).replace("-", "−") : figure(x));
  const write = (x) => (known(x) ? `${points(x)}${share ? "\u202f%" : ""}` : "–"), { value, low, high } = measured.selectivity ?? {};
  const ends = (it) => (known(it?.low) ? make("small", {}, `[${write(it.low)}, ${write(it.high)}]`) : null);
  const rows = Object.keys(measured.after).map((name) => make("tr", {}, make("th", { scope: "row" }, name),
    ["before", "after"].map((when) => make("td", {}, write(measured[when][name]?.value), ends(measured[when][name])))));
  return [make("table", {}, make("thead", {}, make("tr", {}, make("th", { scope: "col" }, measured.measure), make("th", { scope: "col" }, "Before"), make("th", { scope: "col" }, "After"))), make("tbody", {}, rows)),
    known(value) ? make("p", { class: "note" }, "Selectivity ", make("b", {}, points(value), share ? " points" : ""), known(low) ? ` [${points(low)}, ${points(high)}]` : "", ": fall on the concept − fall on the others. Brackets are 95\u202f% intervals.") : null];
}

// ---------------------------------------------------------------- export

function exports_() {
  const button = (text, kind) => make("button", { type: "button", class: "tool", "data-key": `export-${kind}`, onclick: () => exportAs(kind) }, text);
  return make("section", {}, make("h3", {}, "Take it with you"), make("div", { class: "toolrow" }, button("Python", "python"), button("Command line", "command"), served ? button("Weights", "weights") : null), exported);
}

function showText(kind, text) {
  exported.replaceChildren(make("pre", { class: "code", tabindex: 0, "aria-label": kind === "python" ? "The edit as Python" : "The edit as a command line" }, text),
    make("div", { class: "toolrow" }, copyButton("Copy", text), make("button", { type: "button", class: "tool", onclick: () => download(fileName(kind === "python" ? "-surgery.py" : "-surgery.sh"), text, "text/plain") }, "Download")));
}

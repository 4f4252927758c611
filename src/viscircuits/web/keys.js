// The keyboard: walking along the circuit, and a key for whatever the toolbar does.
import { data, set, state, units } from "viscircuits/store.js";
import { $, announce, make } from "viscircuits/words.js";
import { goToUnit, isShown, toggleCut, toggleLayer, togglePin } from "viscircuits/graph.js";
import { nextFace, showEdges, toggleMosaic } from "viscircuits/filters.js";
import { stepSize } from "viscircuits/size.js";

const KEYS = [
  ["→ ←", "go along the strongest edge to the next or the previous layer"], ["↑ ↓", "go to the unit above or below"],
  ["+ −", "show more or fewer edges"], ["[ ]", "a smaller or larger circuit"], ["/", "find units"],
  ["P", "pin the unit, so that its edges stay lit; Ctrl- or Cmd-click does the same"], ["S", "select the unit for surgery; Shift-click does the same"],
  ["C", "take the units of its layer together, or apart"], ["V", "exemplars, visualisations or heat maps on the units"], ["F", "the graph alone, as wide as the window"], ["M", "one picture or four on each unit"],
  ["Esc", "clear, one thing after another: what is found, the focus, the pins"], ["?", "show these keys"],
];

const subject = () => state.hovered ?? state.focus;
const withSubject = (act) => () => { if (subject() === null) announce("Point at a unit or choose one first."); else act(subject()); };

const ACTS = {
  "+": () => showEdges(state.shown * 1.25 + 1), "=": () => showEdges(state.shown * 1.25 + 1), "-": () => showEdges(state.shown / 1.25 - 1), "−": () => showEdges(state.shown / 1.25 - 1),
  "[": () => stepSize(-1), "]": () => stepSize(1), "/": () => { $("find").focus(); $("find").select(); },
  p: withSubject(togglePin), s: withSubject(toggleCut), c: withSubject((id) => toggleLayer(units[id].layer)), f: () => set({ alone: !state.alone }), v: nextFace, m: toggleMosaic, Escape: clear, "?": () => $("keys").showModal(),
  ArrowRight: () => walk("outs", "target"), ArrowLeft: () => walk("ins", "source"), ArrowDown: () => along(1), ArrowUp: () => along(-1),
};

function walk(list, end) {
  const unit = units[state.focus];
  if (!unit) { start(); return; }
  const edge = unit[list].find((each) => isShown(each[end]));
  if (edge) goToUnit(units[edge[end]], { walk: true });
  else announce("No edge leads further that way.");
}

function along(by) {
  const unit = units[state.focus];
  if (!unit) { start(); return; }
  const column = data.layers[unit.layer].order.filter(isShown), next = column[column.indexOf(unit.id) + by];
  if (next !== undefined) goToUnit(units[next], { walk: true });
  else announce("The layer ends here.");
}

function start() {
  const first = data.layers.flatMap((layer) => layer.order).find(isShown);
  if (first !== undefined) goToUnit(units[first], { walk: true });
}

function clear() {
  if (state.query) set({ query: "" });
  else if (state.focus !== null || state.edge !== null) set({ focus: null, edge: null, panel: "evaluation" });
  else if (state.pinned.size) set({ pinned: new Set() });
}

const typing = (event) => event.target.closest?.("input:not([type=range], [type=checkbox]), textarea, select, dialog, [contenteditable]");
const taken = (event) => event.key.startsWith("Arrow") && event.target.closest?.("input, [role=tab], details[open]");

export function mountKeys() {
  addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || typing(event) || taken(event)) return;
    const act = ACTS[event.key] ?? ACTS[event.key.toLowerCase()];
    if (!act) return;
    event.preventDefault();
    act();
  });
  $("keys").append(make("h2", {}, "Keys"), make("dl", {}, KEYS.flatMap(([names, what]) => [make("dt", {}, names.split(" ").flatMap((key) => [make("kbd", {}, key), " "])), make("dd", {}, what)])),
    make("form", { method: "dialog" }, make("button", {}, "Close")));
  $("help").addEventListener("click", () => $("keys").showModal());
}

// Puts the page together: header, graph, toolbar, side panels, tables.
import { activations, activationsSigned, data, edges, on, operated, set, state, units } from "viscircuits/store.js";
import { $, count, known, make, paintSprites, plural, sum } from "viscircuits/words.js";
import { startSize } from "viscircuits/layout.js";
import { goToUnit, mountGraph } from "viscircuits/graph.js";
import { mountFilters } from "viscircuits/filters.js";
import { mountFinding } from "viscircuits/finding.js";
import { mountSize } from "viscircuits/size.js";
import { mountTables } from "viscircuits/tables.js";
import { mountKeys } from "viscircuits/keys.js";
import { mountExport } from "viscircuits/export.js";
import { panel as evaluation, evaluated } from "viscircuits/evaluation.js";
import { panel as unit } from "viscircuits/unit.js";
import { panel as edge } from "viscircuits/edge.js";
import { panel as probe } from "viscircuits/probe.js";
import { panel as compare } from "viscircuits/compare.js";
import { panel as surgery } from "viscircuits/surgery.js";
import { panel as notes } from "viscircuits/notes.js";

const PANELS = [evaluation, unit, edge, probe, compare, surgery, notes].filter((panel) => panel.available());

// ---------------------------------------------------------------- header and legend

const address = (thing) => (thing && typeof thing === "object" ? thing.address ?? thing.name ?? null : thing ?? null);

function fillFacts() {
  const made = data.provenance, result = evaluated(), tested = result?.images, nFound = made.images?.n ?? made.images?.n_images ?? made.images?.names?.length ?? made.n_images;
  const n = (some) => (known(some?.n) ? count(some.n) : "?");
  const testedOn = !result ? "not measured" : !tested ? null : tested.others ? `${n(tested.concept)} + ${n(tested.others)} other images` : `${n(tested.concept)} images`;
  const facts = [
    ["Model", address(made.model)], ["Found on", known(nFound) ? plural(nFound, "image") : null], ["Tested on", testedOn],
    ["Circuit", `${plural(units.length, "unit")} of ${count(sum(data.layers.map((layer) => layer.width)))} in ${plural(data.layers.length, "layer")}`],
    ["Score", made.score ?? made.options?.score], ["Ablation", result?.ablation ?? made.ablation ?? made.options?.ablation],
  ];
  $("facts").replaceChildren(...facts.filter(([, value]) => value).map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, String(value)))));
}

function fillCommand() {
  $("command").textContent = data.command;
  $("command").parentElement.hidden = !data.command;
  $("copy").addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(data.command); } catch {
      getSelection().selectAllChildren($("command"));
      document.execCommand("copy");
    }
    $("copy").textContent = "Copied";
    setTimeout(() => { $("copy").textContent = "Copy"; }, 1500);
  });
}

const sample = (colour, { dash = null, end = "" } = {}) => make("svg", { viewBox: "0 0 34 12", "aria-hidden": "true" },
  make("path", { d: `M1 6H31${end}`, fill: "none", stroke: `var(--${colour})`, "stroke-width": 2.4, "stroke-dasharray": dash }));

function fillLegend() {
  const sure = edges.some((each) => known(each.chosen)), whose = data.comparison;
  const entries = [
    [sample("excite", { end: "M26 1.5L32 6L26 10.5" }), "excites"], [sample("inhibit", { end: "M32 1V11" }), "inhibits"],
    sure ? [sample("soft"), "chosen in at least 80\u202f% of bootstrap draws"] : null, sure ? [sample("soft", { dash: "7 4" }), "in half of them"] : null, sure ? [sample("soft", { dash: "1.8 3.4" }), "in fewer; dashed frame: a unit in fewer"] : null,
    whose ? [make("i", { class: "swatch first" }), `only ${data.title}`] : null, whose ? [make("i", { class: "swatch both" }), "both"] : null, whose ? [make("i", { class: "swatch second" }), `only ${whose.title}`] : null,
    activations && !activationsSigned ? [make("i", { class: "swatch glows" }), `brightness and rim: how strongly the probe excites the unit${operated ? " under the edit" : ""}`] : null,
    activations && activationsSigned ? [make("i", { class: "swatch rose" }), "more on the second image"] : null, activations && activationsSigned ? [make("i", { class: "swatch fell" }), "less"] : null,
    operated ? [make("i", { class: "swatch rose-mark" }), "more after the edit"] : null, operated ? [make("i", { class: "swatch fell-mark" }), "less"] : null,
    ["Thickness: √ of the share of the attribution between two layers; of a lit path, of what passes through it"],
    known(units[0]?.score) ? ["Bar: score within the layer"] : null,
    data.n_edges > edges.length ? [`The page holds the strongest ${count(edges.length)} of ${count(data.n_edges)} edges; circuit.json has them all.`] : null,
  ];
  $("legend").replaceChildren(...entries.filter(Boolean).map((entry) => make("span", {}, entry)));
}

// ---------------------------------------------------------------- side panel

function mountPanels() {
  const tabs = $("tabs");
  PANELS.forEach(({ name, title, mount }) => {
    const element = make("div", { id: name, role: "tabpanel", "aria-labelledby": `tab-${name}`, tabindex: 0 });
    tabs.append(make("button", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": name, onclick: () => set({ panel: name }) }, title));
    $("side").append(element);
    mount(element);
  });
  tabs.addEventListener("keydown", (event) => {
    const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key], at = PANELS.findIndex(({ name }) => name === state.panel);
    if (!by || at < 0) return;
    event.preventDefault();
    set({ panel: PANELS[(at + by + PANELS.length) % PANELS.length].name });
    $(`tab-${state.panel}`).focus();
  });
  $("close").addEventListener("click", () => set({ focus: null, edge: null, panel: "evaluation" }));
  on(["panel", "focus", "edge"], open);
  open();
}

function open() {
  if (!PANELS.some(({ name }) => name === state.panel)) { set({ panel: "evaluation" }); return; }
  PANELS.forEach(({ name }) => {
    const chosen = name === state.panel, tab = $(`tab-${name}`);
    $(name).hidden = !chosen;
    tab.setAttribute("aria-selected", String(chosen));
    tab.tabIndex = chosen ? 0 : -1;
    if (chosen && $("tabs").scrollWidth > $("tabs").clientWidth) $("tabs").scrollLeft = tab.offsetLeft - 40;
  });
  const about = (state.panel === "unit" && state.focus !== null) || (state.panel === "edge" && state.edge !== null);
  $("close").hidden = !about;
  $("side").classList.toggle("sheet", about);  // on small screens it comes up over the graph
}

/** The graph alone, as wide as the window, or beside its panels. */
function widen() {
  document.querySelector("main").classList.toggle("alone", state.alone);
  $("alone").setAttribute("aria-pressed", String(state.alone));
}

// ---------------------------------------------------------------- start

document.title = `${data.title} · viscircuits`;
paintSprites();
fillFacts();
fillCommand();
fillLegend();
widen();
on(["ablation"], fillFacts);
on(["activations", "operated"], fillLegend);
mountSize();
mountPanels();
const start = startSize(data.layers, $("scroll").clientWidth, $("scroll").clientHeight);
mountGraph(start);
mountFilters(start.size);
mountFinding((chosen) => goToUnit(chosen));
mountExport($("more"));
mountTables();
mountKeys();
$("alone").addEventListener("click", () => set({ alone: !state.alone }));
on(["alone"], widen);

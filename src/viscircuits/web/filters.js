// What thins the graph out: how many edges, which scores, which layers taken together, which pictures.
import { FACES, covered, data, edges, on, set, state, units } from "viscircuits/store.js";
import { $, announce, count, make, percent } from "viscircuits/words.js";
import { hasMosaic, nDrawn, zoom } from "viscircuits/graph.js";
import { inView, scored } from "viscircuits/paths.js";
import { served } from "viscircuits/remote.js";

const STEPS = 1000, FIRST = 40;
const FACE_WORDS = { exemplars: "Exemplars", visualisations: "Visualisations", heat: "Heat map" };

export function mountFilters(size) {
  mountAmount();
  mountMenu(size);
  mountFaces();
}

// ---------------------------------------------------------------- how many edges

const fromSlider = (value) => (value < FIRST / 2 ? 0 : Math.exp(((value - FIRST) / (STEPS - FIRST)) * Math.log(Math.max(2, edges.length))));
const toSlider = (n) => (n <= 1 ? n * FIRST : FIRST + ((STEPS - FIRST) * Math.log(n)) / Math.log(Math.max(2, edges.length)));

export function showEdges(n) { set({ shown: Math.max(0, Math.min(edges.length, Math.round(n))) }); }

function mountAmount() {
  const slider = $("amount");
  slider.addEventListener("input", () => showEdges(fromSlider(Number(slider.value))));
  on(["shown", "fraction", "least", "members"], fillAmount);
  fillAmount();
}
function fillAmount() {
  const slider = $("amount"), whole = state.fraction === 1 && !state.least && state.members.size === 3;
  if (document.activeElement !== slider) slider.value = toSlider(state.shown);
  const text = !edges.length ? "no edges" : `${count(nDrawn())} of ${count(data.n_edges)}${whole ? ` · ${percent(Math.min(1, covered[state.shown]))} of attribution` : ""}`;
  $("shown").textContent = text;
  slider.setAttribute("aria-valuetext", text);
}

// ---------------------------------------------------------------- the menu

function mountMenu(size) {
  const menu = $("filters"), least = make("input", { type: "range", id: "least", min: 0, max: 100, step: 1, "aria-describedby": "least-said", oninput: (event) => set({ least: Number(event.target.value) / 100 }) });
  const layers = data.layers.map((layer, l) => make("label", {}, make("input", { type: "checkbox", "data-layer-box": l, onchange: () => toggle(l) }), make("bdi", { class: "layer" }, layer.name)));
  const skips = make("input", { type: "checkbox", id: "skips", onchange: (event) => set({ skips: event.target.checked }) });
  const skipping = edges.some((edge) => data.layers[units[edge.target].layer].column - data.layers[units[edge.source].layer].column > 1);
  const four = make("input", { type: "checkbox", id: "four", onchange: (event) => set({ mosaic: event.target.checked }) });
  const every = (collapsed) => set({ collapsed: new Set(collapsed ? data.layers.keys() : []) });
  menu.lastElementChild.replaceChildren(
    make("label", { class: "line" }, make("span", {}, "Zoom"), make("input", { type: "range", id: "zoom", min: 24, max: 112, step: 4, value: size, oninput: (event) => zoom(Number(event.target.value)) })),
    ...(data.sprite ? [make("label", {}, four, "Four pictures on each unit")] : []),
    ...(scored ? [make("label", { class: "line" }, make("span", {}, "Score at least"), least, make("output", { id: "least-said", for: "least" })), make("p", { class: "note" }, "of the layer's largest score")] : []),
    ...(skipping ? [make("label", {}, skips, "Edges that skip layers in full")] : []),
    make("fieldset", {}, make("legend", {}, "Layers shown unit by unit"), layers, make("div", { class: "toolrow" }, make("button", { type: "button", class: "tool", onclick: () => every(false) }, "All"), make("button", { type: "button", class: "tool", onclick: () => every(true) }, "None"))));
  const fill = () => {
    least.value = Math.round(state.least * 100);
    if (scored) $("least-said").textContent = percent(state.least);
    skips.checked = state.skips;
    four.checked = hasMosaic();
    menu.querySelectorAll("[data-layer-box]").forEach((box) => { box.checked = !state.collapsed.has(Number(box.dataset.layerBox)); });
    const n = (state.least > 0) + (state.collapsed.size > 0) + !state.skips;
    menu.firstElementChild.textContent = n ? `View · ${n}` : "View";
  };
  on(["least", "collapsed", "skips", "mosaic"], fill);
  on(["least"], () => announce(`${count(inView().reduce((n, one) => n + one, 0))} units in view.`));
  fill();
  addEventListener("pointerdown", (event) => { if (menu.open && !menu.contains(event.target)) menu.open = false; });
  menu.addEventListener("keydown", (event) => { if (event.key === "Escape" && menu.open) { event.stopPropagation(); menu.open = false; menu.firstElementChild.focus(); } });
}

function toggle(l) {
  const next = new Set(state.collapsed);
  if (!next.delete(l)) next.add(l);
  set({ collapsed: next });
}

// ---------------------------------------------------------------- which pictures

const there = { exemplars: true, visualisations: Boolean(data.visualisation_sprite), heat: served };
export const faces = FACES.filter((face) => there[face]);

/** The next kind of picture on the units. */
export function nextFace() {
  const face = faces[(faces.indexOf(state.face) + 1) % faces.length];
  if (faces.length < 2) { announce("This page has one kind of picture."); return; }
  set({ face });
  announce(face === "heat" && !state.probe ? "Heat maps need a probe image: choose one under Probe." : `The units show ${FACE_WORDS[face].toLowerCase()}.`);
}
export function toggleMosaic() { set({ mosaic: !hasMosaic() }); }

function mountFaces() {
  const group = $("faces");
  group.hidden = faces.length < 2;
  group.append(...faces.map((face) => make("button", { type: "button", "data-face": face, onclick: () => set({ face }) }, FACE_WORDS[face])));
  const fill = () => group.querySelectorAll("button").forEach((button) => button.setAttribute("aria-pressed", String(button.dataset.face === (faces.includes(state.face) ? state.face : "exemplars"))));
  on(["face"], fill);
  fill();
}

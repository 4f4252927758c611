// The page of one unit: its pictures, what it is connected to, what is known about it. Its address is a permanent link.
import { data, link, on, set, state, units } from "viscircuits/store.js";
import { called, classOf, count, figure, imageOf, known, make, picture, sureness } from "viscircuits/words.js";
import { copyButton, edgeRow, refill, selectButton, shortName, tileOf } from "viscircuits/pieces.js";
import { editor } from "viscircuits/notes.js";
import { current, nameOfProbe } from "viscircuits/probe.js";
import { ask, served } from "viscircuits/remote.js";

const LISTED = 12;
const FACES = { exemplars: "Exemplars", visualisations: "Visualisations", heat: "Heat map" };
let element, heat = { address: null, of: null };

export const panel = {
  name: "unit",
  title: "Unit",
  available: () => true,
  mount(place) {
    element = place;
    on(["focus", "face", "selected", "probe", "probes", "notes", "edge", "pinned"], fill);
    fill();
  },
};

function fill() {
  const unit = units[state.focus];
  if (!unit) {
    refill(element, make("p", { class: "note lead" }, "Click a unit, or press an arrow key, to see what excites it and what it is connected to."));
    return;
  }
  const name = called(unit);
  refill(element,
    make("h2", { class: name ? "called" : null }, name || unit.name), name ? make("p", { class: "where" }, unit.name) : null,
    make("p", { class: "note" }, standing(unit)),
    make("div", { class: "toolrow" }, selectButton("units", unit.id), pinButton(unit), copyButton("Copy link", link)),
    faces(unit), neighbours("Strongest incoming", unit.ins, "source"), neighbours("Strongest outgoing", unit.outs, "target"),
    elsewhere(unit), make("section", { class: "noted" }, make("h3", {}, "Note"), editor(unit.name, `Note on ${unit.name}`)));
  if (element.dataset.unit !== unit.name) element.scrollTop = 0;
  element.dataset.unit = unit.name;
}

function standing(unit) {
  const layer = data.layers[unit.layer], sure = sureness(unit);
  const rank = known(unit.score) ? 1 + layer.scores.filter((score) => score > unit.score).length : null;
  const score = rank ? `Score ${figure(unit.score)}, number ${rank} of the ${layer.units.length} units the circuit has in this layer.` : "No score.";
  return sure ? `${score} It is ${sure}.` : score;
}

function pinButton(unit) {
  const pinned = state.pinned.has(unit.id);
  return make("button", { type: "button", class: "tool", "aria-pressed": pinned, "data-key": "pin", onclick: () => {
    const next = new Set(state.pinned);
    if (!next.delete(unit.id)) next.add(unit.id);
    set({ pinned: next });
  } }, pinned ? "Pinned ✓" : "Pin");
}

// ---------------------------------------------------------------- pictures

function faces(unit) {
  const there = {
    exemplars: true,
    visualisations: Boolean(data.visualisation_sprite),
    heat: served && Boolean(current()),
  };
  const shown = there[state.face] ? state.face : "exemplars";
  const names = Object.keys(FACES).filter((face) => there[face]);
  const choice = names.length > 1 && make("div", { class: "segments", role: "group", "aria-label": "Pictures" }, names.map((face) =>
    make("button", { type: "button", "aria-pressed": face === shown, "data-key": `face-${face}`, onclick: () => set({ face }) }, FACES[face])));
  return [choice, { exemplars, visualisations, heat: heatMap }[shown](unit)];
}

function exemplars(unit) {
  const shots = data.pictures[unit.id] ?? [];
  if (!shots.length) return make("p", { class: "note" }, data.sprite ? "This unit has no picture: the strongest of each layer have, where an image excites them." : "This page was made without pictures.");
  return [make("div", { class: "shots" }, shots.map((shot) => make("figure", {},
    picture(shot, `Region of ${imageOf(shot)}${classOf(shot) ? `, ${classOf(shot)},` : ""} that excites ${unit.name} to ${figure(shot[2])}`),
    make("figcaption", { title: [imageOf(shot), classOf(shot)].filter(Boolean).join(": ") }, `${figure(shot[2])} · ${shortName(imageOf(shot))}`)))),
  make("p", { class: "note" }, `Its ${shots.length === 1 ? "strongest region" : `${count(shots.length)} strongest regions`}, with its activation there.`)];
}

function visualisations(unit) {
  const made = data.visualisations?.[unit.id] ?? [];
  if (!made.length) return make("p", { class: "note" }, "This unit has no visualisation.");
  return [make("div", { class: "shots drawn" }, made.map(([tile, kind]) => make("figure", {}, tileOf(data.visualisation_sprite, tile, `Visualisation of ${unit.name}: ${kind}`), make("figcaption", {}, kind)))),
    make("p", { class: "note" }, "Images made by optimisation to excite the unit (negative: to inhibit it). They show what it responds to at the extreme, not what it means.")];
}

function heatMap(unit) {
  const probe = current(), query = new URLSearchParams({ layer: data.layers[unit.layer].name, index: unit.index, probe }).toString();
  const frame = make("figure", { class: "heat" });
  const caption = make("figcaption", {}, `Where ${nameOfProbe(probe)} excites ${unit.name}. Choose another image under Probe.`);
  const showing = (address) => frame.replaceChildren(make("img", { src: address, alt: `Heat map of ${unit.name} on ${nameOfProbe(probe)}` }), caption);
  if (heat.of === query) showing(heat.address);
  else {
    frame.append(make("p", { class: "note" }, "Asking the network…"));
    ask(`/api/heat?${query}`, { topic: "heat", into: frame, read: (response) => response.blob() }).then((picture) => {
      if (!picture) { frame.querySelector(".note")?.remove(); return; }
      if (heat.address) URL.revokeObjectURL(heat.address);
      heat = { of: query, address: URL.createObjectURL(picture) };
      showing(heat.address);
    });
  }
  return frame;
}

// ---------------------------------------------------------------- what it is connected to, and where else it stands

function neighbours(title, list, end) {
  if (!list.length) return null;
  const more = list.length > LISTED ? `The ${LISTED} strongest of ${count(list.length)}. ` : "";
  const whole = list.some((edge) => edge.share > 0);
  return make("section", {}, make("h3", {}, title),
    make("p", { class: "note" }, `${more}${whole ? `Signed share of what this unit ${end === "source" ? "receives" : "gives"} in the circuit; below it the score. › opens the edge.` : ""}`),
    make("ul", { class: "rows" }, list.slice(0, LISTED).map((edge) => edgeRow(edge, end))));
}

function elsewhere(unit) {
  const titles = data.elsewhere?.[unit.name] ?? [];
  if (!titles.length) return null;
  return make("section", {}, make("h3", {}, "Also in"), make("ul", { class: "chips" }, titles.map((title) => make("li", { class: "chip" }, title))));
}

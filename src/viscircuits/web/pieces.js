// What several panels are made of: a row for an edge, a unit's button, and content that is replaced without losing focus.
import { data, edges, set, state, units } from "viscircuits/store.js";
import { shareOf } from "viscircuits/paths.js";
import { announce, called, figure, known, make, picture, signedPercent, verb } from "viscircuits/words.js";

/** A probability, to a hundredth of a percent. */
export const probability = (p) => (known(p) ? `${(100 * p).toFixed(2)}\u202f%` : "–");

/** An image's name without its folders. */
export const shortName = (name) => name.split("/").pop() || name;

export function goTo(unit) { set({ focus: unit.id, panel: "unit" }); }
export function openEdge(edge) { set({ edge: edge.place, panel: "edge" }); }

/** Replaces what an element holds. Focus stays on the control of the same data-key, or goes to the heading. */
export function refill(element, ...children) {
  const held = element.contains(document.activeElement) ? document.activeElement : null;
  element.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false && child !== ""));
  if (!held) return;
  const same = held.dataset.key && element.querySelector(`[data-key="${CSS.escape(held.dataset.key)}"]`);
  const heading = element.querySelector("h2");
  if (same && !same.disabled) same.focus({ preventScroll: true });
  else if (heading) { heading.tabIndex = -1; heading.focus({ preventScroll: true }); }
}

/** A unit's first picture, or its number where there is none. */
export function thumb(unit, alt = null) {
  const shot = data.pictures[unit.id]?.[0];
  return shot ? picture(shot, alt) : make("i", { class: "bare" }, String(unit.index));
}

function unitName(unit) {
  const name = called(unit);
  return name ? [make("b", { class: "called" }, name), make("small", { class: "where" }, unit.name)] : [make("b", {}, unit.name)];
}

/** A unit to click, with a picture. */
export function unitButton(unit, attributes = {}) {
  return make("button", { type: "button", class: "end", onclick: () => goTo(unit), ...attributes }, thumb(unit), make("span", {}, unitName(unit)));
}

/** A neighbour: who it is, and how much of the unit's attribution comes from or goes to it; beside it, the edge itself. */
export function edgeRow(edge, end) {
  const other = units[edge[end]], share = shareOf(edge, end === "source" ? "ins" : "outs"), draws = data.selection?.confidence?.draws;
  const sure = known(edge.chosen) && draws ? ` · ${Math.round(edge.chosen * draws)} of ${draws} draws` : "";
  const words = `${other.name}${called(other) ? `, ${called(other)}` : ""}`;
  return make("li", { class: "neighbour" },
    make("button", { class: "row", type: "button", "data-key": `${end}${edge.place}`, onclick: () => goTo(other) },
      thumb(other),
      make("span", {}, unitName(other), make("em", { class: verb(edge) }, verb(edge)), sure, make("s", { class: verb(edge), "--w": `${(100 * Math.abs(share)).toFixed(1)}%` })),
      make("span", { class: "n" }, make("b", {}, signedPercent(share)), make("small", {}, figure(edge.score)))),
    make("button", { class: "see", type: "button", title: "This edge", "aria-label": `The edge ${end === "source" ? "from" : "to"} ${words}`, "aria-pressed": state.edge === edge.place, "data-key": `edge${edge.place}`, onclick: () => openEdge(edge) }, "›"));
}

export function selected() {
  return { units: [...state.selected.units].map((id) => units[id]).filter(Boolean), edges: [...state.selected.edges].map((place) => edges[place]).filter(Boolean) };
}

/** Puts a unit or an edge into the basket of surgery, or takes it out. */
function toggle(kind, id) {
  const next = { units: new Set(state.selected.units), edges: new Set(state.selected.edges) };
  const there = next[kind].delete(id);
  if (!there) next[kind].add(id);
  set({ selected: next });
  const n = next.units.size + next.edges.size;
  announce(`${there ? "Taken out of" : "Put into"} surgery; it holds ${n}.`);
}

export function selectButton(kind, id) {
  const on = state.selected[kind].has(id);
  return make("button", { type: "button", class: "tool", "aria-pressed": on, "data-key": "select", onclick: () => toggle(kind, id) }, on ? "In surgery ✓" : "Select for surgery");
}

/** A button that copies a text and says so. */
export function copyButton(label, text, key = label) {
  const button = make("button", { type: "button", class: "tool", "data-key": key }, label);
  button.addEventListener("click", async () => {
    const done = await copy(typeof text === "function" ? text() : text);
    button.textContent = done ? "Copied" : "Press Ctrl+C";
    announce(done ? "Copied." : "The browser does not let this page copy; the text is selected.");
    setTimeout(() => { button.textContent = label; }, 1600);
  });
  return button;
}

async function copy(text) {
  try { await navigator.clipboard.writeText(text); return true; } catch { /* from disk some browsers forbid it */ }
  const area = make("textarea", { class: "hidden", "aria-hidden": "true" });
  area.value = text;
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  const before = document.activeElement;
  area.select();
  const done = document.execCommand("copy");
  area.remove();
  before?.focus?.({ preventScroll: true });
  return done;
}

/** Hands the user a file. */
export function download(name, content, type) {
  const address = URL.createObjectURL(content instanceof Blob ? content : new Blob([content], { type }));
  const link = make("a", { href: address, download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}

/** A file name made of the page's title. */
export function fileName(ending) {
  const stem = String(data.title || "circuit").normalize("NFKD").replace(/[^\w.-]+/g, "-").replace(/^[-.]+|[-.]+$/g, "").toLowerCase();
  return `${stem || "circuit"}${ending}`;
}

const sheets = new Map();  // sprite → its class
/** One tile of a sprite as an element; its size is --t. */
export function tileOf(sprite, place, alt = null) {
  if (!sheets.has(sprite)) {
    const name = sprite === data.visualisation_sprite ? "made" : `sheet${sheets.size}`;  // that one is painted already
    sheets.set(sprite, name);
    if (name !== "made") document.head.append(make("style", {}, `.pic.${name} { background-image: url(${sprite.uri}); --columns: ${sprite.columns}; --rows: ${sprite.rows}; }`));
  }
  return make("i", { class: `pic ${sheets.get(sprite)}`, "--x": place % sprite.columns, "--y": Math.floor(place / sprite.columns), ...(alt ? { role: "img", "aria-label": alt } : {}) });
}

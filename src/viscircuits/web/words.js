// Words and small pieces that every part of the page uses.
import { data, state } from "viscircuits/store.js";

const NAMESPACE = "http:" + "//www.w3.org/2000/svg";  // a name, no address
const SVG = new Set(["svg", "path", "line", "circle", "rect", "text", "g", "title", "polygon"]);

/** An element with attributes; `on…` listens, `--name` is a custom property, and null, undefined or false is left out. */
export function make(tag, attributes = {}, ...children) {
  const node = SVG.has(tag) ? document.createElementNS(NAMESPACE, tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key.startsWith("--")) node.style.setProperty(key, String(value));
    else node.setAttribute(key, value === true && !key.startsWith("aria-") ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

export const $ = (id) => document.getElementById(id);
export const known = (value) => typeof value === "number" && Number.isFinite(value);
export const sum = (numbers) => numbers.reduce((a, b) => a + b, 0);
export const count = (n) => Number(n).toLocaleString("en");
export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

/** A number to three figures, as people write it. */
export function figure(x) {
  if (!known(x)) return "–";
  const size = Math.abs(x);
  if (size !== 0 && (size < 1e-3 || size >= 1e5)) return x.toExponential(1).replaceAll("-", "−");
  return String(Number(x.toPrecision(3))).replace("-", "−");
}
/** A share as a percentage: whole from 10 % on, one figure below. */
export const percent = (share) => (Math.abs(share) >= 0.0995 || share === 0 ? Math.round(share * 100) : Number((share * 100).toPrecision(1))) + "\u202f%";
/** A share with its sign: "+12 %". */
export const signedPercent = (share) => `${share < 0 ? "−" : "+"}${percent(Math.abs(share))}`;

export const verb = (edge) => (edge.signed > 0 ? "excites" : edge.signed < 0 ? "inhibits" : "reaches");
const draws = data.selection.confidence?.draws;
/** In how many bootstrap draws a unit or an edge is chosen, in words; empty where that is not known. */
export const sureness = (thing) => (known(thing.chosen) && draws ? `chosen in ${Math.round(thing.chosen * draws)} of ${draws} bootstrap draws` : "");

// ---------------------------------------------------------------- units

/** What people called a unit, or nothing. */
export const called = (unit) => data.notes[unit.name]?.name || "";
export const shotsOf = (unit) => data.pictures[unit.id] ?? [];
export const imageOf = (shot) => data.names[shot[1]];
/** What an exemplar's image shows, as far as somebody said it. */
export const classOf = (shot) => data.classes[shot[1]];

/** One tile of the sprite of exemplars; its size is --t. */
export function picture(shot, alt) { return tile(data.sprite, shot[0], "", alt); }

function tile({ columns }, place, kind, alt) {
  return make("i", { class: `pic ${kind}`.trim(), "--x": place % columns, "--y": Math.floor(place / columns), ...(alt ? { role: "img", "aria-label": alt } : {}) });
}

/** What stands for a unit in the graph: up to n pictures of the kind in view, or its number. */
export function face(unit, n) {
  const made = state.face === "visualisations" ? data.visualisations[unit.id] ?? [] : [];
  if (made.length) return made.slice(0, n).map(([place]) => tile(data.visualisation_sprite, place, "made"));
  const shots = shotsOf(unit);
  return shots.length ? shots.slice(0, n).map((shot) => picture(shot)) : [make("i", { class: "bare" }, String(unit.index))];
}

/** A unit in one sentence, for those who hear the page. */
export function describe(unit) {
  const shots = shotsOf(unit), name = called(unit), sure = sureness(unit), whose = { 1: `only in ${data.title}`, 2: `only in ${data.comparison?.title}` }[unit.member];
  const seen = shots.length ? `; excited most by a region of ${shots.map(imageOf).join(", ")}` : "";
  return `${name ? `${name}, unit` : "Unit"} ${unit.index} of ${data.layers[unit.layer].name}${known(unit.score) ? `, score ${figure(unit.score)}` : ""}${whose ? `, ${whose}` : ""}${sure ? `, ${sure}` : ""}${seen}`;
}

/** Says something to those who hear the page. */
export function announce(text) { $("status").textContent = text; }

/** Rules for the sprites: not custom properties, which browsers cut off at two megabytes. */
export function paintSprites() {
  for (const [sprite, selector] of [[data.sprite, ".pic"], [data.visualisation_sprite, ".pic.made"]]) {
    if (sprite) document.head.append(make("style", {}, `${selector} { background-image: url(${sprite.uri}); --columns: ${sprite.columns}; --rows: ${sprite.rows}; }`));
  }
}

// Finding units by what is known of them: index, layer, name, remark, the images that excite them and what these show,
// other circuits.
import { data, on, set, state, units } from "viscircuits/store.js";
import { $, announce, called, classOf, face, imageOf, make, plural, shotsOf } from "viscircuits/words.js";

const LISTED = 30;
let texts = null;  // what is known of each unit, in small letters: [what it is, the text]

function about() {
  texts ??= units.map((unit) => {
    const note = data.notes[unit.name] ?? {};
    return [["unit", unit.name], ["unit", String(unit.index)], ["name", called(unit)], ["remark", note.text ?? ""], ...[...new Set(shotsOf(unit).map(imageOf))].map((name) => ["image", name]), ...[...new Set(shotsOf(unit).map(classOf))].map((name) => ["shows", name]), ...(data.elsewhere[unit.name] ?? []).map((title) => ["also in", title])]
      .filter(([, text]) => text).map(([what, text]) => [what, text, text.toLowerCase()]);
  });
  return texts;
}
on(["notes"], () => { texts = null; });

/** The units that a query means, best first, each with where its words were found. Every word must be found somewhere. */
export function search(query) {
  const words = query.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return [];
  const found = [];
  about().forEach((told, id) => {
    const hits = words.map((word) => best(told, word));
    if (hits.every(Boolean)) found.push({ unit: units[id], why: hits.find((hit) => hit.what !== "unit"), worth: hits.reduce((sum, hit) => sum + hit.worth, 0) });
  });
  return found.sort((a, b) => b.worth - a.worth || a.unit.id - b.unit.id);
}
function best(about, word) {
  let found = null;
  for (const [what, text, small] of about) {
    const at = small.indexOf(word);
    if (at < 0) continue;
    const worth = (small === word ? 4 : at === 0 ? 2 : 1) + (what === "name" ? 1 : 0);
    if (!found || worth > found.worth) found = { what, text, worth };
  }
  return found;
}

// ---------------------------------------------------------------- the box and its list

let results = [], active = -1;

/** Makes the search box work; `go` is told which unit was chosen. */
export function mountFinding(go) {
  const input = $("find"), list = $("results");
  const close = () => { list.hidden = true; input.setAttribute("aria-expanded", "false"); input.removeAttribute("aria-activedescendant"); active = -1; };
  const choose = (unit) => { close(); go(unit); };
  const open = () => {
    results = search(state.query);
    list.replaceChildren(...rows(choose));
    list.hidden = !state.query.trim();
    input.setAttribute("aria-expanded", String(!list.hidden));
    active = -1;
  };
  input.addEventListener("input", () => { set({ query: input.value }); open(); announce(results.length ? `${plural(results.length, "unit")} found.` : state.query.trim() ? "No unit found." : ""); });
  input.addEventListener("focus", () => { if (state.query.trim()) open(); });
  input.addEventListener("blur", () => setTimeout(() => { if (!list.contains(document.activeElement)) close(); }, 0));
  list.addEventListener("pointerdown", (event) => event.preventDefault());  // keeps the box's focus
  input.addEventListener("keydown", (event) => {
    if (event.key === "ArrowDown" || event.key === "ArrowUp") { event.preventDefault(); if (list.hidden) open(); step(event.key === "ArrowDown" ? 1 : -1, input, list); }
    else if (event.key === "Enter") { event.preventDefault(); const chosen = results[Math.max(0, active)]; if (chosen) choose(chosen.unit); }
    else if (event.key === "Escape") { event.stopPropagation(); if (!list.hidden && state.query) { set({ query: "" }); input.value = ""; close(); } else input.blur(); }
  });
  on(["query"], () => { if (input.value !== state.query) input.value = state.query; if (!state.query) close(); });
  input.value = state.query;
}

function step(by, input, list) {
  const options = [...list.querySelectorAll("[role=option]")];
  if (!options.length) return;
  active = (active + by + options.length) % options.length;
  options.forEach((option, i) => option.setAttribute("aria-selected", String(i === active)));
  input.setAttribute("aria-activedescendant", options[active].id);
  options[active].scrollIntoView({ block: "nearest" });
}

function rows(choose) {
  if (!results.length) return [make("li", { class: "note", role: "presentation" }, "No unit found. Words are looked for in layers, indices, names, remarks, and the names and classes of images.")];
  const more = results.length - LISTED;
  return [...results.slice(0, LISTED).map(({ unit, why }, i) => make("li", { role: "option", id: `result${i}`, "aria-selected": "false", onclick: () => choose(unit) },
    make("span", { class: "thumb" }, face(unit, 1)), make("span", {}, make("b", {}, called(unit) || unit.name), why ? make("small", {}, `${why.what}: ${why.text}`) : called(unit) ? make("small", {}, unit.name) : null))),
    more > 0 ? make("li", { class: "note", role: "presentation" }, `and ${more} more`) : null].filter(Boolean);
}

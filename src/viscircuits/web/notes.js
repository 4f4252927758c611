// Names and remarks on units and on the circuit. A served page keeps them in the result folder; a page opened from disk
// keeps them in the browser, to be downloaded as the notes.json that `viscircuits view` folds in.
import { data, on, set, state, units } from "viscircuits/store.js";
import { announce, make, plural } from "viscircuits/words.js";
import { download, refill, thumb } from "viscircuits/pieces.js";
import { ask, served } from "viscircuits/remote.js";

const SCHEMA = "viscircuits/notes", VERSION = 1, LONGEST = { name: 80, text: 4000, by: 80 };
const KEPT = `viscircuits/notes: ${data.title}: ${data.command}`, WHO = "viscircuits/by";
const IN_THE_FILE = new Set(Object.keys(data.notes ?? {}));
const drafts = new Map();  // key → what was typed and not saved yet
let element;

export const panel = {
  name: "notes",
  title: "Notes",
  available: () => true,
  mount(place) {
    element = place;
    data.notes ??= {};
    takeIn(kept());
    on(["notes", "focus"], fill);
    fill();
  },
};

function fill() {
  const written = Object.entries(data.notes ?? {}).filter(([key, note]) => key && (note.name || note.text));
  refill(element, make("h2", {}, "Notes"),
    make("p", { class: "note" }, served ? "Kept in the result folder, for all who open it." : "Kept in this browser. Download them and put the file into the result folder: the next viscircuits view folds them in."),
    make("section", { class: "noted" }, make("h3", {}, "The circuit"), editor("", "Note on the circuit")),
    make("section", {}, make("h3", {}, written.length ? plural(written.length, "unit") + " with a note" : "Units"),
      written.length ? make("ul", { class: "rows" }, written.map(noteRow)) : make("p", { class: "note" }, "No unit has a note. Choose one and write it under Unit.")),
    make("div", { class: "toolrow" }, make("button", { type: "button", class: "tool", "data-key": "download", onclick: save }, "Download notes.json")));
}

function noteRow([key, note]) {
  const unit = units.find((each) => each.name === key);
  const words = make("span", {}, make("b", { class: "called" }, note.name || key), note.name ? make("small", { class: "where" }, key) : null, note.text ? make("span", { class: "said" }, note.text) : null, byline(note));
  if (!unit) return make("li", { class: "row still" }, make("i", { class: "bare" }, "–"), words);
  return make("li", {}, make("button", { type: "button", class: "row", "data-key": `note-${key}`, onclick: () => set({ focus: unit.id, panel: "unit" }) }, thumb(unit), words));
}

function byline({ by, when }) {
  const day = when && !Number.isNaN(Date.parse(when)) ? new Date(when).toISOString().slice(0, 10) : null;
  return by || day ? make("small", { class: "where" }, [by, day].filter(Boolean).join(", ")) : null;
}

// ---------------------------------------------------------------- writing

/** A form for the note on a unit ("layer:index") or on the circuit (""). */
export function editor(key, label) {
  const held = data.notes?.[key] ?? { name: "", text: "", by: "", when: "" };
  const draft = drafts.get(key) ?? { name: held.name, text: held.text, by: held.by || remembered(WHO) || "" };
  const trouble = make("div"), form = make("form", { class: "editor", "aria-label": label });
  const field = (part, tag, attributes, text) => {
    const input = make(tag, { name: part, maxlength: LONGEST[part], autocomplete: "off", "data-key": `${part}-${key}`, oninput: () => { drafts.set(key, { ...draft, ...(drafts.get(key) ?? {}), [part]: input.value }); }, ...attributes });
    input.value = draft[part];
    return make("label", {}, make("span", {}, text), input);
  };
  form.append(field("name", "input", { type: "text", placeholder: key ? "what it seems to respond to" : "what the circuit is of" }, "Name"), field("text", "textarea", { rows: 3 }, "Remark"),
    make("div", { class: "signature" }, field("by", "input", { type: "text" }, "By"), make("button", { type: "submit", class: "tool", "data-key": `save-${key}` }, "Save")), byline(held) ?? "", trouble);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    keep(key, Object.fromEntries(["name", "text", "by"].map((part) => [part, form.elements[part].value.trim()])), trouble);
  });
  return form;
}

async function keep(key, note, trouble) {
  remember(WHO, note.by);
  if (served) {
    const all = await ask("/api/notes", { method: "PUT", json: { key, ...note }, into: trouble });
    if (!all) return;  // the draft stays
    drafts.delete(key);
    replaceAll(all);
  } else {
    drafts.delete(key);
    keepHere(key, note);
  }
  announce("Note saved.");
}

function keepHere(key, note) {
  const mine = kept();
  if (note.name || note.text || IN_THE_FILE.has(key)) mine[key] = data.notes[key] = { ...note, when: new Date().toISOString().replace("Z", "+00:00") };
  else { delete mine[key]; delete data.notes[key]; }  // an empty note is kept only where it takes another's place
  if (!remember(KEPT, JSON.stringify(mine))) announce("This browser keeps nothing for pages from disk; download notes.json before closing.");
  changed();
}

function replaceAll(all) {
  Object.keys(data.notes).forEach((key) => { delete data.notes[key]; });
  Object.assign(data.notes, all);
  changed();
}

/** Notes of both; where both wrote about the same thing, the later one. */
function takeIn(notes) {
  for (const [key, note] of Object.entries(notes)) {
    const old = data.notes[key];
    if (!old || !(Date.parse(old.when) > Date.parse(note.when))) data.notes[key] = note;
  }
  changed();
}
function changed() { set({ notes: (state.notes ?? 0) + 1 }); }

function save() {
  const said = Object.entries(data.notes ?? {}).sort(([a], [b]) => (a < b ? -1 : 1));
  download("notes.json", `${JSON.stringify({ schema: SCHEMA, version: VERSION, notes: Object.fromEntries(said) }, null, 1)}\n`, "application/json");
}

// ---------------------------------------------------------------- the browser's own store, which may be forbidden

function remembered(name) { try { return localStorage.getItem(name); } catch { return null; } }
function remember(name, text) { try { localStorage.setItem(name, text); return true; } catch { return false; } }
function kept() {
  if (served) return {};
  try { return JSON.parse(remembered(KEPT)) ?? {}; } catch { return {}; }
}

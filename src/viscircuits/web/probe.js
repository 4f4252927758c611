// Probe images: the units glow by one, or by the difference of two, and the network's answers stand beside them.
import { data, on, set, setActivations, setOperated, state, units } from "viscircuits/store.js";
import { announce, count, make, percent, signedPercent } from "viscircuits/words.js";
import { refill, shortName, tileOf, unitButton } from "viscircuits/pieces.js";
import { answerBars, diverging } from "viscircuits/bars.js";
import { HOW_TO_SERVE, ask, report, served } from "viscircuits/remote.js";

const LISTED = 10;
const uploaded = [];
let element, trouble, lost, limits = {}, after = new Map();  // probe → activations in the edited network

export const panel = {
  name: "probe",
  title: "Probe",
  available: () => served || kept().length > 0,
  mount(place) {
    trouble = make("div", { class: "trouble" });
    element = make("div");
    lost = make("div", { class: "trouble" });
    place.append(trouble, lost, element);
    on(["probe", "probe2", "probes", "notes"], fill);
    on(["probe", "probe2"], fetchMissing);
    listen();
    fetchMissing();
    if (served) network().then((known) => { limits = known?.limits ?? {}; });
    fill();
  },
};

// ---------------------------------------------------------------- which there are

const kept = () => (data.probes?.probes ?? []).map((probe, i) => ({ ...probe, id: `kept:${i}`, tile: i }));

/** All probes, those kept with the result first. */
const probes = () => [...kept(), ...uploaded];
const find = (id) => probes().find((probe) => probe.id === id) ?? null;

/** The probe in view, or the first one there is; null where there is none. */
export const current = () => (find(state.probe) ?? probes()[0])?.id ?? null;
/** The one or two probes in view. */
export const inView = () => [current(), find(state.probe2)?.id].filter(Boolean);
export const nameOfProbe = (id) => (find(id) ? shortName(find(id).name) : "the image");

/** Whether there is a probe of that name. */
export const isThere = (id) => find(id) !== null;

const sought = new Set();
/** Images that the address names and the server has seen, before this page was loaded. */
function fetchMissing() {
  for (const id of [state.probe, state.probe2]) {
    if (!served || !id || isThere(id) || id.startsWith("kept:") || sought.has(id)) continue;
    sought.add(id);
    ask(`/api/probe/${encodeURIComponent(id)}`, { into: lost }).then((probe) => { if (probe && !isThere(id)) hold(probe); });
  }
}

function hold(probe) {
  uploaded.push(probe);
  set({ probes: uploaded.length });
}

let asked = null;
/** What the served network can be asked; asked for once, and again if that failed. */
export async function network() {
  asked ??= ask("/api/network", { into: trouble });
  const answer = await asked;
  if (!answer) asked = null;
  return answer;
}

/** Takes over what units do on each probe in the edited network, if there is one: from now on they glow by that. */
export function setAfter(found) {
  if (!found.size && !after.size) return;
  after = found;
  if (element) fill();
}

/** Each unit's activation on a probe before and after the edit, as shares of its largest; null without an edit. */
export function changesOn(id) {
  const probe = find(id);
  if (!probe || !after.has(id)) return null;
  return { before: units.map((unit) => share(probe.activations, unit)), after: units.map((unit) => share(after.get(id), unit)) };
}

export function portrait(id, alt = nameOfProbe(id)) {
  const probe = find(id);
  if (probe?.picture) return make("img", { class: "portrait", src: probe.picture, alt });
  return probe && data.probes?.sprite ? tileOf(data.probes.sprite, probe.tile, alt) : make("i", { class: "bare", role: "img", "aria-label": alt }, "no picture");
}

// ---------------------------------------------------------------- what shows

function fill() {
  const first = find(state.probe), second = find(state.probe2);
  glow(first, second);
  refill(element, make("h2", {}, first && second ? `${nameOfProbe(first.id)} against ${nameOfProbe(second.id)}` : first ? nameOfProbe(first.id) : "Probe images"),
    make("p", { class: "note" }, first && second ? "The graph shows the difference: purple units fire more on the second image, orange ones less." : first ? "The graph glows by what this image excites. Set another against it to see the difference." : "Choose an image: the units glow by how strongly it excites them."),
    first && after.has(first.id) ? make("p", { class: "note operating" }, "Units glow by what they do in the edited network; what it answers stands under Surgery.") : null,
    served ? dropZone() : null, strip(first, second), first ? (second ? both(first, second) : one(first)) : null,
    served ? null : make("p", { class: "note empty" }, "Any other image can be tried with ", make("code", {}, HOW_TO_SERVE), "."));
}

/** The largest activation a unit has over the kept probes; where it is silent on these, or none were kept, over all that is known. */
function most(unit) {
  const held = data.probes?.most?.[unit.id];
  return held || Math.max(1e-12, ...[...probes().map((probe) => probe.activations), ...after.values()].map((each) => Math.abs(each[unit.id] ?? 0)));
}
const share = (activations, unit) => (activations[unit.id] ?? 0) / most(unit);
const relative = (probe, unit) => share(after.get(probe.id) ?? probe.activations, unit);

function glow(first, second) {
  setOperated(second ? null : changesOn(current()));  // with two images what changes is not told apart from how they differ
  if (!first) { setActivations(null); return; }
  setActivations(Float32Array.from(units, (unit) => (second ? relative(second, unit) - relative(first, unit) : Math.max(0, relative(first, unit)))), { signed: Boolean(second) });
}

function strip(first, second) {
  const all = probes();
  return make("ul", { class: "strip", "aria-label": "Probe images" }, all.map((probe) => {
    const role = probe.id === first?.id ? "first" : probe.id === second?.id ? "second" : null;
    return make("li", { class: role },
      make("button", { type: "button", class: "probe", "aria-pressed": role === "first", "data-key": `probe-${probe.id}`, onclick: () => choose(probe, role) }, portrait(probe.id, ""), make("span", {}, make("b", { title: probe.name }, nameOfProbe(probe.id)), make("small", {}, probe.kind))),
      first && role !== "first" ? make("button", { type: "button", class: "against", "aria-pressed": role === "second", "aria-label": `Set ${nameOfProbe(probe.id)} against ${nameOfProbe(first.id)}`, "data-key": `against-${probe.id}`, onclick: () => set({ probe2: role === "second" ? null : probe.id }) }, role === "second" ? "against ✓" : "against") : null);
  }));
}

function choose(probe, role) {
  if (role === "first") set({ probe: null, probe2: null });
  else set({ probe: probe.id, probe2: role === "second" ? null : state.probe2 });
}

function one(probe) {
  const strongest = [...units].sort((a, b) => relative(probe, b) - relative(probe, a)).slice(0, LISTED);
  return [make("div", { class: "seen" }, portrait(probe.id), make("div", {}, make("h3", {}, "Answers"), answerBars(probe.answers))),
    make("h3", {}, "Units it excites most"), make("p", { class: "note" }, `Activation, as a share of the largest over the ${count(kept().length || probes().length)} images kept.`),
    make("ul", { class: "excited" }, strongest.map((unit) => make("li", {}, unitButton(unit), make("i", { class: "share", "--w": `${Math.max(0, Math.min(1, relative(probe, unit))) * 100}%` }), make("span", { class: "n" }, percent(Math.max(0, relative(probe, unit)))))))];
}

function both(first, second) {
  const change = (unit) => relative(second, unit) - relative(first, unit);
  const differing = units.filter((unit) => Math.abs(change(unit)) >= 0.005).sort((a, b) => Math.abs(change(b)) - Math.abs(change(a))).slice(0, LISTED).sort((a, b) => change(b) - change(a));
  return [make("div", { class: "pair" }, [first, second].map((probe, i) => make("figure", {}, portrait(probe.id), make("figcaption", {}, make("small", {}, i ? "second" : "first"), " ", nameOfProbe(probe.id)), answerBars(probe.answers, { label: `Answers on ${probe.name}` })))),
    make("div", { class: "toolrow" }, make("button", { type: "button", class: "tool", "data-key": "swap", onclick: () => set({ probe: second.id, probe2: first.id }) }, "Swap")),
    make("h3", {}, "Units that differ most"), make("p", { class: "note" }, "Second − first, as a share of each unit's largest activation over the kept images."),
    differing.length ? make("ul", { class: "excited" }, differing.map((unit) => make("li", {}, unitButton(unit), diverging(change(unit)), make("span", { class: "n" }, signedPercent(change(unit)))))) : make("p", { class: "note" }, "None differs.")];
}

// ---------------------------------------------------------------- any image (served)

function dropZone() {
  const input = make("input", { type: "file", id: "probe-file", accept: "image/png,image/jpeg,image/webp", class: "hidden", multiple: true, onchange: (event) => { upload([...event.target.files]); event.target.value = ""; } });
  return make("div", { class: "drop" }, input, make("label", { for: "probe-file", class: "tool" }, "Choose an image"), make("span", { class: "note" }, "or drop or paste one anywhere on this page."));
}

async function upload(files) {
  for (const file of files) {
    const refused = !file.type.startsWith("image/") ? `${file.name || "That"} is no image; give a PNG, JPEG or WebP.`
      : limits.upload_bytes && file.size > limits.upload_bytes ? `${file.name} has ${count(Math.ceil(file.size / 1024))} KiB; the server takes up to ${count(Math.floor(limits.upload_bytes / 1024))} KiB. Make it smaller.` : null;
    if (refused) { report(new Error(refused), trouble); continue; }
    const probe = await ask("/api/probe", { method: "POST", body: file, headers: { "Content-Type": file.type, "X-Name": encodeURIComponent(file.name || "pasted image") }, into: trouble });
    if (!probe) continue;
    if (!isThere(probe.id)) hold(probe);
    announce(`The network saw ${probe.name}.`);
    set({ probe: probe.id, probe2: null, panel: "probe" });
  }
}

function receive(files) {
  if (served) upload(files);
  else report(new Error(`This page cannot run the network. Open it with “${HOW_TO_SERVE}” to try your own image.`), trouble);
  if (!served) set({ panel: "probe" });
}

const carriesFiles = (event) => event.dataTransfer?.types?.includes("Files");
function listen() {
  let depth = 0;
  const mark = (n) => { depth = Math.max(0, n); document.body.classList.toggle("dropping", depth > 0); };
  addEventListener("dragenter", (event) => { if (carriesFiles(event)) { event.preventDefault(); mark(depth + 1); } });
  addEventListener("dragleave", (event) => { if (carriesFiles(event)) mark(depth - 1); });
  addEventListener("dragover", (event) => { if (carriesFiles(event)) event.preventDefault(); });  // else the browser would leave the page for the image
  addEventListener("drop", (event) => {
    if (!carriesFiles(event)) return;
    event.preventDefault();
    mark(0);
    receive([...event.dataTransfer.files]);
  });
  addEventListener("paste", (event) => {
    const files = [...(event.clipboardData?.files ?? [])];
    if (files.length) { event.preventDefault(); receive(files); }
  });
}

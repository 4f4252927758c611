// The size of the circuit in view, on the curve of what was measured at each size. Between measured sizes it says so.
import { data, on, set, state, units } from "viscircuits/store.js";
import { $, announce, count, figure, known, make, percent } from "viscircuits/words.js";
import { band } from "viscircuits/charts.js";
import { evaluated, measured } from "viscircuits/evaluation.js";
import { nUnitsAt, scored } from "viscircuits/paths.js";

const WIDE = 232, HIGH = 62, LEFT = 8, RIGHT = 8, TOP = 8, BOTTOM = 8, SNAP = 0.02, KEEPING = 0.9;
const SERIES = [["faithfulness", "--ink", "", "faithfulness"], ["selectivity", "--accent", "4 2.5", "selectivity"]];

const sizes = () => data.sizes[state.ablation] ?? Object.values(data.sizes)[0] ?? [];
const same = (a, b) => Math.abs(a - b) < 1e-6;
const measuredAt = (fraction) => sizes().find((size) => same(size.fraction, fraction)) ?? null;

/** Fills the strip; a circuit without scores, or a union of two, has no parts of its own. */
export function mountSize() {
  const strip = $("size");
  strip.hidden = !scored || Boolean(data.comparison);
  if (strip.hidden) return;
  const slider = $("fraction");
  slider.addEventListener("input", () => set({ fraction: snapped(Number(slider.value) / 1000) }));
  $("keeping").addEventListener("click", () => { const smallest = smallestKeeping(); set({ fraction: smallest.size.fraction }); announce(readout().textContent); });
  on(["fraction", "ablation"], fill);
  fill();
}

/** The next measured size, or the next twentieth where none was measured. */
export function stepSize(way) {
  const stops = sizes().length ? sizes().map((size) => size.fraction) : Array.from({ length: 20 }, (_, i) => (i + 1) / 20);
  const next = way > 0 ? stops.find((stop) => stop > state.fraction + 1e-6) : stops.filter((stop) => stop < state.fraction - 1e-6).at(-1);
  if (next !== undefined) { set({ fraction: next }); announce($("kept").textContent); }
}

function snapped(fraction) {
  const near = sizes().find((size) => Math.abs(size.fraction - fraction) <= SNAP);
  return near ? near.fraction : Math.max(0.005, fraction);
}

/** The smallest measured size with 90 % of what the whole circuit has: of its faithfulness, or else of its selectivity. */
function smallestKeeping() {
  const whole = measuredAt(1), what = ["faithfulness", "selectivity"].find((name) => whole?.[name]?.value > 0);
  if (!what) return null;
  return { what, size: sizes().find((size) => size[what]?.value >= KEEPING * whole[what].value) };
}

function fill() {
  const slider = $("fraction"), text = readout(), smallest = smallestKeeping(), button = $("keeping");
  if (document.activeElement !== slider || snapped(Number(slider.value) / 1000) !== state.fraction) slider.value = Math.round(state.fraction * 1000);
  slider.setAttribute("aria-valuetext", text.textContent);
  $("kept").replaceChildren(...text.childNodes);
  $("curve").replaceChildren(...drawCurve());
  button.hidden = !smallest;
  if (!smallest) return;
  button.textContent = `Smallest keeping 90\u202f% of its ${smallest.what}`;
  button.disabled = same(smallest.size.fraction, state.fraction);
}

function readout() {
  const n = nUnitsAt(state.fraction), here = measuredAt(state.fraction), text = make("span", {});
  text.append(make("b", {}, `${count(n)} of ${count(units.length)} units`), ` · the best ${percent(state.fraction)} of each layer`, make("br"), ...(here ? figures(here) : [make("span", { class: "between" }, between())]));
  return text;
}

function figures(size) {
  const { points, share } = measured(evaluated()), { faithfulness, selectivity } = size, parts = [];
  if (known(faithfulness?.value)) parts.push([dot("--ink"), "faithfulness ", make("b", {}, figure(faithfulness.value)), ` ${band(faithfulness, figure)}`]);
  if (known(selectivity?.value)) parts.push([dot("--accent"), "selectivity ", make("b", {}, `${points(selectivity.value)}${share ? " points" : ""}`), ` ${band(selectivity, points)}`, ...controls(size, points)]);
  if (!parts.length) return ["measured on the concept alone; see Evaluation"];
  return parts.flatMap((part, i) => (i ? [" · ", ...part] : part));
}
const dot = (colour) => make("i", { class: colour ? "dot" : "dot area", "--colour": colour && `var(${colour})` });
function controls(size, points) {
  const values = Object.values(size.controls).map((each) => each.value).filter(known);
  return values.length ? [", ", dot(null), `controls ${points(Math.min(...values))}${values.length > 1 ? ` to ${points(Math.max(...values))}` : ""}`] : [];
}

function between() {
  const stops = sizes().map((size) => size.fraction);
  if (!stops.length) return "not measured at any size";
  const below = stops.filter((stop) => stop < state.fraction).at(-1), above = stops.find((stop) => stop > state.fraction);
  return below === undefined ? `below the smallest measured size, ${percent(above)}` : `between measured sizes, ${percent(below)} and ${percent(above)}`;
}

// ---------------------------------------------------------------- the curve

function drawCurve() {
  const all = sizes(), values = all.flatMap((size) => [...SERIES.flatMap(([name]) => [size[name]?.low, size[name]?.high, size[name]?.value]), ...Object.values(size.controls).map((each) => each.value)]).filter(known);
  $("curve").toggleAttribute("hidden", !values.length);
  if (!values.length) return [];
  const low = Math.min(0, ...values), high = Math.max(0.2, ...values);
  const px = (x) => LEFT + x * (WIDE - LEFT - RIGHT), py = (y) => HIGH - BOTTOM - ((y - low) / (high - low)) * (HIGH - TOP - BOTTOM), dot = (x, y) => `${px(x).toFixed(1)},${py(y).toFixed(1)}`;
  $("curve").setAttribute("aria-label", `Over the size of the circuit: ${all.map((size) => `${percent(size.fraction)}: ${SERIES.filter(([name]) => known(size[name]?.value)).map(([name]) => `${name} ${figure(size[name].value)}`).join(", ")}`).join("; ")}`);
  return [make("line", { x1: LEFT, x2: WIDE - RIGHT, y1: py(0), y2: py(0), stroke: "var(--line)" }), controlBand(all, dot),
    ...SERIES.flatMap(([name, colour, dash]) => series(all.filter((size) => known(size[name]?.value)), name, colour, dash, px, py, dot)), marker(px)].filter(Boolean);
}

function controlBand(all, dot) {
  const at = all.map((size) => ({ x: size.fraction, values: Object.values(size.controls).map((each) => each.value).filter(known) })).filter(({ values }) => values.length);
  if (!at.length) return null;
  const points = [...at.map(({ x, values }) => dot(x, Math.max(...values))), ...at.map(({ x, values }) => dot(x, Math.min(...values))).reverse()].join(" ");
  return make("polygon", { points, fill: "var(--soft)", "fill-opacity": 0.2, stroke: "var(--soft)", "stroke-opacity": 0.35 }, make("title", {}, "Selectivity of controls of the same size"));
}

function series(all, name, colour, dash, px, py, dot) {
  if (!all.length) return [];
  const here = all.find((size) => same(size.fraction, state.fraction));
  return [make("path", { d: `M${all.map((size) => dot(size.fraction, size[name].value)).join("L")}`, fill: "none", stroke: `var(${colour})`, "stroke-width": 1.4, "stroke-dasharray": dash || null, "stroke-opacity": 0.75 }),
    ...all.map((size) => make("circle", { cx: px(size.fraction), cy: py(size[name].value), r: 1.9, fill: `var(${colour})` })),
    here ? make("circle", { class: "here", cx: px(here.fraction), cy: py(here[name].value), r: 4.6, fill: `var(${colour})`, stroke: "var(--page)", "stroke-width": 1.5 }, make("title", {}, `${name} ${figure(here[name].value)}`)) : null];
}
/** Where the slider stands. */
function marker(px) {
  return make("line", { class: "stand", x1: px(state.fraction), x2: px(state.fraction), y1: 3, y2: HIGH - 3, stroke: "var(--ink)", "stroke-opacity": 0.5, "stroke-dasharray": measuredAt(state.fraction) ? null : "2 3" });
}

// Small bar charts as HTML, so that names stay text, wrap, and are read aloud.
import { figure, known, make } from "viscircuits/words.js";
import { probability, shortName } from "viscircuits/pieces.js";

/** Signed values beside their names; bars go right of a common zero for +, hatched to the left for −; the scale is that of `all`. */
export function signedBars(rows, write = figure, all = rows) {
  const low = Math.min(0, ...all.map((row) => row.value)), high = Math.max(0, ...all.map((row) => row.value)), span = high - low || 1;
  return make("ol", { class: "bars" }, rows.map(({ name, value, title }) => make("li", { title: title ?? name },
    make("span", { class: "name" }, make("bdi", {}, shortName(name))),
    make("span", { class: "track", "--zero": `${(-low / span) * 100}%` },
      make("i", { class: value < 0 ? "less" : "more", "--from": `${((Math.min(value, 0) - low) / span) * 100}%`, "--w": `${(Math.abs(value) / span) * 100}%` })),
    make("span", { class: "n" }, write(value)))));
}

/** A change in [−1, 1]: right of the middle for more, hatched to the left for less. */
export function diverging(x) {
  const size = Math.min(1, Math.abs(x)) * 50;
  return make("span", { class: "track", "--zero": "50%" }, make("i", { class: x < 0 ? "less" : "more", "--from": `${x < 0 ? 50 - size : 50}%`, "--w": `${size}%` }));
}

/** A network's strongest answers, as bars in [0, 1]. */
export function answerBars(answers, { label = "Answers" } = {}) {
  if (!answers?.length) return make("p", { class: "note" }, "This network names no classes.");
  return make("ol", { class: "answers", "aria-label": label }, answers.map((answer) => make("li", {},
    make("span", { class: "name" }, answer.label), make("span", { class: "n" }, probability(answer.probability)),
    make("i", { class: "share", "--w": `${(100 * answer.probability).toFixed(3)}%` }))));
}

const STRONGEST = 3;
/** What the strongest answers before and after were and are, with the change. Answers are told apart by their index. */
export function pairedBars(before, after) {
  const all = new Map([...before.slice(0, STRONGEST), ...after.slice(0, STRONGEST)].map(({ index, label }) => [index, { label }]));
  const least = (answers) => Math.min(1, ...answers.map((answer) => answer.probability)), floors = [least(before), least(after)];
  before.forEach(({ index, probability: p }) => { if (all.has(index)) all.get(index).before = p; });
  after.forEach(({ index, probability: p }) => { if (all.has(index)) all.get(index).after = p; });
  if (!all.size) return make("p", { class: "note" }, "This network names no classes, so its answers cannot be shown.");
  const bar = (kind, p) => make("i", { class: `share ${kind}`, "--w": `${(100 * (p ?? 0)).toFixed(3)}%` });
  return make("ol", { class: "answers paired" }, [...all.entries()].map(([index, row]) => make("li", { "data-answer": index },
    make("span", { class: "name" }, row.label),
    make("span", { class: "n" }, make("span", { class: "was" }, told(row.before, floors[0])), make("span", { "aria-hidden": "true" }, " → "), make("span", { class: "hidden" }, " becomes "), make("b", { class: "is" }, told(row.after, floors[1])), changeOf(row)),
    bar("old", row.before), bar("new", row.after))));
}
/** A probability; of an answer that is not among the strongest, what it is at most. */
const told = (p, least) => (known(p) ? probability(p) : `≤ ${probability(least)}`);
function changeOf({ before, after }) {
  if (!known(before) || !known(after)) return null;
  const points = 100 * (after - before);
  const sign = Math.abs(points) < 0.005 ? "±" : points < 0 ? "−" : "+";
  return make("em", { class: sign === "−" ? "fell" : sign === "+" ? "rose" : "" }, `${sign}${Math.abs(points).toFixed(2)}`);
}

/** How values are spread: columns, zero marked; the sentence that goes with it says it in words. */
export function histogram(values, { bins = 15, label }) {
  const low = Math.min(0, ...values), high = Math.max(0, ...values), width = (high - low) / bins || 1;
  const counts = new Array(bins).fill(0);
  values.forEach((value) => { counts[Math.min(bins - 1, Math.floor((value - low) / width))] += 1; });
  const most = Math.max(1, ...counts), W = 320, H = 64, step = W / bins, zero = ((0 - low) / (width * bins)) * W;
  const svg = make("svg", { class: "histogram", viewBox: `0 0 ${W} ${H + 16}`, role: "img", "aria-label": label });
  counts.forEach((n, i) => {
    const middle = low + (i + 0.5) * width, high = (n / most) * (H - 4);
    if (n) svg.append(make("rect", { x: i * step + 1, y: H - high, width: step - 2, height: high, rx: 1.5, class: middle < 0 ? "less" : "more" }, make("title", {}, `${n} between ${figure(low + i * width)} and ${figure(low + (i + 1) * width)}`)));
  });
  svg.append(make("line", { x1: 0, x2: W, y1: H, y2: H, class: "axis" }), make("line", { x1: zero, x2: zero, y1: 0, y2: H, class: "zero" }),
    make("text", { x: 0, y: H + 13, "text-anchor": "start" }, zero > 24 ? figure(low) : ""), make("text", { x: Math.min(W - 4, Math.max(4, zero)), y: H + 13, "text-anchor": "middle" }, "0"),
    make("text", { x: W, y: H + 13, "text-anchor": "end" }, W - zero > 24 ? figure(high) : ""));
  return svg;
}

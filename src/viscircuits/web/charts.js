// Small charts as SVG. Series are told apart by colour, dash and mark.
import { known, make, percent } from "viscircuits/words.js";

const PENS = [
  { colour: "var(--ink)", dash: "", mark: "disc" }, { colour: "var(--inhibit)", dash: "5 3", mark: "square" }, { colour: "var(--accent)", dash: "2 3", mark: "ring" },
  { colour: "var(--excite)", dash: "8 3 2 3", mark: "triangle" }, { colour: "var(--soft)", dash: "1 2", mark: "cross" },
];
export const pen = (i) => PENS[i % PENS.length];
export function mark(kind, x, y, stroke, text) {
  const shapes = {
    disc: () => make("circle", { cx: x, cy: y, r: 3, fill: stroke }), ring: () => make("circle", { cx: x, cy: y, r: 3, fill: "var(--page)", stroke, "stroke-width": 1.5 }),
    square: () => make("rect", { x: x - 2.7, y: y - 2.7, width: 5.4, height: 5.4, fill: stroke }),
    triangle: () => make("polygon", { points: `${x},${y - 3.6} ${x + 3.4},${y + 2.6} ${x - 3.4},${y + 2.6}`, fill: stroke }),
    cross: () => make("path", { d: `M${x - 3} ${y - 3}l6 6m0 -6l-6 6`, stroke, "stroke-width": 1.5 }),
  };
  const node = shapes[kind]();
  if (text) node.append(make("title", {}, text));
  return node;
}
/** Round numbers from low to high, about five of them. */
export function ticks(low, high) {
  const rough = (high - low) / 4, power = 10 ** Math.floor(Math.log10(rough));
  const stepSize = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= rough);
  const list = [];
  for (let t = Math.ceil(low / stepSize - 1e-9) * stepSize; t <= high + stepSize * 1e-6; t += stepSize) list.push(Math.abs(t) < 1e-12 ? 0 : t);
  return list;
}

/** Series over x with their intervals as bands; null if there is nothing to draw. */
export function chart({ title, xTitle, yTitle, x, series, range, write, width = 360, height = 156 }) {
  const drawn = series.map((s, i) => ({ ...s, pen: pen(s.pen ?? i), dots: (s.values ?? []).map((v, j) => ({ ...v, x: x[j] })).filter((v) => known(v.value) && known(v.x)) })).filter((s) => s.dots.length);
  if (!drawn.length) return null;
  const all = drawn.flatMap((s) => s.dots.flatMap((d) => [d.value, d.low, d.high])).filter(known);
  const low = Math.min(range[0], ...all), high = Math.max(range[1], ...all);
  const left = 40, right = 8, top = 8, bottom = 34, x0 = Math.min(...x), x1 = Math.max(...x);
  const px = (v) => left + ((v - x0) / (x1 - x0 || 1)) * (width - left - right), py = (v) => height - bottom - ((v - low) / (high - low || 1)) * (height - top - bottom);
  const line = (dots, key) => dots.map((d) => `${px(d.x).toFixed(1)},${py(d[key]).toFixed(1)}`);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}. ${drawn.map((s) => `${s.name}: ${s.dots.map((d) => `${percent(d.x)} ${write(d.value)}`).join(", ")}`).join(". ")}` });
  ticks(low, high).forEach((t) => svg.append(make("line", { x1: left, x2: width - right, y1: py(t), y2: py(t), stroke: "var(--line)", "stroke-width": t === 0 ? 1.4 : 0.8 }), make("text", { x: left - 6, y: py(t) + 4, "text-anchor": "end" }, write(t))));
  ticks(x0, x1).forEach((t) => svg.append(make("text", { x: px(t), y: height - bottom + 15, "text-anchor": "middle" }, percent(t))));
  svg.append(make("text", { x: (left + width - right) / 2, y: height - 3, "text-anchor": "middle" }, xTitle));
  drawn.forEach((s) => { if (s.dots.every((d) => known(d.low) && known(d.high))) svg.append(make("polygon", { points: [...line(s.dots, "high"), ...line(s.dots, "low").reverse()].join(" "), fill: s.pen.colour, "fill-opacity": 0.13 })); });
  [...drawn].reverse().forEach((s) => {
    svg.append(make("path", { d: `M${line(s.dots, "value").join("L")}`, fill: "none", stroke: s.pen.colour, "stroke-width": 1.8, "stroke-dasharray": s.pen.dash || null }));
    s.dots.forEach((d) => svg.append(mark(s.pen.mark, px(d.x), py(d.value), s.pen.colour, `${s.name}, ${percent(d.x)}: ${write(d.value)} ${band(d, write)}`)));
  });
  return make("figure", {}, make("h4", {}, title), make("figcaption", {}, yTitle), svg);
}
/** What each series looks like. */
export function key(names) {
  return make("div", { class: "key", role: "list", "aria-label": "Legend" }, names.map((name, i) => make("span", { role: "listitem" },
    make("svg", { viewBox: "0 0 34 10", "aria-hidden": "true" }, make("line", { x1: 0, x2: 34, y1: 5, y2: 5, stroke: pen(i).colour, "stroke-width": 1.8, "stroke-dasharray": pen(i).dash || null }), mark(pen(i).mark, 17, 5, pen(i).colour)), name)));
}
/** An interval in brackets, or nothing. */
export const band = (e, write) => (known(e?.low) && known(e?.high) ? `[${write(e.low)}, ${write(e.high)}]` : "");

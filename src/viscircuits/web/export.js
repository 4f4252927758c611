// The graph in view as SVG and PNG, and how to cite it, make it again, and link to it.
import { data, link, state, units } from "viscircuits/store.js";
import { announce, called, make } from "viscircuits/words.js";
import { copyButton, download, fileName } from "viscircuits/pieces.js";
import { drawing } from "viscircuits/graph.js";
import { report } from "viscircuits/remote.js";

const FONT = "Helvetica, Arial, 'Liberation Sans', sans-serif", MOST_PIXELS = 64e6, LONGEST_SIDE = 16_000;
const SHARPNESS = 2, QUALITY = 0.9;

/** Adds a button that opens the dialog of everything that can be taken from the page. */
export function mountExport(place) {
  const dialog = make("dialog", { class: "export", "aria-label": "Export" });
  document.body.append(dialog);
  place.append(make("button", { type: "button", id: "export", "aria-haspopup": "dialog", onclick: () => { fill(dialog); dialog.showModal(); } }, "Export"));
}

function fill(dialog) {
  const trouble = make("div");
  const button = (text, act) => make("button", { type: "button", class: "tool", onclick: () => act().catch((fault) => report(fault, trouble)) }, text);
  const block = (text, label) => [make("pre", { tabindex: 0, "aria-label": label }, text), make("div", { class: "toolrow" }, copyButton(`Copy ${label.toLowerCase()}`, text))];
  dialog.replaceChildren(make("h2", {}, "Export"),
    make("h3", {}, "The graph as it stands"), make("p", { class: "note" }, "SVG is a true vector, ready for PDF: text stays text, pictures are inside. PNG has two pixels for one."),
    make("div", { class: "toolrow" }, button("SVG", saveSvg), button("PNG", savePng), copyButton("Copy link to this state", link)), trouble,
    make("h3", {}, "Citation"), ...block(citation(), "Citation"),
    ...(data.command ? [make("h3", {}, "Command that made it"), ...block(data.command, "Command")] : []),
    make("form", { method: "dialog", class: "toolrow" }, make("button", { class: "tool" }, "Close")));
}

async function saveSvg() {
  download(fileName(".svg"), await svgText(), "image/svg+xml");
  announce("The SVG is being downloaded.");
}

async function savePng() {
  const text = await svgText(), { width, height } = sizeOf(drawing());
  const scale = Math.min(SHARPNESS, Math.sqrt(MOST_PIXELS / (width * height)), LONGEST_SIDE / Math.max(width, height));
  const canvas = make("canvas", { width: Math.round(width * scale), height: Math.round(height * scale) });
  canvas.getContext("2d").drawImage(await loaded(`data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`), 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((done) => { canvas.toBlob(done, "image/png"); });
  if (!blob) throw new Error(`The browser cannot make a picture of ${canvas.width} × ${canvas.height} pixels. Choose a smaller size of the graph, or take the SVG.`);
  download(fileName(".png"), blob);
  announce("The PNG is being downloaded.");
}

// ---------------------------------------------------------------- the vector

const FOOT = 46, colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const sizeOf = ({ width, height }) => ({ width: Math.ceil(width), height: Math.ceil(height) + FOOT });
const short = (x) => Number(x.toFixed(2));

/** What the graph shows, as the text of an SVG file that needs nothing else. */
async function svgText() {
  const seen = drawing(), { width, height } = sizeOf(seen), ink = colour("--ink"), soft = colour("--soft");
  const pictures = await picturesOf(seen.units);
  const text = (x, y, words, size, fill, more = {}) => make("text", { x: short(x), y: short(y), "font-size": size, fill, ...more }, words);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, "font-family": FONT },
    make("title", {}, data.title),
    make("rect", { width, height, fill: colour("--page") }),
    make("g", { id: "edges", fill: "none" }, seen.edges.map((edge) => make("path", { d: edge.d, stroke: edge.stroke, "stroke-width": short(edge.width), "stroke-opacity": short(edge.opacity), "stroke-dasharray": edge.dash?.length ? edge.dash.map(short).join(" ") : null }))),
    make("g", { id: "units" }, seen.units.map((seat) => unitGroup(seat, pictures.get(seat.id), text, soft))),
    make("g", { id: "layers", "text-anchor": "middle" }, seen.heads.flatMap((head) => [text(head.x, 22, head.text, 12, ink, { "font-weight": 600 }), text(head.x, 38, head.sub, 11, soft)])),
    legend(height, text, soft));
  return `<?xml version="1.0" encoding="UTF-8"?>\n${new XMLSerializer().serializeToString(svg)}\n`;
}

function unitGroup({ id, label, x, y, size, opacity = 1 }, picture, text, soft) {
  const unit = units[id], side = short(size), caption = label ?? (called(unit) || String(unit.index));
  const group = make("g", { opacity: opacity < 1 ? short(opacity) : null }, make("title", {}, label ?? [unit.name, called(unit)].filter(Boolean).join(", ")));
  if (picture) {
    const image = document.createElementNS(group.namespaceURI, "image");
    for (const [key, value] of Object.entries({ x: short(x), y: short(y), width: side, height: side, href: picture })) image.setAttribute(key, value);
    group.append(image);
  } else group.append(make("rect", { x: short(x), y: short(y), width: side, height: side, rx: 6, fill: colour("--empty") }));
  if (size >= 24) group.append(text(x, y + size + 11, caption, 10, soft));
  return group;
}

function legend(height, text, soft) {
  const y = height - 16, line = (x, name, end) => make("path", { d: `M${x} ${y - 4}h26${end}`, stroke: colour(name), "stroke-width": 2.5, fill: "none" });
  return make("g", { id: "legend" }, line(24, "--excite", "m-7 -4.5l7 4.5l-7 4.5"), text(57, y, "excites", 11, soft), line(116, "--inhibit", "m0 -5v10"), text(149, y, "inhibits", 11, soft), text(214, y, `${data.title} · ${state.shown} of ${data.n_edges} edges`, 11, soft));
}

/** Each unit's picture as a data URI, cut from the sprite. */
async function picturesOf(seats) {
  const face = state.face === "visualisations" && data.visualisation_sprite ? "visualisations" : "pictures";
  const sprite = face === "visualisations" ? data.visualisation_sprite : data.sprite, found = new Map();
  if (!sprite) return found;
  const sheet = await loaded(sprite.uri), { tile, columns } = sprite, canvas = make("canvas", { width: tile, height: tile }), context = canvas.getContext("2d");
  for (const { id } of seats) {
    const place = data[face][id]?.[0]?.[0];
    if (place === undefined) continue;
    context.drawImage(sheet, (place % columns) * tile, Math.floor(place / columns) * tile, tile, tile, 0, 0, tile, tile);
    found.set(id, canvas.toDataURL("image/jpeg", QUALITY));  // what every reader of SVG and PDF knows
  }
  return found;
}

function loaded(address) {
  return new Promise((done, failed) => {
    const image = new Image();
    image.onload = () => done(image);
    image.onerror = () => failed(new Error("The browser could not draw the picture. Take the SVG, or try another browser."));
    image.src = address;
  });
}

// ---------------------------------------------------------------- citation

/** BibTeX of the software and of the paper whose method it implements. */
function citation() {
  const made = data.provenance ?? {}, model = typeof made.model === "string" ? made.model : made.model?.address;
  const what = `Circuit \`\`${data.title}''${model ? ` in ${model}` : ""}`.replace(/[&%$#_{}\\]/g, (sign) => (sign === "\\" ? "\\textbackslash{}" : `\\${sign}`));
  const version = made.versions?.viscircuits ? `  version = {${made.versions.viscircuits}},\n` : "";
  return `@software{viscircuits,\n  title  = {viscircuits},\n  author = {{The viscircuits contributors}},\n${version}  note   = {${what}}\n}\n\n`
    + "@article{rajaram2024automatic,\n  title   = {Automatic Discovery of Visual Circuits},\n  author  = {Rajaram, Achyuta and Chowdhury, Neil and Torralba, Antonio and Andreas, Jacob and Schwettmann, Sarah},\n"
    + "  journal = {arXiv preprint arXiv:2404.14349},\n  year    = {2024}\n}\n";
}

// Where units stand, and how edges run between them. Numbers in, numbers out: nothing here touches the page.

export const HEAD = 58, PAD = 28;
const BESIDE = 26, LEAST_GAP = 44, MOST_GAP = 190, TALL = 1.5, LEAST_ROWS = 6;

/** A layer stands in as many files as keep it from having more than so many rows. */
const filesOf = (layer, most) => Math.ceil(layer.units.length / most) || 1;
export const captionOf = (size) => (size >= 40 ? 18 : 4);
const gutterOf = (size) => (size >= 48 ? 8 : 4);
const rowStepOf = (size) => size + captionOf(size) + (size >= 48 ? 6 : 2);

/** The largest units, in files of so many rows, with which the whole circuit is as wide as its room and not much higher. */
export function startSize(layers, room, height) {
  const columns = byColumn(layers), n = layers.reduce((a, layer) => a + layer.units.length, 0);
  const rowsAt = (size) => Math.max(LEAST_ROWS, Math.floor((TALL * height - HEAD) / rowStepOf(size)));
  for (let size = 92; size >= 28; size -= 4) {
    const rows = rowsAt(size), step = size + gutterOf(size), beside = columns.reduce((a, column) => a + (column.length - 1) * BESIDE, 0);
    const wide = layers.reduce((a, layer) => a + filesOf(layer, rows) * step - gutterOf(size), 0) + beside + (columns.length - 1) * LEAST_GAP + 2 * PAD;
    if (wide <= room) return { size, rows };
  }
  const size = n > 600 ? 32 : 48;
  return { size, rows: rowsAt(size) };
}

function byColumn(layers) {
  const columns = [];
  layers.forEach((layer, l) => { (columns[layer.column] ??= []).push(l); });
  return columns.filter(Boolean);
}

/**
 * Seats of units and of collapsed layers. Layers are columns; those that run side by side are files of one column.
 *
 * `shown[l]` lists the units of layer l that are in view, from top to bottom; a layer in `collapsed` has one seat for
 * all of them, numbered `nUnits + l`.
 */
export function arrange({ layers, shown, collapsed, nUnits, size, rows: most, room, height }) {
  const step = size + gutterOf(size), rowStep = rowStepOf(size), high = (n) => HEAD + n * rowStep + 14;
  const widthOf = (l) => (collapsed.has(l) ? size : filesOf(layers[l], most) * step - gutterOf(size));
  const columns = byColumn(layers), widths = columns.map((column) => column.reduce((w, l) => w + widthOf(l), (column.length - 1) * BESIDE));
  const all = widths.reduce((a, b) => a + b, 0);
  const gap = Math.max(LEAST_GAP, Math.min(MOST_GAP, (room - 2 * PAD - all) / Math.max(1, columns.length - 1)));
  const rowsOf = (l) => (collapsed.has(l) ? Math.min(1, shown[l].length) : Math.ceil(shown[l].length / filesOf(layers[l], most)));
  const rows = Math.max(1, ...layers.map((_, l) => rowsOf(l)));
  const offset = high(rows) > height * 2 ? 0 : 0.5;  // where little of the height is seen at once, all begin at the top
  const above = HEAD + Math.max(0, (height - high(rows)) / 3);
  const seats = new Map(), lanes = [], bands = [];
  let left = Math.max(PAD, (room - all - gap * (columns.length - 1)) / 2);
  columns.forEach((column, c) => {
    bands.push({ x: left, width: widths[c], layers: column });
    for (const l of column) {
      const files = collapsed.has(l) ? 1 : filesOf(layers[l], most), top = above + offset * (rows - rowsOf(l)) * rowStep;
      lanes[l] = { x: left, width: widthOf(l), column: c, beside: column.length > 1 };
      const seated = collapsed.has(l) ? (shown[l].length ? [nUnits + l] : []) : shown[l];
      seated.forEach((id, rank) => seats.set(id, { x: left + (rank % files) * step, y: top + Math.floor(rank / files) * rowStep, port: ((rank % files) + 1) / (files + 1), layer: l }));
      left += widthOf(l) + BESIDE;
    }
    left += gap - BESIDE;
  });
  return { seats, lanes, bands, size, gap, width: Math.max(room, left - gap + PAD), height: Math.max(height, high(rows)) };
}

/** The curve of an edge from seat to seat. Edges that skip columns rise in an arc, the higher the more they skip. */
export function curve(geometry, from, to) {
  const a = geometry.seats.get(from), b = geometry.seats.get(to), out = geometry.lanes[a.layer], into = geometry.lanes[b.layer];
  // edges leave a whole layer, so that none hides beneath its units
  const x0 = out.x + out.width + 1, y0 = a.y + a.port * geometry.size, x1 = into.x - 2, y1 = b.y + b.port * geometry.size;
  const skipped = into.column - out.column - 1, bend = Math.max(24, (x1 - x0) * (skipped > 0 ? 0.25 : 0.5));
  const lift = skipped > 0 ? Math.min(geometry.size * 1.2 + 34 * skipped, Math.min(y0, y1) - 12) : 0;
  return { x0, y0, x1, y1, cx0: x0 + bend, cy0: y0 - lift, cx1: x1 - bend, cy1: y1 - lift, skips: skipped > 0 };
}

/** What stands at an edge's end: an arrowhead if it excites, a bar if it inhibits; two or three points. */
export function endMark({ x1, y1, cx1, cy1 }, sign, width) {
  const length = Math.hypot(x1 - cx1, y1 - cy1) || 1, dx = (x1 - cx1) / length, dy = (y1 - cy1) / length;
  if (sign < 0) { const half = 2.4 + 0.8 * width; return [[x1 - dy * half, y1 + dx * half], [x1 + dy * half, y1 - dx * half]]; }
  if (sign === 0) return [];
  const back = 3.2 + 0.9 * width, wing = 0.62 * back;
  return [[x1 - dx * back - dy * wing, y1 - dy * back + dx * wing], [x1, y1], [x1 - dx * back + dy * wing, y1 - dy * back - dx * wing]];
}

/** How far a point is from a curve, in pixels, to within what a pointer can tell. */
export function distance(line, x, y) {
  const { x0, y0, x1, y1, cx0, cy0, cx1, cy1 } = line;
  let best = Infinity, px = x0, py = y0;
  for (let i = 1; i <= 14; i++) {
    const t = i / 14, s = 1 - t, a = s * s * s, b = 3 * s * s * t, c = 3 * s * t * t, d = t * t * t;
    const qx = a * x0 + b * cx0 + c * cx1 + d * x1, qy = a * y0 + b * cy0 + c * cy1 + d * y1;
    best = Math.min(best, toSegment(x, y, px, py, qx, qy));
    px = qx; py = qy;
  }
  return best;
}
function toSegment(x, y, ax, ay, bx, by) {
  const vx = bx - ax, vy = by - ay, t = Math.max(0, Math.min(1, ((x - ax) * vx + (y - ay) * vy) / (vx * vx + vy * vy || 1)));
  return Math.hypot(x - ax - t * vx, y - ay - t * vy);
}

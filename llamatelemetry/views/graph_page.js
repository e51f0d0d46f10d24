// Data: nodes 0..N-1 with x, y; edges 0..M-1, the heaviest first. Screen = world * scale + offset, in CSS pixels.
const X = unpack(DATA.x), Y = unpack(DATA.y), SRC = unpack(DATA.source), DST = unpack(DATA.target);
const N = X.length, M = SRC.length, WEIGHT = DATA.weight ? unpack(DATA.weight) : null;
const KIND = DATA.kind ? unpack(DATA.kind.codes) : new Int32Array(N);
const LABELS = DATA.labels, SHORT = LABELS.map(text => short(text, 28)), LOWER = LABELS.map(text => text.toLowerCase());
const canvas = $('canvas'), view = canvas.getContext('2d');
const cache = document.createElement('canvas'), context = cache.getContext('2d');
const CATEGORIES = Array.from({length: 7}, (_, i) => cssColor(`--c${i}`)), OTHER = cssColor('--missing'), BINS = 24;

// Which paint each element has: an index into a list of colours.
function paints(encoding, count) {
  const index = new Uint8Array(count);
  if (!encoding) return {index, colors: [CATEGORIES[0]]};
  if (encoding.names) {
    const codes = unpack(encoding.codes);
    for (let i = 0; i < count; i++) index[i] = codes[i] in CATEGORIES ? codes[i] : CATEGORIES.length;
    return {index, colors: [...CATEGORIES, OTHER]};
  }
  const share = unpack(encoding.share);
  for (let i = 0; i < count; i++) index[i] = share[i] < 0 ? BINS : Math.min(BINS - 1, Math.floor(share[i] * BINS));
  const ramp = Array.from({length: BINS}, (_, bin) => `rgb(${viridis((bin + 0.5) / BINS).map(Math.round)})`);
  return {index, colors: [...ramp, OTHER]};
}
const NODE = paints(DATA.color, N), EDGE = DATA.edgeColor ? paints(DATA.edgeColor, M) : null;
const BASE = Math.max(1.6, Math.min(4.5, 55 / Math.sqrt(N)));  // CSS pixels
const RADIUS = new Float32Array(N).fill(BASE);
if (DATA.size) {
  const share = unpack(DATA.size.share);
  for (let i = 0; i < N; i++) RADIUS[i] = BASE * (0.7 + 1.8 * Math.sqrt(Math.max(0, share[i])));
}
// Neighbours in compressed rows, over all edges: edge numbers of node i are ADJ[START[i]] to ADJ[START[i+1]-1].
const START = new Int32Array(N + 1), ADJ = new Int32Array(2 * M);
for (let e = 0; e < M; e++) { START[SRC[e] + 1]++; START[DST[e] + 1]++; }
for (let i = 0; i < N; i++) START[i + 1] += START[i];
const fill = START.slice();
for (let e = 0; e < M; e++) { ADJ[fill[SRC[e]]++] = e; ADJ[fill[DST[e]]++] = e; }

const graph = window.graph = {
  n: N, m: M, scale: 1, dx: 0, dy: 0, hovered: -1, selected: -1, matches: [], match: -1, minWeight: -Infinity,
  kinds: new Set(DATA.kind ? DATA.kind.names.map((_, i) => i).concat(-1) : [0]), names: true,
  shown: new Uint8Array(N).fill(1), shownEdges: M, shownNodes: N, drawnEdges: 0, moving: false, frames: [],
  screen: i => [X[i] * graph.scale + graph.dx, Y[i] * graph.scale + graph.dy],
};
let width = 0, height = 0, margin = 0, live = new Int32Array(0), near = null, asked = false, rest = 0, last = 0;
let dirty = true, fresh = false, touched = false, cost = 30, seen = {scale: 1, dx: 0, dy: 0, at: 0};
let colors = {};

function readColors() {
  colors = {fg: cssColor('--fg'), bg: cssColor('--bg'), line: cssColor('--muted'), accent: cssColor('--accent')};
}
function filter() {
  graph.shownNodes = 0;
  for (let i = 0; i < N; i++) graph.shownNodes += graph.shown[i] = graph.kinds.has(KIND[i]) ? 1 : 0;
  const kept = [];
  for (let e = 0; e < M; e++) {
    if (WEIGHT && WEIGHT[e] < graph.minWeight) break;  // sorted
    if (graph.shown[SRC[e]] && graph.shown[DST[e]]) kept.push(e);
  }
  live = Int32Array.from(kept); graph.shownEdges = kept.length;
  if (graph.selected >= 0) select(graph.shown[graph.selected] ? graph.selected : -1);
  dirty = true; search(); draw();
}
function fit() {
  let [x0, x1, y0, y1] = [Infinity, -Infinity, Infinity, -Infinity];
  for (let i = 0; i < N; i++) if (graph.shown[i]) {
    x0 = Math.min(x0, X[i]); x1 = Math.max(x1, X[i]); y0 = Math.min(y0, Y[i]); y1 = Math.max(y1, Y[i]);
  }
  if (x0 > x1) return;
  graph.home = graph.scale = Math.min((width - 50) / ((x1 - x0) || 1), (height - 50) / ((y1 - y0) || 1));
  graph.dx = width / 2 - graph.scale * (x0 + x1) / 2; graph.dy = height / 2 - graph.scale * (y0 + y1) / 2;
  dirty = true; touched = false; draw();
}
function grow() { return Math.max(0.8, Math.min(2.5, Math.pow(graph.scale / (graph.home || 1), 0.35))); }

// A full drawing goes to `cache`, with a margin around the view. While the view moves, frames show the cache, shifted
// and scaled, and it is drawn anew as often as this machine can afford: smooth at any size, sharp at rest.
function move() {
  graph.moving = touched = true; clearTimeout(rest);
  rest = setTimeout(() => { graph.moving = false; last = 0; dirty = true; draw(); }, 140);
  draw();
}
function draw() { if (!asked) { asked = true; requestAnimationFrame(frame); } }
function frame(now) {
  asked = false;
  if (!width || !height) return;  // in a frame that is not on screen yet: drawn when it is resized into view
  if (last) { graph.frames.push(now - last); if (fresh) cost = now - last; }
  last = graph.moving ? now : 0;
  const before = graph.scale / seen.scale;
  fresh = dirty || (graph.moving && now - seen.at > Math.max(100, 4 * cost)) || before > 4 || before < 0.25;
  if (fresh) { full(); seen = {scale: graph.scale, dx: graph.dx, dy: graph.dy, at: now}; dirty = false; }
  const ratio = window.devicePixelRatio || 1, k = graph.scale / seen.scale;
  view.setTransform(ratio, 0, 0, ratio, 0, 0);
  view.fillStyle = colors.bg; view.fillRect(0, 0, width, height);
  view.drawImage(cache, graph.dx - k * (seen.dx + margin), graph.dy - k * (seen.dy + margin),
    k * (width + 2 * margin), k * (height + 2 * margin));
  marks();
  if (graph.names) paintNames();
  status();
  if (graph.moving) draw();  // without a pause, so that the time between frames is what this machine needs for one
}
function full() {
  const ratio = window.devicePixelRatio || 1;
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.fillStyle = colors.bg; context.fillRect(0, 0, width + 2 * margin, height + 2 * margin);
  context.translate(margin, margin);
  paintEdges(graph.selected >= 0 ? 0.25 : 1); paintNodes(graph.selected >= 0);
}
function segment(e, aside = 0) {
  let x0 = X[SRC[e]] * graph.scale + graph.dx, y0 = Y[SRC[e]] * graph.scale + graph.dy;
  let x1 = X[DST[e]] * graph.scale + graph.dx, y1 = Y[DST[e]] * graph.scale + graph.dy;
  const w = width + margin, h = height + margin;
  if (Math.max(x0, x1) < -margin || Math.max(y0, y1) < -margin) return false;
  if (Math.min(x0, x1) > w || Math.min(y0, y1) > h) return false;
  if (aside) {
    const part = aside / (Math.hypot(x1 - x0, y1 - y0) || 1), dx = part * (y0 - y1), dy = part * (x1 - x0);
    x0 += dx; x1 += dx; y0 += dy; y1 += dy;
  }
  context.moveTo(x0, y0); context.lineTo(x1, y1); return true;
}
const CHUNK = 400;  // segments in one path: long paths cost more than their parts
// Edges of several kinds lie side by side, and each kind is as dense as its own number allows: else the rare ones are
// lost under the many.
function paintEdges(dim) {
  const groups = EDGE ? EDGE.colors.length : 1, kinds = EDGE && DATA.edgeColor.names;
  let drawn = 0;
  context.lineWidth = 1;
  for (let group = 0; group < groups; group++) {
    const edges = EDGE ? live.filter(e => EDGE.index[e] === group) : live;
    const dense = Math.max(0.06, Math.min(0.6, 30 / Math.sqrt((kinds ? edges : live).length + 1)));
    let inPath = 0, style = -1;
    for (let k = 0; k < edges.length; k++) {
      const level = WEIGHT ? 3 - Math.floor(4 * k / edges.length) : 2;  // quarters by weight: the heavier, the darker
      if (level !== style || inPath >= CHUNK) {
        if (inPath) context.stroke();
        context.beginPath(); inPath = 0; style = level;
        context.strokeStyle = EDGE ? EDGE.colors[group] : colors.line;
        context.globalAlpha = Math.min(1, dim * dense * (0.5 + 0.35 * level));
      }
      if (segment(edges[k], kinds ? 2 * Math.min(group, 2) : 0)) { inPath++; drawn++; }
    }
    if (inPath) context.stroke();
  }
  graph.drawnEdges = drawn;
  if (graph.selected >= 0) {
    context.globalAlpha = 0.9; context.strokeStyle = colors.accent; context.lineWidth = 1.4; context.beginPath();
    for (const e of liveEdges(graph.selected)) segment(e);
    context.stroke();
  }
  context.globalAlpha = 1;
}
function liveEdges(i) {
  const edges = [];
  for (let k = START[i]; k < START[i + 1]; k++) {
    const e = ADJ[k];
    if (graph.shown[SRC[e]] && graph.shown[DST[e]] && !(WEIGHT && WEIGHT[e] < graph.minWeight)) edges.push(e);
  }
  return edges;
}
function disc(to, i, extra) {
  const x = X[i] * graph.scale + graph.dx, y = Y[i] * graph.scale + graph.dy;
  const r = RADIUS[i] * grow() + extra, edge = r + margin;
  if (x < -edge || y < -edge || x > width + edge || y > height + edge) return false;
  to.moveTo(x + r, y); to.arc(x, y, r, 0, 6.2832); return true;
}
const BY_PAINT = NODE.colors.map(() => []);
for (let i = 0; i < N; i++) BY_PAINT[NODE.index[i]].push(i);
function paintNodes(focus) {
  for (let pass = focus ? 0 : 1; pass < 2; pass++) {
    BY_PAINT.forEach((members, paint) => {
      context.fillStyle = NODE.colors[paint]; context.globalAlpha = pass ? 1 : 0.18; context.beginPath();
      let inPath = 0;
      for (const i of members) {
        if (!graph.shown[i] || (focus && near.has(i) !== !!pass) || !disc(context, i, 0) || ++inPath < 16) continue;
        context.fill(); context.beginPath(); inPath = 0;
      }
      context.fill();
    });
  }
  context.globalAlpha = 1;
}
function marks() {
  view.lineWidth = 2; view.strokeStyle = colors.accent; view.beginPath();
  for (const i of graph.matches) disc(view, i, 3);
  view.stroke();
  view.strokeStyle = colors.fg; view.beginPath();
  for (const i of [graph.selected, graph.hovered, graph.match]) if (i >= 0) disc(view, i, 2);
  view.stroke();
}
// Labels: what is pointed at, selected or found first, then the largest nodes, none over another.
const degree = i => START[i + 1] - START[i];
const BY_SIZE = Array.from({length: N}, (_, i) => i).sort((a, b) => RADIUS[b] - RADIUS[a] || degree(b) - degree(a));
function paintNames() {
  const boxes = [], most = graph.moving ? 25 : 60;
  view.font = "12px system-ui, 'DejaVu Sans', sans-serif"; view.textBaseline = 'middle'; view.lineJoin = 'round';
  view.lineWidth = 3; view.strokeStyle = colors.bg; view.fillStyle = colors.fg;
  const place = i => {
    if (i < 0 || !graph.shown[i] || boxes.length >= most) return;
    const [x, y] = graph.screen(i), r = RADIUS[i] * grow();
    if (x < 0 || y < 0 || x > width || y > height) return;
    const text = SHORT[i];
    const w = view.measureText(text).width, left = x + r + 3 + w > width ? x - r - 3 - w : x + r + 3;
    const box = [left - 2, y - 8, left + w + 2, y + 8];
    if (boxes.some(b => b[0] < box[2] && box[0] < b[2] && b[1] < box[3] && box[1] < b[3])) return;
    boxes.push(box); view.strokeText(text, left, y); view.fillText(text, left, y);
  };
  [graph.hovered, graph.match, graph.selected].forEach(place);
  graph.matches.slice(0, 40).forEach(place);
  if (graph.selected >= 0) { for (const i of near) place(i); return; }
  let tried = 0;
  for (const i of BY_SIZE) {
    if (boxes.length >= most || tried > 600) break;
    if (graph.shown[i]) { tried++; place(i); }
  }
}
function status() {
  const of = (some, all, what) => `${some.toLocaleString('en')} of ${all.toLocaleString('en')} ${what}`;
  const text = `${of(graph.shownNodes, N, 'nodes')}, ${of(graph.shownEdges, M, 'edges')}`;
  if ($('status').textContent !== text) $('status').textContent = text;
}

// All heads as thumbnails, one head as lines and as a map, and q·k of one query per dimension.
const N = DATA.tokens.length, weight = triangle(DATA.attention);
const qOf = DATA.q && vectors(DATA.q), kOf = DATA.k && vectors(DATA.k);
const group = DATA.n_head / DATA.n_kv_head;
// What is selected and what was drawn: the page's tests read it.
const state = window.state = {layer: DATA.layer, head: DATA.head, query: N - 1, key: 0, thumbnails: 0, lines: 0};
window.weightOf = weight;
const tone = () => +$('tone').value;
const firstKey = () => $('nofirst').checked ? 1 : 0;
const shown = i => DATA.tokens[i].toLowerCase().includes($('filter').value.toLowerCase());

// Thumbnails
let cell = 0, left = 34, top_ = 16, run = 0, room = 0;
const heads = [DATA.n_layer, DATA.n_head];
function drawGrid() {
  const mine = ++run, ratio = devicePixelRatio || 1, canvas = $('grid');
  room = $('gridbox').clientWidth;  // 0: not laid out yet
  cell = Math.max(14, Math.min(40, Math.floor((Math.min(870, room || 870) - left) / DATA.n_layer)));
  const width = left + cell * DATA.n_layer, height = top_ + cell * DATA.n_head;
  canvas.width = width * ratio; canvas.height = height * ratio;
  canvas.style.width = width + 'px'; canvas.style.height = height + 'px';
  const ctx = canvas.getContext('2d'); ctx.scale(ratio, ratio);
  ctx.font = '11px sans-serif'; ctx.fillStyle = cssColor('--muted'); ctx.textAlign = 'center';
  const every = cell < 20 ? 2 : 1;
  for (let l = 0; l < DATA.n_layer; l += every) ctx.fillText(l, left + cell * (l + .5), 11);
  ctx.textAlign = 'right'; ctx.textBaseline = 'middle';
  for (let h = 0; h < DATA.n_head; h += every) ctx.fillText(h, left - 6, top_ + cell * (h + .5));
  const side = Math.min(N, Math.floor((cell - 2) * ratio)), power = tone(), skip = firstKey();
  const small = el('canvas', {width: side, height: side}), pen = small.getContext('2d');
  const image = pen.createImageData(side, side), best = new Float32Array(side * side);
  const place = Array.from({length: N}, (_, i) => Math.floor(i * side / N)), colors = Array.from({length: 256},
    (_, i) => viridis(i / 255));
  state.thumbnails = 0;
  const column = layer => {           // one layer per frame: the page answers while 1,024 heads are drawn
    if (mine !== run) return;
    for (let head = 0; head < DATA.n_head; head++) {
      best.fill(0);
      for (let q = 0; q < N; q++) for (let k = skip; k <= q; k++) {
        const at = place[q] * side + place[k]; best[at] = Math.max(best[at], weight(layer, head, q, k));
      }
      for (let i = 0; i < best.length; i++) image.data.set([...colors[Math.round(255 * best[i] ** power)], 255], 4 * i);
      pen.putImageData(image, 0, 0);
      ctx.imageSmoothingEnabled = false;
      ctx.drawImage(small, left + cell * layer + 1, top_ + cell * head + 1, cell - 2, cell - 2);
      state.thumbnails++;
    }
    if (layer + 1 < DATA.n_layer) requestAnimationFrame(() => column(layer + 1));
  };
  column(0); mark(); drawScale();
}
// A frame is narrower than the page, and may get its width after the page has run.
new ResizeObserver(() => { if ($('gridbox').clientWidth !== room) drawGrid(); }).observe($('gridbox'));
function drawScale() {
  const bar = el('canvas', {width: 120, height: 1}), ctx = bar.getContext('2d'), image = ctx.createImageData(120, 1);
  for (let i = 0; i < 120; i++) image.data.set([...viridis((i / 119) ** tone()), 255], 4 * i);
  ctx.putImageData(image, 0, 0); $('scale').replaceChildren('Weight 0 ', bar, ' 1.');
}
function mark() {
  Object.assign($('chosen').style, {left: left + cell * state.layer + 'px', top: top_ + cell * state.head + 'px',
    width: cell + 'px', height: cell + 'px'});
}
function at(event) {
  const layer = Math.floor((event.offsetX - left) / cell), head = Math.floor((event.offsetY - top_) / cell);
  return layer >= 0 && head >= 0 && layer < DATA.n_layer && head < DATA.n_head ? [layer, head] : null;
}
$('grid').addEventListener('click', event => { const to = at(event); if (to) choose(...to); });
$('grid').addEventListener('mousemove', event => {
  const to = at(event); $('grid').title = to ? 'layer ' + to[0] + ', head ' + to[1] : '';
});
$('grid').addEventListener('keydown', event => {
  const step = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key];
  if (!step) return;
  event.preventDefault();
  choose(...[state.layer, state.head].map((v, i) => Math.min(heads[i] - 1, Math.max(0, v + step[i]))));
});

// One head as lines
const ROW = 17, X1 = 150, X2 = 280, WIDTH = 430;
function edges(focus) {
  const threshold = +$('threshold').value, skip = firstKey(), out = [];
  for (let q = 0; q < N; q++) for (let k = skip; k <= q; k++) {
    const w = weight(state.layer, state.head, q, k);
    if (focus ? (focus.side === 'query' ? q !== focus.i : k !== focus.i) : !shown(q) && !shown(k)) continue;
    if (w >= threshold && w > 0) out.push([q, k, w]);
  }
  return out;
}
let pinned = null;
function drawLines(focus = pinned) {
  const box = $('lines'), y = i => 12 + ROW * i + ROW / 2;
  box.setAttribute('viewBox', `0 0 ${WIDTH} ${ROW * N + 14}`);
  const found = edges(focus), paths = found.map(([q, k, w]) => {
    const path = svg('path', {d: `M${X1},${y(q)} C${X1 + 60},${y(q)} ${X2 - 60},${y(k)} ${X2},${y(k)}`,
      'stroke-opacity': Math.max(.06, w)});
    path.append(svg('title', {}, `${label(q)} → ${label(k)}: ${w.toFixed(4)}`)); return path;
  });
  const texts = [svg('text', {x: X1 - 6, y: 10, 'text-anchor': 'end', class: 'value'}, 'query'),
    svg('text', {x: X2 + 6, y: 10, class: 'value'}, 'key')];
  for (let i = 0; i < N; i++) for (const side of ['query', 'key']) {
    const text = svg('text', {x: side === 'query' ? X1 - 6 : X2 + 6, y: y(i) + 4,
      'text-anchor': side === 'query' ? 'end' : 'start', 'data-side': side, 'data-i': i}, short(label(i), 13));
    if (!shown(i)) text.classList.add('off');
    if (pinned && side === pinned.side && i === pinned.i) text.classList.add('pinned');
    texts.push(text);
  }
  if (focus) for (let i = 0; i < N; i++) {     // every value of the token under the pointer, also those without a line
    const [q, k] = focus.side === 'query' ? [focus.i, i] : [i, focus.i];
    if (k > q) continue;
    const place = focus.side === 'query' ? {x: WIDTH - 2, 'text-anchor': 'end'} : {x: 0};
    texts.push(svg('text', {...place, y: y(i) + 4, class: 'value', 'data-value': i},
      weight(state.layer, state.head, q, k).toFixed(4)));
  }
  box.replaceChildren(...paths, ...texts);
  state.lines = paths.length; state.focus = focus;
}
$('lines').addEventListener('mouseover', event => {
  const {side, i} = event.target.dataset || {};
  if (side && !(state.focus && state.focus.side === side && state.focus.i === +i)) drawLines({side, i: +i});
});
$('lines').addEventListener('mouseleave', () => drawLines());
$('lines').addEventListener('click', event => {
  const {side, i} = event.target.dataset || {};
  if (side === 'query') { pinned = pinned && pinned.i === +i ? null : {side, i: +i}; state.query = +i; drawDims(); }
  else if (side === 'key') { state.key = +i; drawDims(); }
  drawLines();
});

// The same head as a map
function drawMap() {
  const canvas = $('map'), power = tone(), skip = firstKey(), bg = background();
  canvas.width = canvas.height = N;
  const ctx = canvas.getContext('2d'), image = ctx.createImageData(N, N);
  for (let q = 0; q < N; q++) for (let k = 0; k < N; k++) {
    const color = k > q || k < skip ? bg : viridis(weight(state.layer, state.head, q, k) ** power);
    image.data.set([...color, 255], 4 * (q * N + k));
  }
  ctx.putImageData(image, 0, 0);
}
function cellAt(event) {
  const size = $('map').clientWidth / N;
  return [Math.floor(event.offsetY / size), Math.floor(event.offsetX / size)].map(i => Math.max(0, Math.min(N - 1, i)));
}
$('map').addEventListener('mousemove', event => {
  const [q, k] = cellAt(event);
  $('cell').textContent = k > q ? `${label(q)} cannot see ${label(k)}: it comes later`
    : `${label(q)} → ${label(k)}: ${weight(state.layer, state.head, q, k).toFixed(4)}`;
});
$('map').addEventListener('click', event => {
  const [q, k] = cellAt(event);
  if (k <= q) { [state.query, state.key] = [q, k]; pinned = {side: 'query', i: q}; drawLines(); drawDims(); }
});

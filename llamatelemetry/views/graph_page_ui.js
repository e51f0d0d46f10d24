// What answers the reader: hover, click, search, filters, legend. Follows graph_page.js in the same script.
function nodeAt(px, py) {
  let best = -1, least = 81;
  for (let i = 0; i < N; i++) if (graph.shown[i]) {
    const x = X[i] * graph.scale + graph.dx - px, y = Y[i] * graph.scale + graph.dy - py, d = x * x + y * y;
    if (d < Math.max(least, 0) || (best < 0 && d < (RADIUS[i] * grow() + 3) ** 2)) { least = d; best = i; }
  }
  return best;
}
function describe(i) {
  const lines = [LABELS[i]];
  for (const [name, values] of Object.entries(DATA.details)) {
    if (values[i] !== null) lines.push(`${name}: ${values[i]}`);
  }
  lines.push(`edges: ${liveEdges(i).length}`);
  return lines.join('\n');
}
function hover(px, py) {
  const i = px === null ? -1 : nodeAt(px, py), tip = $('tip');
  if (i !== graph.hovered) { graph.hovered = i; draw(); }
  tip.hidden = i < 0;
  if (i < 0) return;
  tip.textContent = describe(i);
  tip.style.left = Math.max(0, Math.min(px + 14, width - tip.offsetWidth - 4)) + 'px';
  tip.style.top = Math.max(0, Math.min(py + 14, height - tip.offsetHeight - 4)) + 'px';
}
function select(i) {
  graph.selected = i; near = new Set(i < 0 ? [] : [i]);
  const side = $('side'); side.hidden = i < 0; side.replaceChildren();
  if (i >= 0) {
    const edges = liveEdges(i).sort((a, b) => a - b);
    side.append(el('h2', {}, `${LABELS[i]}: ${edges.length} edge${edges.length === 1 ? '' : 's'}`));
    for (const e of edges) {
      const other = SRC[e] === i ? DST[e] : SRC[e]; near.add(other);
      if (side.children.length > 40) continue;
      const said = [DATA.edgeLabels && DATA.edgeLabels[e], WEIGHT && format(WEIGHT[e])].filter(Boolean).join(' ');
      const name = (SRC[e] === i ? '→ ' : '← ') + LABELS[other];
      const row = el('button', {}, el('span', {}, name), el('span', {}, said));
      row.onclick = () => { select(other); centre(other); }; side.append(row);
    }
  }
  dirty = true; draw();
}
function centre(i) {
  graph.scale = Math.max(graph.scale, 3 * graph.home);
  graph.dx = width / 2 - X[i] * graph.scale; graph.dy = height / 2 - Y[i] * graph.scale; move();
}
function search() {
  const text = $('search').value.trim().toLowerCase();
  graph.matches = []; graph.match = -1;
  if (text) for (let i = 0; i < N; i++) if (graph.shown[i] && LOWER[i].includes(text)) graph.matches.push(i);
  $('found').textContent = text ? `${graph.matches.length} found` + (graph.matches.length ? ', Enter: next' : '') : '';
  draw();
}
// The shortest text of a number in four digits: weights are often whole.
const format = value => Number(value.toPrecision(4)).toString();

function zoom(factor, px, py) {
  const scale = Math.max(graph.home / 20, Math.min(graph.home * 400, graph.scale * factor));
  factor = scale / graph.scale;
  graph.dx = px - factor * (px - graph.dx); graph.dy = py - factor * (py - graph.dy); graph.scale = scale; move();
}
const pointers = new Map(); let travelled = 0;
const at = event => {
  const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top];
};
canvas.addEventListener('wheel', event => {
  event.preventDefault(); zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), ...at(event));
}, {passive: false});
canvas.addEventListener('pointerdown', event => {
  canvas.setPointerCapture(event.pointerId); pointers.set(event.pointerId, at(event)); travelled = 0;
  canvas.classList.add('drag');
});
canvas.addEventListener('pointermove', event => {
  const now = at(event), before = pointers.get(event.pointerId);
  if (!before) return hover(...now);
  if (pointers.size === 1) {
    graph.dx += now[0] - before[0]; graph.dy += now[1] - before[1];
    travelled += Math.abs(now[0] - before[0]) + Math.abs(now[1] - before[1]); if (travelled > 4) hover(null);
  } else if (pointers.size === 2) {
    const other = [...pointers].find(([id]) => id !== event.pointerId)[1];
    const distance = p => Math.hypot(p[0] - other[0], p[1] - other[1]);
    travelled = 99; zoom(distance(now) / (distance(before) || 1), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
  }
  pointers.set(event.pointerId, now); move();
});
for (const name of ['pointerup', 'pointercancel']) canvas.addEventListener(name, event => {
  if (name === 'pointerup' && pointers.has(event.pointerId) && travelled <= 4) select(nodeAt(...at(event)));
  pointers.delete(event.pointerId); canvas.classList.remove('drag');
});
canvas.addEventListener('pointerleave', () => hover(null));
canvas.addEventListener('keydown', event => {
  const step = {ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40]}[event.key];
  if (step) { graph.dx += step[0]; graph.dy += step[1]; event.preventDefault(); move(); }
  if (event.key === '+' || event.key === '-') zoom(event.key === '+' ? 1.25 : 0.8, width / 2, height / 2);
});
document.addEventListener('keydown', event => {
  if (event.key === 'Escape') { $('search').value = ''; search(); select(-1); }
});
$('search').addEventListener('input', search);
$('search').addEventListener('keydown', event => {
  if (event.key !== 'Enter' || !graph.matches.length) return;
  graph.match = graph.matches[(graph.matches.indexOf(graph.match) + 1) % graph.matches.length]; centre(graph.match);
});
$('names').addEventListener('change', event => { graph.names = event.target.checked; draw(); });
$('fit').addEventListener('click', fit);

function legend() {
  const box = $('legend');
  const name = encoding => box.append(el('strong', {}, encoding.name));
  const item = (color, text, edge) => el(
    'label', {}, el('span', {class: edge ? 'swatch edge' : 'swatch', style: `background:${color}`}), text);
  const scale = ({name, range}) => box.append(
    el('span', {}, `${name} ${format(range[0])} `, el('span', {class: 'ramp'}), ` ${format(range[1])}`));
  const listed = (encoding, edge) => {
    name(encoding);
    encoding.names.slice(0, CATEGORIES.length).forEach((text, i) => box.append(item(CATEGORIES[i], text, edge)));
    const others = encoding.names.length - CATEGORIES.length;
    if (others > 0) box.append(item(OTHER, `${others} others`, edge));
  };
  const same = DATA.kind && DATA.color && DATA.color.names && DATA.color.name === DATA.kind.name;
  if (DATA.kind) {
    name(DATA.kind);
    const counts = new Map(); for (const code of KIND) counts.set(code, (counts.get(code) || 0) + 1);
    [...DATA.kind.names, ...(counts.has(-1) ? ['none'] : [])].forEach((kind, at) => {
      const code = at < DATA.kind.names.length ? at : -1, text = `${kind} (${counts.get(code)})`;
      const tick = el('input', {type: 'checkbox', 'data-kind': kind});
      const label = same ? item(CATEGORIES[code] || OTHER, text) : el('label', {}, text);
      tick.checked = true;
      tick.onchange = () => { if (tick.checked) graph.kinds.add(code); else graph.kinds.delete(code); filter(); };
      label.prepend(tick); box.append(label);
    });
  }
  if (DATA.color && !same) { if (DATA.color.names) listed(DATA.color); else scale(DATA.color); }
  if (DATA.size) box.append(`area: ${DATA.size.name} ${format(DATA.size.range[0])} to ${format(DATA.size.range[1])}`);
  if (DATA.edgeColor) { if (DATA.edgeColor.names) listed(DATA.edgeColor, true); else scale(DATA.edgeColor); }
}
$('weightname').textContent = `${DATA.weightName} ≥`;
if (WEIGHT && M && WEIGHT[0] > WEIGHT[M - 1]) {
  // The slider runs over ranks, so that each step removes as many edges whatever the weights' distribution.
  $('weight').addEventListener('input', event => {
    const at = Math.min(M - 1, Math.max(0, Math.round((1 - event.target.value / 1000) * (M - 1))));
    graph.minWeight = event.target.value === '0' ? -Infinity : WEIGHT[at];
    $('weightvalue').textContent = format(WEIGHT[at]); filter();
  });
  $('weightvalue').textContent = format(WEIGHT[M - 1]);
} else $('weightbox').hidden = true;
function resize() {
  const box = canvas.getBoundingClientRect(), ratio = window.devicePixelRatio || 1, first = !width;
  const dx = (box.width - width) / 2, dy = (box.height - height) / 2;
  width = box.width; height = box.height;
  margin = Math.round(Math.min(width, height) / 4);
  canvas.width = Math.round(width * ratio); canvas.height = Math.round(height * ratio);
  cache.width = Math.round((width + 2 * margin) * ratio); cache.height = Math.round((height + 2 * margin) * ratio);
  if (first || !touched) fit(); else { graph.dx += dx; graph.dy += dy; dirty = true; draw(); }
}
window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', () => {
  readColors(); dirty = true; draw();
});
readColors(); legend(); filter(); resize(); new ResizeObserver(resize).observe($('frame'));

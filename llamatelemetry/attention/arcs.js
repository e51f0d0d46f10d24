// Tokens in order as nodes. Above: edges of heads, summed per pair of tokens. Below: rollout edges.
const N = DATA.tokens.length, E = Object.fromEntries(Object.entries(DATA.edges).map(([k, p]) => [k, unpack(p)]));
const state = window.state = {layer: -1, head: -1, threshold: DATA.threshold, edges: 0, arcs: 0};
const STEP = 860 / N, x = i => 20 + STEP * (i + .5), MIDDLE = Math.min(330, 40 + STEP * N / 2), LABELS = 104;
// Edges of heads that pass the filters, per pair: total weight and the heads behind it.
function pairs() {
  const found = new Map(), skip = $('nofirst').checked ? 1 : 0; state.edges = 0;
  for (let e = 0; e < E.src.length; e++) {
    if (E.weight[e] < state.threshold || E.dst[e] < skip || (state.layer >= 0 && E.layer[e] !== state.layer)
      || (state.head >= 0 && E.head[e] !== state.head)) continue;
    const key = E.src[e] * N + E.dst[e], pair = found.get(key) || {total: 0, heads: []};
    pair.total += E.weight[e]; pair.heads.push(e); found.set(key, pair); state.edges++;
  }
  return found;
}
function arc(from, to, up, name, opacity, title) {
  const r = Math.abs(x(from) - x(to)) / 2, limit = up ? MIDDLE - 14 : 120, h = Math.min(r, limit);
  const y = up ? MIDDLE : MIDDLE + LABELS;
  const path = svg('path', {d: `M${x(from)},${y} A${r},${h} 0 0 ${up ? 0 : 1} ${x(to)},${y}`, class: name,
    'stroke-opacity': opacity, 'data-from': from, 'data-to': to});
  path.append(svg('title', {}, title)); return path;
}
function draw() {
  $('threshold-value').textContent = state.threshold.toFixed(2);
  const found = pairs(), most = Math.max(...[...found.values()].map(p => p.total), 1e-9), skip = $('nofirst').checked;
  const parts = [...found].map(([key, pair]) => {
    const q = Math.floor(key / N), k = key % N, best = pair.heads.sort((a, b) => E.weight[b] - E.weight[a]).slice(0, 8);
    const what = `${label(q)} → ${label(k)}: ${pair.heads.length} heads, sum ${pair.total.toFixed(2)}; `
      + best.map(e => `layer ${E.layer[e]} head ${E.head[e]} ${E.weight[e].toFixed(2)}`).join(', ');
    return arc(q, k, true, 'head', Math.max(.1, pair.total / most), what);
  });
  if ($('rollout').checked) DATA.rollout.filter(r => !(skip && r[1] === 0)).forEach(([q, k, w]) => parts.push(
    arc(q, k, false, 'rollout', Math.max(.15, w), `rollout ${label(q)} → ${label(k)}: ${w.toFixed(3)}`)));
  for (let i = 0; i < N; i++) {
    const node = svg('circle', {cx: x(i), cy: MIDDLE + 6, r: 2 + 5 * Math.sqrt(DATA.size[i]), 'data-i': i,
      fill: `rgb(${viridis(DATA.color[i])})`});
    node.append(svg('title', {}, DATA.details[i])); parts.push(node);
    if (N <= 80 || i % Math.ceil(N / 80) === 0) parts.push(svg('text', {'data-i': i, 'text-anchor': 'end',
      transform: `translate(${x(i) + 4},${MIDDLE + 16}) rotate(-90)`}, short(label(i), 14)));
  }
  const box = $('arcs'); box.setAttribute('viewBox', `0 0 900 ${MIDDLE + LABELS + ($('rollout').checked ? 130 : 6)}`);
  box.replaceChildren(...parts); state.arcs = found.size;
  $('result').textContent = `${state.edges} edges of heads between ${found.size} pairs of tokens, above the line; `
    + `rollout of layers 0 to ${DATA.rollout_layer} below it.`;
}
$('arcs').addEventListener('mouseover', event => {
  const i = event.target.dataset && event.target.dataset.i;
  for (const path of $('arcs').querySelectorAll('path')) {
    path.classList.toggle('off', i !== undefined && path.dataset.from !== i && path.dataset.to !== i);
  }
  const title = event.target.querySelector && event.target.querySelector('title');
  $('tip').textContent = i !== undefined ? DATA.details[i] : title && event.target !== $('arcs') ? title.textContent : '';
});
const choices = (id, count) => $(id).replaceChildren(new Option('all', -1),
  ...Array.from({length: count}, (_, i) => new Option(i, i)));
choices('layer', DATA.n_layer); choices('head', DATA.n_head);
for (const id of ['layer', 'head']) $(id).addEventListener('change', () => { state[id] = +$(id).value; draw(); });
$('threshold').min = DATA.threshold; $('threshold').value = DATA.threshold;
$('threshold').addEventListener('input', () => { state.threshold = +$('threshold').value; draw(); });
for (const id of ['nofirst', 'rollout']) $(id).addEventListener('change', draw);
onTheme(draw); draw(); state.ready = true;

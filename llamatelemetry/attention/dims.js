// q·k of the chosen query with every key, per dimension; then what ties the three views together.
function drawDims() {
  state.key = Math.min(state.key, state.query);
  options($('query'), N, label, state.query); options($('key'), state.query + 1, label, state.key);
  const {layer, head, query, key} = state, kv = Math.floor(head / group);
  $('dims-title').textContent = `Query ${label(query)} and its keys per dimension: layer ${layer}, head ${head}`
    + (group === 1 ? '' : `, key head ${kv} (serves heads ${kv * group} to ${(kv + 1) * group - 1})`);
  const q = qOf && qOf(layer, head, query);
  if (!q) {
    $('bars').textContent = DATA.q ? 'q and k of this layer are not on this page, to keep it small. Here they are for '
      + `layers ${DATA.q.layers.join(', ')}; draw the page with another layer to have its own.`
      : 'q and k were not captured for this page.';
    $('dims').replaceChildren(); state.dot = null; return;
  }
  const keys = Array.from({length: query + 1}, (_, i) => kOf(layer, kv, i));
  const products = keys.map(k => k.map((x, d) => x * q[d]));
  const limit = Math.max(...products.map(largest)), kLimit = Math.max(...keys.map(largest));
  const head_ = el('tr', {}, ...['key', 'k', 'q × k', 'q·k', 'scaled', 'weight'].map(t => el('th', {}, t)));
  const qRow = el('tr', {}, el('th', {}, 'q of ' + label(query)), el('th', {}, strip(q, largest(q), 'q')));
  const rows = keys.map((k, i) => {
    const sum = dot(q, k), row = el('tr', {'data-key': i, class: i === key ? 'on' : ''}, el('td', {}, label(i)),
      el('td', {}, strip(k, kLimit, 'k')), el('td', {}, strip(products[i], limit, 'q × k')),
      ...[number(sum), number(scaled(sum)), weight(layer, head, query, i).toFixed(4)].map(t => el('td', {}, t)));
    row.addEventListener('click', () => { state.key = i; drawDims(); });
    return row;
  });
  $('dims').replaceChildren(el('table', {}, el('thead', {}, head_, qRow), el('tbody', {}, ...rows)));
  drawBars(products[key], dot(q, keys[key]));
}
// llama.cpp caps the scores before it scales them.
function scaled(sum) {
  const cap = DATA.softcap; return (cap ? cap * Math.tanh(sum / cap) : sum) * DATA.scales[state.layer];
}
function drawBars(product, sum) {
  const {layer, head, query, key} = state, w = 880 / product.length, limit = largest(product) || 1;
  const box = svg('svg', {viewBox: '0 0 880 130', preserveAspectRatio: 'none', role: 'img'});
  product.forEach((value, d) => {
    const h = 52 * Math.abs(value) / limit, bar = svg('rect', {x: d * w, width: w * .8, height: h,
      y: value < 0 ? 62 : 62 - h, fill: `rgb(${signed(Math.sign(value))})`});
    bar.append(svg('title', {}, `dimension ${d}: ${number(value, 6)}`)); box.append(bar);
  });
  box.append(svg('line', {x1: 0, x2: 880, y1: 62, y2: 62, stroke: cssColor('--line')}));
  for (const d of [0, product.length >> 1, product.length - 1]) {
    box.append(svg('text', {x: d * w, y: 126, 'text-anchor': d === product.length - 1 ? 'end' : 'start'}, 'dim ' + d));
  }
  const order = [...product.keys()].sort((a, b) => Math.abs(product[b]) - Math.abs(product[a])).slice(0, 3);
  const line = `${label(query)} · ${label(key)} = ${number(sum, 5)}, scaled ${number(scaled(sum), 5)}, weight `
    + `${weight(layer, head, query, key).toFixed(4)}; largest dimensions: `
    + order.map(d => `${d} (${number(product[d], 3)})`).join(', ');
  $('bars').replaceChildren(el('p', {class: 'mono', id: 'dot'}, line), box);
  state.dot = sum;
}

function choose(layer, head) {
  state.layer = layer; state.head = head; $('layer').value = layer; $('head').value = head;
  $('head-title').textContent = `Layer ${layer}, head ${head}`;
  mark(); drawLines(); drawMap(); drawDims();
}
function all() {
  $('threshold-value').textContent = (+$('threshold').value).toFixed(2);
  drawGrid(); choose(state.layer, state.head);
}
options($('layer'), DATA.n_layer, i => i, state.layer); options($('head'), DATA.n_head, i => i, state.head);
for (const id of ['layer', 'head']) $(id).addEventListener('change', () => choose(+$('layer').value, +$('head').value));
for (const id of ['query', 'key']) $(id).addEventListener('change', () => { state[id] = +$(id).value; drawDims(); });
$('threshold').addEventListener('input', () => {
  $('threshold-value').textContent = (+$('threshold').value).toFixed(2); drawLines();
});
$('filter').addEventListener('input', () => drawLines());
$('tone').addEventListener('change', all); $('nofirst').addEventListener('change', all);
onTheme(all); all(); state.ready = true;

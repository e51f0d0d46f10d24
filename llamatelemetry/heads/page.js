const MISSING = -99, n = DATA.tokens.length, size = n * (n + 1) / 2, H = DATA.n_head, L = DATA.layers.length;
const weights = unpack(DATA.weights), near = unpack(DATA.near), nearDistance = unpack(DATA.near_distance);
const measures = DATA.measures.map(m => ({name: m.name, signed: m.signed, value: unpack(m.value),
  low: m.low && unpack(m.low), high: m.high && unpack(m.high), shuffled: m.baseline_high && unpack(m.baseline_high)}));
const nearCount = near.shape[1], cell = Math.max(8, Math.min(26, Math.floor(830 / L))), left = 34, bottom = 20;
let chosen = DATA.first, measure = 0;
const headName = i => 'L' + DATA.layers[Math.floor(i / H)] + 'H' + i % H;
const weight = (head, q, k) => weights[head * size + q * (q + 1) / 2 + k] * DATA.unit;
const has = x => x !== MISSING;

function range(m) {
  let low = Infinity, high = -Infinity;
  for (const v of m.value) if (has(v)) { low = Math.min(low, v); high = Math.max(high, v); }
  if (m.signed) { const top = Math.max(Math.abs(low), Math.abs(high)) || 1; return [-top, top]; }
  return [Math.min(0, low), high > low ? high : low + 1];
}
function color(m, v, [low, high]) {
  return m.signed ? signed(v / high) : viridis((v - low) / (high - low));
}
const css = c => `rgb(${c.map(Math.round).join(',')})`;

function drawMap() {
  const canvas = $('map'), ratio = devicePixelRatio || 1, width = left + L * cell + 4, height = H * cell + bottom;
  canvas.width = width * ratio; canvas.height = height * ratio;
  canvas.style.width = width + 'px'; canvas.style.height = height + 'px';
  const ctx = canvas.getContext('2d'), m = measures[measure], limits = range(m), only = $('label').value;
  ctx.scale(ratio, ratio); ctx.font = '11px system-ui,sans-serif'; ctx.fillStyle = cssColor('--muted');
  ctx.textAlign = 'right'; ctx.textBaseline = 'middle';
  for (let h = 0; h < H; h += cell < 12 ? 4 : 1) ctx.fillText(h, left - 5, (h + 0.5) * cell);
  ctx.textAlign = 'center';
  for (let l = 0; l < L; l += cell < 20 ? 5 : 2) ctx.fillText(DATA.layers[l], left + (l + 0.5) * cell, H * cell + 10);
  for (let i = 0; i < L * H; i++) {
    const x = left + Math.floor(i / H) * cell, y = i % H * cell;
    if (!has(m.value[i])) continue;
    ctx.globalAlpha = !only || DATA.labels[i].split(', ').includes(only) ? 1 : 0.12;
    ctx.fillStyle = css(color(m, m.value[i], limits));
    ctx.fillRect(x + 0.5, y + 0.5, cell - 1, cell - 1);
  }
  ctx.globalAlpha = 1; ctx.strokeStyle = cssColor('--c5'); ctx.lineWidth = 2.5;
  ctx.strokeRect(left + Math.floor(chosen / H) * cell, chosen % H * cell, cell, cell);
  const bar = el('canvas', {width: 100, height: 1}), strip = bar.getContext('2d');
  for (let i = 0; i < 100; i++) {
    strip.fillStyle = css(color(m, limits[0] + (limits[1] - limits[0]) * i / 99, limits)); strip.fillRect(i, 0, 1, 1);
  }
  $('scale').replaceChildren(number(limits[0], 3) + ' ', bar, ' ' + number(limits[1], 3));
}
function drawMatrix(canvas, head, noSink) {
  canvas.width = canvas.height = n;
  const ctx = canvas.getContext('2d'), image = ctx.createImageData(n, n), first = noSink ? 1 : 0;
  let top = 0;
  for (let q = 0; q < n; q++) for (let k = first; k <= q; k++) top = Math.max(top, weight(head, q, k));
  for (let q = 0; q < n; q++) for (let k = first; k <= q; k++)
    image.data.set([...viridis(weight(head, q, k) / (top || 1)), 255], 4 * (q * n + k));
  ctx.putImageData(image, 0, 0);
}
function drawProfile() {
  const rows = measures.map((m, j) => {
    const v = m.value[chosen], [low, high] = range(m), x = t => 4 + 142 * (t - low) / (high - low || 1);
    const picture = svg('svg', {viewBox: '0 0 150 14', role: 'img'});
    picture.append(svg('line', {x1: 2, x2: 148, y1: 7, y2: 7, stroke: cssColor('--line')}));
    const [from, to, chance] = [m.low, m.high, m.shuffled].map(a => a && has(a[chosen]) ? a[chosen] : null);
    const line = (x1, x2, y1, y2, name, width) =>
      picture.append(svg('line', {x1, x2, y1, y2, stroke: cssColor(name), 'stroke-width': width}));
    if (from !== null) line(x(from), x(to), 7, 7, '--accent', 4);
    if (chance !== null) line(x(chance), x(chance), 1, 13, '--c5', 2);
    if (has(v)) picture.append(svg('circle', {cx: x(v), cy: 7, r: 3.5, fill: cssColor('--fg')}));
    const said = from === null ? '' : `${number(v)}, interval ${number(from)} to ${number(to)}`
      + (chance === null ? '' : `, highest shuffled ${number(chance)}`);
    const row = el('tr', {title: said, class: j === measure ? 'on' : ''}, el('td', {}, m.name),
      el('td', {}, has(v) ? number(v, 3) : '-'), el('td', {}, picture));
    row.onclick = () => { measure = j; $('measure').value = j; draw(); };
    return row;
  });
  $('profile').tBodies[0].replaceChildren(...rows);
}
function drawNear() {
  $('near').replaceChildren(...Array.from({length: nearCount}, (_, j) => {
    const other = near[chosen * nearCount + j], canvas = el('canvas'), d = nearDistance[chosen * nearCount + j];
    drawMatrix(canvas, other, $('nosink').checked);
    const button = el('button', {'data-head': other, title: DATA.labels[other]}, canvas,
      headName(other) + '  ' + number(d, 3));
    button.onclick = () => choose(other);
    return button;
  }));
}
function draw() {
  drawMap(); drawProfile();
  const cluster = DATA.clusters ? ', cluster ' + (DATA.clusters[chosen] < 0 ? 'none' : DATA.clusters[chosen]) : '';
  $('name').textContent = headName(chosen) + ': ' + (DATA.labels[chosen] || 'none') + cluster;
  drawMatrix($('matrix'), chosen, $('nosink').checked); drawNear();
}
function choose(i) { if (i >= 0 && i < L * H && has(measures[0].value[i])) { chosen = i; draw(); } }
function under(event) {
  const box = $('map').getBoundingClientRect(), l = Math.floor((event.clientX - box.left - left) / cell);
  const h = Math.floor((event.clientY - box.top) / cell);
  return l >= 0 && l < L && h >= 0 && h < H ? l * H + h : -1;
}
$('measure').append(...measures.map((m, j) => new Option(m.name, j)));
const kinds = [...new Set(DATA.labels.flatMap(t => t.split(', ')))].filter(Boolean).sort();
$('label').append(new Option('any', ''), ...kinds.map(t => new Option(t, t)));
$('measure').onchange = event => { measure = +event.target.value; draw(); };
$('label').onchange = drawMap; $('nosink').onchange = draw;
$('go').onchange = event => {
  const found = /^\s*L?(\d+)\D+(\d+)\s*$/i.exec(event.target.value), l = found ? DATA.layers.indexOf(+found[1]) : -1;
  if (l >= 0 && +found[2] < H) choose(l * H + +found[2]);
  else $('over').textContent = 'no head ' + event.target.value + ': write layer and head as L3H2';
};
$('map').onclick = event => choose(under(event));
$('map').onmousemove = event => {
  const i = under(event), m = measures[measure];
  const shown = i < 0 || !has(m.value[i]) ? '-' : number(m.value[i], 5);
  $('over').textContent = i < 0 ? '\u00a0' : `${headName(i)}  ${m.name} ${shown}  ${DATA.labels[i]}`;
};
$('map').onkeydown = event => {
  const step = {ArrowLeft: -H, ArrowRight: H, ArrowUp: -1, ArrowDown: 1}[event.key];
  if (step) { event.preventDefault(); choose(chosen + step); }
};
$('matrix').onmousemove = event => {
  const box = $('matrix').getBoundingClientRect(), k = Math.floor((event.clientX - box.left) / box.width * n);
  const q = Math.floor((event.clientY - box.top) / box.height * n);
  const inside = k <= q && q < n && k >= 0;
  $('cell').textContent = inside ? `query ${label(q)}  key ${label(k)}  ${number(weight(chosen, q, k), 5)}` : '\u00a0';
};
onTheme(draw);
draw();

// Map of (state, token) and the values of the chosen state. `page` is the state, for tests and the console.
const names = Object.keys(DATA.measures), maps = Object.fromEntries(names.map(n => [n, unpack(DATA.measures[n])]));
const nTokens = DATA.tokens.length, stateOf = vectors(DATA.vectors), shares = unpack(DATA.probability);
const page = {measure: names[0], log: true, layer: Math.floor(DATA.states / 2), token: nTokens - 1};
for (const name of names) $('measure').append(el('option', {value: name}, name));

function scaled(values, logs) {
  let low = Infinity, high = -Infinity;
  for (const v of values) if (Number.isFinite(v)) { low = Math.min(low, v); high = Math.max(high, v); }
  const useLog = logs && low > 0, f = useLog ? Math.log10 : x => x;
  const start = useLog ? f(low) : Math.min(0, low), span = f(high) - start || 1;
  return {low: useLog ? low : start, high, at: v => (f(v) - start) / span, canLog: low > 0};
}
function drawMap() {
  const values = maps[page.measure], scale = scaled(values, page.log), map = $('map');
  const w = map.clientWidth || 400, h = map.clientHeight || 420, ratio = window.devicePixelRatio || 1;
  map.width = w * ratio; map.height = h * ratio;
  const ctx = map.getContext('2d'); ctx.scale(ratio, ratio);
  const cw = w / nTokens, ch = h / DATA.states;
  for (let l = 0; l < DATA.states; l++) for (let t = 0; t < nTokens; t++) {
    const v = values[l * nTokens + t];
    ctx.fillStyle = Number.isFinite(v) ? 'rgb(' + viridis(scale.at(v)).map(Math.round) + ')' : 'transparent';
    ctx.fillRect(t * cw, l * ch, Math.ceil(cw), Math.ceil(ch));
  }
  drawLabels(cw); drawRows(ch);
  ctx.strokeStyle = cssColor('--c5'); ctx.lineWidth = 2;
  ctx.strokeRect(page.token * cw + 1, page.layer * ch + 1, Math.max(cw - 2, 2), Math.max(ch - 2, 2));
  $('log').disabled = !scale.canLog;
  $('low').textContent = number(scale.low, 3); $('high').textContent = number(scale.high, 3);
  const bar = $('scale').getContext('2d');
  for (let x = 0; x < 120; x++) { bar.fillStyle = 'rgb(' + viridis(x / 119).map(Math.round) + ')'; bar.fillRect(x, 0, 1, 10); }
}
// Token texts under the map, turned, as many as fit.
function drawLabels(cw) {
  const box = $('labels'), ratio = window.devicePixelRatio || 1, w = box.clientWidth || 400, h = box.clientHeight || 70;
  box.width = w * ratio; box.height = h * ratio;
  const ctx = box.getContext('2d'), every = Math.ceil(13 / cw);
  ctx.scale(ratio, ratio); ctx.fillStyle = cssColor('--muted'); ctx.font = "11px 'DejaVu Sans', sans-serif";
  ctx.textAlign = 'right'; ctx.textBaseline = 'middle';
  for (let t = 0; t < nTokens; t += every) {
    const text = DATA.tokens[t];
    ctx.save(); ctx.translate((t + 0.5) * cw, 3); ctx.rotate(-Math.PI / 2);
    ctx.fillText(short(text, 10), 0, 0, h - 4); ctx.restore();
  }
}
// Numbers of the states beside the map, as many as fit.
function drawRows(ch) {
  const box = $('rows'), ratio = window.devicePixelRatio || 1, w = box.clientWidth || 22, h = box.clientHeight || 420;
  box.width = w * ratio; box.height = h * ratio;
  const ctx = box.getContext('2d'), every = [1, 2, 5, 10, 20, 50].find(n => n * ch >= 13) || 100;
  ctx.scale(ratio, ratio); ctx.fillStyle = cssColor('--muted'); ctx.font = "11px 'DejaVu Sans', sans-serif";
  ctx.textAlign = 'right'; ctx.textBaseline = 'middle';
  for (let l = 0; l < DATA.states; l += every) ctx.fillText(String(l), w - 4, (l + 0.5) * ch);
}
function drawVector() {
  $('chosen').textContent = 'state ' + page.layer + ', token ' + label(page.token);
  const x = stateOf(page.layer, 0, page.token) || new Float64Array(0), box = $('vector'), ratio = window.devicePixelRatio || 1;
  const w = box.clientWidth || 400, h = box.clientHeight || 190, limit = largest(x) || 1;
  box.width = w * ratio; box.height = h * ratio;
  const ctx = box.getContext('2d'); ctx.scale(ratio, ratio);
  ctx.strokeStyle = cssColor('--line'); ctx.beginPath(); ctx.moveTo(0, h / 2); ctx.lineTo(w, h / 2); ctx.stroke();
  for (let i = 0; i < x.length; i++) {
    ctx.fillStyle = cssColor(x[i] < 0 ? '--c0' : '--c5');
    const y = x[i] / limit * (h / 2 - 4);
    ctx.fillRect(i / x.length * w, h / 2 - Math.max(y, 0), Math.max(w / x.length, 1), Math.max(Math.abs(y), 0.5));
  }
  $('vectornote').textContent = !x.length ? 'the values of this state are not stored (see below)' : x.length + ' dimensions from left to right; full height is ' + number(limit, 6);
  const order = [...x.keys()].sort((a, b) => Math.abs(x[b]) - Math.abs(x[a])).slice(0, 6);
  const sizes = [...x].map(Math.abs).sort((a, b) => a - b), middle = sizes[Math.floor(sizes.length / 2)];
  const rows = order.map(i => el('tr', {}, el('td', {}, String(i)), el('td', {}, number(x[i], 6)),
    el('td', {}, middle ? number(Math.abs(x[i]) / middle, 3) : '')));
  const head = el('tr', {}, ...['dimension', 'value', 'times median magnitude'].map(n => el('th', {}, n)));
  const length = Math.sqrt(dot(x, x));
  const says = 'lens: ' + DATA.says[page.layer][page.token]
    + ' (' + number(shares[page.layer * nTokens + page.token], 3) + ')';
  $('facts').replaceChildren(el('p', {class: 'mono'}, x.length ? 'length ' + number(length, 6) : ''),
    el('p', {class: 'mono'}, says), !x.length ? '' : el('table', {}, el('thead', {}, head), el('tbody', {}, ...rows)));
}
function draw() { drawMap(); drawVector(); }
function cell(event) {
  const box = $('map').getBoundingClientRect(), clamp = (x, n) => Math.min(Math.max(Math.floor(x * n), 0), n - 1);
  return [clamp((event.clientY - box.top) / box.height, DATA.states), clamp((event.clientX - box.left) / box.width, nTokens)];
}
$('map').addEventListener('mousemove', event => {
  const [l, t] = cell(event);
  $('under').textContent = 'state ' + l + ', ' + label(t) + ': ' + number(maps[page.measure][l * nTokens + t], 5);
});
$('map').addEventListener('click', event => { [page.layer, page.token] = cell(event); draw(); });
$('map').addEventListener('keydown', event => {
  const step = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
  if (!step) return;
  event.preventDefault();
  page.layer = Math.min(Math.max(page.layer + step[0], 0), DATA.states - 1);
  page.token = Math.min(Math.max(page.token + step[1], 0), nTokens - 1); draw();
});
$('measure').addEventListener('change', event => { page.measure = event.target.value; $('under').textContent = ''; drawMap(); });
$('log').addEventListener('change', event => { page.log = event.target.checked; drawMap(); });
matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
window.addEventListener('resize', draw);
window.page = page;
draw();

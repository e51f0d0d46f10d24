// Shared by the attention pages: elements, numbers, colours, and weights stored as lower triangles.
const $ = id => document.getElementById(id);
const SVG = 'http://www.w3.org/2000/svg';
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children); return node;
}
function svg(tag, attributes = {}, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text; return node;
}
const number = (x, digits = 4) => x === 0 ? '0' : Math.abs(x) >= 1e4 || Math.abs(x) < 1e-3 ? x.toExponential(2)
  : x.toPrecision(digits);
const label = i => i + ' ' + DATA.tokens[i];
// At most n characters, counted so that none is cut in halves; a token's isolate (U+2068) is closed again.
function short(text, n) {
  const all = Array.from(text);
  return all.length <= n ? text : all.slice(0, n - 1).join('') + '…' + (text.includes('\u2068') ? '\u2069' : '');
}

// Viridis, sampled; between samples linear. Signed values run from blue over the page's background to red.
const VIRIDIS = ['440154', '482878', '3e4989', '31688e', '26828e', '1f9e89', '35b779', '6ece58', 'b5de2b', 'fde725']
  .map(hex => [0, 2, 4].map(i => parseInt(hex.slice(i, i + 2), 16)));
function viridis(t) {
  const x = Math.min(Math.max(t, 0), 1) * (VIRIDIS.length - 1), i = Math.min(Math.floor(x), VIRIDIS.length - 2);
  return VIRIDIS[i].map((a, c) => a + (x - i) * (VIRIDIS[i + 1][c] - a));
}
function background() {
  const hex = cssColor('--bg').slice(1); return [0, 2, 4].map(i => parseInt(hex.slice(i, i + 2), 16));
}
function signed(t, bg = background()) {
  const dark = bg[0] < 128, s = Math.min(Math.abs(t), 1);
  const end = t < 0 ? (dark ? [86, 180, 233] : [33, 102, 172]) : (dark ? [244, 109, 67] : [178, 24, 43]);
  return bg.map((a, c) => a + s * (end[c] - a));
}
// One row of cells for a vector, signed around zero; limit: the value with full colour. Exact values on hover.
function strip(values, limit, name) {
  const canvas = el('canvas', {width: values.length, height: 1, class: 'strip', role: 'img', 'aria-label': name || ''});
  const ctx = canvas.getContext('2d'), image = ctx.createImageData(values.length, 1), bg = background();
  for (let i = 0; i < values.length; i++) image.data.set([...signed(values[i] / (limit || 1), bg), 255], 4 * i);
  ctx.putImageData(image, 0, 0);
  canvas.addEventListener('mousemove', event => {
    const i = Math.min(values.length - 1, Math.floor(event.offsetX / canvas.clientWidth * values.length));
    canvas.title = (name ? name + ' ' : '') + '[' + i + '] = ' + number(values[i], 6);
  });
  return canvas;
}
const largest = values => { let m = 0; for (const v of values) m = Math.max(m, Math.abs(v)); return m; };
const dot = (a, b) => { let s = 0; for (let i = 0; i < a.length; i++) s += a[i] * b[i]; return s; };

// Weights: (layer, head, query >= key) packed row by row, as float32 or in steps of 1/65535.
function triangle(packed) {
  const values = unpack(packed), n = DATA.tokens.length, size = n * (n + 1) / 2, heads = DATA.n_head;
  const unit = packed.dtype === 'uint16' ? 1 / 65535 : 1;
  return (layer, head, query, key) => key > query ? 0
    : values[(layer * heads + head) * size + query * (query + 1) / 2 + key] * unit;
}
// Vectors: (layer, head, token, feature), as float32, or as integers with one scale per vector.
function vectors(packed) {
  const values = unpack(packed.values), scales = packed.scales && unpack(packed.scales);
  const [, heads, tokens, width] = packed.values.shape, first = packed.values.dtype === 'uint16' ? 32768 : 0;
  return (layer, head, token) => {
    const i = packed.layers.indexOf(layer);
    if (i < 0) return null;
    const row = (i * heads + head) * tokens + token, out = new Float64Array(width);
    for (let d = 0; d < width; d++) out[d] = (values[row * width + d] - first) * (scales ? scales[row] : 1);
    return out;
  };
}
function options(select, count, text = i => i, value = 0) {
  select.replaceChildren(...Array.from({length: count}, (_, i) => new Option(text(i), i)));
  select.value = value;
}
const onTheme = redraw => matchMedia('(prefers-color-scheme: dark)').addEventListener('change', redraw);

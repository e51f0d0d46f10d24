// Shared by all pages: elements, numbers, colours; by those of attention: weights stored as lower triangles.
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
const label = i => (DATA.positions ? DATA.positions[i] : i) + ' ' + DATA.tokens[i];
// At most n characters, counted so that none is cut in halves; a token's isolate (U+2068) is closed again.
function short(text, n) {
  const all = Array.from(text);
  return all.length <= n ? text : all.slice(0, n - 1).join('') + '…' + (text.includes('\u2068') ? '\u2069' : '');
}

// Magnitudes in the theme's ramp, between its samples linear. Signed values run over the page's background.
const rgb = color => [1, 3, 5].map(i => parseInt(color.slice(i, i + 2), 16));
const between = (a, b, share) => a.map((from, c) => from + share * (b[c] - from));
const RAMP = cssColor('--ramp').split(',').map(rgb);
function viridis(t) {
  const x = Math.min(Math.max(t, 0), 1) * (RAMP.length - 1), i = Math.min(Math.floor(x), RAMP.length - 2);
  return between(RAMP[i], RAMP[i + 1], x - i);
}
const background = () => rgb(cssColor('--bg'));
const diverging = () => ['--bg', '--less', '--more'].map(name => rgb(cssColor(name)));
function signed(t, [middle, less, more] = diverging()) {
  return between(middle, t < 0 ? less : more, Math.min(Math.abs(t), 1));
}
// One row of cells for a vector, signed around zero; limit: the value with full colour. Exact values on hover.
function strip(values, limit, name) {
  const canvas = el('canvas', {width: values.length, height: 1, class: 'strip', role: 'img', 'aria-label': name || ''});
  const ctx = canvas.getContext('2d'), image = ctx.createImageData(values.length, 1), ends = diverging();
  for (let i = 0; i < values.length; i++) image.data.set([...signed(values[i] / (limit || 1), ends), 255], 4 * i);
  ctx.putImageData(image, 0, 0);
  canvas.addEventListener('mousemove', event => {
    const i = Math.min(values.length - 1, Math.floor(event.offsetX / canvas.clientWidth * values.length));
    canvas.title = (name ? name + ' ' : '') + '[' + i + '] = ' + number(values[i], 6);
  });
  return canvas;
}
const largest = values => { let m = 0; for (const v of values) m = Math.max(m, Math.abs(v)); return m; };
const dot = (a, b) => { let s = 0; for (let i = 0; i < a.length; i++) s += a[i] * b[i]; return s; };

// Weights: (layer, head, query >= key) packed row by row, as float32, in steps of 1/65535, or 8 bits of the root.
function triangle(packed) {
  const values = unpack(packed), n = DATA.tokens.length, size = n * (n + 1) / 2, heads = DATA.n_head;
  const unit = packed.dtype === 'uint16' ? 1 / 65535 : 1, root = packed.dtype === 'uint8';
  return (layer, head, query, key) => key > query ? 0
    : (w => root ? (w / 255) ** 2 : w * unit)(
      values[(layer * heads + head) * size + query * (query + 1) / 2 + key]);
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

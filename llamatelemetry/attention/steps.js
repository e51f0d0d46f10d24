// One token's way through one head of one layer. Steps 6 and 7 are computed here from q, k and v, beside what was
// captured.
const T = DATA.position, group = DATA.n_head / DATA.n_kv_head, arrays = {};
for (const [name, packed] of Object.entries(DATA.arrays)) arrays[name] = unpack(packed);
// A row of the array `name` (layer, ..., width) at the given indices, the layer counted among those on this page.
function row(name, ...index) {
  const shape = DATA.arrays[name].shape, width = shape[shape.length - 1];
  const at = index.reduce((sum, i, axis) => sum * shape[axis] + i, 0);
  return arrays[name].subarray(at * width, (at + 1) * width);
}
const state = window.state = {layer: DATA.layer, head: DATA.head};
const length = x => Math.sqrt(dot(x, x));
const apart = (a, b) => a.reduce((m, x, i) => Math.max(m, Math.abs(x - b[i])), 0);
const add = (a, b) => Array.from(a, (x, i) => x + b[i]);

function softmax(scores) {
  const top = Math.max(...scores), e = scores.map(s => Math.exp(s - top)), sum = e.reduce((a, b) => a + b);
  return e.map(x => x / sum);
}
// Scores, scale with soft-cap, mask, softmax, weighted values: from q, k and v alone.
function recompute(l, h, kv) {
  const q = row('q', l, h), window_ = DATA.windows[l], cap = DATA.softcap;
  const scores = Array.from({length: T + 1}, (_, i) => dot(q, row('k', l, kv, i)));
  const scaled = scores.map(s => (cap ? cap * Math.tanh(s / cap) : s) * DATA.scales[l]);
  const masked = scaled.map((s, i) => window_ && T - i >= window_ ? -Infinity : s), weights = softmax(masked);
  const output = new Float64Array(row('v', l, kv, 0).length);
  weights.forEach((w, i) => row('v', l, kv, i).forEach((x, d) => { output[d] += w * x; }));
  return {scores, scaled, masked, weights, output};
}
function step(title, shape, ...content) {
  return el('li', {}, el('h2', {}, title + ' ', el('span', {class: 'shape'}, shape)), ...content);
}
const say = text => el('p', {}, text);
// A strip with its numbers under it.
function vector(x, name, limit = largest(x)) {
  const at = x.reduce((best, v, i) => Math.abs(v) > Math.abs(x[best]) ? i : best, 0);
  return el('div', {}, strip(x, limit, name), el('p', {class: 'numbers'}, `[${Array.from(x.slice(0, 6),
    v => number(v, 3)).join(', ')}, …] largest: dimension ${at}, ${number(x[at])}`));
}

function draw() {
  const l = DATA.layers.indexOf(state.layer), h = state.head, kv = Math.floor(h / group), token = label(T);
  const q = row('q', l, h), qPre = row('q_pre', l, h), k = row('k', l, kv, T), kPre = row('k_pre', l, kv);
  const stream = row('hidden', l), normed = row('attn_norm', l), added = row('attn_out', l);
  const mine = state.recomputed = recompute(l, h, kv), wrote = row('written', l, h);
  const captured = row('attention', l, h), out = row('attn_heads', l, h);
  const lengths = Array.from({length: DATA.n_head}, (_, i) => length(row('written', l, i)));
  state.captured = {weights: Array.from(captured), output: Array.from(out)};
  state.difference = {weights: apart(mine.weights, captured), output: apart(mine.output, out)};
  const embedding = arrays.embedding, wide = 'q, k: ' + q.length + ', v: ' + mine.output.length;
  const limit = Math.max(...mine.weights.map((w, i) => w * largest(row('v', l, kv, i))));
  const rows = mine.scores.map((s, i) => el('tr', isFinite(mine.masked[i]) ? {} : {class: 'masked'},
    ...[label(i), number(s), number(row('scores', l, h)[i]), number(mine.scaled[i]),
      isFinite(mine.masked[i]) ? 'kept' : '−∞', mine.weights[i].toFixed(4), captured[i].toFixed(4)]
      .map(t => el('td', {}, t)),
    el('td', {}, strip(row('v', l, kv, i).map(x => x * mine.weights[i]), limit, 'weight × v'))));
  const later = DATA.tokens.length - T - 1;
  const turned = T === 0 || qPre.some((x, i) => Math.abs(x - q[i]) > 1e-5 * largest(q));
  const header = ['key', 'q·k', 'captured', 'scaled', 'mask', 'softmax', 'captured', 'weight × v'];
  const bars = lengths.map((x, i) => el('div', {class: 'bar', title: `head ${i}: ${number(x)}`},
    el('div', {style: `height:${60 * x / Math.max(...lengths)}px`, class: i === h ? 'on' : ''}), i));
  $('steps').replaceChildren(
    step('Token and its embedding row', `(${embedding.length})`,
      say(`${token}, id ${DATA.ids[T]}: what enters layer 0, of length ${number(length(embedding))}.`),
      vector(embedding, 'embedding')),
    step(`Residual stream entering layer ${state.layer}`, `(${stream.length})`,
      say(`Length ${number(length(stream))}; the embedding plus what ${state.layer} layers added.`),
      vector(stream, 'residual')),
    step('Norm', `(${normed.length})`,
      say(`Brought to one size and weighted per dimension: length ${number(length(normed))}.`),
      vector(normed, 'normed')),
    step('Query, key, value', wide, say(group === 1 ? `Head ${h} has its own key and value.`
      : `Query head ${h} reads key and value head ${kv}, as do heads ${kv * group} to ${(kv + 1) * group - 1}.`),
      say('q'), vector(qPre, 'q before RoPE'), say('k'), vector(kPre, 'k before RoPE'), say('v'),
      vector(row('v', l, kv, T), 'v')),
    step('RoPE: position turns pairs of dimensions', `(${q.length})`,
      say(`q before and after; length ${number(length(qPre), 5)} and ${number(length(q), 5)}.`
        + (turned ? '' : ' They are the same: this layer turns nothing by position.')),
      vector(qPre, 'q before'), vector(q, 'q after'),
      say(`k before, and after as attention reads it; length ${number(length(kPre), 5)} and ${number(length(k), 5)}.`),
      vector(kPre, 'k before'), vector(k, 'k after')),
    step('Scores, scale, mask, softmax, weighted values', `${T + 1} keys`,
      say(`softmax(${DATA.softcap ? 'softcap(q·k)' : 'q·k'} × ${number(DATA.scales[l], 6)}`
        + `${DATA.windows[l] ? ', window of ' + DATA.windows[l] + ' tokens' : ''}); recomputed here from q, k and v, `
        + `beside what llama.cpp computed. ${later ? `The ${later} later tokens are masked (−∞).` : ''} Largest difference of a `
        + `weight: ${number(state.difference.weights, 2)}.`),
      el('div', {class: 'rows'}, el('table', {}, el('thead', {}, el('tr', {}, ...header.map(t => el('th', {}, t)))),
        el('tbody', {}, ...rows)))),
    step("The head's output: sum of weighted values", `(${out.length})`,
      say(`Recomputed, then captured; largest difference ${number(state.difference.output, 2)}.`),
      vector(mine.output, 'recomputed', largest(out)), vector(out, 'captured')),
    step('Output projection', `(${out.length}) to (${wrote.length})`,
      say(`What head ${h} adds to the residual stream through its columns of W_O, length ${number(length(wrote))}; `
        + 'below, the lengths of what every head adds.'),
      vector(wrote, 'W_O × output'), el('div', {class: 'lengths'}, ...bars)),
    step('All heads together', `(${added.length})`,
      say(`What attention adds, captured: length ${number(length(added))}. The heads' outputs through the dequantized `
        + `W_O differ from it by ${number(100 * DATA.projection_difference[l], 3)}% (relative, L2): ${DATA.kernels[l]}.`),
      vector(added, 'attn_out')),
    step('Residual stream after attention', `(${stream.length})`,
      say(`Length ${number(length(add(stream, added)))}; what the feed-forward block reads, unless both blocks read what enters the layer.`),
      vector(add(stream, added), 'residual')));
  $('layer').value = state.layer;
  [...$('heads').querySelectorAll('button')].forEach((b, i) => b.classList.toggle('on', i === h));
}
$('layer').replaceChildren(...DATA.layers.map(l => new Option(l, l)));
$('layer').addEventListener('change', () => { state.layer = +$('layer').value; draw(); });
$('heads').append('Head ', ...Array.from({length: DATA.n_head}, (_, i) => {
  const button = el('button', {style: `border-bottom-color:var(--c${Math.floor(i / group) % 7})`, 'data-head': i}, i);
  button.addEventListener('click', () => { state.head = i; draw(); }); return button;
}));
$('groups').textContent = group === 1 ? 'Every head has its own key and value head.'
  : `The colour under a head is the key and value head that it reads: ${DATA.n_kv_head}, each for ${group} heads.`;
onTheme(draw); draw(); state.ready = true;

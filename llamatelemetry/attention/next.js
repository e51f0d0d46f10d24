// Next-token probabilities out of captured logits, sorted, in the order of llama.cpp's default chain:
// top-k, top-p, min-p, temperature.
const LOGITS = Float64Array.from(unpack(DATA.logits)), NAMES = ['temperature', 'top_k', 'top_p', 'min_p'];
const state = window.state = {...DATA.settings};
function softmax(logits) {
  const out = new Float64Array(logits.length); let sum = 0;     // sorted: the first logit is the largest
  for (let i = 0; i < out.length; i++) sum += out[i] = Math.exp(logits[i] - logits[0]);
  return out.map(x => x / sum);
}
const PLAIN = softmax(LOGITS);
// How many of the sorted tokens stay, and their probabilities.
function sample({temperature, top_k, top_p, min_p}) {
  let n = top_k > 0 ? Math.min(top_k, LOGITS.length) : LOGITS.length;
  if (top_p < 1) {
    const p = softmax(LOGITS.subarray(0, n)); let sum = 0;
    for (let i = 0; i < p.length; i++) { sum += p[i]; if (sum >= top_p) { n = i + 1; break; } }
  }
  if (min_p > 0) while (n > 1 && LOGITS[n - 1] < LOGITS[0] + Math.log(min_p)) n--;
  if (temperature <= 0) return softmax(LOGITS.subarray(0, 1));
  return softmax(LOGITS.subarray(0, n).map(x => x / temperature));
}
function draw() {
  for (const name of NAMES) {
    $(name).value = state[name];
    $(name + '-value').textContent = name === 'top_k' ? state[name] || 'off' : state[name].toFixed(2);
  }
  const p = sample(state); let entropy = 0;
  for (const x of p) if (x > 0) entropy -= x * Math.log(x);
  const probabilities = Array.from(p.subarray(0, DATA.shown.length));
  Object.assign(state, {kept: p.length, probabilities, entropy});
  $('result').textContent = `${p.length} of ${LOGITS.length} tokens can be drawn; entropy ${number(entropy, 3)} nats; `
    + `the best, ${DATA.shown[0]}, has ${(100 * p[0]).toFixed(2)}% (${(100 * PLAIN[0]).toFixed(2)}% before sampling).`;
  const widest = Math.max(p[0], PLAIN[0]);
  const header = el('div', {class: 'row note'}, ...['token', 'drawn from (bar), model (mark)', 'drawn', 'model']
    .map(t => el('span', {}, t)));
  $('bars').replaceChildren(header, ...DATA.shown.slice(0, 25).map((token, i) => {
    const value = p[i] || 0, track = el('div', {class: 'track'}, el('div', {style: `width:${98 * value / widest}%`}),
      el('i', {style: `left:${98 * PLAIN[i] / widest}%`}));
    const title = `id ${DATA.ids[i]}, logit ${number(LOGITS[i], 6)}`;
    return el('div', {class: i < p.length ? 'row' : 'row out', title},
      el('span', {class: 'mono'}, token), track, el('span', {}, i < p.length ? (100 * value).toFixed(2) + '%' : 'cut'),
      el('span', {}, (100 * PLAIN[i]).toFixed(2) + '%'));
  }));
}
for (const name of NAMES) $(name).addEventListener('input', () => { state[name] = +$(name).value; draw(); });
const set = settings => { Object.assign(state, settings); draw(); };
$('off').addEventListener('click', () => set({temperature: 1, top_k: 0, top_p: 1, min_p: 0}));
$('default').addEventListener('click', () => set(DATA.settings));
draw(); state.ready = true;

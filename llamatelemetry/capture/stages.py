"""Which graph nodes hold which stage, found from the graph's operations and their sources.

Attention is a softmax whose result multiplies values; queries, keys and values are the sources of the two products
around it. The residual stream is the chain of nodes that every path from the embedding to the logits passes. What a
block adds is what the sums between two of those nodes add. Names only tell the layer, and the stream where per-layer
inputs bypass it.
"""

import struct
from dataclasses import dataclass, field

from .ggml import DTYPES
from .graph import VIEWS, base, between, cone, cut_nodes
from .names import LAYER_OUTPUT, OUTPUT, RECURRENT, STAGES

NORMS = {"RMS_NORM", "NORM", "L2_NORM", "GROUP_NORM"}
# Walking back from a query to its rotation: anything that keeps the shape.
ELEMENTWISE = VIEWS | NORMS | {"SCALE", "MUL", "CONT", "CPY", "CLAMP"}
# The stream passes through these unchanged in meaning: rows picked (all of them here), views, copies.
WHY_NO_SUM = "the stream is not a sum of what the blocks add (several streams, or mixed by learned weights)"
PASSING = VIEWS | {"GET_ROWS", "CONT", "CPY"}


@dataclass
class Tap:
    """Where one stage of one layer is read: after node `index` is computed, as `view` of its bytes.

    view: None for the node as it is, else (offset, ne, nb) with the number of tokens in ne[token_dim].
    """

    index: int
    name: str
    op: str
    shape: tuple  # of one token's values: (width,) or (head, feature); (head,) for scores and attention
    view: tuple | None = None
    token_dim: int = 1
    source: int | None = None  # read this source of the node instead of its result
    grid: int = 0  # 2 for (head, query, key), 1 for (query, key)


@dataclass
class Plan:
    """taps: {stage: {layer: [Tap, ...]}} (several taps add up); layers: facts per layer; n_nodes: of the graph."""

    n_nodes: int
    taps: dict = field(default_factory=dict)
    layers: list = field(default_factory=list)
    why_not: dict = field(default_factory=dict)  # stage -> reason
    output: dict = field(default_factory=dict)  # what happens to the logits: softcap (0: none), bias

    def put(self, stage, layer, *taps):
        if taps and all(tap is not None for tap in taps):
            self.taps.setdefault(stage, {})[layer] = list(taps)


def find_stages(graph, n_tokens, n_layer):
    """A Plan for a recorded Graph of n_tokens tokens."""
    plan = Plan(len(graph.nodes))
    plan.layers = [{"kind": "none", "scale": None, "softcap": 0.0, "sliding": False} for _ in range(n_layer)]
    attention = _attention_nodes(graph, n_layer)
    # llama.cpp makes the full mask before the sliding-window one, so that its tensor struct has the lower address.
    masks = sorted({s.src[1] for s in attention.values() if len(s.src) > 1}, key=lambda mask: mask.address)
    for layer, softmax in attention.items():
        _attention(plan, graph, layer, softmax, n_tokens, masks)
    stream = _stream(graph, n_layer, attention.get(0))
    _ends(plan, graph, stream, n_tokens)
    for layer in range(n_layer):
        _block(plan, graph, layer, stream, attention.get(layer), n_tokens)
    _experts(plan, graph, n_layer, n_tokens)
    return plan


def _attention_nodes(graph, n_layer):
    """{layer: softmax node}: a softmax whose result is multiplied with values."""
    found = {}
    for node in graph.nodes:
        if node.op == "SOFT_MAX" and any(user.op == "MUL_MAT" and user.src[1] is node for user in node.users):
            layer = node.layer if node.layer is not None else len(found)
            if layer < n_layer:
                found.setdefault(layer, node)
    return found


def _attention(plan, graph, layer, softmax, n_tokens, masks):
    scores, cap = softmax.src[0], 0.0
    while scores.op != "MUL_MAT":  # between the product and the softmax: scale, soft-cap, ALiBi bias
        if scores.op == "TANH":
            cap = 1.0 / _float(scores.src[0], 0)
        scores = scores.src[0]
    values = next(user for user in softmax.users if user.op == "MUL_MAT" and user.src[1] is softmax)
    mask = softmax.src[1] if len(softmax.src) > 1 else None
    plan.layers[layer].update(
        kind="attention", scale=_float(softmax, 0), softcap=cap, max_bias=_float(softmax, 1),
        sliding=bool(masks and mask is not None and mask is not masks[0]), sinks=len(softmax.src) > 2,
    )  # fmt: skip
    heads = (softmax.ne[2],)
    plan.put("attention", layer, Tap(softmax.index, softmax.name, softmax.op, heads, grid=2))
    plan.put("scores", layer, Tap(scores.index, scores.name, scores.op, heads, grid=2))
    if mask is not None and mask.type in DTYPES:
        plan.put("mask", layer, Tap(softmax.index, softmax.name, softmax.op, (), source=1, grid=1))

    query = scores.src[1].src[0] if scores.src[1].op == "PERMUTE" else scores.src[1]
    plan.put("q", layer, _view_tap(query, 2))
    plan.put("q_pre", layer, _before_rope(query))
    n_kv, width = scores.src[0].ne[2], scores.src[0].ne[0]
    key = _stored(graph, scores.src[0]) or scores.src[0]
    plan.put("k", layer, _rows_tap(key, n_kv, width, n_tokens))
    plan.put("k_pre", layer, _before_rope(key))
    n_kv_v, width_v = values.src[0].ne[2], values.ne[0]
    value = _stored(graph, values.src[0]) or values.src[0]
    plan.put("v", layer, _rows_tap(value, n_kv_v, width_v, n_tokens))

    result = values
    while result.op != "CONT" and result.users and result.users[0].op in VIEWS | {"CONT", "MUL_MAT"}:
        result = result.users[0]
    if result.op == "CONT":
        n_head = softmax.ne[2]
        plan.put("attn_heads", layer, Tap(result.index, result.name, result.op, (n_head, result.ne[0] // n_head)))


def _float(node, slot):
    return struct.unpack_from("<f", node.params, 4 * slot)[0]


def _view_tap(node, token_dim):
    """A Tap on the bytes of a 3-d view (feature, head, token) of whatever node computed them."""
    source = base(node)
    if source.is_leaf:
        return None
    layout = (node.data - source.data, node.ne[:3], node.nb[:3])
    return Tap(source.index, source.name, source.op, (node.ne[1], node.ne[0]), layout, token_dim)


def _leaf(node):
    while not node.is_leaf and node.op in VIEWS | {"CONT", "SET_ROWS", "CPY"}:
        node = node.src[2] if node.op == "SET_ROWS" else node.src[0]
    return node if node.is_leaf else None


def _stored(graph, read):
    """The node whose rows go into the cache that `read` looks at, or None when there is no cache."""
    cache = _leaf(read)
    if cache is None:
        return None
    for node in graph.nodes:
        if node.op == "SET_ROWS" and _leaf(node.src[2]) is cache:
            return node.src[0]
        if node.op == "CPY" and len(node.src) > 1 and _leaf(node.src[1]) is cache:
            return node.src[0]
    return None


def _rows_tap(node, n_heads, width, n_tokens):
    """Keys or values of all tokens as (token, head, feature), whether stored as rows, elements or not at all."""
    if node.op == "CONT" and node.ne[:2] == (n_tokens, width):  # values transposed where there is no cache
        node = node.src[0]
    while node.op in VIEWS and not (node.ne[2] == n_tokens and node.ne[1] == n_heads and node.ne[0] == width):
        if node.ne[1] == n_tokens and node.ne[0] >= n_heads * width and node.ne[2] == 1:
            break
        node = node.src[0]
    source = base(node)
    if source.is_leaf:
        return None
    if node.ne[2] == n_tokens and node.ne[1] == n_heads and node.ne[0] >= width:
        layout = (node.data - source.data, (width, n_heads, n_tokens), node.nb[:3])
    elif node.ne[1] == n_tokens and node.ne[0] >= n_heads * width:
        layout = (node.data - source.data, (width, n_heads, n_tokens), (node.nb[0], width * node.nb[0], node.nb[1]))
    else:
        return None
    return Tap(source.index, source.name, source.op, (n_heads, width), layout, 2)


def _before_rope(node):
    for _ in range(16):
        if node.is_leaf or node.op not in ELEMENTWISE | {"ROPE"}:
            return None
        if node.op == "ROPE":
            return _view_tap(node.src[0], 2)
        node = node.src[0]
    return None


def _logits(graph):
    named = [node for node in graph.nodes if node.name == OUTPUT]
    return named[-1] if named else graph.nodes[-1]


def _embedding(graph):
    lookups = [n for n in graph.nodes if n.op == "GET_ROWS" and n.src[0].is_weight and n.src[1].is_leaf]
    tokens = [n for n in lookups if n.src[0].name == "token_embd.weight"]
    return (tokens or lookups or graph.nodes)[0]


def _stream(graph, n_layer, attention):
    """The residual stream: {layer: node} that enters layer 0..n_layer-1 and, at n_layer, leaves the last."""
    sink, source = _logits(graph), _embedding(graph)
    path = between(source, sink)
    cuts = cut_nodes(path) if path else []
    first = {}
    for node in path:
        if node.layer is not None and node.layer < n_layer:
            first.setdefault(node.layer, node.index)
    outputs = {n.layer: n for n in graph.nodes if n.name == f"{LAYER_OUTPUT}-{n.layer}"}
    stream = {}
    for layer in range(n_layer):
        before = [node for node in cuts if layer in first and node.index < first[layer]]
        if before:
            stream[layer] = before[-1]
        if layer == 0 and 0 in outputs:  # after embedding norms and the like: the last node that layer 0 adds to
            products = [n.index for n in path if n.layer == 0 and n.op == "MUL_MAT"]
            mixer = attention.index if attention else min(products, default=outputs[0].index)
            adds = [c for c in cuts if c.index < mixer and c.layer in (None, 0) and _terms(outputs[0], c) is not None]
            stream[layer] = adds[-1] if adds else stream.get(layer)
        hidden = not before or layer and before[-1].index < first.get(layer - 1, 0)
        if layer - 1 in outputs and (hidden or outputs[layer - 1] in cuts):
            stream[layer] = outputs[layer - 1]  # by its name where a bypass hides it or several cuts offer themselves
    last = _final_norm_input(graph, sink)
    stream[n_layer] = last if last in cuts else outputs.get(n_layer - 1, last)
    return {layer: node for layer, node in stream.items() if node is not None}


def _final_norm_input(graph, sink):
    node = _before_output(sink)
    steps = 0
    while node is not None and node.op not in NORMS and steps < 8:
        node, steps = (node.src[0] if node.src and not node.src[0].is_leaf else None), steps + 1
    return node.src[0] if node is not None else None


def _before_output(sink):
    """The activations that the output matrix multiplies."""
    node = sink
    while not node.is_leaf and node.op != "MUL_MAT":
        node = node.src[0]
    return None if node.is_leaf else node.src[1]


def _ends(plan, graph, stream, n_tokens):
    sink = _logits(graph)
    final = _before_output(sink)
    node, plan.output = sink, {"softcap": 0.0, "bias": False}
    while not node.is_leaf and node.op != "MUL_MAT":
        if node.op == "TANH":
            plan.output["softcap"] = 1.0 / _float(node.src[0], 0)
        plan.output["bias"] |= node.op == "ADD" and node.src[1].is_leaf
        node = node.src[0]
    plan.put("logits", None, _node_tap(sink, n_tokens))
    if final is not None and not final.is_leaf:
        plan.put("final_norm", None, _node_tap(final, n_tokens))
    for layer, node in stream.items():
        plan.put("hidden", layer, _node_tap(node, n_tokens))


def _node_tap(node, n_tokens):
    """A Tap on a whole node whose outermost dimension is the tokens: several streams are one wide vector per token."""
    source = base(node)
    sizes = [size for size in source.ne if size != 1] or [1]
    if source.is_leaf or n_tokens > 1 and sizes[-1] != n_tokens:
        return None
    return Tap(source.index, source.name, source.op, (source.ne[0] * source.ne[1] * source.ne[2] // n_tokens,))


def _block(plan, graph, layer, stream, softmax, n_tokens):
    """What layer `layer` adds to the stream, what it reads, and its kind when it holds no attention."""
    start, end = stream.get(layer), stream.get(layer + 1)
    if start is None or end is None or start is end:
        return
    facts = plan.layers[layer]
    recurrent = {node for node in cone(end, {start}) if _is_recurrent(node)}
    mixers = recurrent | ({softmax} if softmax else set())
    if recurrent:
        facts["kind"] = "attention+recurrent" if softmax else "recurrent"
    terms = _terms(end, start)
    facts["sum"] = terms is not None
    if terms is None:
        named = [node for node in cone(end, {start}) if node.name == f"{LAYER_OUTPUT}-{layer}" and node.op == "ADD"]
        terms = _local_terms(named[0] if named else end, mixers, layer)
    if terms is None:
        plan.why_not.setdefault("attn_out", WHY_NO_SUM)
        plan.why_not.setdefault("ffn_out", WHY_NO_SUM)
        return
    additions, sums = terms
    stops = sums | {start}
    mixing = [node for node in additions if cone(node, stops - {node}) & mixers]
    rest = [node for node in additions if node not in mixing]
    if recurrent == set() and softmax is None and mixing == [] and rest:
        facts["kind"] = "ffn"
    plan.put("attn_out", layer, *(_node_tap(node, n_tokens) for node in mixing))
    plan.put("ffn_out", layer, *(_node_tap(node, n_tokens) for node in rest))
    for stage, nodes in (("attn_norm", mixing), ("ffn_norm", rest)):
        entry = _entry(nodes, stops)
        if entry is not None:
            plan.put(stage, layer, _node_tap(entry, n_tokens))
    if len(rest) == 1 and not _expert_products(rest, stops):
        down = _last_product(rest[0], stops)
        if down is not None and down.src[0].is_weight:
            plan.put("ffn_act", layer, _node_tap(down.src[1], n_tokens))


def _is_recurrent(node):
    """Whether a node mixes positions through a state: a scan, or anything that reads a recurrent state's memory."""
    return node.op in RECURRENT or any(s.is_leaf and s.name.startswith(("cache_r", "cache_s")) for s in node.src)


def _terms(end, start):
    """(nodes added to the stream between two of its nodes, the sums on the way), or None where it is no sum."""
    carries = {}  # node -> whether it is start plus additions

    def carry(node):
        if node is start:
            return True
        if node not in carries:
            carries[node] = False
            if node.op == "ADD":
                carries[node] = any(not s.is_leaf and carry(s) for s in node.src[:2])
            elif node.op in PASSING:
                carries[node] = not node.src[0].is_leaf and carry(node.src[0])
        return carries[node]

    if not carry(end):
        return None
    additions, sums = [], set()
    node = end
    while node is not start:
        sums.add(node)
        if node.op == "ADD":
            kept, added = node.src[:2] if carry(node.src[0]) else node.src[1::-1]
            if added.is_leaf:
                return None  # a constant joins the stream
            additions.append(added)
            node = kept
        else:
            node = node.src[0]
    return _split_sums(additions), sums


def _local_terms(end, mixers, layer):
    """The same without knowing where the stream came from: of two summands, the one that the other was computed from
    is the stream. Norms and scales that the stream passes on the way are passed too, so that what is found need not
    add up; a stream that begins anew in the block begins with its first addition."""
    additions, sums, node = [], set(), end
    while True:
        node = _passed(node, sums)
        if node.op == "DSV4_HC_POST":  # several streams, to which the block's output is dealt out
            added, kept = node.src[0], node.src[1]
        elif node.op == "ADD":
            left, right = node.src[:2]
            if _passed(left, set()) in cone(right, set()):
                added, kept = right, left
            elif _passed(right, set()) in cone(left, set()):
                added, kept = left, right
            else:
                return None
        elif additions and cone(node, sums - {node}) & mixers:
            return _split_sums([*additions, node]), sums
        else:
            return (_split_sums(additions), sums) if additions else None
        sums.add(node)
        additions.append(added)
        below = _passed(kept, set())
        if cone(added, sums | {below}) & mixers or below.is_leaf or below.layer not in (None, layer):
            sums.add(below)
            return _split_sums(additions), sums
        node = kept


def _passed(node, seen):
    """Back through norms, gains and scales of the stream to the sum they normalize."""
    while not node.is_leaf:
        factor = node.op in ("MUL", "ADD") and base(node.src[1]).is_leaf
        if node.op not in PASSING | NORMS | {"SCALE"} and not factor or node.src[0].is_leaf:
            break
        seen.add(node)
        node = node.src[0]
    return node


def _split_sums(nodes):
    """A parallel block adds attention and FFN to each other first: take such a sum apart."""
    parts = []
    for node in nodes:
        inner = base(node)
        while inner.op == "GET_ROWS":
            inner = base(inner.src[0])
        if inner.op == "ADD" and not any(base(source).is_leaf for source in inner.src[:2]):
            cones = [cone(source, set()) for source in inner.src[:2]]
            mixes = [any(n.op == "SOFT_MAX" or _is_recurrent(n) for n in c - o) for c, o in (cones, cones[::-1])]
            if any(mixes) and not all(mixes):
                parts.extend(inner.src[:2])
                continue
        parts.append(node)
    return parts


def _entry(nodes, stops):
    """The normalized input of a block: what its first weight matrices multiply."""
    best = None
    for node in nodes:
        for inner in cone(node, stops):
            if inner.op in ("MUL_MAT", "MUL_MAT_ID") and inner.src[0].is_weight:
                given = inner.src[1]
                if any(p.op in ("MUL_MAT", "MUL_MAT_ID") for p in cone(given, stops)):
                    continue
                source = base(given)
                if source not in stops and not source.is_leaf and (best is None or source.index < best.index):
                    best = source
    return best


def _expert_products(nodes, stops):
    return [inner for node in nodes for inner in cone(node, stops) if inner.op == "MUL_MAT_ID"]


def _last_product(node, stops):
    products = [inner for inner in cone(node, stops) if inner.op == "MUL_MAT" and not inner.src[1].is_leaf]
    return max(products, key=lambda inner: inner.index, default=None)


def _experts(plan, graph, n_layer, n_tokens):
    """Router probabilities, chosen experts and their weights, from the products that pick matrices by index."""
    for node in graph.nodes:
        layer = node.layer
        if node.op != "MUL_MAT_ID" or layer is None or layer >= n_layer or layer in plan.taps.get("experts", {}):
            continue
        chosen = node.src[2]
        source = base(chosen)
        if source.is_leaf:
            continue
        ids = (chosen.data - source.data, chosen.ne[:2], chosen.nb[:2])
        plan.put("experts", layer, Tap(source.index, source.name, source.op, (chosen.ne[0],), ids))
        router = source.src[0] if source.src else None
        while router is not None and not router.is_leaf and router.op not in ("SOFT_MAX", "SIGMOID", "SQRT_SOFTPLUS"):
            if router.op == "MUL_MAT":
                break
            router = router.src[0] if router.src else None
        if router is not None and not router.is_leaf:
            plan.layers[layer]["router"] = {"SOFT_MAX": "softmax", "SIGMOID": "sigmoid"}.get(router.op, "logits")
            plan.put("router", layer, _node_tap(router, n_tokens))
    for node in graph.nodes:
        layer = node.layer
        if node.op == "MUL" and node.name.startswith("ffn_moe_weighted") and layer is not None:
            weights = base(node.src[1])
            if not weights.is_leaf:
                slots = node.src[1].ne[1]
                plan.put("expert_weights", layer, Tap(weights.index, weights.name, weights.op, (slots,)))


def missing(plan, stage, n_layer):
    """Layers for which a stage was not found."""
    layers = range(n_layer + 1) if stage == "hidden" else range(n_layer) if STAGES[stage].per_layer else [None]
    return [layer for layer in layers if layer not in plan.taps.get(stage, {})]

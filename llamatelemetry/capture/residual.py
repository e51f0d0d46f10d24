"""The residual stream and what each block adds to it, found from the paths of llama.cpp's graph.

The stream is the chain of nodes that every path from the embedding to the logits passes; what a
block adds is what the sums between two of those nodes add. Where the stream is no plain sum
(normalized between blocks, several strands), of two summands the one that the other was computed
from is the stream."""

from .ends import final_norm_input, find_embedding, find_sink
from .graph import NORMS, VIEWS, base, between, cone, cut_nodes
from .plan import node_tap

# The stream passes through these unchanged in meaning: rows picked (all of them here), views,
# copies.
PASSING = VIEWS | {"GET_ROWS", "CONT", "CPY"}
# What leaves a layer has this name wherever the graph has bypasses (per-layer embeddings, several
# streams) that hide it from the paths.
LAYER_OUTPUT = "l_out"
# Operations that mix positions other than by softmax attention: convolutions over time, state-space
# scans, linear attention. A layer whose block holds one of these and no softmax is recurrent.
RECURRENT = set(
    "SSM_CONV SSM_SCAN RWKV_WKV6 RWKV_WKV7 GATED_LINEAR_ATTN GATED_DELTA_NET SOLVE_TRI CUMSUM".split()
)
PRODUCTS = {"MUL_MAT", "MUL_MAT_ID"}
WHY_NO_SUM = (
    "the stream is not a sum of what the blocks add (several streams, or mixed by learned weights)"
)


def find_stream(graph, n_layer, attention):
    """The residual stream: {layer: node} that enters layer 0..n_layer-1 and, at n_layer, leaves the
    last."""
    sink, source = find_sink(graph), find_embedding(graph)
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
        if layer == 0 and 0 in outputs:
            # After embedding norms and the like: the last node that layer 0 adds to.
            products = [n.index for n in path if n.layer == 0 and n.op == "MUL_MAT"]
            mixer = attention.index if attention else min(products, default=outputs[0].index)
            adds = [
                c
                for c in cuts
                if c.index < mixer and c.layer in (None, 0) and _terms(outputs[0], c) is not None
            ]
            stream[layer] = adds[-1] if adds else stream.get(layer)
        hidden = not before or layer and before[-1].index < first.get(layer - 1, 0)
        # By its name where a bypass hides it or several cuts offer themselves.
        if layer - 1 in outputs and (hidden or outputs[layer - 1] in cuts):
            stream[layer] = outputs[layer - 1]
    last = final_norm_input(sink)
    stream[n_layer] = last if last in cuts else outputs.get(n_layer - 1, last)
    return {layer: node for layer, node in stream.items() if node is not None}


def find_block(plan, graph, layer, stream, softmax, n_tokens):
    """What layer `layer` adds to the stream, what it reads, and its kind when it holds no
    attention."""
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
        name = f"{LAYER_OUTPUT}-{layer}"
        named = [node for node in cone(end, {start}) if node.name == name and node.op == "ADD"]
        terms = _local_terms(named[0] if named else end, mixers, layer)
    if terms is None:
        plan.why_not |= {"attn_out": WHY_NO_SUM, "ffn_out": WHY_NO_SUM}
        return
    additions, sums = terms
    stops = sums | {start}
    mixing = [node for node in additions if cone(node, stops - {node}) & mixers]
    rest = [node for node in additions if node not in mixing]
    if rest and not (recurrent or softmax or mixing):
        facts["kind"] = "ffn"
    plan.put("attn_out", layer, *(node_tap(node, n_tokens) for node in mixing))
    plan.put("ffn_out", layer, *(node_tap(node, n_tokens) for node in rest))
    for stage, nodes in (("attn_norm", mixing), ("ffn_norm", rest)):
        entry = _entry(nodes, stops)
        if entry is not None:
            plan.put(stage, layer, node_tap(entry, n_tokens))
    products = [node for node in cone(rest[0], stops) if node.op in PRODUCTS] if rest else []
    if len(rest) == 1 and all(node.op == "MUL_MAT" for node in products):
        products = [node for node in products if not node.src[1].is_leaf]
        down = max(products, key=lambda node: node.index, default=None)
        if down is not None and down.src[0].is_weight:
            plan.put("ffn_act", layer, node_tap(down.src[1], n_tokens))


def _is_recurrent(node):
    """Whether a node mixes positions through a state: a scan, or anything that reads a recurrent
    state's memory."""
    return node.op in RECURRENT or any(
        s.is_leaf and s.name.startswith(("cache_r", "cache_s")) for s in node.src
    )


def _terms(end, start):
    """(nodes added to the stream between two of its nodes, the sums on the way), or None where it
    is no sum."""
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
    """The same without knowing where the stream came from: of two summands, the one that the other
    was computed from is the stream. Norms and scales that the stream passes on the way are passed
    too, so that what is found need not add up; a stream that begins anew in the block begins with
    its first addition."""
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
        mixed = cone(added, sums | {below}) & mixers
        if mixed or below.is_leaf or below.layer not in (None, layer):
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
            one, other = (cone(source, set()) for source in inner.src[:2])
            mixes = [
                any(step.op == "SOFT_MAX" or _is_recurrent(step) for step in own)
                for own in (one - other, other - one)
            ]
            if any(mixes) and not all(mixes):
                parts.extend(inner.src[:2])
                continue
        parts.append(node)
    return parts


def _entry(nodes, stops):
    """The normalized input of a block: what its first weight matrices multiply."""
    found = []
    for inner in {inner for node in nodes for inner in cone(node, stops)}:
        if inner.op in PRODUCTS and inner.src[0].is_weight:
            given = inner.src[1]
            source = base(given)
            first = all(before.op not in PRODUCTS for before in cone(given, stops))
            if first and source not in stops and not source.is_leaf:
                found.append(source)
    return min(found, key=lambda node: node.index, default=None)

"""Which graph nodes hold which stage, found from the graph's operations and their sources.

Attention is a softmax whose result multiplies values; queries, keys and values are the sources of
the two products around it. `residual` finds the stream and the blocks. Names only tell the layer,
and the stream where per-layer inputs bypass it."""

from .ends import find_ends
from .ggml import DTYPES, TYPE_BY_NAME
from .graph import NORMS, VIEWS, base
from .plan import Plan, Tap, float_param, node_tap, view_tap
from .residual import find_block, find_stream

# Walking back from a query to its rotation: anything that keeps the shape.
ELEMENTWISE = VIEWS | NORMS | {"SCALE", "MUL", "CONT", "CPY", "CLAMP"}
NAMES = {number: name for name, number in TYPE_BY_NAME.items()}
# What a router's values are, by the operation that makes them.
ROUTERS = {
    "SOFT_MAX": "softmax",
    "SIGMOID": "sigmoid",
    "SQRT_SOFTPLUS": "logits",
    "MUL_MAT": "logits",
}


def find_stages(graph, n_tokens, n_layer):
    """A Plan for a recorded Graph of n_tokens tokens."""
    plan = Plan(len(graph.nodes), n_layer)
    plan.layers = [
        {"kind": "none", "scale": None, "softcap": 0.0, "sliding": False} for _ in range(n_layer)
    ]
    attention = _attention_nodes(graph, n_layer)
    for layer, softmax in attention.items():
        _attention(plan, graph, layer, softmax, n_tokens)
    stream = find_stream(graph, n_layer, attention.get(0))
    find_ends(plan, graph, stream, n_tokens)
    for layer in range(n_layer):
        find_block(plan, graph, layer, stream, attention.get(layer), n_tokens)
    _experts(plan, graph, n_layer, n_tokens)
    return plan


def _attention_nodes(graph, n_layer):
    """{layer: softmax node}: a softmax whose result is multiplied with values."""
    found = {}
    for node in graph.nodes:
        if node.op == "SOFT_MAX" and any(
            user.op == "MUL_MAT" and user.src[1] is node for user in node.users
        ):
            layer = node.layer if node.layer is not None else len(found)
            if layer < n_layer:
                found.setdefault(layer, node)
    return found


def _attention(plan, graph, layer, softmax, n_tokens):
    scores, cap, before_cap = softmax.src[0], 0.0, 1.0
    while scores.op != "MUL_MAT":  # from the product to the softmax: scale, soft-cap, ALiBi bias
        if scores.op == "SCALE" and scores.src[0].op == "TANH":
            cap = float_param(scores, 0)  # cap * tanh(before_cap * scores / cap)
            before_cap = float_param(scores.src[0].src[0], 0) * cap
        scores = scores.src[0]
    values = next(user for user in softmax.users if user.op == "MUL_MAT" and user.src[1] is softmax)
    mask = softmax.src[1] if len(softmax.src) > 1 else None
    plan.layers[layer] |= {
        "kind": "attention",
        "scale": float_param(softmax, 0),
        "softcap": cap,
        "before_cap": before_cap,
        "max_bias": float_param(softmax, 1),
        "sinks": len(softmax.src) > 2,
    }
    n_head = softmax.ne[2]
    plan.put("attention", layer, Tap.of(softmax, (n_head,), grid=2))
    plan.put("attention_mean", layer, Tap.of(softmax, (), grid=2))
    plan.put("scores", layer, Tap.of(scores, (n_head,), grid=2))
    # As `scores`, but scaled, capped or biased where the graph does that in nodes of its own.
    taken = Tap.of(softmax, (n_head,), source=0, grid=2, after=base(softmax.src[0]).index)
    seen = mask is not None and Tap.of(softmax, (), source=1, grid=1)
    plan.edges[layer] = (taken, seen)
    if mask is not None and mask.type in DTYPES:
        plan.masks.setdefault(mask.address, []).append(layer)
        plan.put("mask", layer, Tap.of(softmax, (), source=1, grid=1))

    query = scores.src[1].src[0] if scores.src[1].op == "PERMUTE" else scores.src[1]
    query, turned = _unturned(query)
    plan.layers[layer] |= {"key_type": NAMES.get(scores.src[0].type, "other"), "key_turn": turned}
    plan.put("q", layer, view_tap(query, 2))
    plan.put("q_pre", layer, _before_rope(query))
    key = _unturned(_stored(graph, scores.src[0]) or scores.src[0])[0]
    plan.put("k", layer, _rows_tap(key, scores.src[0].ne[2], scores.src[0].ne[0], n_tokens))
    plan.put("k_pre", layer, _before_rope(key))
    value = _stored(graph, values.src[0]) or values.src[0]
    plan.put("v", layer, _rows_tap(value, values.src[0].ne[2], values.ne[0], n_tokens))

    result, ops = values, VIEWS | {"CONT", "MUL_MAT"}
    while result.op != "CONT" and result.users and result.users[0].op in ops:
        result = result.users[0]
    if result.op == "CONT":
        plan.put("attn_heads", layer, Tap.of(result, (n_head, result.ne[0] // n_head)))


def _unturned(node):
    """What a query or key was before llama.cpp turned it for a quantized cache, and how many
    features are turned together (0: none): a product with its Hadamard matrix, an input."""
    product = base(node)
    if product.op != "MUL_MAT" or not product.src[0].name.startswith("attn_inp_k_rot"):
        return node, 0
    plain = product.src[1]
    return plain.src[0] if plain.op in VIEWS | {"CONT"} else plain, product.src[0].ne[0]


def _leaf(node):
    while not node.is_leaf and node.op in VIEWS | {"CONT", "SET_ROWS", "CPY"}:
        node = node.src[2] if node.op == "SET_ROWS" else node.src[0]
    return node if node.is_leaf else None


def _stored(graph, read):
    """The node whose rows go into the cache that `read` looks at, or None when there is no
    cache."""
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
    """Keys or values of all tokens as (token, head, feature), whether stored as rows, elements or
    not at all."""
    if node.op == "CONT" and node.ne[:2] == (n_tokens, width):
        node = node.src[0]  # values, transposed where there is no cache
    wide = n_heads * width

    def flat(node):
        return node.ne[1] == n_tokens and node.ne[0] >= wide

    while node.op in VIEWS and node.ne[:3] != (width, n_heads, n_tokens):
        if flat(node) and node.ne[2] == 1:
            break
        node = node.src[0]
    source = base(node)
    if node.ne[1:3] == (n_heads, n_tokens) and node.ne[0] >= width:
        strides = node.nb[:3]
    elif flat(node):
        strides = (node.nb[0], width * node.nb[0], node.nb[1])
    else:
        return None
    if source.is_leaf:
        return None
    layout = (node.data - source.data, (width, n_heads, n_tokens), strides)
    return Tap.of(source, (n_heads, width), layout, 2)


def _before_rope(node):
    for _ in range(16):
        if node.is_leaf or node.op not in ELEMENTWISE | {"ROPE"}:
            return None
        if node.op == "ROPE":
            return view_tap(node.src[0], 2)
        node = node.src[0]
    return None


def _experts(plan, graph, n_layer, n_tokens):
    """Router probabilities, chosen experts and their weights, from the products that pick matrices
    by index."""
    for node in graph.nodes:
        layer = node.layer
        if layer is None or layer >= n_layer:
            continue
        if node.op == "MUL_MAT_ID" and layer not in plan.of("experts"):
            chosen = node.src[2]
            source = base(chosen)
            if source.is_leaf:
                continue
            ids = (chosen.data - source.data, chosen.ne[:2], chosen.nb[:2])
            plan.put("experts", layer, Tap.of(source, (chosen.ne[0],), ids))
            router = source.src[0] if source.src else None
            while router is not None and not router.is_leaf and router.op not in ROUTERS:
                router = router.src[0] if router.src else None
            if router is not None and not router.is_leaf:
                plan.layers[layer]["router"] = ROUTERS[router.op]
                plan.put("router", layer, node_tap(router, n_tokens))
        elif node.op == "MUL" and node.name.startswith("ffn_moe_weighted"):
            weights = base(node.src[1])
            if not weights.is_leaf:
                plan.put("expert_weights", layer, Tap.of(weights, (node.src[1].ne[1],)))

"""Which graph nodes hold which stage, found from the graph's operations and their sources.

Attention is a softmax whose result multiplies values; queries, keys and values are the sources of
the two products around it. `residual` finds the stream and the blocks. Names only tell the layer,
and the stream where per-layer inputs bypass it."""

from .ggml import DTYPES
from .graph import NORMS, VIEWS, base
from .plan import Plan, Tap, float_param, node_tap, view_tap
from .residual import find_block, find_ends, find_stream

# Walking back from a query to its rotation: anything that keeps the shape.
ELEMENTWISE = VIEWS | NORMS | {"SCALE", "MUL", "CONT", "CPY", "CLAMP"}


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
    while (
        scores.op != "MUL_MAT"
    ):  # between the product and the softmax: scale, soft-cap, ALiBi bias
        if (
            scores.op == "SCALE" and scores.src[0].op == "TANH"
        ):  # cap * tanh(before_cap * scores / cap)
            cap = float_param(scores, 0)
            before_cap = float_param(scores.src[0].src[0], 0) * cap
        scores = scores.src[0]
    values = next(user for user in softmax.users if user.op == "MUL_MAT" and user.src[1] is softmax)
    mask = softmax.src[1] if len(softmax.src) > 1 else None
    plan.layers[layer].update(
        kind="attention",
        scale=float_param(softmax, 0),
        softcap=cap,
        before_cap=before_cap,
        max_bias=float_param(softmax, 1),
        sinks=len(softmax.src) > 2,
    )
    heads = (softmax.ne[2],)
    plan.put("attention", layer, Tap(softmax.index, softmax.name, softmax.op, heads, grid=2))
    plan.put("scores", layer, Tap(scores.index, scores.name, scores.op, heads, grid=2))
    if mask is not None and mask.type in DTYPES:
        plan.masks.setdefault(mask.address, []).append(layer)
        plan.put("mask", layer, Tap(softmax.index, softmax.name, softmax.op, (), source=1, grid=1))

    query = scores.src[1].src[0] if scores.src[1].op == "PERMUTE" else scores.src[1]
    plan.put("q", layer, view_tap(query, 2))
    plan.put("q_pre", layer, _before_rope(query))
    n_kv, width = scores.src[0].ne[2], scores.src[0].ne[0]
    key = _stored(graph, scores.src[0]) or scores.src[0]
    plan.put("k", layer, _rows_tap(key, n_kv, width, n_tokens))
    plan.put("k_pre", layer, _before_rope(key))
    n_kv_v, width_v = values.src[0].ne[2], values.ne[0]
    value = _stored(graph, values.src[0]) or values.src[0]
    plan.put("v", layer, _rows_tap(value, n_kv_v, width_v, n_tokens))

    result = values
    while (
        result.op != "CONT" and result.users and result.users[0].op in VIEWS | {"CONT", "MUL_MAT"}
    ):
        result = result.users[0]
    if result.op == "CONT":
        n_head = softmax.ne[2]
        plan.put(
            "attn_heads",
            layer,
            Tap(result.index, result.name, result.op, (n_head, result.ne[0] // n_head)),
        )


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
    if node.op == "CONT" and node.ne[:2] == (
        n_tokens,
        width,
    ):  # values transposed where there is no cache
        node = node.src[0]
    while node.op in VIEWS and not (
        node.ne[2] == n_tokens and node.ne[1] == n_heads and node.ne[0] == width
    ):
        if node.ne[1] == n_tokens and node.ne[0] >= n_heads * width and node.ne[2] == 1:
            break
        node = node.src[0]
    source = base(node)
    if source.is_leaf:
        return None
    if node.ne[2] == n_tokens and node.ne[1] == n_heads and node.ne[0] >= width:
        layout = (node.data - source.data, (width, n_heads, n_tokens), node.nb[:3])
    elif node.ne[1] == n_tokens and node.ne[0] >= n_heads * width:
        layout = (
            node.data - source.data,
            (width, n_heads, n_tokens),
            (node.nb[0], width * node.nb[0], node.nb[1]),
        )
    else:
        return None
    return Tap(source.index, source.name, source.op, (n_heads, width), layout, 2)


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
        if (
            node.op != "MUL_MAT_ID"
            or layer is None
            or layer >= n_layer
            or layer in plan.taps.get("experts", {})
        ):
            continue
        chosen = node.src[2]
        source = base(chosen)
        if source.is_leaf:
            continue
        ids = (chosen.data - source.data, chosen.ne[:2], chosen.nb[:2])
        plan.put("experts", layer, Tap(source.index, source.name, source.op, (chosen.ne[0],), ids))
        router = source.src[0] if source.src else None
        while (
            router is not None
            and not router.is_leaf
            and router.op not in ("SOFT_MAX", "SIGMOID", "SQRT_SOFTPLUS")
        ):
            if router.op == "MUL_MAT":
                break
            router = router.src[0] if router.src else None
        if router is not None and not router.is_leaf:
            plan.layers[layer]["router"] = {"SOFT_MAX": "softmax", "SIGMOID": "sigmoid"}.get(
                router.op, "logits"
            )
            plan.put("router", layer, node_tap(router, n_tokens))
    for node in graph.nodes:
        layer = node.layer
        if node.op == "MUL" and node.name.startswith("ffn_moe_weighted") and layer is not None:
            weights = base(node.src[1])
            if not weights.is_leaf:
                slots = node.src[1].ne[1]
                plan.put(
                    "expert_weights", layer, Tap(weights.index, weights.name, weights.op, (slots,))
                )

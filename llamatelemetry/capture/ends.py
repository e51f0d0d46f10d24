"""Where the residual stream begins and ends in llama.cpp's graph: embedding, final norm, logits."""

from .graph import NORMS
from .plan import float_param, node_tap

# Names that the graph cannot do without: of the final norm, an encoder's states and the logits; of
# the matrices that make logits.
NORMED, STATES, OUTPUT = "result_norm", "result_embd", "result_output"
OUTPUT_MATRICES = ("output.weight", "token_embd.weight")
WHY_NO_LOGITS = "its graph computes none, as an encoder's does not"


def _named(graph, *names):
    """The last node of one of these names, or None."""
    return next((node for node in reversed(graph.nodes) if node.name in names), None)


def find_logits(graph):
    """The node that holds the logits: by its name, or the last one where the output matrix made it
    (PLaMo 3 leaves it unnamed). None for an encoder's graph, which ends in states."""
    node = named = _named(graph, OUTPUT)
    if named is None and graph.nodes[-1].name not in (NORMED, STATES):
        node = _product(graph.nodes[-1])
        node = graph.nodes[-1] if node is not None and node.src[0].name in OUTPUT_MATRICES else None
    return node


def _product(node):
    """The matrix product that a node was computed from, back through scales, biases and soft-caps;
    None without one."""
    while not node.is_leaf and node.op != "MUL_MAT":
        node = node.src[0]
    return None if node.is_leaf else node


def find_sink(graph):
    """Where the stream ends: in the logits, or in an encoder's last states."""
    return find_logits(graph) or _named(graph, NORMED, STATES) or graph.nodes[-1]


def find_embedding(graph):
    """Where the stream begins: the lookup of the tokens' rows."""
    lookups = [
        n for n in graph.nodes if n.op == "GET_ROWS" and n.src[0].is_weight and n.src[1].is_leaf
    ]
    tokens = [n for n in lookups if n.src[0].name == "token_embd.weight"]
    return (tokens or lookups or graph.nodes)[0]


def final_norm_input(sink):
    """The last state of the stream: what the final norm reads."""
    if sink.name == STATES:  # an encoder whose layers end in a norm: nothing follows the stream
        return sink
    node = sink if sink.name == NORMED else _before_output(sink)
    for _ in range(8):
        if node is None or node.op in NORMS:
            break
        node = node.src[0] if node.src and not node.src[0].is_leaf else None
    return node.src[0] if node is not None else None


def _before_output(sink):
    """The activations that the output matrix multiplies."""
    product = _product(sink)
    return None if product is None else product.src[1]


def find_ends(plan, graph, stream, n_tokens):
    """The stages without layers, what happens to the logits, and the states of the stream."""
    node, plan.output = find_logits(graph), {"softcap": 0.0, "bias": False}
    final = _named(graph, NORMED, STATES) if node is None else _before_output(node)
    if node is None:
        plan.why_not["logits"] = WHY_NO_LOGITS
    else:
        plan.put("logits", None, node_tap(node, n_tokens))
    while node is not None and not node.is_leaf and node.op != "MUL_MAT":
        if node.op == "TANH":
            plan.output["softcap"] = 1.0 / float_param(node.src[0], 0)
        plan.output["bias"] |= node.op == "ADD" and node.src[1].is_leaf
        node = node.src[0]
    if final is not None and not final.is_leaf:
        plan.put("final_norm", None, node_tap(final, n_tokens))
    for layer, node in stream.items():
        plan.put("hidden", layer, node_tap(node, n_tokens))

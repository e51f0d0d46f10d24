"""llama.cpp's compute graph as the evaluation callback sees it: nodes, their sources, and the paths
between them."""

import re

from .ggml import FLAG_INPUT, MAX_SRC, Tensor

VIEWS = {"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"}
NORMS = {"RMS_NORM", "NORM", "L2_NORM", "GROUP_NORM"}
_LAYER = re.compile(r"-(\d+)(?: \(.*\))*$")
_COPY = re.compile(r"^[^#]+#(.*)#\d+$")


class Node:
    """One tensor of the graph. index: its position in the order of evaluation, -1 for leaves
    (weights, inputs)."""

    __slots__ = tuple("index address op name ne nb type params flags src data users".split())

    def __init__(self, index, address, op, name, tensor):
        self.index, self.address, self.op, self.name = index, address, op, name
        self.ne, self.nb, self.type = tuple(tensor.ne), tuple(tensor.nb), tensor.type
        self.params, self.flags, self.data = bytes(tensor.op_params), tensor.flags, tensor.data
        self.src, self.users = [], []

    @property
    def layer(self):
        """The layer that llama.cpp wrote into the name, or None."""
        found = _LAYER.search(self.name)
        return int(found[1]) if found else None

    @property
    def is_leaf(self):
        return self.index < 0

    @property
    def is_weight(self):
        return self.is_leaf and not self.flags & FLAG_INPUT and not self.name.startswith("cache_")

    def __repr__(self):
        return f"{self.index}:{self.op} {self.name!r} {self.ne}"


class Graph:
    """The nodes of one evaluation, in order. Built by `add` for every node that the callback is
    asked about."""

    def __init__(self, ggml):
        self._ggml = ggml
        self.nodes = []
        self._by_address, self._by_name = {}, {}

    def add(self, address):
        tensor = Tensor.from_address(address)
        node = Node(
            len(self.nodes), address, self._ggml.op_desc(address).decode(), _name(tensor), tensor
        )
        for slot in range(MAX_SRC):
            source = tensor.src[slot]
            if source:
                node.src.append(self._resolve(source))
                node.src[-1].users.append(node)
        if node.op == "ADD" and _adapter(node.src[1]):
            _fold(node)
        self.nodes.append(node)
        self._by_address[address] = self._by_name[node.name] = node

    def _resolve(self, address):
        found = self._by_address.get(address)
        if found is None:
            tensor = Tensor.from_address(address)
            name = _name(tensor)
            # Between two devices the scheduler puts copies named "CUDA0#name#0": the copy stands
            # for the original.
            copy = _COPY.match(name)
            found = self._by_name.get(copy[1]) if copy else None
            if found is None:
                found = Node(-1, address, "NONE", copy[1] if copy else name, tensor)
            self._by_address[address] = found
        return found


def _adapter(node):
    """Whether a summand is what an adapter adds to a product, scale * B (A x), or to a row of the
    embedding."""
    return (
        node.op == "SCALE"
        and node.src[0].op.startswith("MUL_MAT")
        and node.src[0].src[0].name.endswith(".lora_b")
    )


def _fold(node):
    """Let the sum W x + scale * B (A x) be the product that it is without an adapter, so that every
    stage is where it is without one; what it is made of leads nowhere any more."""
    plain, scaled = node.src[:2]
    op, sources = plain.op, plain.src
    for part in (plain, scaled, scaled.src[0], scaled.src[0].src[1]):
        for source in part.src:
            source.users = [user for user in source.users if user is not part]
        part.op = "ADAPTER"
    node.op, node.src = op, sources
    for source in sources:
        source.users.append(node)


def _name(tensor):
    return tensor.name.decode("utf-8", "replace")


def base(node):
    """The node that computed what `node` is a view of."""
    while node.op in VIEWS and node.src:
        node = node.src[0]
    return node


def cone(node, stop):
    """Every node that `node` is computed from, itself included, not going past `stop` (a set of
    nodes)."""
    seen, pending = set(), [node]
    while pending:
        current = pending.pop()
        if current in seen or current in stop:
            continue
        seen.add(current)
        pending.extend(source for source in current.src if not source.is_leaf)
    return seen


def between(source, sink):
    """Nodes on any path from source to sink, in order of evaluation."""
    reached = {source}
    for node in _after(source):
        if any(parent in reached for parent in node.src):
            reached.add(node)
    kept = cone(sink, set())
    return sorted(reached & kept, key=lambda node: node.index)


def _after(source):
    seen, pending = set(), list(source.users)
    while pending:
        node = pending.pop()
        if node not in seen:
            seen.add(node)
            pending.extend(node.users)
    return sorted(seen, key=lambda node: node.index)


def cut_nodes(path):
    """The nodes of a path set that every path passes: no edge jumps over them. The residual stream
    is made of these."""
    position = {node: number for number, node in enumerate(path)}
    furthest, cuts = 0, []
    for number, node in enumerate(path):
        if furthest <= number:
            cuts.append(node)
        for user in node.users:
            furthest = max(furthest, position.get(user, 0))
    return cuts

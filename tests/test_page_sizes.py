"""Every kind of page of a text of 2,000 tokens and a model of 32 x 32 heads holds what its
max_bytes says, by choosing and by saying so. Arrays by hand: no model runs."""

import json
import re

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from llamatelemetry.attention import page as attention_page
from llamatelemetry.graphs import Graph
from llamatelemetry.heads import page as heads_page
from llamatelemetry.layers import page as layers_page

N_TOKEN, N_LAYER, N_HEAD, N_KV, WIDTH, N_EMBD, N_VOCAB = 2000, 32, 32, 8, 128, 4096, 128_256
N_QUERY = 16  # rows of all heads that attention.long captures of so long a text: few
PIECES = [f" wörd{i % 700}" for i in range(N_TOKEN)]
LIMIT = 5_000_000  # of a whole page, with its script
LAYERS = ("layer", "token", "embd")


def same(*shape, value=0.5):
    """An array of one value that takes no memory."""
    return np.broadcast_to(np.float32(value), shape)


def size(page, limit=LIMIT):
    size = len(page.html.encode())
    assert size < limit, f"{size:,} bytes"
    return json.loads(re.search(r"id='data'>(.*?)</script>", page.html, re.S)[1])


def maps(n_query=N_QUERY):
    dims = ("layer", "head", "query", "key")
    values = same(N_LAYER, N_HEAD, n_query, N_TOKEN, value=1 / N_TOKEN)
    where = {"query_position": ("query", np.arange(N_TOKEN - n_query, N_TOKEN))}
    return xr.DataArray(values, dims=dims, coords=where)


FACTS = [(0.1, None, None)] * N_LAYER


def test_views():
    q, k = same(N_LAYER, N_HEAD, N_TOKEN, WIDTH), same(N_LAYER, N_KV, N_TOKEN, WIDTH)
    page = attention_page.views(maps(), PIECES, FACTS, model="M", q=q, k=k, layer=3)
    assert "of 2,000 tokens" in page.html
    assert size(page)["positions"][-1] == N_TOKEN - 1


def test_steps():
    names = dict.fromkeys(("hidden", "attn_norm", "attn_out"), same(N_LAYER, N_TOKEN, N_EMBD))
    names |= dict.fromkeys(("q", "q_pre", "attn_heads"), same(N_LAYER, N_HEAD, N_TOKEN, WIDTH))
    names |= dict.fromkeys(("k", "k_pre", "v"), same(N_LAYER, N_KV, N_TOKEN, WIDTH))
    names |= dict.fromkeys(("scores", "attention"), maps())
    of_layer = {"difference": ("layer", np.zeros(N_LAYER)), "type": ("layer", ["Q4_K"] * N_LAYER)}
    written = xr.Dataset(
        {"written": (("layer", "head", "embd"), same(N_LAYER, N_HEAD, N_EMBD)), **of_layer}
    )
    tokens = pd.DataFrame({"id": range(N_TOKEN), "piece": PIECES})
    page = attention_page.steps(names, written, tokens, FACTS, model="M", layer=9)
    assert "Of 2,000 tokens" in page.html and "on this page" in page.html
    assert size(page)["layers"] == [9]


def test_next_token():
    logits = np.linspace(0, 9, 262_144, dtype=np.float32)  # the largest vocabulary there is
    size(attention_page.next_token(logits, PIECES * 132, model="M"))


@pytest.mark.parametrize("per_query", [5, 400])
def test_arcs_and_the_graph_of_tokens(per_query):
    """Every head an edge, and rollout as dense as a low threshold makes it."""
    query = np.repeat(np.arange(N_TOKEN), per_query)
    edges = pd.DataFrame({"src": query, "dst": query // 2})
    edges["weight"] = np.linspace(0.1, 1, len(edges))
    edges["layer"], edges["head"] = query % N_LAYER, query % N_HEAD
    edges["kind"] = np.where(np.arange(len(edges)) % 2, "head", "rollout")
    nodes = pd.DataFrame({"position": range(N_TOKEN), "piece": PIECES, "label": PIECES})
    for column in ("received", "pagerank", "betweenness"):
        nodes[column] = np.linspace(0, 1, N_TOKEN)
    page = attention_page.arcs(nodes, edges, model="M", n_layer=N_LAYER, n_head=N_HEAD)
    data, most = size(page), len(edges) // 2
    kept = data["edges"]["src"]["shape"][0], len(data["rollout"])
    assert ("To stay small" in page.html) == (per_query == 400) == (kept < (most, most))
    assert min(kept) >= min(most, 40_000), "no fewer than there is room for"
    graph = Graph(
        nodes,
        edges,
        node="position",
        source="src",
        target="dst",
        label="label",
        weight="weight",
        color="received",
        size="pagerank",
        edge_color="kind",
        position=("received", "pagerank"),
    )
    size(graph.page())


def test_states():
    hidden = xr.DataArray(same(N_LAYER + 1, N_TOKEN, N_EMBD), dims=LAYERS)
    shape, dims = (N_LAYER + 1, N_TOKEN), ("layer", "token")
    measures = {name: (dims, same(*shape)) for name in ("entropy", "probability")}
    best = (*dims, "best")
    measures["top"] = (best, np.zeros((*shape, 1), int))
    measures["top_probability"] = (best, same(*shape, 1))
    read = {"position": ("token", np.arange(N_TOKEN))}
    page = layers_page.states(hidden, xr.Dataset(measures, read), PIECES, [" wörd"], model="M")
    assert "Of 2,000 tokens" in page.html
    assert size(page)["positions"][-1] == N_TOKEN - 1


@pytest.mark.parametrize("n_token, bits", [(20, "exact"), (60, "1/255"), (N_TOKEN, "1/255")])
def test_dashboard_of_heads(n_token, bits):
    coords = {"measure": ["a", "b"], "layer": range(N_LAYER), "head": range(N_HEAD)}
    values = same(2, N_LAYER, N_HEAD)
    names = ("value", "low", "high", "baseline_high")
    profiled = xr.Dataset({name: (tuple(coords), values) for name in names}, coords)
    layer, head = np.divmod(np.arange(N_LAYER * N_HEAD), N_HEAD)
    table = pd.DataFrame({"layer": layer, "head": head, "labels": "previous token, sink"})
    distance = np.abs(np.subtract.outer(layer, layer)).astype(float)
    attention = xr.DataArray(same(N_LAYER, N_HEAD, n_token, n_token))
    page = heads_page.dashboard(profiled, table, attention, PIECES[:n_token], distance, model="M")
    data = size(page)
    assert bits in page.html and ("of 2,000 tokens)" in page.html) == (n_token == N_TOKEN)
    shown = data["positions"]
    assert data["weights"]["shape"] == [N_LAYER * N_HEAD, len(shown) * (len(shown) + 1) // 2]
    assert shown[0] == 0 and shown[-1] == n_token - 1

"""Files, layers and tensors of a comparison as node and edge tables."""

from collections.abc import Mapping

import numpy as np
import pandas as pd

from ..maths import ratio


def graph_tables(
    quality: pd.DataFrame,
    drifts: Mapping[str, pd.DataFrame],
    errors: Mapping[str, pd.DataFrame],
    focus: str,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Nodes and edges: every file tied to every layer by its drift there, layers to the focus
    file's tensors by error.

    quality: Comparison; drifts: {name: hidden_drift}; errors: {name: weight_errors}; focus: a name
    in all of them. nodes: id, label, kind (file, layer, tensor), size (KLD of a file, mean drift of
    a layer, error of a tensor, each as a share of the largest of its kind), value (the number
    itself), type; x, y (files in the middle, layers on a ring, tensors outside their layer); edges:
    src, dst, weight (error or drift), kind."""
    nodes, edges = [], []
    for name, row in quality.dropna(subset="kld_mean").iterrows():
        bits = f"{row['bits_per_weight']:.2f} bits per weight"
        nodes.append((f"file {name}", name, "file", row["kld_mean"], bits))
    for layer in drifts[focus].index[1:] - 1:  # what leaves layer l is entry l + 1
        own, moved = f"layer {layer}", {n: t["error"].loc[layer + 1] for n, t in drifts.items()}
        mean = float(np.mean(list(moved.values())))
        nodes.append((own, own, "layer", mean, "mean drift of the files"))
        edges += [
            (f"file {name}", own, float(error), "drift")
            for name, error in moved.items()
            if name in quality.index
        ]
    for name, row in errors[focus].iterrows():
        nodes.append((name, name, "tensor", row["error"], row["type"]))
        tied = f"file {focus}" if pd.isna(row["layer"]) else f"layer {int(row['layer'])}"
        edges.append((tied, name, float(row["error"]), "weight error"))
    nodes = pd.DataFrame(nodes, columns=["id", "label", "kind", "value", "type"])
    nodes["x"], nodes["y"] = _places(nodes, errors[focus])
    nodes["size"] = ratio(nodes["value"], nodes.groupby("kind")["value"].transform("max"))
    nodes["size"] = nodes["size"].fillna(0.0)  # a kind whose every error is 0
    edges = pd.DataFrame(edges, columns=["src", "dst", "weight", "kind"])
    return nodes, edges[edges["weight"] > 0].reset_index(drop=True)


def _places(nodes, tensors):
    layers = nodes["label"][nodes["kind"] == "layer"].tolist()
    files = nodes["label"][nodes["kind"] == "file"].tolist()
    width = 2 * np.pi / max(len(layers), 1)
    seen, places = {}, []
    for name, kind in zip(nodes["label"], nodes["kind"]):
        if kind == "file":
            angle, radius = 2 * np.pi * files.index(name) / len(files), 0.35
        elif kind == "layer":
            angle, radius = width * layers.index(name), 1.0
        else:
            layer = tensors["layer"][name]
            place = seen[layer] = seen.get(layer, -1) + 1
            outside = len(layers) if pd.isna(layer) else layers.index(f"layer {int(layer)}")
            angle, radius = width * (outside + 0.25 * (place % 2) - 0.125), 1.2 + 0.13 * place
            if pd.isna(layer):  # embedding and output: tied to the file, in the middle
                angle, radius = np.pi * place, 0.12
        places.append((radius * np.cos(angle), radius * np.sin(angle)))
    return np.array(places).T

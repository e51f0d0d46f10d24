"""What notebooks 12 and 14 ask the runtime for of a prompt of 2,000 tokens stays within stated
bytes, and says less of no quantity that they show. No model runs but a tiny one."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from models import DENSE, IDS, tiny_model

from llamatelemetry.attention import long, steps
from llamatelemetry.capture.names import STAGES
from llamatelemetry.capture.session import CaptureSession, by_stage, named_stages
from llamatelemetry.layers import budget, graph

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
LONG, GENERATE = 2000, 24
# SmolLM2-135M's shape
SHAPE = dict(n_layer=30, n_head=9, n_kv_head=3, n_embd=576, head_dim=64, n_ff=1536, n_vocab=49152)


class Asked(Exception):
    """The cell has asked for its capture: what it would do with it is not tried."""


class Engine:
    """In an engine's place: adds up the bytes of the captures that it is asked for."""

    def __init__(self, model):
        self.model, self.bytes = model, []

    def capture(self, ids, stages, queries=None, positions=None, generate=0, **_):
        stages = named_stages(stages)
        some = by_stage(stages, queries, positions)
        self.bytes.append(n_bytes(self.model, stages, len(ids) + generate, some))
        raise Asked

    def stages(self):
        there = pd.Series(True, STAGES)
        there[["router", "experts"]] = False
        return pd.DataFrame({"there": there, "why": "no experts"})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def load_model(self, *_, **__):
        pass


def n_bytes(model, stages, n_token, positions):
    """Of the arrays of a capture, from the stages' dims alone."""
    sizes = {
        "layer": model.n_layer,
        "head": model.n_head,
        "kv_head": model.n_kv_head,
        "embd": model.n_embd,
        "feature": model.head_dim,
        "neuron": model.n_ff,
        "vocab": model.n_vocab,
    } | dict.fromkeys(("token", "query", "key"), n_token)
    total = 0
    for stage in stages:
        facts = STAGES[stage]
        here = sizes | {facts.place: len(positions.get(stage, range(n_token)))}
        here["layer"] += facts.embedding
        total += 4 * int(np.prod([here[dim] for dim in facts.all_dims]))
    return total


def asked(number, cells, n_token, after=lambda names: None):
    """[bytes] of the captures that these cells of a notebook ask for."""
    notebook = json.loads(next(NOTEBOOKS.glob(f"{number}-*.ipynb")).read_text())
    sources = {cell["id"]: "".join(cell["source"]) for cell in notebook["cells"]}
    model = SimpleNamespace(**SHAPE)
    engine, ids = Engine(model), list(range(n_token))
    table = pd.DataFrame({"id": ids, "piece": ["x"] * n_token})
    names = dict(
        (("engine", engine), ("model", model), ("tokens", table), ("ids", ids)),
        second_ids=ids,
        pieces=ids,
        GENERATE=GENERATE,
        SEED=0,
        CONTEXT=None,
        NAME="x",
        OWN="x",
        SECOND="x",
        second_path="x",
        others={"x": "x"},
        place=SimpleNamespace(tensor_split=None, fits=True),
        cap=SimpleNamespace(hidden=None, logits=None),
        other=SimpleNamespace(hidden=None),
        PATCH_POSITIONS=1,
        compare=SimpleNamespace(changed_positions=lambda *_: [0]),
        time=time,
        alike=False,
        InferenceEngine=lambda: engine,
        patch=lambda *_: None,
        long=long,
        steps=steps,
        budget=budget,
        graph=graph,
        np=np,
        pd=pd,
    )
    for cell in cells:
        names |= {"wanted": ["hidden", "logits"]} if cell == "cell-36a" else {}
        with pytest.raises(Asked):
            exec(sources[cell], names)
    return engine.bytes


CELLS = {
    "12": ["attention-08", "attention-28", "attention-38"],
    "14": ["cell-06", "cell-31", "cell-36a", "cell-39"],
}


# Bytes of all captures that are held at once. Of every position they would be 3.4e9 and 3.6e9.
@pytest.mark.parametrize("number, most", [("12", 2.25e9), ("14", 2.4e9)])
def test_what_is_held_of_a_long_prompt(number, most, capsys):
    held = asked(number, CELLS[number], LONG)
    assert len(held) == len(CELLS[number]) and sum(held) < most
    said = capsys.readouterr().out
    assert "Logits of all 2,000 tokens would take 0.4 GB" in said
    assert ("q·k and the maps while writing for the last 16" in said) == (number == "12")
    assert ("The last 129 of the prompt's 2,000 tokens" in said) == (number == "14")
    # Of logits alone, what notebook 14 tries its patches with
    if number == "14":
        assert asked(number, ["cell-31", "cell-33b"], LONG)[1] == 4 * SHAPE["n_vocab"]


@pytest.mark.parametrize("number", CELLS)
def test_a_short_prompt_is_captured_whole(number, capsys):
    """What SmolLM2's default prompts show is of every position."""
    model = SimpleNamespace(**SHAPE)
    short = asked(number, CELLS[number], 100)
    maps = (*steps.STAGES, "attention_mean", "ffn_out", "final_norm", "logits")
    states = ["hidden", "attn_out", "ffn_out", "final_norm", "logits"]
    first = maps if number == "12" else [*states, "attn_norm", "ffn_norm", "ffn_act"]
    assert short[0] == n_bytes(model, first, 100, {})
    assert "would take" not in capsys.readouterr().out


def test_bytes_are_those_of_the_capture(tmp_path):
    with CaptureSession(tiny_model("llama", tmp_path), threads=1) as session:
        positions = {"logits": [3], "hidden": [1, 2], "attention_mean": [5]}
        stages = [stage for stage in DENSE if stage != "mask"]
        cap = session.capture(IDS, stages, queries=[4, 7], positions=positions)
        gguf, some = session.model, by_stage(stages, [4, 7], positions)
        sizes = {name: getattr(gguf, name) for name in SHAPE if name != "n_ff"}
        sizes["n_ff"] = max(gguf.n_ff_per_layer)
        reckoned = n_bytes(SimpleNamespace(**sizes), stages, len(IDS), some)
    assert sum(cap[stage].nbytes for stage in stages) == reckoned

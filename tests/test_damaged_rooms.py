"""Damaged files of the rooms that read others' work: features, control vectors, collected states.
Each ends in an error of ours, or works; what a damaged Arrow file could do to a process is seen in
a fork."""

import json
import os
import random
import shutil
import struct

import numpy as np
import pytest
from outcomes import outcome
from safetensors.numpy import save_file

from llamatelemetry.collecting import store
from llamatelemetry.features import formats
from llamatelemetry.steering.vectors import ControlVector, _labelled

FILES, FACTS = 40, 24  # of each kind: damaged bytes, damaged facts
ODD = (None, True, -1, 0, 1.5, 2**70, "", "x" * 100, [], ["a"], {}, {"a": 1}, [[[]]])


def weights(*names):
    draw = np.random.default_rng(0).standard_normal
    shapes = {"W_enc": (8, 16), "W_dec": (16, 8), "b_dec": (8,)}
    return {name: draw(shapes.get(name, (16,))).astype(np.float32) for name in names}


def sae_lens(folder):
    about = {"hook_name": "blocks.0.hook_resid_post", "model_name": "x"}
    config = {"architecture": "standard", "activation_fn": "relu", "metadata": about}
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file(weights("W_enc", "W_dec", "b_enc", "b_dec"), folder / "sae_weights.safetensors")


def gemma_scope(folder):
    np.savez(folder / "params.npz", **weights("W_enc", "W_dec", "b_enc", "b_dec", "threshold"))


def vector(folder):
    rows = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    ControlVector(_labelled(rows, [2, 3, 4]), "llama", None, {}).save(folder / "v.gguf")


def states(folder, change=lambda facts: None):
    layout = {"hidden": {"layers": [0, 1], "shape": [4], "dtype": "float32"}}
    facts = {"request": {"stages": ["hidden"]}, "digest": "x", "variant": "y", "pool": "mean"}
    facts |= {"model": {"name": "m", "file": "f"}, "layout": layout}
    rows = [{"text": "a b", "label": 1}, {"text": "c", "label": 2}]
    arrays = {"hidden": np.ones((2, 2, 4), np.float32)}
    given = [[1, 2], [3]], [["a", " b"], ["c"]], [False, False], arrays, facts
    with store.make(folder) as made:
        for number in range(2):
            made.write(number, rows, *given, number == 1)


def look(folder):
    found = store.open_states(folder)
    found.hidden.values, found.label.values, found.last_token.values
    return store.Store(folder).rows(0)


KINDS = {
    "sae_lens": (sae_lens, formats.read),
    "gemma_scope": (gemma_scope, formats.read),
    "vector": (vector, lambda folder: ControlVector.load(folder / "v.gguf").unit()),
    "states": (states, look),
}


def damaged(path, draw):
    """Bytes changed, cut off or put in, most of them where the header is."""
    raw = bytearray(path.read_bytes())
    for _ in range(draw.randint(1, 4)):
        at, what = (
            draw.randrange(max(1, min(draw.choice([64, 1024, 2**30]), len(raw)))),
            draw.random(),
        )
        if what < 0.1:
            del raw[at:]
        elif what < 0.2:
            raw[at:at] = draw.randbytes(draw.randint(1, 9))
        elif what < 0.4:
            raw[at : at + 4] = struct.pack("<I", draw.choice([0, 2**31 - 1, 2**31, 2**32 - 1]))
        elif raw:
            raw[min(at, len(raw) - 1)] = draw.choice([0, 1, 127, 128, 255, draw.randrange(256)])
    path.write_bytes(raw)


def in_a_fork(call):
    """(kind, what it said) of a call that may end the process."""
    read, write = os.pipe()
    if not (child := os.fork()):
        try:
            os.write(write, json.dumps(outcome(lambda: call() and ""))[:4000].encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        words = said.read()
    status = os.waitpid(child, 0)[1]
    return json.loads(words) if words else ["crash", f"status {status}"]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_bytes(tmp_path, kind):
    make, use = KINDS[kind]
    (sound := tmp_path / "sound").mkdir()
    make(sound)
    assert in_a_fork(lambda: use(sound))[0] == "works"
    found = []
    for number in range(FILES):
        draw, case = random.Random(f"{kind} {number}"), tmp_path / "case"
        shutil.copytree(sound, case)
        damaged(draw.choice(sorted(case.iterdir())), draw)
        what, said = in_a_fork(lambda: use(case))
        if what not in ("works", "typed"):
            found.append((number, what, said))
        shutil.rmtree(case)
    assert not found


def test_odd_facts_of_collected_states(tmp_path):
    """Sound Arrow that says something else than it has."""
    import pyarrow as pa

    states(tmp_path)
    path, found = tmp_path / "block-000000.arrow", []
    table = pa.ipc.open_stream(path.read_bytes()).read_all()
    for number in range(FACTS):
        draw = random.Random(number)
        facts = at = json.loads(table.schema.metadata[store.KEY])
        while isinstance(at[place := draw.choice(list(at))], dict) and draw.random() < 0.7:
            at = at[place]
        at[place] = draw.choice(ODD)
        if draw.random() < 0.2:
            del at[place]
        said = json.dumps(facts).encode()
        with pa.OSFile(str(path), "wb") as file:
            with pa.ipc.new_stream(file, table.schema.with_metadata({store.KEY: said})) as to:
                to.write_table(table.replace_schema_metadata({store.KEY: said}))
        what, said = in_a_fork(lambda: look(tmp_path))
        if what not in ("works", "typed"):
            found.append((number, what, said))
    assert not found

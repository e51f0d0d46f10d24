"""Damaged files, made by changing sound ones in their structure and byte by byte, and what becomes
of each in a process that is watched.

`run(count, seed)` makes the files with hypothesis (the same ones for the same seed), opens each as
a user would, and counts what came of them. Sound is "works" or "typed", an error of ours. Anything
else is a finding, and its file is kept: "untyped", "crash" (the process ended), "hang" (no answer
in SECONDS), "memory" (more than LIMIT)."""

import copy
import json
import math
import os
import queue
import re
import select
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

SECONDS = 60  # for one file; a sound one takes about one
LIMIT = 1536 << 20  # bytes of the process that opens them: 1 GiB for a header, and what it imports
ARCHITECTURES = ("llama", "gemma3", "qwen2moe", "gpt2")
MODEL = "tiny-llama-0.gguf"  # what the importance matrices are of
WORKERS = 2
FORMS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9


# The structure of a GGUF file


@dataclass
class Structure:
    """keys: [name, type, bytes of the value]; tensors: [name, dims, type, offset]; data: all
    behind; counts: what the file says instead of how many there are."""

    keys: list = field(default_factory=list)
    tensors: list = field(default_factory=list)
    data: bytes = b""
    version: int = 3
    counts: dict = field(default_factory=dict)


def text(value):
    return struct.pack("<Q", len(value)) + value


def parse(path):
    raw, at, found = Path(path).read_bytes(), 24, Structure()

    def take(form):
        nonlocal at
        values = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize("<" + form)
        return values

    def name():
        (length,) = take("Q")
        return take(f"{length}s")[0]

    def skip(kind):
        if kind == TEXT:
            name()
        elif kind == ARRAY:
            inner, count = take("IQ")
            for _ in range(count):
                skip(inner)
        else:
            take(FORMS[kind])

    found.version, n_tensors, n_keys = struct.unpack_from("<IQQ", raw, 4)
    for _ in range(n_keys):
        key, (kind,) = name(), take("I")
        start = at
        skip(kind)
        found.keys.append([key, kind, raw[start:at]])
    for _ in range(n_tensors):
        tensor, (n_dims,) = name(), take("I")
        *dims, kind, offset = take(f"{n_dims}QIQ")
        found.tensors.append([tensor, dims, kind, offset])
    found.data = raw[-(-at // 32) * 32 :]
    return found


def build(model):
    n_tensors = model.counts.get("tensors", len(model.tensors))
    n_keys = model.counts.get("keys", len(model.keys))
    out = b"GGUF" + struct.pack("<IQQ", model.version, n_tensors, n_keys)
    for key, kind, value in model.keys:
        out += text(key) + struct.pack("<I", kind) + value
    for name, dims, kind, offset in model.tensors:
        out += text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return out + bytes(-len(out) % 32) + model.data


# Strategies


def strategies():
    from hypothesis import strategies as st

    odd = [0, 1, 2, 3, 7, 100, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**64 - 1]
    whole = st.sampled_from(odd) | st.integers(0, 2**64 - 1)
    floats = st.sampled_from([0.0, -1.0, 0.5, 1e-38, 3e38, float("inf"), float("nan")])
    texts = st.sampled_from(
        [b"", b"12", b"llama", b"\xff\xfe", b"a" * 70_000, "\u00e9\u2581".encode()]
    )

    def single(kind):
        """The bytes of a value of this type."""
        if kind == TEXT:
            return texts.map(text)
        if kind in (6, 12):
            return floats.map(lambda value: struct.pack("<" + FORMS[kind], value))
        size = struct.calcsize(FORMS[kind])
        return whole.map(lambda value: struct.pack("<Q", value)[:size])

    kinds = [*FORMS, TEXT]

    @st.composite
    def array(draw):
        kind = draw(st.sampled_from(kinds))
        values = draw(st.lists(single(kind), max_size=5))
        count = draw(st.sampled_from([None, None, None, 0, 2**24, 2**63, 2**64 - 1]))
        return struct.pack("<IQ", kind, len(values) if count is None else count) + b"".join(values)

    nested = st.sampled_from([1, 3, 5000]).map(
        lambda depth: struct.pack("<IQ", ARRAY, 1) * depth + struct.pack("<IQB", 0, 1, 7)
    )
    value = st.sampled_from(kinds).flatmap(
        lambda kind: single(kind).map(lambda raw: [kind, raw])
    ) | (array() | nested).map(lambda raw: [ARRAY, raw])
    names = st.sampled_from(
        [b"", b"blk.99999999999999999999.attn_q.weight", b"blk.-1.x", b"\xff\xff", b"x" * 70_000]
    )

    small = st.sampled_from([0, 1, 2, 3, 5, 17, 32, 63, 65, 4096, 2**20, 2**32 - 1])

    @st.composite
    def alike(draw, kind, raw):
        """Another value of the same type, so that only what it means is wrong."""
        if kind == TEXT:
            return text(
                draw(st.sampled_from([b"", b"llama", b"gemma3", b"gpt2", b"bert", b"mamba"]))
            )
        if kind != ARRAY:
            whole = small.map(lambda value: struct.pack("<Q", value)[: len(raw)])
            return draw(whole if kind not in (6, 12) else single(kind))
        at = draw(st.integers(12, len(raw)))  # behind what its values are and how many
        return (
            raw[:at] + bytes([draw(st.integers(0, 255))]) + raw[at + 1 :] if at < len(raw) else raw
        )

    @st.composite
    def structure(draw, model):
        keys, tensors = model.keys, model.tensors
        for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
            key = keys[draw(st.integers(0, len(keys) - 1))]
            tensor = tensors[draw(st.integers(0, len(tensors) - 1))] if tensors else None
            what = draw(st.integers(-9, 11))
            if what < 0:
                key[2] = draw(alike(key[1], key[2]))
            elif what < 5:
                key[1:] = draw(value)
            elif what == 5:
                keys.append([draw(names | st.just(key[0])), *draw(value)])
            elif what == 6 and len(keys) > 1:
                keys.remove(key)
            elif what == 7:
                model.counts[draw(st.sampled_from(["keys", "tensors"]))] = draw(whole)
            elif what == 8:
                key[1] = draw(st.integers(0, 2**32 - 1) | st.integers(0, 20))
            elif tensor is None:
                model.version = draw(st.integers(0, 2**32 - 1))
            elif what == 9:
                at = draw(st.integers(0, 3))
                kind = st.integers(0, 60) | st.integers(0, 2**32 - 1)
                tensor[at] = draw([names, st.lists(whole, max_size=9), kind, whole][at])
            elif what == 10:
                tensors.append(list(tensor))
            else:
                tensors.remove(tensor)
        return build(model)

    @st.composite
    def flipped(draw, raw):
        """Bytes changed, cut off or put in, most of them where the header is."""
        raw = bytearray(raw)
        for _ in range(draw(st.integers(1, 4))):
            end = draw(st.sampled_from([64, 1024, len(raw)]))
            at = draw(st.integers(0, max(0, min(end, len(raw)) - 1)))
            what = draw(st.integers(0, 9))
            if what == 0:
                del raw[at:]
            elif what == 1:
                raw[at:at] = draw(st.binary(max_size=9))
            elif raw:
                raw[at] = draw(st.integers(0, 255))
        return bytes(raw)

    leaf = st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats() | st.text(max_size=3)
    json_value = leaf | st.lists(leaf, max_size=3) | st.dictionaries(st.text(max_size=3), leaf)
    json_value |= st.just(["nested"]) | st.just({"hex": "zz"}) | st.just("\ud83d")
    json_value = json_value.map(copy.deepcopy)  # what was put in may be changed by the next change

    @st.composite
    def saved(draw, raw):
        """A saved capture: its facts, or what safetensors says of an array, changed."""
        (size,) = struct.unpack_from("<Q", raw)
        head = json.loads(raw[8 : 8 + size])
        facts = json.loads(head["__metadata__"]["llamatelemetry"])
        for _ in range(draw(st.integers(1, 2))):
            where = draw(st.sampled_from(["facts", "facts", "head"]))
            at = facts if where == "facts" else head
            while True:  # down to some place
                places = list(at) if isinstance(at, dict) else range(len(at))
                place = draw(st.sampled_from(places))
                if not (isinstance(at[place], dict | list) and at[place]) or draw(st.booleans()):
                    break
                at = at[place]
            if draw(st.integers(0, 4)) == 0:
                del at[place]
            else:
                at[place] = draw(json_value)
            if not facts or not head:
                break
        if isinstance(head.get("__metadata__"), dict):
            head["__metadata__"]["llamatelemetry"] = json.dumps(facts).replace(
                '"nested"', "[" * 9000 + "]" * 9000
            )
        new = json.dumps(head).encode()
        return struct.pack("<Q", len(new)) + new + raw[8 + size :]

    return structure, flipped, saved


# The sound files


def sound(folder):
    """{name: (what it is, path)} of the files that are damaged, and beside them what they need."""
    import gguf
    from models import tiny_model

    from llamatelemetry.capture.data import Capture

    found = {name: ("model", tiny_model(name, folder)) for name in ARCHITECTURES}
    llama = parse(found["llama"][1])
    for number in range(2):
        part = Structure(keys=[] if number else llama.keys.copy())
        for name, dims, kind, offset in llama.tensors[number::2]:
            part.tensors.append([name, dims, kind, len(part.data)])
            part.data += llama.data[offset : offset + 4 * math.prod(dims)]  # F32, in whole steps
        stated = (b"split.no", 2, number), (b"split.count", 2, 2)
        part.keys += [[key, kind, struct.pack("<H", n)] for key, kind, n in stated]
        part.keys.append([b"split.tensors.count", 5, struct.pack("<i", len(llama.tensors))])
        path = folder / f"split-0000{number + 1}-of-00002.gguf"
        path.write_bytes(build(part))
        found[f"split {number}"] = ("model", path)
    matrix = folder / "imatrix.gguf"
    writer = gguf.GGUFWriter(str(matrix), "imatrix")
    former = [struct.pack("<i", 3)]
    for layer in range(3):
        name = f"blk.{layer}.attn_q.weight"
        writer.add_tensor(f"{name}.in_sum2", np.ones((1, 64), np.float32))
        writer.add_tensor(f"{name}.counts", np.ones((1, 1), np.float32))
        former.append(struct.pack("<i", len(name)) + name.encode() + struct.pack("<2i", 1, 64))
        former.append(np.ones(64, np.float32).tobytes())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found["matrix"] = ("matrix", matrix)
    (folder / "imatrix.dat").write_bytes(b"".join(former))
    found["former matrix"] = ("matrix", folder / "imatrix.dat")
    parts = {
        "hidden": (np.ones((2, 3, 4), np.float32), [0, 1], None),
        "attention": (np.ones((1, 2, 1, 3), np.float32), [0], [2]),
        "logits": (np.ones((3, 5), np.float32), None, None),
    }
    facts = {"name": "x", "architecture": "llama", "n_layer": 2, "file": "x.gguf"}
    tokens = [1, 2, 3], ["a", b"\xff", "c"], [False, False, True]
    saved = Capture(parts, tokens, facts, [{"kind": "full"}]).save(folder / "c.safetensors")
    found["capture"] = ("capture", saved)
    return found


def files(count, seed, folder):
    """Write `count` damaged files, each into a folder of its own. Yields (what it is, path, the
    sound file's name)."""
    import hypothesis
    from hypothesis import strategies as st

    structure, flipped, saved = strategies()
    base, made = sound(folder), []

    def damaged(name):
        what, path = base[name]
        raw = path.read_bytes()
        ways = [flipped(raw)]
        if what == "capture":
            ways = [saved(raw), saved(raw), *ways]
        elif raw[:4] == b"GGUF":
            # lazily: what is changed is parsed anew each time
            ways = [st.builds(parse, st.just(path)).flatmap(structure)] * 3 + ways
        return st.tuples(st.just(name), st.one_of(ways))

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(st.sampled_from(sorted(base)).flatmap(damaged))
    def make(example):
        if len(made) < count:
            made.append(example)

    make()
    for number, (name, raw) in enumerate(made):
        what, path = base[name]
        place = folder / f"{number:04d}"
        place.mkdir()
        (place / path.name).write_bytes(raw)
        if name.startswith("split"):
            other = base["split 1" if name == "split 0" else "split 0"][1]
            shutil.copy(other, place)
            path = base["split 0"][1]
        yield what, place / path.name, name


# The process that opens them


def visit(what, path):
    """All that a user does with a file before a long run."""
    from llamatelemetry import Capture, GGUFFile, InferenceEngine, list_models
    from llamatelemetry.capture.session import least_context
    from llamatelemetry.convert import expand, importance
    from llamatelemetry.gpus.fit import fit

    if what == "template":
        from soak import spells

        return spells.visit(path)
    if what == "capture":
        captured = Capture.load(path)
        repr(captured), captured.tokens, captured.layers
        return [captured[stage].sum() for stage in captured.stages]
    if what == "matrix":
        importance.entries(path)
        beside = path.parent if (path.parent / MODEL).is_file() else path.parent.parent
        return importance.check(GGUFFile(beside / MODEL), path)
    os.environ["LLAMATELEMETRY_KAGGLE_INPUT"] = str(path.parent)
    list_models()
    file = GGUFFile(path)
    repr(file), file.tensors, file.pieces, file.token_types, file.bits_per_weight
    expand.quantized_types(file), least_context(file, 512)
    for gpu in (False, True):
        fit(file, memory_bytes=1 << 26, gpu=gpu)
    for name in file.tensors.index:
        file.rows(name, [0]), file.tensor(name)
    with InferenceEngine() as engine:
        engine.load_model(path, auto_start=False, silent=True)
        engine.fit()
        return engine.capture([1, 2, 3]).stages


def serve():
    from outcomes import outcome

    from llamatelemetry import liveness

    liveness.LOOP = 20  # so that an endless loop of llama.cpp is found out within SECONDS
    for line in sys.stdin:
        what, path = json.loads(line)
        kind, said = outcome(lambda: visit(what, Path(path)) and "")
        print(json.dumps([kind, said if kind != "works" else ""]), flush=True)


class Watched:
    """A process that opens one file after the other; a new one where it had to be ended. What it
    starts is watched with it.

    script: what that process runs; seconds: for one file."""

    process = None

    def __init__(self, script=__file__, seconds=SECONDS, limit=LIMIT):
        self.script, self.seconds, self.limit = script, seconds, limit

    def open(self, what, path):
        """(kind, what it said)."""
        import psutil

        if self.process is None:
            paths = os.pathsep.join([str(Path(__file__).parent.parent), str(Path(__file__).parent)])
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", str(self.script)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"},
            )
        self.process.stdin.write(json.dumps([what, str(path)]) + "\n")
        self.process.stdin.flush()
        deadline, itself = time.monotonic() + self.seconds, psutil.Process(self.process.pid)
        while not select.select([self.process.stdout], [], [], 0.05)[0]:
            if time.monotonic() > deadline:
                return self._end("hang", f"no answer in {self.seconds} s")
            try:
                family = [itself, *itself.children(recursive=True)]
            except psutil.Error:
                break
            if too_much := self._above(family):
                return self._end("memory", too_much)
        line = self.process.stdout.readline()
        if not line:
            return self._end("crash", f"status {self.process.wait()}")
        # What it held for a moment only
        too_much = self._above([itself])
        return self._end("memory", too_much) if too_much else json.loads(line)

    def _above(self, processes):
        """What one of the processes held at its most, where that is more than the limit; a file
        that it maps is none of it."""
        for each in processes:
            try:
                said = Path(f"/proc/{each.pid}/status").read_text()
            except OSError:
                continue
            peak = re.search(r"VmHWM:\s+(\d+)", said)
            if peak and int(peak[1]) << 10 > self.limit:
                name = re.search(r"Name:\s+(.*)", said)[1]
                return f"{int(peak[1]) >> 10} MiB in {name}"
        return ""

    def _end(self, kind, said):
        self.close()
        return kind, said

    def close(self):
        if self.process:
            import psutil

            try:
                family = psutil.Process(self.process.pid).children(recursive=True)
            except psutil.Error:
                family = []
            for each in [self.process, *family]:
                try:
                    each.kill()
                except (psutil.Error, OSError):
                    pass
            self.process.wait()
            self.process.stdin.close()
            self.process.stdout.close()
            self.process = None


def run(count, seed=0, kept=None):
    """Damage `count` files and open them. Returns (Counter of what came of them, findings: [(kind,
    what it said, the sound file's name, path)]), the files of the findings copied into the folder
    `kept`."""
    with tempfile.TemporaryDirectory(prefix="damage-") as folder:
        waiting, counts, findings = queue.Queue(), Counter(), []
        for each in files(count, seed, Path(folder)):
            waiting.put(each)

        def work():
            watched = Watched()
            try:
                while True:
                    what, path, name = waiting.get_nowait()
                    kind, said = watched.open(what, path)
                    counts[kind] += 1
                    if kind not in ("works", "typed"):
                        place = path.parent
                        if kept:
                            place = Path(kept) / f"{seed}-{path.parent.name}"
                            shutil.copytree(path.parent, place, dirs_exist_ok=True)
                        findings.append((kind, said, name, str(place / path.name)))
                    shutil.rmtree(path.parent)
            except queue.Empty:
                pass
            finally:
                watched.close()

        workers = [threading.Thread(target=work) for _ in range(WORKERS)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return counts, findings


if __name__ == "__main__":
    serve()

"""The process of a scene: it gets ready, makes one call while a fault strikes it, then the same
call again, and leaves. It is told what to do by lines of stdin and answers in JSON lines.

    python actor.py PHASE MODEL FOLDER

Commands: go, again (after load_model where a word follows), end; at any time fill and room (its
temporary folder has none, has some again), and fork (a fork that outlives it)."""

import hashlib
import json
import os
import queue
import signal
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
TEXT = "The cat sat on the mat and looked at the rain. "


class Scene:
    """What the calls of one phase need."""

    def __init__(self, model, folder):
        from llamatelemetry import InferenceEngine

        self.model, self.folder = model, Path(folder)
        self.engine = InferenceEngine()

    def load(self, **options):
        self.engine.load_model(self.model, silent=True, ctx_size=2048, **options)

    def out(self, name):
        return self.folder / name


def digest(*parts):
    """A short name of arrays, texts and files, equal where these are."""
    import numpy as np

    made = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                made.update(hashlib.file_digest(file, "sha256").digest())
        else:
            made.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part))
    return made.hexdigest()[:16]


GREEDY = {"temperature": 0, "ignore_eos": True}


def loading(scene):
    scene.load()
    return digest(scene.engine.infer(TEXT, max_tokens=2, **GREEDY).text)


def inferring(scene):
    return digest(scene.engine.infer(TEXT, max_tokens=200, **GREEDY).text)


def streaming(scene):
    return digest("".join(scene.engine.infer_stream(TEXT, max_tokens=200, **GREEDY)))


def embedding(scene):
    return digest(scene.engine.embed([f"{number}: {TEXT * 10}" for number in range(4)]))


def capture_start(scene):
    return digest(*_arrays(scene.engine.capture(TEXT)))


def capture_running(scene):
    return digest(*_arrays(scene.engine.capture(TEXT, generate=60)))


def _arrays(captured):
    return [captured[stage].values for stage in captured.stages]


def statistics(scene):
    found = scene.engine.head_statistics(TEXT * 90)
    return digest(*(found[name].values for name in found))


def collecting(scene):
    texts = [f"{number}: {TEXT * 4}" for number in range(12)]
    return digest(scene.engine.collect(texts, where=scene.out("states"), progress=False).hidden)


def cutting(scene):
    from llamatelemetry.steering import knockout

    captured = scene.engine.capture(TEXT, "attention")
    groups = knockout.layer_groups(captured.attention, 3)
    ids, answers = captured.tokens["id"].tolist(), [260, 253]
    found = knockout.cut(scene.engine, ids, captured.attention, answers, groups, progress=False)
    return digest(found["change"], found["kl"])


def quantizing(scene):
    from llamatelemetry import quantize

    return digest(quantize(scene.model, scene.out("Q6_K.gguf"), "Q6_K", progress=False))


def expanding(scene):
    from llamatelemetry import expand

    return digest(expand(scene.model, scene.out("F16.gguf"), "F16", progress=False))


def weighing(scene):
    import gguf

    from llamatelemetry import imatrix

    made = imatrix(scene.model, TEXT * 70, scene.out("imatrix.gguf"), 128, progress=False)
    return digest(*(tensor.data for tensor in gguf.GGUFReader(made).tensors))


def comparing(scene):
    from llamatelemetry import compare_quantizations
    from llamatelemetry.errors import CompareError

    table = compare_quantizations(
        scene.model, [scene.model], text=TEXT * 70, n_ctx=128, progress=False
    )
    if why := table["error"].iloc[0]:
        raise CompareError(why)
    return digest(table[["ppl", "kld_mean", "kld_max"]].to_numpy(float))


def referring(scene):
    from llamatelemetry import make_reference

    return digest(make_reference(scene.model, scene.out("F16.gguf"), type="F16", progress=False))


# {phase: (what gets ready, the call)}
PHASES = {
    "load": (None, loading),
    "infer": (Scene.load, inferring),
    "stream": (Scene.load, streaming),
    "embed": (lambda scene: scene.load(embeddings=True), embedding),
    "capture start": (lambda scene: scene.load(auto_start=False), capture_start),
    "capture running": (lambda scene: (scene.load(auto_start=False), capture_start(scene)), None),
    "head statistics": (lambda scene: scene.load(auto_start=False), statistics),
    "collect": (lambda scene: scene.load(auto_start=False), collecting),
    "cut edges": (lambda scene: scene.load(auto_start=False), cutting),
    "quantize": (None, quantizing),
    "expand": (None, expanding),
    "imatrix": (None, weighing),
    "compare": (None, comparing),
    "make_reference": (None, referring),
}
PHASES["capture running"] = (PHASES["capture running"][0], capture_running)


def fill(folder):
    """Leave no room in a folder."""
    with open(folder / "filler", "ab", 0) as file:
        for step in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(step))
            except OSError:
                pass


def listen(todo, temp):
    """Commands from stdin: those that can be done at any time at once, the others into `todo`."""
    for line in sys.stdin:
        command = line.strip()
        if command == "fill":
            fill(temp)
        elif command == "room":
            (temp / "filler").unlink(missing_ok=True)
        elif command == "fork":
            if (pid := os.fork()) == 0:
                time.sleep(120)
                os._exit(0)
            print(json.dumps({"fork": pid}), flush=True)
        else:
            todo.put(command)
    os._exit(1)  # its director is gone


def main(phase, model, folder):
    from outcomes import outcome

    warnings.simplefilter("ignore")
    temp, todo, inside = Path(tempfile.gettempdir()), queue.Queue(), False

    def interrupt(*_):
        if inside:  # a moment too late is no matter of the scene
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=listen, args=(todo, temp), daemon=True).start()
    scene, (prepare, call) = Scene(model, folder), PHASES[phase]
    prepare and prepare(scene)
    print(json.dumps({"ready": os.getpid()}), flush=True)
    while (command := todo.get()) != "end":
        started, inside = time.monotonic(), True
        if command == "again anew":
            kind, said = outcome(lambda: (prepare and prepare(scene), call(scene))[1])
        else:
            kind, said = outcome(lambda: call(scene))
        inside = False
        answer = {"kind": kind, "said": said, "seconds": time.monotonic() - started}
        print(json.dumps(answer), flush=True)
    scene.engine.close()
    # A comparison keeps its reference's logits for the next one, as long as the process lives
    files = (path for path in temp.rglob("*") if path.is_file() and path.suffix != ".logits")
    left = [str(path) for path in files if "/out/" not in str(path)]
    print(json.dumps({"left": left}), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:4])

"""What is written takes its place when it is whole: a full disk, Ctrl-C and kill -9 in the middle
of each writer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from models import tiny_model

from llamatelemetry import quantize

# A process that writes, in which the first (or a later) file meets its end. RLIMIT_FSIZE is a disk
# that is full after a page.
WRITES = """
import os, resource, signal, sys
from pathlib import Path
import numpy as np, xarray as xr
from llamatelemetry import ControlVector, InferenceEngine, LlamaTelemetryError
from llamatelemetry.convert import mixture, mixing
from llamatelemetry.files import outputs, scratch

end, what, model, out, after = *sys.argv[1:3], *map(Path, sys.argv[3:5]), int(sys.argv[5])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
check, replace, begun = outputs.check_output, os.replace, []

def checked(*given, **options):
    begun.append(1)
    if end == "full" and len(begun) == after:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, -1))
    return check(*given, **options)

def replaced(*given):
    if len(begun) == after and end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if len(begun) == after and end == "interrupt":
        signal.raise_signal(signal.SIGINT)
    replace(*given)

engine = InferenceEngine()
engine.load_model(model, auto_start=False, silent=True, ctx_size=128, threads=1)
captured = engine.capture(list(range(20)))
vectors = xr.DataArray(np.ones((2, 4096), np.float32), dims=("layer", "embd"), coords=dict(layer=[2, 3]))
base = model.with_name("base.gguf")
engine.collect([[1, 2, 3]], "hidden", where=out.parent / "other", progress=False)
texts = [list(range(1, 30))] * 40
acts = {
    "capture": lambda: captured.save(out / "c.safetensors"),
    "vector": lambda: ControlVector(vectors, "llama").save(out / "v.gguf"),
    "states": lambda: engine.collect(texts, "hidden", where=out / "states", progress=False),
    "mixture": lambda: mixing.mix(base, model, out / "m.gguf", {"ffn_up": "F16"}, progress=False),
    "costs": lambda: mixture.group_costs(
        model, out, "a b c d " * 60, base=base, types=["Q4_0"], n_ctx=32, seconds=900, progress=False
    ),
}
outputs.check_output, outputs.os.replace = checked, replaced

def left():
    halves = [*out.rglob("*.partial"), *scratch.scratch().rglob("*.partial")]
    return [*halves, *scratch.scratch().glob("group-*")]

try:
    acts[what]()
    print("not struck")
except LlamaTelemetryError as error:
    print(f"{type(error).__name__}: {error}".splitlines()[0])
except KeyboardInterrupt:
    print("KeyboardInterrupt")
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
print(left(), [one.name for one in out.rglob("*") if one.is_file()])
begun += [1] * after
acts[what]()
print(left(), sorted(one.name for one in out.rglob("*") if one.is_file()))
engine.close()
"""
MADE = {
    "capture": "['c.safetensors']",
    "vector": "['v.gguf']",
    "states": "['block-000000.arrow']",
    "mixture": "['m.gguf']",
    "costs": "[]",
}
ERRORS = dict(capture="Capture", vector="Capture", states="Collect", mixture="Quantize")
ERRORS["costs"] = "Quantize"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    pytest.importorskip("llama_cpp")
    path = tiny_model("llama", tmp_path_factory.mktemp("models"), n_layer=2)
    quantize(path, path.with_name("base.gguf"), "Q8_0", progress=False)
    return path


@pytest.mark.slow
@pytest.mark.parametrize("what", MADE)
@pytest.mark.parametrize("end", ["full", "interrupt", "kill"])
def test_nothing_half_is_left_by(what, end, model, tmp_path):
    pytest.importorskip("pyarrow", reason="llamatelemetry[analysis] is not installed")
    (temp := tmp_path / "temp").mkdir()
    (out := tmp_path / "out").mkdir()
    tests = Path(__file__).parent
    env = os.environ | {"TMPDIR": str(temp), "OMP_WAIT_POLICY": "passive"}
    env["PYTHONPATH"] = os.pathsep.join([str(tests.parent), str(tests)])
    after = "3" if what == "costs" else "1"  # two files lie there by then
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", WRITES, end, what, str(model), str(out), after],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said, trouble = process.communicate(timeout=300)
    lines = said.splitlines()
    if end == "kill":
        assert process.returncode == -signal.SIGKILL and not lines, trouble
    else:
        assert process.returncode == 0, trouble
        expected = {"full": f"{ERRORS[what]}Error: ", "interrupt": "KeyboardInterrupt"}[end]
        assert lines[0].startswith(expected), said
        assert end == "interrupt" or "Could not write" in lines[0]
        assert lines[1:] == ["[] []", f"[] {MADE[what]}"]
    mark = f"llamatelemetry-scratch-{process.pid}-"

    def left():
        here = [*temp.iterdir(), *out.rglob("*.partial"), *Path("/dev/shm").glob(f"{mark}*")]
        return here + [one for one in out.rglob("*") if one.is_file() and end == "kill"]

    deadline = time.monotonic() + 20
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left()

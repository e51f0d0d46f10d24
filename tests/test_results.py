"""What is left behind is whole or not there, and a disk that refuses it is a typed error."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from llamatelemetry import LlamaTelemetryError, results
from llamatelemetry.errors import OutputError, StageError
from llamatelemetry.kaggle import push, stage

TABLE = pd.DataFrame({"piece": [" a", "b"], "value": [1.0, np.nan]})
VALUES = {
    "t.parquet": TABLE,
    "a.npz": {"distance": np.eye(3), "layer": np.arange(3)},
    "r.txt": "a\nб\ud83d",
}


def read(path):
    if path.suffix == ".parquet":
        return pd.read_parquet(path)
    return dict(np.load(path)) if path.suffix == ".npz" else path.read_text()


@pytest.mark.parametrize("name", VALUES)
def test_what_is_saved_is_read_again(name, tmp_path):
    path = results.save(tmp_path / "folder" / name, VALUES[name])
    assert [each.name for each in path.parent.iterdir()] == [name]
    found = read(path)
    if name == "t.parquet":
        pd.testing.assert_frame_equal(found, TABLE)
    elif name == "a.npz":
        assert all((found[key] == VALUES[name][key]).all() for key in VALUES[name])
    else:
        assert found == "a\nб\\ud83d"


FULL = """
import resource, signal, sys
sys.path[:0] = {path!r}
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
import numpy as np, pandas as pd
from pathlib import Path
from llamatelemetry import LlamaTelemetryError, results
from llamatelemetry.kaggle import push, stage
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))  # as a disk that is full after a page
out, big = Path({out!r}), np.random.default_rng(0).random(10**5)
state = push.State(out / "push.json")
asks = dict(
    parquet=lambda: results.save(out / "t.parquet", pd.DataFrame(dict(a=big))),
    npz=lambda: results.save(out / "a.npz", dict(a=big)),
    text=lambda: results.save(out / "r.txt", "x" * 10**5),
    state=lambda: state.put("name" * 5000, "content", 1, "sent"),
    copy=lambda: stage._copy({large!r}, out),
)
for name, ask in asks.items():
    try:
        ask()
    except LlamaTelemetryError as error:
        print(name, type(error).__name__)
"""


def test_a_full_disk(tmp_path):
    large = tmp_path / "large.gguf"
    large.write_bytes(bytes(10**5))
    out = tmp_path / "out"
    out.mkdir()
    code = FULL.format(path=[os.getcwd()], out=str(out), large=str(large))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = dict(line.split() for line in done.stdout.splitlines())
    assert said == {
        "parquet": "OutputError",
        "npz": "OutputError",
        "text": "OutputError",
        "state": "StageError",
        "copy": "StageError",
    }, done.stderr
    assert list(out.iterdir()) == []


def test_an_interrupt_leaves_what_was_there(tmp_path, monkeypatch):
    path = results.save(tmp_path / "r.txt", "before")

    def interrupted(self, text, **_):
        Path.write_bytes(self, text[:2].encode())
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        results.save(path, "behind")
    assert [each.name for each in tmp_path.iterdir()] == ["r.txt"]
    assert path.read_bytes() == b"before"


def test_a_model_is_not_written_over(tmp_path):
    model = tmp_path / "m.parquet"
    model.write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(OutputError, match="is a model"):
        results.save(model, TABLE)
    assert model.read_bytes()[:4] == b"GGUF"


def test_a_read_only_folder(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refused)
    for ask, error in (
        (lambda: results.save(tmp_path / "x" / "r.txt", "a"), OutputError),
        (lambda: stage._half(tmp_path / "y").__enter__(), StageError),
        (lambda: push.State(tmp_path / "z" / "push.json").put("a", "b", 1, "sent"), StageError),
    ):
        with pytest.raises(error, match="Read-only file system") as said:
            ask()
        assert isinstance(said.value, LlamaTelemetryError)

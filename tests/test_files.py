"""What is written is whole and over none of its inputs; what files are called; what is a text and
what a path."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from models import tiny_model

from llamatelemetry import CaptureError, LlamaTelemetryError
from llamatelemetry.capture.data import Capture
from llamatelemetry.cli import main
from llamatelemetry.compare.texts import load_text
from llamatelemetry.convert.expand import expand, make_reference
from llamatelemetry.convert.importance import imatrix
from llamatelemetry.convert.quantize import quantize
from llamatelemetry.errors import CompareError, OutputError, QuantizeError, shown
from llamatelemetry.files.outputs import labels, refuse_overwriting, written
from llamatelemetry.files.scratch import sweep
from llamatelemetry.kaggle import stage
from llamatelemetry.kaggle.push import StageError
from llamatelemetry.tools.notebooks import run_notebook
from llamatelemetry.views.page import Page


def names_of(path, folder):
    """The same file by other names."""
    symbolic, hard, linked = folder / "symbolic.gguf", folder / "hard.gguf", folder / "linked"
    symbolic.symlink_to(path)
    hard.hardlink_to(path)
    linked.symlink_to(path.parent)
    return [
        path,
        str(path),
        symbolic,
        hard,
        linked / path.name,
        path.parent / ".." / path.parent.name / path.name,
        Path(os.path.relpath(path)),
    ]


def test_no_output_takes_the_place_of_its_input(tmp_path):
    (tmp_path / "models").mkdir()
    model = tiny_model("llama", tmp_path / "models")
    text, before = tmp_path / "text.txt", model.read_bytes()
    text.write_text("a text")
    for other in names_of(model, tmp_path):
        for write in (
            lambda dst: quantize(model, dst, "Q8_0", progress=False),
            lambda dst: expand(model, dst),
            lambda dst: quantize(dst, model, "Q8_0", progress=False),
            lambda dst: make_reference(model, dst),
            lambda dst: imatrix(model, "text", dst),
        ):
            with pytest.raises(QuantizeError, match="file that it would be made from"):
                write(other)
    for given in (text, str(text)):
        with pytest.raises(QuantizeError, match="file that it would be made from"):
            imatrix(model, given, text)
    with pytest.raises(QuantizeError, match="file that it would be made from"):
        quantize(model, text, "Q8_0", imatrix=text)
    assert model.read_bytes() == before and text.read_text() == "a text"


def test_every_part_of_a_split_input_counts(tmp_path):
    parts = [tmp_path / f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    for part in parts:
        part.write_bytes(b"GGUF")
        with pytest.raises(OutputError, match="would destroy"):
            refuse_overwriting(part, [parts[0]])
    refuse_overwriting(tmp_path / "other.gguf", [parts[0], None, tmp_path / "absent.gguf"])


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "out.bin"
    with pytest.raises(ZeroDivisionError), written(path) as temporary:
        temporary.write_bytes(b"half")
        assert not path.exists() and 1 / 0
    assert list(path.parent.iterdir()) == []
    with written(path) as temporary:
        temporary.write_bytes(b"whole")
    assert path.read_bytes() == b"whole" and list(path.parent.iterdir()) == [path]
    with pytest.raises(OutputError, match="is a folder"), written(tmp_path / "new"):
        pass
    for wrong in (path / "below" / "a.bin", "x" * 300, "zero\0", 5):
        with (
            pytest.raises(OutputError, match="Could not write|is no name of a file"),
            written(wrong),
        ):
            pass
    longest = tmp_path / ("x" * 255)
    with written(longest) as one, written(longest) as other:  # as two threads do
        one.write_bytes(b"one"), other.write_bytes(b"other")
    assert longest.read_bytes() == b"one"


def test_a_device_or_a_pipe_is_no_output(tmp_path):
    pipe, link = tmp_path / "pipe", tmp_path / "null"
    os.mkfifo(pipe)
    link.symlink_to("/dev/null")
    for path in (pipe, link):
        with pytest.raises(OutputError, match="device or a pipe"), written(path):
            pass
    assert pipe.is_fifo() and link.is_symlink()


def test_a_tilde_is_the_home_in_outputs_and_inputs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    model = tiny_model("llama", tmp_path)
    before = model.read_bytes()
    for src, dst in (
        (f"~/{model.name}", model),
        (model, f"~/{model.name}"),
        (model.name, f"~/{model.name}"),
    ):
        with pytest.raises(QuantizeError, match="would destroy"):
            expand(src, dst, progress=False)
    assert expand(f"~/{model.name}", "~/out.gguf", progress=False) == tmp_path / "out.gguf"
    assert model.read_bytes() == before
    assert (
        capture().save("~/c.safetensors") == tmp_path / "c.safetensors"
        and Capture.load("~/c.safetensors").stages
    )
    assert not (tmp_path / "~").exists()


def capture():
    facts = {"name": "x", "architecture": "llama"}
    return Capture(
        {"logits": (np.zeros((1, 3), np.float32), None, None)}, ([1], ["a"], [False]), facts, []
    )


@pytest.mark.parametrize(
    "error, save",
    [
        (CaptureError, lambda path: capture().save(path)),
        (OutputError, lambda path: Page("t", "body", "", {}).save(path)),
    ],
)
def test_nothing_but_a_model_replaces_a_model(tmp_path, error, save):
    model = tmp_path / "model.gguf"
    model.write_bytes(b"GGUF and more")
    with pytest.raises(error, match="is a model"):
        save(model)
    assert model.read_bytes() == b"GGUF and more" and list(tmp_path.iterdir()) == [model]
    assert (
        save(tmp_path / "fine").is_file() and save(tmp_path / "fine").is_file()
    )  # its own kind it replaces
    (tmp_path / "blocked").write_text("")
    with pytest.raises(error, match="Could not write"):
        save(tmp_path / "blocked" / "file")


def test_an_importance_matrix_replaces_its_own_kind_only(tmp_path):
    model, other = tiny_model("llama", tmp_path), tiny_model("llama", tmp_path, seed=1)
    matrix = tmp_path / "matrix.gguf"
    before = other.read_bytes()
    with pytest.raises(QuantizeError, match="is a model"):
        imatrix(model, "A text. " * 90, other, n_ctx=64, progress=False)
    assert other.read_bytes() == before
    for _ in range(2):
        assert imatrix(model, "A text. " * 90, matrix, n_ctx=64, progress=False) == matrix


def test_tensors_of_somebody_else_are_no_output(tmp_path):
    from safetensors.numpy import save_file

    theirs = tmp_path / "model.safetensors"
    save_file({"w": np.ones(3, np.float32)}, theirs, {"format": "pt"})
    before = theirs.read_bytes()
    with pytest.raises(CaptureError, match="file of tensors"):
        capture().save(theirs)
    assert theirs.read_bytes() == before
    ours = capture().save(tmp_path / "ours.safetensors")
    assert Capture.load(ours).save(ours) == ours and Capture.load(ours).stages == ("logits",)


def test_files_of_one_name_are_told_apart(tmp_path):
    a, b, c = Path("/m/a/model.gguf"), Path("/m/b/model.gguf"), Path("/m/b/other.gguf")
    assert labels([a, c]) == ["model", "other"]
    assert labels([a, b, c, a]) == ["a/model", "b/model", "other", "a/model"]
    assert labels(["/x/1/q/model.gguf", "/x/2/q/model.gguf"]) == ["1/q/model", "2/q/model"]
    assert labels(["/x/m.gguf", "/x/m.GGUF"]) == ["m.gguf", "m.GGUF"]
    blob = tmp_path / "blob"
    blob.write_bytes(b"")
    (tmp_path / "model.gguf").symlink_to(blob)
    assert labels([tmp_path / "model.gguf"]) == ["model"]
    assert shown(os.fsdecode(b"m\xff.gguf")) == r"m\xff.gguf" and labels(
        [os.fsdecode(b"/m\xff.gguf")]
    ) == [r"m\xff"]
    assert shown(Path("\ud83d")) == r"\ud83d"


LINE = "The dog saw the cat and the cat saw the dog. "


@pytest.mark.parametrize(
    "text",
    [
        "",
        "one word",
        LINE * 6,
        LINE * 12,
        LINE * 400,
        "a/b of it. " * 300,
        LINE + "\n",
        "notes.txt\n",
        "Call me Ishmael.",
        "zero \0 byte",
        "x" * 300 + ".txt",
        "\ufeffa\r\nb",
    ],
)
def test_a_text_is_a_text_whatever_its_length(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_text(text) == text


def test_a_path_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "a text.txt"
    file.write_text("inside")
    (tmp_path / "LICENSE").write_text("inside")
    written_out = str(tmp_path / "LICENSE")
    for path in (
        file,
        str(file),
        "a text.txt",
        "./a text.txt",
        Path("LICENSE"),
        "./LICENSE",
        written_out,
    ):
        assert load_text(path) == "inside"
    for path in (
        tmp_path / "none",
        "none.txt",
        str(tmp_path / "none"),
        "a/none",
        "./none here",
        str(tmp_path),
    ):
        with pytest.raises(CompareError, match="No text at"):
            load_text(path)
    with pytest.raises(CompareError, match=r"Path\('LICENSE'\)"):  # it could be both
        load_text("LICENSE")
    (tmp_path / "windows.txt").write_bytes(
        b"\xef\xbb\xbfa\r\nb\r\n"
    )  # the mark is no text, line ends are
    assert load_text("windows.txt") == "a\r\nb\r\n"
    with pytest.raises(CompareError, match="half a character at position 1"):
        load_text("a\ud83d")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CompareError, match="No text at.*utf-8"):
        load_text("latin.txt")
    for wrong in (b"bytes", 3, ["a"]):
        with pytest.raises(LlamaTelemetryError, match="A text is a str"):
            load_text(wrong)


def test_staging_removes_nothing_that_it_did_not_write(tmp_path):
    mine = tmp_path / "models" / "mine.gguf"
    mine.parent.mkdir()
    mine.write_bytes(b"GGUF")
    with pytest.raises(StageError, match="was not staged and would be emptied"):
        stage._placed(tmp_path / "new", tmp_path / "models")
    with pytest.raises(StageError, match="lies where staged folders are made afresh"):
        stage._check_inputs(tmp_path, [mine], [])
    other = tmp_path / "other" / "mine.gguf"
    other.parent.mkdir()
    other.write_bytes(b"GGUF")
    with pytest.raises(StageError, match="several files are called mine.gguf"):
        stage._check_inputs(tmp_path / "staged", [mine, other], [])
    stage._check_inputs(tmp_path / "staged", [mine, mine], [])
    (mine.parent / stage.DATASET).write_text("{}")
    (tmp_path / "new").mkdir()
    made = stage._placed(tmp_path / "new", tmp_path / "models")
    assert made == tmp_path / "models" and list(made.iterdir()) == []


def test_a_folder_that_is_staged_is_there_when_it_is_whole(tmp_path, monkeypatch):
    """And what was staged before stays until then; of a killed process nothing is left."""
    with pytest.raises(RuntimeError), stage._half(tmp_path) as half:
        (half / "wheels").mkdir()
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    script = (
        "import os, signal\nfrom pathlib import Path\nfrom llamatelemetry.kaggle import stage\n"
        f"with stage._half(Path({str(tmp_path)!r})) as half:\n"
        "    (half / 'wheels').mkdir()\n    (half / 'wheels' / 'x.whl').write_bytes(b'half')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script])
    deadline = time.monotonic() + 20
    while list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert list(tmp_path.iterdir()) == []
    late = "from llamatelemetry.files import scratch; scratch._AFTER = ''"  # its shell was ended
    subprocess.run([sys.executable, "-c", f"{late}\n{script}"])
    assert [path.suffix for path in tmp_path.iterdir()] == [".partial"]
    sweep()
    assert list(tmp_path.iterdir()) == []


def test_a_notebook_is_not_executed_onto_itself(tmp_path):
    import nbformat

    path = tmp_path / "one.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")]), path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="would destroy"):
        run_notebook(path, tmp_path)
    assert path.read_bytes() == before


def test_a_capture_is_not_saved_onto_its_model(tmp_path, capsys):
    model = tiny_model("llama", tmp_path).rename(tmp_path / "model.safetensors")
    before = model.read_bytes()
    assert main(["capture", str(model), "The cat", "--out", str(model)]) == 1
    assert "would destroy" in capsys.readouterr().err and model.read_bytes() == before

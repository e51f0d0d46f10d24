"""An importance matrix' statistics against what llama-imatrix prints of it."""

import re
import subprocess

import gguf
import numpy as np
import pytest
from models import tiny_model

from llamatelemetry import imatrix
from llamatelemetry.convert.statistics import by_layer, statistics
from llamatelemetry.errors import QuantizeError
from llamatelemetry.files.programs import tool

TEXT = (
    "The dog saw the cat and the cat saw the dog. A bird sang in the old tree by the river. " * 20
)
COLUMNS = "sum min max mean std active n entropy entropy_share zd cosine".split()


def matrix_of(path, values, count=1.0, names=("blk.0.attn_q.weight",)):
    writer = gguf.GGUFWriter(path, "")
    for name in names:
        writer.add_tensor(f"{name}.in_sum2", np.array([values], np.float32))
        writer.add_tensor(f"{name}.counts", np.array([[count]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_no_activation_has_no_shares_and_no_direction(tmp_path):
    names = ("blk.0.attn_q.weight", "blk.1.attn_q.weight")
    with np.errstate(all="raise"):
        table = statistics(matrix_of(tmp_path / "x.gguf", [0.0, 0.0], names=names))
    assert table["sum"].tolist() == [0, 0] and table["entropy_share"].isna().all()
    assert table["cosine"][names[0]] == 0 and np.isnan(table["cosine"][names[1]])


@pytest.mark.parametrize(
    "values, count, says", [([1.0, np.nan], 1.0, "no numbers"), ([1.0, 1.0], 0.0, "from no text")]
)
def test_what_says_nothing_is_refused(values, count, says, tmp_path):
    with pytest.raises(QuantizeError, match=says):
        statistics(matrix_of(tmp_path / "x.gguf", values, count))


def test_by_hand(tmp_path):
    """Two experts of three columns, the second of which saw nothing."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "")
    for layer, values in ((0, [4.0, 4.0, 0.0]), (1, [0.0, 0.0, 8.0])):
        name = f"blk.{layer}.ffn_up_exps.weight"
        sums = np.array([values, [0.0] * 3], np.float32)
        writer.add_tensor(f"{name}.in_sum2", sums)
        writer.add_tensor(f"{name}.counts", np.array([[4.0], [0.0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    table = statistics(path).set_index("layer")
    assert table["sum"].tolist() == [2, 2] and table["n"].tolist() == [3, 3]
    assert table["entropy"].tolist() == [1, 0] and table["cosine"].tolist() == [0, 0]
    assert table["zd"].tolist() == [0, pytest.approx(1 / 3)]
    assert table["active"].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert table["std"][1] == pytest.approx(np.std([0, 0, 2]))
    layers = by_layer(statistics(path))
    assert layers["sum"].tolist() == [2, 2] and layers["zd"].tolist() == [0, pytest.approx(1 / 3)]
    with pytest.raises(QuantizeError):
        statistics(__file__)


def printed(model, matrix):
    """What llama-imatrix prints. It ends without waiting for its log's thread: of some 500 lines
    the last 256 may be lost, and of several runs the longest is taken."""
    command = [tool("llama-imatrix"), "--show-statistics", "--in-file", matrix, "-m", model]
    runs = [
        subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout
        for _ in range(20)
    ]
    return re.sub(r"^\S+ [A-Z] ", "", max(runs, key=len), flags=re.MULTILINE)  # time and level


@pytest.mark.slow
@pytest.mark.parametrize("architecture, layers", [("llama", 70), ("qwen2moe", 40)])
def test_they_are_llama_imatrixs(architecture, layers, tmp_path):
    pytest.importorskip("llama_cpp")
    model = tiny_model(architecture, tmp_path, n_layer=layers)
    path = imatrix(model, TEXT, tmp_path / "m.gguf", n_ctx=64, progress=False)
    ours, said = statistics(path), printed(model, path)
    rows = re.findall(r"^ *(\d+|-)\t(\w+) *\t(.*\d)$", said, re.MULTILINE)
    assert len(rows) > 150 and len(ours) > 450
    for layer, tensor, values in rows:
        own = ours[ours["tensor"] == tensor]
        own = own[own["layer"].isna() if layer == "-" else own["layer"] == int(layer)].iloc[0]
        theirs = [float(value.strip(" %")) for value in values.split("\t")]
        scale = [1, 1, 1, 1, 1, 100, 1, 1, 100, 100, 1]
        mine = [own[name] * factor for name, factor in zip(COLUMNS, scale)]
        assert mine == pytest.approx(theirs, rel=1e-3, abs=0.006), (layer, tensor)
    assert [row[1] for row in rows] == ours["tensor"].head(len(rows)).tolist()
    means = re.findall(r"^ *(\d+)\t *([\d.]+)\t *([\d.]+)%\t *([-\d.]+)$", said, re.MULTILINE)
    for number, *values in means:
        own = by_layer(ours).loc[int(number)]
        theirs = [own["sum"], 100 * own["zd"], own["cosine"]]
        assert theirs == pytest.approx(list(map(float, values)), rel=1e-3, abs=0.006)

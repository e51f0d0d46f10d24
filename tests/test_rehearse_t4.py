"""The rehearsal of the T4's kernels, as far as it goes without a GPU: what it stores, when it
stops, what it reads."""

import argparse
import json
import sys
import time
from pathlib import Path

import bench_scale
import common
import pytest
import rehearse_t4

from llamatelemetry.gpus import devices


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(
        work=tmp_path,
        deadline=time.monotonic() + 60,
        cores={0},
        keep=100,
        sources=None,
        names=[],
        model=None,
        links=None,
        results=tmp_path / "t4.json",
    )


def test_a_row_takes_the_place_of_the_one_it_repeats_and_other_parts_stay(options, monkeypatch):
    for part, what, value in (("tests", "a", 1), ("wheel", "b", 2), ("tests", "a", 3)):
        rehearse_t4.store(part, {"what": what, "value": value}, options.results)
    rows = json.loads(options.results.read_text())["rows"]
    assert rows == [
        {"part": "wheel", "what": "b", "value": 2},
        {"part": "tests", "what": "a", "value": 3},
    ]
    monkeypatch.setattr(
        common, "_cpu", lambda: "another"
    )  # figures of two machines never stand together
    rehearse_t4.store("tests", {"what": "c"}, options.results)
    assert [row["what"] for row in json.loads(options.results.read_text())["rows"]] == ["c"]
    assert list(options.work.iterdir()) == [options.results]


def test_a_command_is_stopped_at_the_end_of_the_time_and_says_how_far_it_came(options):
    log = options.work / "log"
    code = "import time; print('began', flush=True)\ntry: time.sleep(60)\nfinally: print('ended its children')"
    options.deadline = time.monotonic() + 1
    status, seconds, tail = rehearse_t4.run([sys.executable, "-c", code], log, options)
    assert (
        status == "stopped"
        and seconds < 20
        and "began" in tail
        and "ended its children" in log.read_text()
    )
    options.deadline += 60
    assert rehearse_t4.run([sys.executable, "-c", "raise SystemExit(3)"], log, options)[0] == 3
    row = rehearse_t4.failed(3, "one\ntwo", {"what": "x"})
    assert row == {"what": "x", "failed": "3: one two"} and "failed" not in rehearse_t4.failed(
        0, "", {"what": "x"}
    )


@pytest.mark.parametrize(
    "said, expected",
    [
        ("CUDA : ARCHS = 750 | NO_VMM = 1 | USE_GRAPHS = 1 | CPU : SSE3 = 1 | AVX = 1 | ", True),
        ("CUDA : ARCHS = 900 | CPU : SSE3 = 1 | ", False),
        ("CUDA : ARCHS = 750,900 | CPU : SSE3 = 1 | ", False),
        ("CPU : SSE3 = 1 | ", False),
    ],
)
def test_nothing_is_measured_on_other_kernels(said, expected, options, monkeypatch):
    monkeypatch.setattr(
        rehearse_t4.subprocess, "run", lambda *args, **kwargs: argparse.Namespace(stdout=said)
    )
    if expected:
        rehearse_t4.needs_kernels()
    else:
        with pytest.raises(RuntimeError, match="not the T4's"):
            next(rehearse_t4.tests(options))


def test_what_cannot_run_here_is_said(options, monkeypatch):
    monkeypatch.setattr(devices, "_nvml", lambda: None)
    assert (
        rehearse_t4.lacks("tests", options)
        == rehearse_t4.lacks("notebooks", options)
        == "no NVIDIA GPU"
    )
    options.deadline = 0
    assert rehearse_t4.lacks("wheel", options) == "--until is over"


def test_cores_and_what_cuobjdump_lists(monkeypatch):
    assert rehearse_t4.cores_of("0-3") == {0, 1, 2, 3} and rehearse_t4.cores_of("1,4-5") == {
        1,
        4,
        5,
    }
    lists = {
        "--list-elf": "ELF file    1: tmp.1.sm_75.cubin\nELF file    2: tmp.2.sm_75.cubin\n",
        "--list-ptx": "PTX file    1: tmp.1.sm_75.ptx\n",
    }
    monkeypatch.setattr(rehearse_t4.shutil, "which", lambda name: name)
    monkeypatch.setattr(
        rehearse_t4.subprocess,
        "run",
        lambda command, **kwargs: argparse.Namespace(stdout=lists[command[1]]),
    )
    assert rehearse_t4.code_in(Path("x.so")) == ["PTX sm_75", "code sm_75"]


def test_memory_is_held_down_to_what_a_t4_has(monkeypatch, capsys):
    """Two GPUs, one with something on it already; blocks above 30 GiB are refused, as fragmented
    memory refuses them."""

    class Cuda:
        free, now = [80000 << 20, 20000 << 20], 0

        def cudaGetDeviceCount(self, count):
            count._obj.value = 2

        def cudaSetDevice(self, device):
            self.now = device

        def cudaMemGetInfo(self, free, total):
            free._obj.value, total._obj.value = self.free[self.now], 81559 << 20

        def cudaMalloc(self, pointer, size):
            if size.value > 30 << 30:
                return 2
            self.free[self.now] -= size.value
            return 0

    monkeypatch.setattr(rehearse_t4, "_library", lambda name: Cuda())
    monkeypatch.setattr(rehearse_t4.sys, "stdin", argparse.Namespace(read=lambda: ""))
    rehearse_t4.hold(14913)
    left = json.loads(capsys.readouterr().out)
    assert all(14913 <= mib <= 14915 for mib in left) and len(left) == 2


def test_the_first_figure_and_slow_cells_are_read_from_an_executed_notebook(tmp_path):
    def cell(source, begin, end, html=None):
        ran = {
            f"{name}_time": f"2026-01-01T00:00:{at:02d}.5+00:00"
            for name, at in (("start", begin), ("end", end))
        }
        outputs = [{"data": {"text/html": html}}] if html else []
        return {
            "cell_type": "code",
            "source": [source],
            "outputs": outputs,
            "metadata": {"papermill": ran | {"duration": end - begin}},
        }

    path = tmp_path / "a.ipynb"
    begun = [cell("import a", 1, 3), cell("a.table()", 3, 4, "<table>"), cell("load()", 4, 15)]
    drawn = [cell("draw()", 15, 17, '<div class="plotly-graph-div">'), cell("more()", 17, 25)]
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown"}, *begun, *drawn]}))
    assert bench_scale.cells(path) == (16.0, {"load()": 11, "more()": 8}, None)
    said = {"output_type": "stream", "text": ["hello\n", "analytics on T4 (here): cuML 26\n"]}
    drawn[1]["outputs"].append(said)
    path.write_text(json.dumps({"cells": [*begun, *drawn]}))
    assert bench_scale.cells(path)[2] == "analytics on T4 (here)"
    path.write_text(json.dumps({"cells": begun}))
    assert bench_scale.cells(path) == (None, {"load()": 11}, None)


def test_what_is_stored_and_whole_is_not_run_again(options):
    assert bench_scale.done(options.results) == set()
    for row in ({"what": "12, 8b"}, {"what": "13, 8b", "failed": "stopped"}):
        rehearse_t4.store("scale", row, options.results)
    assert bench_scale.done(options.results) == {"12, 8b"}
    assert bench_scale.called(Path("12-x.ipynb"), "/x/8b.gguf") == "12, 8b"

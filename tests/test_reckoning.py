"""What is reckoned before files are made, on hand-made sizes, and the ladder that follows."""

from types import SimpleNamespace

import pandas as pd
import pytest
from models import tiny_model

from llamatelemetry.convert import reckoning
from llamatelemetry.convert.quantize import dry_run, dry_size, targets
from llamatelemetry.files.gguf import GGUFFile

BITS = {"Q8_0": 8.5, "Q5_K_M": 5.7, "Q4_K_M": 4.9, "IQ3_XS": 3.5, "Q3_K_M": 3.9, "Q3_K_S": 3.5}
BITS |= {"Q5_1": 6, "Q4_0": 4.5, "F16": 16, "F32": 32}
INSIDE = {"Q5_K_M": "q5_K", "Q4_K_M": "q4_K", "IQ3_XS": "iq3_s", "Q3_K_M": "q3_K", "Q3_K_S": "q3_K"}


def model(weights, kind="Q4_K", file_type="Q4_K_M"):
    """A file of one matrix, and a vector that counts for nothing."""
    shapes = [(8, int(weights) // 8), (8,)]
    table = pd.DataFrame(
        {"n_elements": [int(weights), 8], "shape": shapes, "type": [kind, "F32"]}, index=["a", "n"]
    )
    size = int(weights * 4.8 / 8)
    return SimpleNamespace(tensors=table, path="m.gguf", file_type=file_type, size_bytes=size)


@pytest.fixture
def machine(monkeypatch):
    """machine(cores, ...): llama-quantize's words, the disk and the cores, by hand."""

    def made(cores, weights, free=100e9, speed=1.0, needs=True):
        def words(path, kind):
            mib = weights * BITS[kind.upper()] / 8 / 2**20
            inner = INSIDE.get(kind, kind.lower())
            end = "will require an imatrix" if needs and kind == "IQ3_XS" else ""
            return (
                f"[   1/   2] n    - [8, 1, 1, 1], type =    f32, size =    0.008 MiB\n"
                f"[   2/   2] a    - [8, 8, 1, 1], type =    f16, size =   9.00 MiB -> "
                f"    3.00 MiB ({inner})\nquant size  = {mib:.2f} MiB (4.94 BPW)\n{end}"
            )

        monkeypatch.setattr(reckoning, "physical_cores", lambda: cores)
        monkeypatch.setattr(reckoning, "speed", lambda: speed)
        monkeypatch.setattr(reckoning, "dry_run", words)
        monkeypatch.setattr(reckoning, "free_bytes", lambda _: free)
        size = lambda _, kind: SimpleNamespace(size_bytes=int(BITS[kind] * weights / 8))  # noqa: E731
        monkeypatch.setattr(reckoning, "as_type", size)

    return made


def test_seconds_are_work_over_cores_and_bytes_over_the_flow(machine):
    machine(4, 8e9, speed=0.5)
    file = model(8e9)
    work = 1.15 * 8e9 / 15.4e6 / (4 * 0.5)
    assert reckoning.making_seconds(file, "Q4_K_M") == pytest.approx(
        work + (16e9 + 8e9 * 4.9 / 8) / 1.5e9, rel=1e-3
    )
    swift = reckoning.making_seconds(file, "Q8_0")
    assert swift == pytest.approx(1.15 * 8e9 / 248e6 / 2 + (16e9 + 8.5e9) / 1.5e9, rel=1e-3)
    inside = reckoning.making_seconds(file, "Q8_0", apart=False)  # of one pass: nothing is read
    assert swift - inside == pytest.approx(16e9 / 1.5e9)
    noise = 1.15 * 8e9 / 128e6 / 2 + 16e9 / 1.5e9
    assert reckoning.stand_in_seconds(file) == pytest.approx(noise)
    machine(2, 8e9)
    assert reckoning.making_seconds(file, "Q8_0") == pytest.approx(swift, rel=1e-3)


def test_what_several_files_of_one_pass_have_alike_is_reckoned_once(machine):
    machine(4, 8e9)
    seconds = reckoning.ladder(model(8e9), ["Q8_0", "q8_0", "Q4_0"]).seconds
    _, first, again, other = seconds.values()
    assert again == pytest.approx(8.5e9 / 1.5e9, rel=1e-3)  # written, not made
    assert first - again == pytest.approx(1.15 * 8e9 / 248e6 / 4, rel=1e-3)
    assert other > 4.5e9 / 1.5e9
    alone = reckoning.ladder(model(8e9), ["Q8_0", "q8_0"], stand_in=False).seconds
    assert alone["Q8_0"] == alone["q8_0"]  # llama-quantize makes each for itself


@pytest.mark.parametrize(
    "weights, cores, speed, needs, wanted",
    [
        (135e6, 2, 1, False, "Q8_0 Q5_K_M Q4_K_M IQ3_XS"),  # as ever for a small model
        (135e6, 2, 0.3, False, "Q8_0 Q5_K_M Q4_K_M IQ3_XS"),
        (1.2e9, 2, 1, True, "Q8_0 Q5_K_M Q4_K_M Q3_K_M"),
        (8e9, 4, 1, True, "Q8_0 Q5_1 m.gguf Q3_K_S"),
        (8e9, 4, 0.5, True, "Q8_0 Q5_1 m.gguf Q3_K_S"),
        (8e9, 4, 0.35, True, "Q8_0 m.gguf Q4_0 Q3_K_S"),
        (8e9, 2, 0.3, True, "Q8_0 Q5_1 m.gguf Q4_0"),  # four at the least, the quickest
        (8e9, 64, 1, True, "Q8_0 Q5_K_M Q4_K_M Q3_K_M"),
    ],
)
def test_the_ladder_is_what_can_be_made_in_minutes(weights, cores, speed, needs, wanted, machine):
    machine(cores, weights, speed=speed, needs=needs)
    found = reckoning.ladder(model(weights))
    assert found.wanted == wanted.split() and len(found.wanted) == 4
    assert set(found.seconds) == {"stand-in", *found.wanted} - {"m.gguf"}
    assert found.own == ("m.gguf" if "m.gguf" in wanted else None)
    assert list(found.left) == (["Q5_K_M", "Q4_K_M", "Q3_K_M"][::2] if found.own else [])
    assert not found.left or sum(found.left.values()) > 100


def test_what_is_asked_for_is_taken_and_reckoned(machine):
    machine(2, 8e9)
    found = reckoning.ladder(model(8e9), ["Q4_K_M", "x.gguf"])
    assert found.wanted == ["Q4_K_M", "x.gguf"] and set(found.seconds) == {"stand-in", "Q4_K_M"}
    found = reckoning.ladder(model(8e9), ["Q8_0"], stand_in=False)
    assert set(found.seconds) == {"Q8_0"} and not found.left and found.own is None


def test_a_model_of_floats_is_no_rung_of_its_own_ladder(machine):
    machine(2, 8e9)
    found = reckoning.ladder(model(8e9, "F16", "F16"))
    assert found.own is None and len(found.wanted) == 4 and "stand-in" not in found.seconds
    assert found.wanted == ["Q8_0", "Q5_1", "Q4_0", "Q3_K_S"]


def test_no_more_is_made_than_there_is_room_for(machine):
    # 16 for the stand-in, 23 for the whole ladder, 9.6 for two mixtures; 8.5 and 3.5 without Q5_1
    machine(64, 8e9, free=50e9)
    assert reckoning.ladder(model(8e9)).own is None
    machine(64, 8e9, free=45e9)
    assert reckoning.ladder(model(8e9)).wanted == ["Q8_0", "Q5_1", "m.gguf", "Q3_K_S"]
    machine(64, 8e9, free=39e9)
    assert reckoning.ladder(model(8e9)).wanted == ["Q8_0", "m.gguf", "Q3_K_S"]


def test_a_dry_run_names_every_tensor(tmp_path):
    pytest.importorskip("llama_cpp")
    path = tiny_model("llama", tmp_path, n_embd=256, n_ff=512, head_dim=64)
    file, words = GGUFFile(path), dry_run(path, "Q4_K_M")
    named = targets(words)
    assert set(named) == set(file.tensors.index)
    assert named["blk.0.attn_q.weight"] == "Q4_K" and named["blk.0.attn_norm.weight"] == "F32"
    assert 0 < dry_size(words) < file.size_bytes / 4
    assert 0 < reckoning.making_seconds(file, "Q8_0") < reckoning.making_seconds(file, "Q4_K_M") < 1
    assert 0.01 < reckoning.speed() < 100

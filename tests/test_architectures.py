"""Every architecture that llama.cpp's generator makes is captured, and the guide's table says what
a run found."""

import subprocess
from concurrent.futures import ThreadPoolExecutor

import architectures
import pytest

from llamatelemetry.capture import prediction


@pytest.mark.slow
def test_every_architecture_is_captured_and_its_invariants_hold():
    try:
        program = architectures.build_generator(architectures.CACHE)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        pytest.skip(
            f"the generator of random models could not be built (no network or no compiler): {error}"
        )
    models = architectures.make_models(program, architectures.CACHE / "models-0")
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(architectures.check_apart, models))
    bad = {
        row["model"]: row.get("error") or row["invariants"]
        for row in rows
        if not architectures.holds(row)
    }
    assert not bad
    assert len(rows) >= 128
    assert all(row["predicts"]["logits"] for row in rows)  # the generator makes no encoders
    assert {row["architecture"] for row in rows if row["predicts"]["ahead"]} == prediction.BOTH_WAYS
    table = (architectures.ROOT / "notebooks" / "ARCHITECTURES.md").read_text()
    assert f"{len(rows)} of {len(rows)} captured" in table
    for row in rows:  # the first columns and the note do not depend on the machine's rounding
        name, kinds = architectures.row_of(row).split("|")[1:3]
        assert f"|{name}|{kinds}|" in table, row["model"]


def test_a_crash_is_a_row_and_not_the_end(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF but not really")
    row = architectures.check_apart(tmp_path / "broken.gguf")
    assert "error" in row and not architectures.holds(row)
    assert "not captured" in architectures.row_of(row)

"""`explore` as a user has it: typed into, clicked and read in a real JupyterLab and a real Notebook
7."""

import re
import time

import nbformat
import numpy as np
import pytest
from live_page import jupyter, run_all

pytest.importorskip("jupyterlab")
pytest.importorskip("notebook")
pytestmark = pytest.mark.slow
PROMPT = "The capital of France is"
CELLS = [
    "import numpy as np\nfrom llamatelemetry import InferenceEngine, explore\n"
    "engine = InferenceEngine()\n"
    "engine.load_model({model!r}, auto_start=False, silent=True)\n"
    "vector = np.ones(engine.model.n_embd, np.float32)",
    'found = explore(engine, layer=3, head=2, vectors={{"ones": (10, vector)}})',
]


def shares(page, run):
    """Percentages of the next-token bars of a run, as they are drawn."""
    return [float(text.rstrip("%")) for text in page.locator(f".llt-{run}").all_inner_texts()]


def said(page):
    return page.locator(".llt-live").last.inner_text()


@pytest.mark.parametrize("application", ["lab", "notebook"])
def test_type_choose_cut_and_read(application, browser, page, engine, smollm2, tmp_path):
    cells = [cell.format(model=str(smollm2)) for cell in CELLS]
    with jupyter(application, tmp_path, cells) as address:
        page.set_viewport_size({"width": 1200, "height": 1400})
        run_all(page, address, ".llt-next")
        before = shares(page, "before")
        logits = engine.capture(PROMPT, "logits").logits.values[-1].astype(float)
        expected = np.sort(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())[
            ::-1
        ]
        assert before == pytest.approx((100 * expected[:10]).tolist(), abs=0.0051)
        assert not shares(page, "after")
        assert page.locator(".llt-live svg rect").count() == 15  # 5 tokens

        page.get_by_role("button", name="Switch head off").click()
        page.locator(".llt-after").first.wait_for(timeout=60_000)
        assert "head 2 of layer 3 off" in said(page)
        off = shares(page, "after")
        assert sorted(shares(page, "before"), reverse=True)[:3] == before[:3] and off != before

        page.get_by_role("button", name="Switch head on").click()
        page.get_by_text("no edits").wait_for(timeout=60_000)
        page.get_by_label("Key").select_option(index=1)
        page.get_by_role("button", name="Cut edge").click()
        page.get_by_text("edge 4 to 1 of layer 3, head 2 cut").first.wait_for(timeout=60_000)
        assert page.locator(".llt-live svg path").count() == 1
        weight = page.locator(".llt-live svg rect title", has_text=re.compile(r"^4 .* to 1 "))
        assert weight.text_content().endswith(": 0.00000")

        prompt = page.get_by_label("Prompt")
        prompt.fill("Two and two are <b>four</b>")
        prompt.press("Enter")
        page.get_by_text("Two and two are <b>four</b>").first.wait_for(timeout=60_000)
        assert "no edits" in said(page)  # its edges were of other tokens

        layer = page.get_by_label("Layer")
        layer.fill("5")
        layer.press("Enter")
        page.get_by_text("Layer 5, head 2").first.wait_for(timeout=60_000)

        prompt.fill("")
        prompt.press("Enter")
        page.get_by_text("The prompt is empty").wait_for(timeout=60_000)
        assert page.locator(".llt-next").count() == 1, "the last answer stays"

        page.screenshot(path=tmp_path / f"{application}.png")
        page.locator(".jp-Notebook").last.press("Control+s")
        deadline = time.monotonic() + 30
        while not (found := saved_stills(tmp_path / "live.ipynb")) and time.monotonic() < deadline:
            time.sleep(0.3)
    assert len(found) == 1 and "Layer 5, head 2" in found[0], (
        "a saved notebook has the last picture"
    )


def saved_stills(path):
    """Pictures in a notebook's outputs."""
    outputs = [
        output for cell in nbformat.read(path, 4).cells for output in cell.get("outputs", [])
    ]
    pages = [output.get("data", {}).get("text/html", "") for output in outputs]
    return [page for page in pages if "llt-next" in page]

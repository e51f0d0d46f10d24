"""Pictures for the README out of executed notebooks: docs/figures/*.png, and the sentence that
stands below each.

    python docs/make_figures.py [--executed executed]

Needs Chromium (or Chrome) and Playwright. Each picture is the first figure that a cell shows, as a
reader of the page sees it; the captions are what the same cell printed, so they change with the
measurements."""

import argparse
import json
import shutil
from pathlib import Path

from llamatelemetry.files.outputs import written

HERE = Path(__file__).parent
LIMIT = 300_000  # bytes per picture
# name, title, notebook, what the source of its cell holds, height of the picture, what the caption
# holds (pages print nothing themselves, and what a reference is is said where it is made; another
# cell of the notebook prints it)
FIGURES = (
    (
        "heads",
        "Every attention map of a prompt, one head opened",
        "12",
        "page.views(",
        700,
        "queries that have a choice",
    ),
    (
        "steps",
        "One token's way through one head, step by step",
        "12",
        "page.steps(",
        720,
        "in NumPy and the captured attention differ",
    ),
    (
        "words",
        "Words as rows of the embedding matrix",
        "13",
        "figures.projections(maps.views, tokens.loc[words.id]",
        700,
        None,
    ),
    (
        "lens",
        "What the residual stream says after every layer",
        "14",
        "figures.best_tokens(",
        700,
        None,
    ),
    (
        "dashboard",
        "A measured profile of every head",
        "15",
        "dashboard = page.dashboard(",
        720,
        "clear their baseline",
    ),
    (
        "quantizations",
        "What each step down in precision costs",
        "16",
        "quality_figures.ladder(",
        700,
        (None, "The reference"),
    ),
)


def cell_of(notebook, text, caption):
    """(cell id, caption) of the code cell whose source holds `text`, or that shows what is defined
    there.

    caption: a piece of the text that some cell printed, or None for what this cell printed; or
    several of them."""
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = next((cell for cell in cells if text in "".join(cell["source"])), None)
    if found is None:
        raise SystemExit(f"no cell with {text!r}")
    shown = next(
        cell
        for cell in cells[cells.index(found) :]
        if any("text/html" in output.get("data", {}) for output in cell["outputs"])
    )
    said = {
        cell["id"]: " ".join(
            "".join(
                "".join(output["text"])
                for output in cell["outputs"]
                if output["output_type"] == "stream"
            ).split()
        )
        for cell in cells
    }
    wanted = caption if isinstance(caption, tuple) else (caption,)
    parts = [
        said[shown["id"]]
        if piece is None
        else next((words for words in said.values() if piece in words), "")
        for piece in wanted
    ]
    return shown["id"], " ".join(parts)


def main():
    from playwright.sync_api import sync_playwright

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--executed", type=Path, default=Path("executed"))
    executed = parser.parse_args().executed
    browser_path = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    )
    captions = {}
    (HERE / "figures").mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--disable-gpu"]
        )
        for name, title, number, source, height, caption in FIGURES:
            path = next(executed.glob(f"{number}-*.ipynb"))
            cell, printed = cell_of(json.loads(path.read_text()), source, caption)
            captions[name] = {"title": title, "notebook": number, "printed": printed}
            page = browser.new_page(viewport={"width": 1080, "height": height + 100})
            page.goto(path.with_suffix(".html").absolute().as_uri())
            # Outside its place in the page a figure is not laid out: bring it there first.
            figure = (
                page.locator(f'[id="cell-id={cell}"]').locator("iframe, .plotly-graph-div").first
            )
            figure.evaluate("element => element.scrollIntoView({block: 'start'})")
            page.wait_for_timeout(2500)
            box = figure.bounding_box()
            clip = box | {"height": min(box["height"], height)}
            target = HERE / "figures" / f"{name}.png"
            picture = page.screenshot(clip=clip, full_page=False)
            size = len(picture)
            print(f"{target}: {clip['width']:.0f} x {clip['height']:.0f}, {size / 1000:,.0f} kB")
            if size > LIMIT:
                raise SystemExit(
                    f"{target} has {size:,} bytes, {LIMIT:,} are allowed: lower its height above"
                )
            with written(target) as temporary:
                temporary.write_bytes(picture)
            page.close()
        browser.close()
    words = json.dumps(captions, indent=1, ensure_ascii=False) + "\n"
    with written(HERE / "figures" / "captions.json") as temporary:
        temporary.write_text(words)


if __name__ == "__main__":
    main()

"""A saved version of a notebook in a browser, as Kaggle shows it: nbconvert's page, require.js, and
no other network."""

TEMPLATE = (
    "/ajax/libs/",
    "/@jupyter-widgets/html-manager",
)  # what nbconvert's own templates load, in their addresses
# For every figure, in the order of the page: is there something drawn in it, and can it be seen?
_DRAWN = """() => [...document.querySelectorAll('.plotly-graph-div')].map(figure => {
  const marks = figure.querySelectorAll('.main-svg .trace, .main-svg .heatmaplayer image, .gl-container canvas');
  return figure.classList.contains('js-plotly-plot') && figure.offsetHeight > 50 &&
    [...marks].some(mark => { const box = mark.getBoundingClientRect(); return box.width > 5 && box.height > 5; });
})"""


def figures(notebook):
    """The number of Plotly figures among an executed notebook's outputs."""
    return sum(
        "plotly-graph-div" in "".join(output.get("data", {}).get("text/html", ""))
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )


def drawn(page, html, require_js, wait_s=20):
    """Open an exported notebook: ([is each figure drawn?], addresses that were asked for).

    page: of Playwright. require_js: path of require.js, given for that address; any other is
    answered by nothing."""
    asked = []

    def answer(route):
        address = route.request.url
        if address.startswith("file:"):
            return route.continue_()
        asked.append(address)
        if "require" in address:
            return route.fulfill(path=require_js, content_type="text/javascript")
        return route.abort()

    page.route("**/*", answer)
    page.goto(f"file://{html}")
    for _ in range(4 * wait_s):
        found = page.evaluate(_DRAWN)
        if all(found):
            break
        page.wait_for_timeout(250)
    return found, asked

"""What the tests of all five notebooks ask of an executed notebook."""

from llamatelemetry.kaggle.rules import LIMITS, cell_lines


def cells_are_short_and_clean(notebook):
    """No outputs, no execution counts, and few lines in every code cell but the set-up."""
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            if "setup" not in cell.metadata.get("tags", []):
                assert cell_lines(cell.source) <= LIMITS["cell"], cell.source


def figures_with_sentences(notebook):
    """The number of code cells that show a Plotly figure; each of them must also print what its
    figure says."""
    figures = 0
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        pages = [output.get("data", {}).get("text/html", "") for output in outputs]
        if "setup" in cell.metadata.get("tags", []) or not any(
            "plotly-graph-div" in page for page in pages
        ):
            continue
        figures += 1
        said = "".join(o.text for o in outputs if o.output_type == "stream" and o.name == "stdout")
        assert len(said) > 60 and "nan" not in said.lower().split(), cell.source
    return figures

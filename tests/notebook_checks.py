"""What the tests of all five notebooks ask of an executed notebook."""


def printed(notebook):
    """All that was printed, without the line breaks."""
    texts = (
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stdout"
    )
    return " ".join("".join(texts).split())


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

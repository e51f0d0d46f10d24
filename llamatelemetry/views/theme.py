"""One look for all five notebooks: colours with a fixed meaning, and how figures and tables get
into a page."""

import re
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from numpy.typing import ArrayLike
from plotly.colors import sequential
from plotly.io.base_renderers import MimetypeRenderer
from plotly.offline import get_plotlyjs, get_plotlyjs_version

from .light import IRIS, without
from .text import (  # noqa: F401
    isolated,
    plotly,
    shorten,
    text_of,
    token_columns,
    token_labels,
    token_text,
)

if TYPE_CHECKING:
    from pandas.io.formats.style import Styler  # asks for jinja2 where it is imported

# Magnitudes: perceptually even (van der Walt and Smith 2015). Signed values: diverging, always
# centred on zero. Categories: Okabe and Ito (2008), distinguishable with every common colour-vision
# deficiency. Pages have all of these as CSS variables.
MAGNITUDE = "Viridis"
RAMP = tuple(getattr(sequential, MAGNITUDE))  # samples; between them linear
SIGNED = "RdBu_r"
CATEGORIES = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#F0E442",
    "#7F7F7F",
)
MISSING = "#9a9a9a"  # what has no value, and categories beyond those with a colour of their own
# The same thing has the same colour everywhere.
COLOR = {
    "attention": CATEGORIES[0],
    "ffn": CATEGORIES[1],
    "residual": CATEGORIES[2],
    "embedding": CATEGORIES[3],
    "query": CATEGORIES[4],
    "key": CATEGORIES[5],
    "value": CATEGORIES[2],
    "reference": CATEGORIES[7],
    "baseline": CATEGORIES[7],
    "cpu": CATEGORIES[0],
    "gpu": CATEGORIES[2],
}
# What pages draw with, light and dark. "less" and "more": the ends of signed values, whose middle
# is the page's background.
PAGE = {
    "light": {
        "bg": "#ffffff",
        "panel": "#f5f5f5",
        "fg": "#1b1b1b",
        "muted": "#5f5f5f",
        "line": "#cccccc",
        "accent": CATEGORIES[0],
        "less": "#2166ac",
        "more": "#b2182b",
    },
    "dark": {
        "bg": "#141414",
        "panel": "#1f1f1f",
        "fg": "#ececec",
        "muted": "#a8a8a8",
        "line": "#444444",
        "accent": CATEGORIES[4],
        "less": "#56b4e9",
        "more": "#f46d43",
    },
}
WIDTH = 900  # Kaggle's output column, pixels
TICK = 18  # characters of a tick label

_GREY = "#808080"  # readable on white and on black alike
# Layout of a figure whose legend stands above it, under the title.
LEGEND_ABOVE = dict(
    legend=dict(orientation="h", y=1.02, yanchor="bottom", x=1, xanchor="right"), margin_t=90
)
TEMPLATE = go.layout.Template(
    layout=dict(
        autotypenumbers="strict",  # else labels like "0 1", "1 2" (position, token) are read as the numbers 1, 12
        colorway=list(CATEGORIES),
        width=WIDTH,
        height=480,
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font=dict(family="system-ui, 'DejaVu Sans', sans-serif", size=13, color=_GREY),
        title=dict(x=0, xanchor="left", font=dict(size=15)),
        margin=dict(l=70, r=30, t=60, b=60),
        xaxis=dict(
            gridcolor="rgba(128,128,128,0.2)",
            zerolinecolor="rgba(128,128,128,0.5)",
            automargin=True,
        ),
        yaxis=dict(
            gridcolor="rgba(128,128,128,0.2)",
            zerolinecolor="rgba(128,128,128,0.5)",
            automargin=True,
        ),
        hoverlabel=dict(font=dict(family="'DejaVu Sans Mono', monospace", size=12), namelength=-1),
        colorscale=dict(sequential=MAGNITUDE, diverging=SIGNED),
    )
)
pio.templates["llamatelemetry"] = TEMPLATE
# A cell is text: pandas' Styler escapes nothing by itself, and both its tables let MathJax set what
# is between dollars.
pd.options.styler.format.escape = "html"
pd.options.styler.html.mathjax = False
pd.options.display.html.use_mathjax = False
pd.options.display.max_colwidth = 120  # pandas' 50 cuts the longest tokens


def table(frame: pd.DataFrame, formats: dict | None = None) -> "Styler":
    """A DataFrame as a pandas Styler without its index, cells and headers escaped. formats: as
    Styler.format's."""
    styler = frame.style.format(formats, escape="html") if formats else frame.style
    return styler.format_index(escape="html", axis="columns").hide(axis="index")


def dashes(frame: pd.DataFrame) -> pd.DataFrame:
    """A DataFrame to be shown: dashes where there is no value, and columns of whole floats as whole
    numbers."""
    shown = {
        name: column.astype("Int64")
        if column.dtype == float and (column.dropna() % 1 == 0).all()
        else column
        for name, column in frame.items()
    }
    return pd.DataFrame(
        {
            name: column.astype(object).where(column.notna(), "–")
            if column.isna().any()
            else column
            for name, column in shown.items()
        },
        index=frame.index,
    )


# Plotly's bundle looks for AMD's `define` and CommonJS' `module` before it sets window.Plotly.
# Pages with require.js have a `define` (nbconvert's templates, among them the one of Kaggle's saved
# versions; the classic notebook): the bundle then registers there, and no figure finds it. So it
# runs where those names are nobody's.
_BUNDLE = """<script>window.PlotlyConfig = {{MathJaxConfig: 'local'}};
if ((window.Plotly || {{}}).version !== '{version}') (function () {{
var define, module, exports, require;
{bundle}
}}).call(window);</script>"""
# An application may add the outputs of a saved notebook in any order, or those in view first: a
# figure waits for the bundle.
_WAIT = "(function draw() {{ if (!window.Plotly) return void setTimeout(draw, 50);{script}}})();"
_SCRIPT = re.compile(r"(<script[^>]*>)(.*)(</script>)", re.DOTALL)


class OfflineRenderer(MimetypeRenderer):
    """A figure as HTML that asks no network for anything: Plotly's own notebook renderer asks for
    MathJax."""

    def to_mimebundle(self, fig_dict: dict) -> dict:
        options = dict(
            include_plotlyjs=False, include_mathjax=False, full_html=False, validate=False
        )
        page = pio.to_html(fig_dict, config={"displaylogo": False, "responsive": True}, **options)
        drawn = _SCRIPT.sub(lambda part: part[1] + _WAIT.format(script=part[2]) + part[3], page)
        # Jupyter's MathJax would set what stands between dollars in a figure's texts: these classes
        # keep it away.
        return {"text/html": f"<div class='mathjax_ignore tex2jax_ignore'>{drawn}</div>"}


def plotly_script() -> str:
    """Plotly's script as HTML: sets window.Plotly whatever module loader a page has, and once
    however often it is shown."""
    return _BUNDLE.format(version=get_plotlyjs_version(), bundle=get_plotlyjs())


def setup() -> None:
    """Make this theme Plotly's default and put Plotly's script into this notebook, once, so that
    every figure shows in a saved copy without a kernel and without a network."""
    pio.templates.default = "llamatelemetry"
    with without(IRIS):
        pio.renderers["llamatelemetry"] = OfflineRenderer()
    pio.renderers.default = "llamatelemetry"
    try:
        from IPython import get_ipython
        from IPython.display import HTML, display
    except ImportError:
        return
    if get_ipython() is not None:
        display(HTML(plotly_script()))


def css_variables() -> str:
    """The palette as a style sheet: --bg, --fg, ... by the reader's light or dark setting, --c0 to
    --c7 the categories, --missing, --ramp the samples of magnitudes."""
    every = {f"c{number}": color for number, color in enumerate(CATEGORIES)}
    every |= {"missing": MISSING, "ramp": ",".join(RAMP)}
    light, dark = (
        ":root {" + "".join(f"--{name}:{color};" for name, color in colors.items()) + "}"
        for colors in (PAGE["light"] | every, PAGE["dark"])
    )
    return f"{light}\n@media (prefers-color-scheme: dark) {{ {dark} }}\n"


def titled(title: str) -> dict:
    """What every figure's layout has: the theme and the title, plain text, in lines that fit
    Kaggle's 900 pixels."""
    lines = textwrap.wrap(plotly(title), 95, break_long_words=False, break_on_hyphens=False)
    return dict(template=TEMPLATE, title="<br>".join(lines))


def nothing(title: str, what: str) -> go.Figure:
    """A figure that says that there is nothing to show: "no head earns a label". Plain text."""
    figure = go.Figure(layout=dict(**titled(title), height=200))
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    return figure.add_annotation(text=plotly(what), showarrow=False)


def axis_values(values: Iterable) -> list:
    """Values of an axis for Plotly: texts escaped, numbers as they are."""
    return [plotly(value) if isinstance(value, str) else value for value in values]


def label_ticks(
    figure: go.Figure, labels: Sequence[str], axis: str, most: int = 32, **where: int
) -> go.Figure:
    """Labels on an axis of axis_values(labels): at most `most` of them, of at most TICK characters;
    hover has all."""
    step = max(1, -(-len(labels) // most))
    ticktext = [plotly(shorten(label, TICK)) for label in labels[::step]]
    # By number, a 5,000th of the axis beside the category: hover takes a tick's text where it is
    # within a 10,000th.
    tickvals = np.arange(0, len(labels), step) + len(labels) / 5000
    update = figure.update_xaxes if axis == "x" else figure.update_yaxes
    return update(tickmode="array", tickvals=tickvals, ticktext=ticktext, **where)


def whole(labels: Sequence | np.ndarray) -> dict:
    """Settings of an axis that counts layers, states or heads: where there are few, no ticks
    between whole numbers."""
    numbers = len(labels) and all(isinstance(label, (int, np.integer)) for label in labels)
    numbers = numbers and max(labels) - min(labels) < 7
    return dict(dtick=1) if numbers else {}


def decades(figure: go.Figure, axis: str = "y", **where: int) -> go.Figure:
    """Make an axis logarithmic, for the positive values drawn on it. Powers of ten are labelled
    where there are two of them, and else 1, 2 and 5 of each, or what Plotly finds between: powers
    alone would leave a narrow axis bare. where: row, col."""
    drawn = [np.asarray(trace[axis], float) for trace in figure.select_traces(**where)]
    values = np.concatenate([np.empty(0), *drawn])
    ends = np.log10(values[np.isfinite(values) & (values > 0)])
    two = len(ends) and np.floor(ends.max()) > np.ceil(ends.min())
    update = figure.update_yaxes if axis == "y" else figure.update_xaxes
    if len(ends) and not two and np.ptp(ends) > 0.7:
        return update(type="log", dtick="D2", tickformat="~g", **where)
    return update(type="log", dtick=1 if two else None, exponentformat="power", **where)


def heatmap(
    values: ArrayLike,
    x: Sequence,
    y: Sequence,
    *,
    title: str,
    x_title: str,
    y_title: str,
    unit: str,
    signed: bool = False,
    zmax: float | None = None,
    hover: ArrayLike | None = None,
    **layout: object,
) -> go.Figure:
    """A heatmap in the theme. Texts are plain text.

    values: (y, x) array; signed maps are centred on zero. unit: colour bar title, with its unit. x,
    y: labels, text. hover: (y, x) array of Plotly markup for the hover box, else labels and the
    exact value."""
    x, y = axis_values(x), axis_values(y)
    title, x_title, y_title, unit = map(plotly, (title, x_title, y_title, unit))

    values = np.asarray(values)
    limit = zmax if zmax is not None else (float(np.nanmax(np.abs(values))) or 1.0)
    figure = go.Figure(
        go.Heatmap(
            z=values,
            x=x,
            y=y,
            colorscale=SIGNED if signed else MAGNITUDE,
            zmin=-limit if signed else min(0.0, float(np.nanmin(values))),
            zmax=limit,
            colorbar=dict(title=dict(text=unit, side="right")),
            text=hover,
            hovertemplate=(
                "%{text}<extra></extra>"
                if hover is not None
                else f"{y_title}: %{{y}}<br>{x_title}: %{{x}}<br>{unit}: %{{z:.5g}}<extra></extra>"
            ),
        ),
        layout=dict(template=TEMPLATE, title=title, xaxis_title=x_title, yaxis_title=y_title),
    )
    figure.update_xaxes(**whole(x)).update_yaxes(autorange="reversed", **whole(y))
    return figure.update_layout(**layout)

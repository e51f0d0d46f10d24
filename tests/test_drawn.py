"""Text as it is drawn: token text, the escape of each medium, and every kind of figure, page and
table in a browser."""

import numpy as np
import pandas as pd
import plotly.io as pio
import pytest
import xarray as xr
from hostile import NAME, PIECES

from llamatelemetry.attention import figures as attention
from llamatelemetry.attention import page as attention_pages
from llamatelemetry.embeddings import figures
from llamatelemetry.graphs import Graph
from llamatelemetry.heads import figures as heads
from llamatelemetry.heads import page as heads_page
from llamatelemetry.layers import figures as layers
from llamatelemetry.layers import page as layers_pages
from llamatelemetry.quantization import figures as quantization
from llamatelemetry.quantization import page as quantization_page
from llamatelemetry.quantization import quality_figures
from llamatelemetry.views import text as drawn
from llamatelemetry.views import theme
from llamatelemetry.views.text import token_labels, token_text

N = len(PIECES)
LABELS, TEXTS = token_labels(PIECES), [token_text(piece) for piece in PIECES]


@pytest.mark.parametrize(
    "piece, text",
    [
        (" the", "␣the"),
        ("a b", "a␣b"),
        ("\n", "⏎"),
        ("\t", "⇥"),
        ("\r", "␍"),
        ("\u00a0", "⍽"),
        ("", "∅"),
        ("\u200b", "\\x200b"),
        ("\u202e", "\\x202e"),
        ("\ufe0f", "\\xfe0f"),
        ("\u2800", "\\x2800"),
        ("\x00", "\\x00"),
        (b"\xf0\x9f", "<0xF0><0x9F>"),
        ("é".encode(), "é"),
        ("🍕", "🍕"),
        ("don't", "don't"),
        ("<b>", "<b>"),
        ("שלום", "\u2068שלום\u2069"),
        (" سلام", "\u2068␣سلام\u2069"),
        ("١", "\u2068١\u2069"),
    ],
)
def test_token_text(piece, text):
    assert token_text(piece) == text
    assert token_text(text.replace(" ", "␣")) == text  # what is token text already stays so


def test_pieces_can_be_told_apart():
    assert len(set(TEXTS)) == len({repr(piece) for piece in PIECES})
    assert all(
        text.strip() and text.isprintable() for text in (t.strip("\u2068\u2069") for t in TEXTS)
    )


@pytest.mark.parametrize(
    "text, seen",
    [
        ("two words", "two words"),
        (" the", "␣the"),
        ("a\nb", "a⏎b"),
        ("", "∅"),
        ("2 ␣said", "2 ␣said"),
        ("3 \u2068של\u2069", "3 \u2068של\u2069"),
        ("של", "\u2068של\u2069"),
        ("\u2068של\u2069", "\u2068של\u2069"),
        ("a\u200bb", "a\\x200bb"),
    ],
)
def test_a_label_stays_as_it_is_where_all_of_it_is_seen(text, seen):
    assert drawn.seen(text) == seen == drawn.seen(seen)


PIZZA = "🍕".encode()


@pytest.mark.parametrize(
    "pieces, runs",
    [
        (["a", " b"], [(1, "a"), (1, " b")]),
        ([PIZZA[:2], PIZZA[2:], "!"], [(2, "🍕"), (1, "!")]),
        ([PIZZA[:1], PIZZA[1:2], PIZZA[2:3], PIZZA[3:]], [(4, "🍕")]),
        (["x", PIZZA[:3]], [(1, "x"), (1, "\ufffd")]),
        ([PIZZA[:2], "x"], [(2, "\ufffdx")]),
        ([b"\xff", "x"], [(1, "\ufffd"), (1, "x")]),
        ([b"\xd7\xa9\xd7", b"\x9c"], [(2, "של")]),
        ([], []),
    ],
)
def test_pieces_are_joined_before_they_are_decoded(pieces, runs):
    assert drawn.whole_characters(pieces) == runs
    whole = b"".join(piece if isinstance(piece, bytes) else piece.encode() for piece in pieces)
    assert drawn.text_of(pieces) == whole.decode("utf-8", "replace")


@pytest.mark.parametrize(
    "text, length, short",
    [("abc", 3, "abc"), ("abcd", 3, "ab…"), ("\u2068שלום\u2069", 4, "\u2068של…\u2069")],
)
def test_shortened_text_is_closed(text, length, short):
    assert drawn.shorten(text, length) == short


@pytest.mark.parametrize(
    "text, plotly, html, markdown",
    [
        ('a "b" don\'t', 'a "b" don\'t', "a &quot;b&quot; don&#x27;t", 'a "b" don\'t'),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;", "&lt;b&gt;&amp;amp;", "\\<b\\>\\&amp;"),
        ("$x$ 5%", "&#36;x&#36; 5%", "$x$ 5%", "\\$x\\$ 5%"),
        ("%{y}", "&#37;{y}", "%{y}", "%{y}"),
        ("one\ntwo", "one<br>two", "one\ntwo", "one\ntwo"),
        ("`a_b*c|[d]", "`a_b*c|[d]", "`a_b*c|[d]", "\\`a\\_b\\*c\\|\\[d\\]"),
    ],
)
def test_what_each_medium_needs(text, plotly, html, markdown):
    assert (drawn.plotly(text), drawn.html(text), drawn.markdown(text)) == (plotly, html, markdown)


# In a browser


def square(n=N):
    a = np.tril(np.ones((n, n)))
    return a / a.sum(axis=1, keepdims=True)


def lens_data():
    top = np.stack([np.arange(N)] * 2)[..., None]  # (layer, token, best)
    share = np.full(top.shape, 0.5)
    dims = ("layer", "token")
    return xr.Dataset(
        {
            "top": ((*dims, "best"), top),
            "top_probability": ((*dims, "best"), share),
            "entropy": (dims, share[..., 0]),
            "probability": (dims, share[..., 0]),
        },
        coords={"layer": [0, 1], "position": ("token", np.arange(N))},
    )


def position_table():
    values = np.linspace(0.1, 0.9, N)
    return pd.DataFrame(
        {
            "position": range(N),
            "piece": PIECES,
            "received": values,
            "pagerank": values,
            "betweenness": values,
            "kl": values,
            "entropy": values,
            "probability": values,
            "settled": 0,
        }
    )


def generation():
    states = lens_data()
    states = xr.concat(
        [states.isel(token=[0]), states], dim="token"
    )  # the state before predicts the token
    return layers.generation(position_table().assign(position=range(1, N + 1)), states, title=NAME)


def changes():
    return xr.Dataset(
        {"distance": (("layer", "pair"), np.ones((2, N)))},
        coords={"layer": [0, 1], "position": ("pair", np.arange(N))},
    )


def tokens_in_plane():
    x, y = np.random.default_rng(0).normal(size=(2, N))
    table = {"layer": 0, "sense": ["a", NAME] * (N // 2), "text": TEXTS, "x": x, "y": y}
    return figures.planes(pd.DataFrame(table | {"variance": 0.8}), title=NAME)


def analogies():
    words = dict(zip("abcd", [TEXTS] * 4))
    return figures.analogies(
        pd.DataFrame(words | {"answer": PIECES, "rank": 1, "rank_without": 2}), title=NAME
    )


def lead_table():
    parts = ["embedding", "attention", "ffn", "other", "bias"]
    return pd.DataFrame({"component": parts, "layer": [-1, 0, 0, -1, -1], "value": 1.0})


# Each with what its ticks show and what its hovers hold: one text per token.
FIGURES = {
    "token map": (
        lambda: attention.token_map(square(), PIECES, title=NAME, unit="weight"),
        "xtick",
        LABELS,
    ),
    "maps": (
        lambda: attention.maps_side_by_side({NAME: square()}, PIECES, title=NAME, unit=NAME),
        "xtick",
        LABELS,
    ),
    "rollout": (
        lambda: attention.rollout(np.ones((3, N)), PIECES, title=NAME),
        "xtick",
        LABELS,
    ),
    "bars": (
        lambda: attention.token_bars(np.ones(N), np.ones(N), PIECES, title=NAME),
        "xtick",
        LABELS,
    ),
    "stack": (
        lambda: attention.generated(pd.DataFrame({"first token": np.ones(N)}), PIECES, title=NAME),
        "xtick",
        LABELS,
    ),
    "build-up": (
        lambda: attention.logit_build_up([lead_table()] * N, PIECES, title=NAME),
        None,
        [f"over {text}" for text in TEXTS],
    ),
    "central": (lambda: attention.centrality(position_table(), title=NAME), None, LABELS),
    "lens": (
        lambda: layers.best_tokens(lens_data(), PIECES, PIECES, title=NAME, last=N),
        "xtick",
        TEXTS,
    ),
    "settled": (lambda: layers.settled(np.ones(N), PIECES, title=NAME), "xtick", LABELS),
    "positions": (
        lambda: layers.divergence(changes(), PIECES, title=NAME),
        "xtick",
        LABELS,
    ),
    "drift": (
        lambda: layers.drift(changes(), position_table(), PIECES, title=NAME),
        "x2tick",
        LABELS,
    ),
    "generation": (generation, "x2tick", [f"{i + 1} {text}" for i, text in enumerate(TEXTS)]),
    "side by side": (
        lambda: heads.side_by_side(maps(), {(0, 0): ""}, PIECES, title=NAME),
        None,
        LABELS,
    ),
    "senses": (tokens_in_plane, None, TEXTS),
    "analogies": (analogies, None, TEXTS),
}
# MathJax as a notebook has it: Plotly asks it for every text between dollars.
MATHJAX = """window.asked = 0;
window.MathJax = {version: '3.2.2', config: {}, startup: {get output() { window.asked++; }}};"""
HOVERS = """() => { const gd = document.querySelector('.js-plotly-plot'), out = [];
  gd.data.forEach((trace, curve) => {
    const first = gd.calcdata[curve][0], rows = trace.type === 'heatmap' && first.z;
    const n = rows ? rows[0].length : gd.calcdata[curve].length;
    for (let i = 0; i < n; i++) {
      Plotly.Fx.unhover(gd);  // else the next one waits its turn
      Plotly.Fx.hover(gd, rows ? {xval: i, yval: rows.length - 1} : [{curveNumber: curve, pointNumber: i}],
        gd._fullData[curve].xaxis ? gd._fullData[curve].xaxis + gd._fullData[curve].yaxis : 'xy');
      out.push(document.querySelector('.hoverlayer').textContent);
    }
  });
  return out; }"""


def plain(text):
    """As text content compares: isolates are not seen, and Plotly draws a blank at the ends as
    itself."""
    return text.replace("\u2068", "").replace("\u2069", "")


def unbroken(text):
    """Without blanks: a long title is broken into lines at one."""
    return "".join(plain(text).split())


def opened(page, tmp_path, html):
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    path = tmp_path / "page.html"
    path.write_text(html, encoding="utf-8")
    page.goto(path.as_uri())
    return problems


def nothing_ran(page):
    assert page.evaluate("window.bad === undefined")
    assert page.evaluate("document.querySelectorAll('body img, body b, body s').length") == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_shows_every_piece_as_it_is(page, tmp_path, name):
    make, ticks, hovers = FIGURES[name]
    figure = make()
    page.add_init_script(MATHJAX)
    problems = opened(
        page, tmp_path, pio.to_html(figure, include_plotlyjs=True, include_mathjax=False)
    )
    page.wait_for_selector(".gtitle")
    assert unbroken(NAME) in unbroken(page.text_content(".gtitle"))
    if ticks:
        shown = [plain(text) for text in page.locator(f".{ticks} text").all_text_contents()]
        wanted = [
            plain(theme.shorten(label, theme.TICK))
            for label in (hovers if name != "lens" else LABELS)
        ]
        step = -(-len(wanted) // len(shown)) if len(shown) < len(wanted) else 1
        assert shown == wanted[::step], f"every {step}"
    said = [plain(text) for text in page.evaluate(HOVERS)]
    missing = [text for text in hovers if not any(plain(text) in hover for hover in said)]
    assert missing == []
    nothing_ran(page)
    assert page.evaluate("window.asked") == 0 and problems == []
    assert (
        page.evaluate(
            "document.querySelectorAll('.js-plotly-plot a[*|href]:not(.modebar-btn)').length"
        )
        == 0
    )


def quality():
    columns = (
        "kld_mean",
        "kld_mean_low",
        "kld_mean_high",
        "bits_per_weight",
        "size_bytes",
        *(
            f"kld_{key}"
            for key in ("min", "p05", "p10", "median", "p90", "p95", "p99", "p999", "max")
        ),
    )
    return pd.DataFrame({column: [0.1, 0.2] for column in columns}, index=[NAME, "Q4_0"])


def drift_tables():
    table = pd.DataFrame(
        {key: [0.1, 0.2] for key in ("error", "cosine", "error_first", "cosine_first")}
    )
    return {NAME: table, "Q4_0": table}


NAMED = {
    "ladder": lambda: quality_figures.ladder(quality(), title=NAME),
    "percentiles": lambda: quality_figures.percentiles(quality(), title=NAME),
    "pareto": lambda: quantization.pareto(
        quality(),
        {"size_bytes": pd.Series(True, index=quality().index)},
        title=NAME,
    ),
    "drift": lambda: quantization.drift(drift_tables(), title=NAME),
    "menu": lambda: quantization.attention(
        {
            name: xr.DataArray(
                np.full((2, 3), 0.1), dims=("layer", "head"), coords={"layer": [0, 1]}
            )
            for name in (NAME, "Q4_0")
        },
        NAME,
        title=NAME,
    ),
    "survival": lambda: heads.survival(
        pd.DataFrame({"labels": [3], "kept": 1, "lost": 1, "gained": 1}, index=["sink"]),
        NAME,
        NAME,
        title=NAME,
    ),
    "heatmap": lambda: theme.heatmap(
        np.eye(2), [NAME, "b"], ["c", NAME], title=NAME, x_title=NAME, y_title=NAME, unit=NAME
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_a_name_is_text_not_markup(page, tmp_path, name):
    page.add_init_script(MATHJAX)
    problems = opened(
        page, tmp_path, pio.to_html(NAMED[name](), include_plotlyjs=True, include_mathjax=False)
    )
    page.wait_for_selector(".gtitle")
    places = (
        ".gtitle, .legendtext, .textpoint text, .xtick text, .ytick text, .updatemenu-item-text, .xtitle, "
        ".ytitle, .cbtitle text"
    )
    texts = [plain(text) for text in page.locator(places).all_text_contents()]
    assert any(plain(NAME) in text for text in texts)
    assert not any("&" in text.replace("' &", "") for text in texts), texts
    said = [plain(text) for text in page.evaluate(HOVERS)]
    assert not any("&lt;" in text or "&#3" in text for text in said)
    nothing_ran(page)
    assert page.evaluate("window.asked") == 0 and problems == []


def arcs():
    nodes = position_table()
    edges = pd.DataFrame(
        {"src": range(1, N), "dst": range(N - 1), "layer": 0, "head": 0, "weight": 0.5}
    )
    edges["kind"] = "head"
    return attention_pages.arcs(nodes, edges, model=NAME, n_layer=2, n_head=2)


def all_heads():
    measures = ("sink", "local")
    values = np.full((2, 2, 2), 0.5)
    profiled = xr.Dataset(
        {
            key: (("measure", "layer", "head"), values)
            for key in ("value", "low", "high", "baseline_high")
        },
        coords={"measure": list(measures), "layer": [0, 1], "head": [0, 1]},
    )
    table = pd.DataFrame({"layer": [0, 0, 1, 1], "head": [0, 1, 0, 1], "labels": "none"})
    return heads_page.dashboard(profiled, table, maps(), PIECES, np.zeros((4, 4)), model=NAME)


def graph():
    nodes = pd.DataFrame({"id": range(N), "piece": PIECES, "label": LABELS, "kind": TEXTS})
    edges = pd.DataFrame({"src": range(N - 1), "dst": range(1, N), "said": TEXTS[1:]})
    return Graph(nodes, edges, label="label", kind="kind", edge_label="said", title=NAME).page()


FACTS = [(0.5, None, None)] * 2  # scale, soft-cap and window of both layers


def vectors():
    return dict(q=np.ones((2, 2, N, 4), "f4"), k=np.ones((2, 1, N, 4), "f4"))


def maps(n=N):
    return xr.DataArray(
        np.broadcast_to(square(n), (2, 2, n, n)), dims=("layer", "head", "query", "key")
    )


# Each with a script that gives one text per piece.
PAGES = {
    "views": (
        lambda: attention_pages.views(maps(), PIECES, FACTS, model=NAME, **vectors()),
        "[...document.querySelectorAll('#query option')].map(o => o.textContent)",
        LABELS,
    ),
    "views without q": (
        lambda: attention_pages.views(maps(), PIECES, FACTS, model=NAME),
        "[...document.querySelectorAll('#query option')].map(o => o.textContent)",
        LABELS,
    ),
    "next": (
        lambda: attention_pages.next_token(np.arange(N, 0, -1.0), PIECES, model=NAME, context=NAME),
        "[...document.querySelectorAll('#bars .row .mono')].map(o => o.textContent)",
        TEXTS[:25],
    ),
    "arcs": (
        arcs,
        "[...document.querySelectorAll('#arcs circle title')].map(o => o.textContent"
        ".split(', received')[0])",
        LABELS,
    ),
    "heads": (all_heads, "DATA.tokens.map((_, i) => label(i))", LABELS),
    "states": (
        lambda: layers_pages.states(np.ones((2, N, 4)), lens_data(), PIECES, PIECES, model=NAME),
        "DATA.tokens.map((_, i) => { page.token = i; drawVector(); return document.getElementById('chosen')"
        ".textContent.slice('state 1, token '.length); })",
        LABELS,
    ),
    "graph": (
        graph,
        "DATA.labels.map((_, i) => { hover(...graph.screen(i)); graph.hovered = i; "
        "return describe(i).split('\\n')[0]; })",
        LABELS,
    ),
    "answers": (
        lambda: quantization_page.answers(
            [{"prompt": NAME, "answers": {"reference": (PIECES, None)}}], model=NAME
        ),
        "[document.querySelector('td.a').textContent]",
        [drawn.text_of(PIECES)],
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_a_page_shows_every_piece_as_it_is(page, tmp_path, name):
    make, script, texts = PAGES[name]
    problems = opened(page, tmp_path, make().html)
    shown = [plain(text).replace("\r", "") for text in page.evaluate(script)]
    assert shown == [plain(text).replace("\r", "") for text in texts]
    assert plain(NAME) in plain(page.text_content("h1"))
    nothing_ran(page)
    assert problems == []


@pytest.mark.slow
def test_tables_show_every_piece_as_it_is(page, tmp_path):
    measured = pd.DataFrame([(text, f"{text} 12.5%") for text in TEXTS], columns=["measured", NAME])
    frame = drawn.token_columns(pd.DataFrame({"piece": PIECES, "to_piece": PIECES, "n": 1.0}))
    own = measured.set_axis(["a", "b"], axis="columns").style.hide(
        axis="index"
    )  # a user's, not made by theme.table
    tables = (theme.table(measured), theme.table(measured, {"measured": "{}"}), own, frame)
    cells = "[...document.querySelectorAll('tbody tr')].map(r => [...r.children].map(c => c.textContent.trim()))"
    for table in tables:
        html = table._repr_html_()
        assert opened(page, tmp_path, f"<!doctype html><meta charset=utf-8>{html}") == []
        rows = page.evaluate(cells)
        assert [plain(text) for row in rows for text in row[-3 if table is frame else 0 : -1]] == [
            plain(text) for text in TEXTS for _ in range(2 if table is frame else 1)
        ]
        nothing_ran(page)
        assert "tex2jax_ignore" in html  # MathJax leaves it alone
    opened(page, tmp_path, theme.table(measured).to_html())
    assert plain(page.locator("thead th").last.text_content()).strip() == plain(NAME)


def test_a_notebook_s_mathjax_leaves_figures_alone():
    shown = theme.OfflineRenderer().to_mimebundle(NAMED["heatmap"]().to_dict())["text/html"]
    assert shown.startswith("<div class='mathjax_ignore tex2jax_ignore'>") and shown.endswith(
        "</div>"
    )


@pytest.mark.slow
@pytest.mark.parametrize("n", [64, 65, 130])
def test_a_page_without_q_and_k_opens_at_any_length(page, tmp_path, n):
    made = attention_pages.views(maps(n), [" w"] * n, FACTS, model="m", max_bytes=1000)
    problems = opened(page, tmp_path, made.html)
    note = page.text_content("p.note")  # the least that a page can hold
    assert "stored within 1/250. To stay small" in note and f"of {n} tokens" in note
    assert (
        page.text_content("#bars") == "q and k were not captured for this page." and problems == []
    )


def order_on_screen(page, selector, marks):
    """Left edges of the given texts, in the order of `marks`, inside one element's first text
    node."""
    return page.evaluate(
        """([selector, marks]) => {
        const node = document.querySelector(selector).firstChild, text = node.textContent; let from = 0;
        return marks.map(mark => { const at = text.indexOf(mark, from), range = document.createRange(); from = at + 1;
          range.setStart(node, at); range.setEnd(node, at + 1); return range.getBoundingClientRect().left; }); }""",
        [selector, marks],
    )


@pytest.mark.slow
@pytest.mark.parametrize("pieces", [["The", " cat"], ["ال", "سلام"], ["של", "ום"], ["١", "٢"]])
def test_numbers_beside_right_to_left_text_keep_their_place(page, tmp_path, pieces):
    q = np.ones((1, 1, 2, 4), "f4")
    one = maps(2).isel(layer=[0], head=[0])
    made = attention_pages.views(one, pieces, FACTS[:1], model="m", q=q, k=q)
    opened(page, tmp_path, made.html)
    left = order_on_screen(page, "#dot", ["1", "·", "0", "=", "scaled", "weight"])
    assert left == sorted(left)

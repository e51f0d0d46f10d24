"""The attention pages: what is packed into them, and what a real browser draws from it."""

import time

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from llamatelemetry.attention import page as pages
from llamatelemetry.attention.output import sampled_probabilities
from llamatelemetry.attention.patterns import attend

PIECES = ["<script>alert(1)</script>", " the", "\n", b"\xff", " cat", " sat"]
N_LAYER, N_HEAD, N_KV, N_EMBD, WIDTH = 3, 4, 2, 8, 6


def made(
    n_layer=N_LAYER,
    n_head=N_HEAD,
    n_kv=N_KV,
    n_token=len(PIECES),
    width=WIDTH,
    window=None,
    softcap=None,
):
    """q, k, v drawn with a seed and everything that attention makes of them, as DataArrays by
    stage."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(n_layer, n_head, n_token, width)).astype(np.float32)
    k, v = rng.normal(size=(2, n_layer, n_kv, n_token, width)).astype(np.float32)
    steps = [
        attend(q[i], k[i], v[i], scale=0.5, window=window, softcap=softcap) for i in range(n_layer)
    ]
    heads = ("layer", "head", "token", "feature")
    maps = ("layer", "head", "query", "key")
    stack = {
        name: np.stack([s[name] for s in steps]).astype(np.float32) for name in steps[0].data_vars
    }
    stream = rng.normal(size=(n_layer + 1, n_token, N_EMBD)).astype(np.float32)
    return {
        "q": xr.DataArray(q, dims=heads),
        "q_pre": xr.DataArray(q, dims=heads),
        "k": xr.DataArray(k, dims=("layer", "kv_head", *heads[2:])),
        "v": xr.DataArray(v, dims=heads),
        "k_pre": xr.DataArray(k, dims=heads),
        "attn_heads": xr.DataArray(stack["head_output"], dims=heads),
        "scores": xr.DataArray(stack["scores"], dims=maps),
        "attention": xr.DataArray(stack["attention"], dims=maps),
        "hidden": stream,
        "attn_norm": stream[1:],
        "attn_out": stream[1:],
    }


def plain(n_layer, softcap=None, window=None):
    """Facts of every layer's softmax."""
    return [(0.5, softcap, window)] * n_layer


def views(data, softcap=None, **options):
    attention = data["attention"]
    vectors = {"q": data["q"], "k": data["k"]}
    pieces, facts = PIECES[: attention.shape[-1]], plain(len(attention), softcap)
    return pages.views(attention, pieces, facts, model="M", **vectors, **options)


def steps_page(data, facts=plain(N_LAYER), **options):
    tokens = pd.DataFrame({"id": range(10, 10 + len(PIECES)), "piece": PIECES})
    written = {
        "written": np.ones((N_LAYER, N_HEAD, N_EMBD), np.float32),
        "difference": np.zeros(N_LAYER),
        "type": np.array(["F32"] * N_LAYER),
    }
    return pages.steps(data, written, tokens, facts, model="M", **options)


@pytest.fixture
def opened(browser, tmp_path):
    """open(page, dark=False): the page in Chromium, ready; fails on any script error or request."""
    contexts, problems = [], []

    def open_(page, dark=False):
        context = browser.new_context(
            color_scheme="dark" if dark else "light", viewport={"width": 900, "height": 900}
        )
        contexts.append(context)
        tab = context.new_page()
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda r: problems.append(r.url) if r.url.startswith("http") else None)
        tab.on("dialog", lambda d: (problems.append("a dialog opened"), d.dismiss()))
        tab.goto(page.save(tmp_path / "page.html").as_uri())
        wait(tab, "window.state && state.ready")
        return tab

    yield open_
    for context in contexts:
        context.close()
    assert problems == []


def wait(tab, condition, seconds=20):
    """Until a condition holds: polled from here, because the page's policy forbids evaluating text
    inside it."""
    end = time.monotonic() + seconds
    while not tab.evaluate(f"!!({condition})"):
        assert time.monotonic() < end, f"{condition} did not hold within {seconds} s"
        time.sleep(0.02)


def test_size_of_a_30_by_9_page_at_64_tokens():
    rng = np.random.default_rng(0)
    a = xr.DataArray(
        rng.random((30, 9, 64, 64), dtype=np.float32), dims=("layer", "head", "query", "key")
    )
    q, k = rng.normal(size=(30, 9, 64, 64)), rng.normal(size=(30, 3, 64, 64))
    page = pages.views(a, ["x"] * 64, plain(30), model="M", q=q, k=k)
    assert len(page.html.encode()) < 5_000_000
    assert "steps of 1/65535, q and k within 1/254 of each vector" in page.html


@pytest.mark.parametrize("bits, error", [(32, 0), (16, 1 / 65534), (8, 1 / 254)])
def test_packed_vectors_are_as_precise_as_the_page_says(bits, error):
    import base64

    x = np.random.default_rng(0).normal(size=(3, 2, 4, 16)).astype(np.float32)
    packed = pages.pack_vectors(x, bits, [0, 2])
    values = packed["values"]
    back = (
        np.frombuffer(base64.b64decode(values["b64"]), values["dtype"])
        .reshape(values["shape"])
        .astype(float)
    )
    if bits < 32:
        back -= 32768 if bits == 16 else 0
        back *= np.frombuffer(base64.b64decode(packed["scales"]["b64"]), np.float32).reshape(
            2, 2, 4, 1
        )
    bound = np.abs(x[[0, 2]]).max(-1, keepdims=True) * (error + 1e-7)
    assert (np.abs(back - x[[0, 2]]) <= bound).all() and packed["layers"] == [0, 2]


@pytest.mark.parametrize(
    "max_bytes, expected",
    [
        (1e9, (32, 32, 8)),
        (1.1e6, (32, 16, 8)),
        (9e5, (16, 16, 8)),
        (6e5, (16, 8, 8)),
        (5e5, (16, 16, 3)),
    ],
)
def test_precision_falls_before_layers_do(max_bytes, expected):
    bits, vector_bits, layers = pages._precision(100_000, 200_000, 8, 5, max_bytes)
    assert (bits, vector_bits, len(layers)) == expected


def test_layers_around_the_chosen_one_stay():
    assert pages._precision(100_000, 800_000, 8, 5, 9.5e5)[2] == [4, 5]
    assert pages._precision(100_000, 800_000, 8, 7, 0) is None  # fewer tokens then


@pytest.mark.slow
@pytest.mark.parametrize("dark", [False, True])
def test_choosing_a_head_redraws_it_with_the_captured_numbers(opened, dark):
    data = made()
    tab = opened(views(data, layer=1, head=2), dark)
    attention = data["attention"].values
    assert (tab.evaluate("state.layer"), tab.evaluate("state.head")) == (1, 2)

    def drawn_equals(layer, head):
        tab.hover("#lines [data-side=query][data-i='5']")
        texts = [tab.text_content(f"#lines [data-value='{i}']") for i in range(6)]
        assert texts == [f"{w:.4f}" for w in attention[layer, head, 5]]
        tab.hover("h1")

    drawn_equals(1, 2)
    before = tab.evaluate("document.getElementById('map').toDataURL()")
    tab.select_option("#layer", "2")
    tab.select_option("#head", "0")
    drawn_equals(2, 0)
    assert tab.text_content("#head-title") == "Layer 2, head 0"
    assert tab.evaluate("document.getElementById('map').toDataURL()") != before
    wait(tab, f"state.thumbnails === {N_LAYER * N_HEAD}")
    box = tab.locator("#grid").bounding_box()  # layer 0, head 3: first column, last row
    tab.mouse.click(box["x"] + 34 + 10, box["y"] + box["height"] - 10)
    drawn_equals(0, 3)
    tab.focus("#grid")
    tab.keyboard.press("ArrowRight")
    assert (tab.evaluate("state.layer"), tab.evaluate("state.head")) == (1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("width", [700, 858, 1000])  # 858: a frame in a notebook's column
def test_all_thumbnails_are_in_view_where_the_frame_is_narrow(opened, width):
    """The last layers of 30 lay outside a frame in a notebook."""
    tab = opened(views(made(n_layer=30)))
    tab.set_viewport_size(
        {"width": width, "height": 900}
    )  # as a frame's, which is set after the page has run
    wait(
        tab,
        "document.getElementById('gridbox').scrollWidth <= document.getElementById('gridbox').clientWidth",
    )
    wait(tab, f"state.thumbnails === {30 * N_HEAD}")


@pytest.mark.slow
def test_lines_follow_threshold_and_filters(opened):
    data = made()
    tab = opened(views(data))
    weights = data["attention"].values[0, 0]
    tab.fill("#threshold", "0.2")
    assert tab.evaluate("state.lines") == (weights >= 0.2).sum()
    tab.check("#nofirst")
    assert tab.evaluate("state.lines") == (weights[:, 1:] >= 0.2).sum()
    tab.uncheck("#nofirst")
    tab.fill("#filter", "cat")  # token 4
    at = np.zeros_like(weights, bool)
    at[4], at[:, 4] = True, True
    assert tab.evaluate("state.lines") == ((weights >= 0.2) & at).sum()


@pytest.mark.slow
def test_dot_products_per_dimension(opened):
    data = made(softcap=2.0)
    tab = opened(views(data, layer=1, head=3, softcap=2.0))
    tab.select_option("#query", "4")
    tab.select_option("#key", "1")
    score = float(data["q"][1, 3, 4] @ data["k"][1, 1, 1])  # heads 2 and 3 read key head 1
    assert tab.evaluate("state.dot") == pytest.approx(score, rel=1e-5)
    cells = tab.locator("#dims tbody tr[data-key='1'] td").all_text_contents()
    assert float(cells[3]) == pytest.approx(score, rel=1e-3)
    assert float(cells[4]) == pytest.approx(2 * np.tanh(score / 2) * 0.5, rel=1e-3)
    assert cells[5] == f"{data['attention'].values[1, 3, 4, 1]:.4f}"
    assert "key head 1 (serves heads 2 to 3)" in tab.text_content("#dims-title")


@pytest.mark.slow
def test_a_32_by_32_page_draws_all_heads_and_answers_meanwhile(opened):
    rng = np.random.default_rng(0)
    a = np.tril(rng.random((32, 32, 64, 64), dtype=np.float32))
    q, k = rng.normal(size=(32, 32, 64, 8)), rng.normal(size=(32, 8, 64, 8))
    a /= a.sum(-1, keepdims=True)
    page = pages.views(a, ["x"] * 64, plain(32), model="M", q=q, k=k)
    tab = opened(page)
    done = tab.evaluate("state.thumbnails")
    tab.select_option("#head", "31")
    assert tab.text_content("#head-title") == "Layer 0, head 31"
    wait(tab, "state.thumbnails === 1024", 60)
    assert done < 1024  # it answered before all were drawn


@pytest.mark.slow
@pytest.mark.parametrize("window, softcap", [(None, None), (3, 1.5)])
def test_the_step_view_recomputes_what_was_captured(opened, window, softcap):
    data = made(window=window, softcap=softcap)
    tab = opened(steps_page(data, plain(N_LAYER, softcap, window), layer=1, head=1))
    for layer, head in ((1, 1), (2, 3)):
        tab.select_option("#layer", str(layer))
        tab.click(f"[data-head='{head}']")
        assert (
            tab.evaluate("state.captured.weights")
            == data["attention"].values[layer, head, 5].tolist()
        )
        mine = tab.evaluate("state.recomputed.weights")
        np.testing.assert_allclose(mine, data["attention"][layer, head, 5], atol=1e-6)
        assert tab.evaluate("state.difference.output") < 1e-5
    masked = tab.locator("#steps tr.masked").count()
    assert masked == (0 if window is None else 6 - window)
    assert "reads key and value head 1, as do heads 2 to 3" in tab.text_content("#steps")


@pytest.mark.slow
def test_the_step_view_would_show_a_difference(opened):
    data = made()
    data["attention"] = data["attention"] * 0.5
    assert opened(steps_page(data)).evaluate("state.difference.weights") > 0.1


SETTINGS = [
    dict(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05),
    dict(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
    dict(temperature=1.5, top_k=7, top_p=0.6, min_p=0.0),
    dict(temperature=0.5, top_k=0, top_p=1.0, min_p=0.3),
    dict(temperature=0.0, top_k=5, top_p=1.0, min_p=0.0),
]


@pytest.mark.slow
def test_next_token_page_samples_as_the_chain_does(opened):
    logits = np.random.default_rng(0).normal(size=300).astype(np.float32) * 3
    vocabulary = [f"t{i}" for i in range(300)]
    tab = opened(pages.next_token(logits, vocabulary, model="M"))
    order = np.argsort(-logits)
    for settings in SETTINGS:
        for name, value in settings.items():
            tab.fill(f"#{name}", str(value))
        expected = sampled_probabilities(logits, **settings)
        assert tab.evaluate("state.kept") == np.count_nonzero(expected)
        got = tab.evaluate("state.probabilities")
        np.testing.assert_allclose(got, expected[order][: len(got)], atol=1e-9)
    assert (
        tab.locator("#bars .row").nth(1).locator("span").first.text_content()
        == vocabulary[order[0]]
    )


@pytest.mark.slow
def test_token_text_is_shown_and_not_run(opened):
    tab = opened(views(made()))
    labels = [tab.text_content(f"#lines [data-side=key][data-i='{i}']") for i in range(6)]
    assert labels == ["0 <script>al…", "1 ␣the", "2 ⏎", "3 <0xFF>", "4 ␣cat", "5 ␣sat"]
    assert (
        opened(steps_page(made()))
        .locator("#steps")
        .text_content()
        .startswith("Token and its embedding")
    )


@pytest.mark.slow
def test_arcs_are_filtered_by_layer_head_and_weight(opened):
    edges = pd.DataFrame(
        {
            "src": [1, 2, 2, 3, 3],
            "dst": [0, 1, 1, 2, 0],
            "layer": [0, 0, 1, 1, 4],
            "head": [0, 1, 1, 0, -1],
            "weight": [0.4, 0.5, 0.6, 0.9, 0.7],
            "kind": ["head"] * 4 + ["rollout"],
        }
    )
    nodes = pd.DataFrame(
        {"piece": PIECES[:4], "received": [0.9, 0.1, 0.2, 0.0], "pagerank": [0.4, 0.2, 0.2, 0.2]}
    )
    tab = opened(pages.arcs(nodes, edges, model="M", n_layer=2, n_head=2))
    assert (tab.evaluate("state.edges"), tab.evaluate("state.arcs")) == (
        4,
        3,
    )  # two heads on one pair
    assert tab.locator("path.rollout").count() == 1
    tab.select_option("#layer", "1")
    assert tab.evaluate("state.edges") == 2
    tab.select_option("#head", "1")
    assert tab.locator("path.head").count() == 1
    assert "layer 1 head 1 0.60" in tab.locator("path.head title").text_content()
    tab.select_option("#layer", "-1")
    tab.select_option("#head", "-1")
    tab.fill("#threshold", "0.55")
    assert tab.evaluate("state.edges") == 2


@pytest.mark.parametrize(
    "n_layer, n_head, n_kv, n_query, n_token, width",
    [(30, 9, 3, 200, 200, 64), (30, 9, 3, 60, 2000, 64), (32, 32, 8, 64, 64, 128)],
)
def test_a_page_of_a_long_text_holds_its_limit(n_layer, n_head, n_kv, n_query, n_token, width):
    shape = (n_layer, n_head, n_query, n_token)
    attention = xr.DataArray(np.full(shape, 1 / n_token, np.float32), dims=MAPS)
    q = np.ones((n_layer, n_head, n_token, width), np.float32)
    shown = pages.views(
        attention, [" w"] * n_token, plain(n_layer), model="M", q=q, k=q[:, :n_kv], layer=3
    )
    assert len(shown.html) < 5e6
    if n_token > 64:
        assert f"of {n_token:,} tokens" in shown.html


MAPS = ("layer", "head", "query", "key")


def test_the_last_tokens_of_a_long_text_keep_their_weights():
    """Rows of the last queries only: the page's own triangle has them, and the first token's."""
    attention = made(n_token=6)["attention"]
    among = pages._among(attention[:, :, 3:], np.array([0, 4, 5]))
    assert (among[:, :, 0] == [1, 0, 0]).all()
    np.testing.assert_array_equal(among[:, :, 1:], attention.values[:, :, 4:][..., [0, 4, 5]])

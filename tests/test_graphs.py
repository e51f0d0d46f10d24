"""graphs.py: tables that do not fit together, the offline page in a real browser, and the upload
with the real PyGraphistry client against a local server that decodes what arrives."""

import io
import json
import re
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pandas as pd
import pytest

from llamatelemetry.errors import GraphistryError
from llamatelemetry.graphs import Graph, upload
from llamatelemetry.views import theme
from llamatelemetry.views.graph_page import categories, graph_page
from llamatelemetry.views.page import Page

EVIL = "<script>window.bad = 1</script>"
KEY, SECRET = "KEYID12345", "very-secret-0123456789"


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch):
    """Nothing on this machine may make a test upload: no secrets but those that a test sets
    itself."""
    for name in (*upload.KEY_ID, *upload.SECRET, "GRAPHISTRY_HOSTNAME", "GRAPHISTRY_PROTOCOL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "kaggle_secrets", None)


def tables():
    nodes = pd.DataFrame(
        {
            "id": ["a", "b", "c", "d", "e"],
            "piece": [" the", EVIL, "\n", "plain", "</script><b>"],
            "kind": ["word", "word", "mark", "word", "mark"],
            "norm": [1.0, 2.0, 3.0, np.nan, 0.5],
            "px": [0.0, 1.0, 0.0, 1.0, 0.5],
            "py": [0.0, 0.0, 1.0, 1.0, 0.5],
        }
    )
    edges = pd.DataFrame(
        {
            "src": list("abca"),
            "dst": list("bcda"),
            "w": [0.9, 0.5, 0.2, 0.7],
            "via": ["q", "k", None, "q"],
        }
    )
    return nodes, edges


def small(**changes):
    nodes, edges = tables()
    options = dict(
        title="a graph", label="piece", kind="kind", size="norm", weight="w", position=("px", "py")
    )
    return Graph(nodes, edges, **{**options, **changes})


# Tables


def changed(table, change):
    nodes, edges = tables()
    return (change(nodes), edges) if table == "nodes" else (nodes, change(edges))


@pytest.mark.parametrize(
    "table, change, options, message",
    [
        (
            "nodes",
            lambda t: t.drop(columns="id"),
            {},
            r"nodes has no column 'id'; it has \['piece'",
        ),
        ("edges", lambda t: t.drop(columns="dst"), {}, "edges has no column 'dst'"),
        ("nodes", lambda t: t, {"color": "colour"}, "nodes has no column 'colour'"),
        ("nodes", lambda t: t, {"position": ("px", "z")}, "nodes has no column 'z'"),
        ("edges", lambda t: t, {"weight": "strength"}, "edges has no column 'strength'"),
        ("nodes", lambda t: t.iloc[:0], {}, "node table is empty"),
        (
            "nodes",
            lambda t: t.assign(id=["a", "b", "b", "d", "b"]),
            {},
            r"2 repeated id\(s\), the first 'b'",
        ),
        (
            "nodes",
            lambda t: t.assign(id=["a", None, "c", "d", "e"]),
            {},
            r"1 row\(s\) of nodes\['id'\] are empty",
        ),
        (
            "edges",
            lambda t: t.assign(src=["a", None, "c", "a"]),
            {},
            r"1 row\(s\) of edges\['src'\] are empty",
        ),
        (
            "edges",
            lambda t: t.assign(dst=["b", "x", "d", "y"]),
            {},
            r"2 of 4 edges name an id.*\['b', 'x'\]",
        ),
        (
            "edges",
            lambda t: t.assign(src=range(4), dst=range(4)),
            {},
            "4 of 4 edges name an id that is not in",
        ),
        ("edges", lambda t: t.assign(w=[1, np.nan, 1, 1]), {"weight": "w"}, "NaN or infinity"),
        ("edges", lambda t: t, {"weight": "via"}, "must be numbers"),
        ("nodes", lambda t: t, {"size": "kind"}, "must be numbers"),
        (
            "nodes",
            lambda t: t.assign(norm=True),
            {"size": "norm"},
            r"nodes\['norm'\] must be numbers, not bool",
        ),
        ("nodes", lambda t: t, {"position": ("px", "kind")}, r"nodes\['kind'\] must be numbers"),
        (
            "nodes",
            lambda t: t.assign(px=[0, 0, 0, np.inf, 0]),
            {"position": ("px", "py")},
            "needs a position",
        ),
        ("nodes", lambda t: t, {"position": ("px", "py", "norm")}, "two columns"),
        ("nodes", lambda t: t.to_dict("list"), {}, "must be a DataFrame, not dict"),
        ("nodes", lambda t: t.rename(columns={"px": "py"}), {}, "the column 'py' twice"),
    ],
)
def test_tables_that_do_not_fit_are_refused(table, change, options, message):
    with pytest.raises(ValueError, match=message):
        Graph(*changed(table, change), **options)


def chain(nodes, **options):
    """A graph of three nodes in a row."""
    return Graph(
        pd.DataFrame({"id": [1, 2, 3]} | nodes),
        pd.DataFrame({"src": [1, 2], "dst": [2, 3]}),
        **options,
    )


@pytest.mark.parametrize(
    "values, names",
    [
        (pd.array([True, None, False], "boolean"), ["False", "True"]),
        (np.array([True, None, False], object), ["False", "True"]),
        (
            pd.to_datetime(["2024-01-02", None, "2024-03-01"]),
            ["2024-01-02 00:00:00", "2024-03-01 00:00:00"],
        ),
        (pd.Categorical(["a", None, "b"]), ["a", "b"]),
        (pd.Categorical([2, None, 10]), ["10", "2"]),
        (["a", None, np.nan], ["a"]),
        ([b"\xf0\x9f", np.nan, " x"], ["␣x", "<0xF0><0x9F>"]),
        (pd.to_timedelta([1, 2, 2], "D"), ["2 days 00:00:00", "1 days 00:00:00"]),
        ([[1], {"a": 1}, None], ["[1]", "{'a': 1}"]),
    ],
)
@pytest.mark.parametrize("role", ["color", "kind"])
def test_columns_of_any_type_give_colours_and_kinds(tmp_path, values, names, role):
    graph = chain({"c": values}, **{role: "c"})
    shown = page_data(graph.page())[role]
    assert shown["names"] == names
    saved = pd.read_parquet(graph.save(tmp_path)["nodes"])
    assert saved["c"].isna().tolist() == [
        bool(missing) for missing in pd.isna(pd.Series(list(values), dtype=object))
    ]


@pytest.mark.parametrize(
    "values",
    [pd.array([1, None, 3], "Int64"), [1, np.nan, 3], [1, np.inf, 3], np.array([1, 2, 3], "u8")],
)
def test_numbers_of_any_type_give_sizes(tmp_path, values):
    graph = chain({"s": values}, size="s", color="s")
    data = page_data(graph.page())
    assert data["size"]["range"] == [1, 3] and data["color"] == data["size"]
    graph.save(tmp_path)


def test_a_missing_label_is_the_id():
    assert page_data(chain({"p": [b"\xf0", np.nan, None]}, label="p").page())["labels"] == [
        "<0xF0>",
        "2",
        "3",
    ]


@pytest.mark.parametrize(
    "taken", [["x"], ["y"], ["x", "layout_x"], ["x", "layout_y", "layout_2_y"], ["src", "dst"]]
)
def test_own_columns_are_never_written_over(tmp_path, taken):
    graph = chain({name: [7, 8, 9] for name in taken})
    nodes, _, (x, y) = graph.tables
    assert not {x, y} & set(taken) and all(nodes[name].tolist() == [7, 8, 9] for name in taken)
    assert set(pd.read_parquet(graph.save(tmp_path)["nodes"])) == {"id", *taken, x, y}


def test_column_names_may_be_numbers():
    graph = Graph(
        pd.DataFrame({0: [1, 2], 1: ["a", "b"]}), pd.DataFrame({5: [1], 6: [2]}), 0, 5, 6, label=1
    )
    assert page_data(graph.page())["labels"] == ["a", "b"] and graph.pairs.tolist() == [[0, 1]]


def test_ids_that_floats_cannot_tell_apart_are_refused():
    nodes = pd.DataFrame({"id": [2**60, 2**60 + 1]})
    with pytest.raises(
        ValueError, match=r"nodes\['id'\] is int64 and edges\['src'\] is float64.*2\*\*53"
    ):
        Graph(nodes, pd.DataFrame({"src": [float(2**60)], "dst": [2**60 + 1]}))
    whole = Graph(nodes, pd.DataFrame({"src": [2**60], "dst": [2**60 + 1]}))
    assert whole.pairs.tolist() == [[0, 1]] and page_data(whole.page())["labels"][1] == str(
        2**60 + 1
    )


def test_a_column_without_a_type_in_parquet_is_named(tmp_path):
    graph = chain({"z": [1j, 2j, 3j]})
    with pytest.raises(
        ValueError,
        match=r"nodes\['z'\] \(complex128\) has no type in a Parquet file.*astype\(str\)",
    ):
        graph.save(tmp_path)


def test_a_graph_without_edges_is_one(tmp_path):
    nodes, edges = tables()
    graph = Graph(nodes, edges.iloc[:0], weight="w")
    saved = graph.save(tmp_path)
    assert graph.positions.shape == (5, 2) and len(np.unique(graph.positions, axis=0)) == 5
    assert len(pd.read_parquet(saved["edges"])) == 0 and "w" in pd.read_parquet(saved["edges"])


def test_given_positions_are_kept_and_missing_ones_computed_once():
    nodes, edges = tables()
    given = small()
    np.testing.assert_array_equal(given.positions, nodes[["px", "py"]].to_numpy(dtype=np.float32))
    computed = Graph(nodes, edges, seed=3)
    assert computed.positions is computed.positions
    np.testing.assert_array_equal(computed.positions, Graph(nodes, edges, seed=3).positions)
    assert not {"x", "y"} & set(computed.nodes) and {"x", "y"} <= set(computed.tables[0])
    taken = Graph(nodes.assign(x=0), edges)
    assert taken.tables[2] == ("layout_x", "layout_y") and (taken.tables[0]["x"] == 0).all()


def test_the_backend_that_is_named_computes_the_layout():
    class Backend:
        def layout(self, pairs, n, weights, dims, seed):
            self.seen = pairs.tolist(), n, None if weights is None else weights.tolist(), dims, seed
            return np.arange(2 * n, dtype=np.float32).reshape(n, 2)

    backend, graph = Backend(), small(position=None, seed=7)
    np.testing.assert_array_equal(graph.layout(backend)[4], [8, 9])
    assert backend.seen == ([[0, 1], [1, 2], [2, 3], [0, 0]], 5, [0.9, 0.5, 0.2, 0.7], 2, 7)


def test_saved_tables_come_back(tmp_path):
    nodes, edges = tables()
    nodes["raw"] = [b"\xff", b" x", "text", None, "y"]  # pieces that are bytes
    graph = Graph(nodes, edges, label="raw")
    saved = graph.save(tmp_path / "new", "g-1.0")
    written = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert written == ["g-1.0.edges.parquet", "g-1.0.html", "g-1.0.nodes.parquet"]
    back = pd.read_parquet(saved["nodes"])
    pd.testing.assert_frame_equal(
        back.drop(columns=["raw", "x", "y"]), nodes.drop(columns="raw"), check_dtype=False
    )
    assert back["raw"].tolist()[:3] == ["<0xFF>", "␣x", "text"] and back["raw"].isna().tolist()[3]
    np.testing.assert_array_equal(back[["x", "y"]].to_numpy(dtype=np.float32), graph.positions)
    pd.testing.assert_frame_equal(pd.read_parquet(saved["edges"]), edges, check_dtype=False)


@pytest.mark.parametrize("name", ["../up", "a/b", ""])
def test_names_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="name must be"):
        small().save(tmp_path, name)


def test_categories_are_ordered_by_how_often_they_occur():
    names, codes = categories(pd.Series(["b", "a", None, "b", "c", "a", "b"]))
    assert names == ["b", "a", "c"] and codes.tolist() == [0, 1, -1, 0, 2, 1, 0]
    ranked = pd.Categorical(["b", "a", "b"], categories=["z", "a", "b"], ordered=True)
    names, codes = categories(pd.Series(ranked))  # unless they have an order, as colours elsewhere
    assert names == ["a", "b"] and codes.tolist() == [1, 0, 1]


def page_data(page):
    return json.loads(re.search(r"id='data'>(.*?)</script>", page.html, re.S).group(1))


def test_kinds_with_an_order_keep_it_on_the_page_and_in_the_files(tmp_path):
    nodes, edges = tables()
    ranked = nodes["kind"].astype(pd.CategoricalDtype(["mark", "word"], ordered=True))
    graph = Graph(nodes.assign(kind=ranked), edges, title="t", label="piece", kind="kind")
    assert page_data(small().page())["kind"]["names"] == ["word", "mark"]
    assert page_data(graph.page())["kind"]["names"] == ["mark", "word"]
    saved = pd.read_parquet(graph.save(tmp_path)["nodes"])
    assert saved["kind"].tolist() == nodes["kind"].tolist()


def test_the_page_asks_no_network_and_escapes_its_data():
    html = small(title=EVIL).page().html
    assert "window.bad" in html and EVIL not in html and "</script><b>" not in html
    assert "default-src 'none'" in html and not re.search(
        r"(src|href)\s*=\s*['\"]?(https?:)?//", html
    )
    data = page_data(small(title=EVIL).page())
    assert data["labels"] == ["␣the", EVIL, "⏎", "plain", "</script><b>"]


# The page in a browser


def opened(page, graph_or_page, tmp_path):
    shown = graph_or_page if isinstance(graph_or_page, Page) else graph_or_page.page()
    page.errors = []
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.on(
        "request",
        lambda request: (
            page.errors.append(request.url) if not request.url.startswith("file:") else None
        ),
    )
    page.goto(shown.save(tmp_path / "graph.html").as_uri())
    page.wait_for_function("window.graph && graph.drawnEdges === graph.shownEdges")
    page.wait_for_timeout(100)
    return page


def colors_on(page):
    """How many pixels of each colour the canvas shows."""
    return page.evaluate(
        """() => { const c = document.getElementById('canvas');
        const d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
        const count = {}; for (let i = 0; i < d.length; i += 4) {
          const k = '#' + [d[i], d[i+1], d[i+2]].map(v => v.toString(16).padStart(2, '0')).join('').toUpperCase();
          count[k] = (count[k] || 0) + 1; } return count; }"""
    )


def move_to(page, node):
    box = page.locator("#canvas").bounding_box()
    x, y = page.evaluate(f"graph.screen({node})")
    page.mouse.move(box["x"] + x, box["y"] + y)
    return box["x"] + x, box["y"] + y


@pytest.mark.slow
@pytest.mark.parametrize("scheme, background", [("light", "#FFFFFF"), ("dark", "#141414")])
def test_page_draws_every_kind_in_its_colour(page, tmp_path, scheme, background):
    page.emulate_media(color_scheme=scheme)
    opened(page, small(), tmp_path)
    found = colors_on(page)
    assert max(found, key=found.get) == background
    for color in theme.CATEGORIES[:2]:  # word, mark
        assert found.get(color.upper(), 0) > 50
    assert page.errors == []


@pytest.mark.slow
def test_search_finds_and_enter_goes_there(page, tmp_path):
    opened(page, small(), tmp_path)
    page.fill("#search", "PLAIN")
    assert page.evaluate("graph.matches") == [3] and "1 found" in page.inner_text("#found")
    page.press("#search", "Enter")
    width, height = page.evaluate("[canvas.clientWidth, canvas.clientHeight]")
    assert page.evaluate("graph.screen(3)") == pytest.approx([width / 2, height / 2], abs=1)
    page.fill("#search", "nowhere")
    assert page.evaluate("graph.matches") == [] and "0 found" in page.inner_text("#found")


@pytest.mark.slow
def test_a_kind_can_be_taken_away(page, tmp_path):
    opened(page, small(), tmp_path)
    assert page.evaluate("[graph.shownNodes, graph.shownEdges]") == [5, 4]
    page.uncheck("input[data-kind=mark]")
    assert page.evaluate("[...graph.shown]") == [1, 1, 0, 1, 0]
    assert page.evaluate("[graph.shownNodes, graph.shownEdges]") == [
        3,
        2,
    ]  # a-b and the loop at a are left
    page.wait_for_timeout(200)
    found = colors_on(page)
    assert (
        found.get(theme.CATEGORIES[1].upper(), 0) == 0
        and found.get(theme.CATEGORIES[0].upper(), 0) > 50
    )
    assert "3 of 5 nodes" in page.inner_text("#status")


@pytest.mark.slow
def test_the_weight_filter_keeps_the_heavier_edges(page, tmp_path):
    opened(page, small(), tmp_path)
    for value, kept in ((0, 4), (400, 3), (1000, 1)):
        page.evaluate(
            f"() => {{ const s = $('weight'); s.value = {value}; s.dispatchEvent(new Event('input')); }}"
        )
        assert page.evaluate("graph.shownEdges") == kept
    assert page.inner_text("#weightvalue") == "0.9" and page.evaluate("graph.shownNodes") == 5


@pytest.mark.slow
def test_hover_shows_text_and_runs_none_of_it(page, tmp_path):
    opened(page, small(), tmp_path)
    move_to(page, 1)
    assert page.evaluate("graph.hovered") == 1
    assert page.inner_text("#tip").splitlines() == [
        EVIL,
        "kind: word",
        "norm: 2",
        "px: 1",
        "py: 0",
        "edges: 2",
    ]
    move_to(page, 3)
    assert "norm" not in page.inner_text("#tip")  # an empty cell is not shown as a number
    assert page.evaluate(
        "[window.bad === undefined, document.querySelectorAll('script').length]"
    ) == [True, 2]
    assert page.errors == []


@pytest.mark.slow
def test_click_lists_the_neighbours_and_escape_clears(page, tmp_path):
    opened(page, small(edge_label="via"), tmp_path)
    page.mouse.click(*move_to(page, 1))
    assert page.evaluate("graph.selected") == 1
    assert page.locator("#side button").all_inner_texts() == ["← ␣the\nq 0.9", "→ ⏎\nk 0.5"]
    page.locator("#side button").first.click()
    assert page.evaluate("graph.selected") == 0
    page.keyboard.press("Escape")
    assert page.evaluate("graph.selected") == -1 and page.locator("#side").is_hidden()


@pytest.mark.slow
def test_wheel_zooms_about_the_pointer_and_drag_moves(page, tmp_path):
    opened(page, small(), tmp_path)
    at, scale = page.evaluate("graph.screen(2)"), page.evaluate("graph.scale")
    move_to(page, 2)
    page.mouse.wheel(0, -300)
    page.wait_for_function(f"graph.scale > {scale * 1.2}")
    assert page.evaluate("graph.screen(2)") == pytest.approx(at, abs=1)
    page.mouse.down()
    x, y = (int(v) for v in page.evaluate("[60, 25]"))
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + at[0] + x, box["y"] + at[1] + y)
    page.mouse.up()
    assert page.evaluate("graph.screen(2)") == pytest.approx([at[0] + x, at[1] + y], abs=1)
    assert page.evaluate("graph.selected") == -1  # a drag is no click
    page.click("#fit")
    assert page.evaluate("graph.screen(2)") == pytest.approx(at, abs=1)


@pytest.mark.slow
def test_numeric_colours_and_edge_colours(page, tmp_path):
    opened(page, small(color="norm", size=None, edge_color="via", label=None), tmp_path)
    legend = page.inner_text("#legend")
    assert "norm 0.5" in legend and "3" in legend and "via" in legend and "q" in legend
    found = colors_on(page)
    assert found.get(theme.MISSING.upper(), 0) > 20  # the node whose norm is empty
    assert page.errors == []


@pytest.mark.slow
def test_five_thousand_nodes_and_twenty_thousand_edges_draw_whole(page, tmp_path):
    rng = np.random.default_rng(0)
    n, m = 5000, 20000
    positions, pairs = rng.normal(size=(n, 2)), rng.integers(0, n, (m, 2))
    kinds = pd.Series([f"kind {i % 12}" for i in range(n)], name="kind")
    shown = graph_page(
        positions,
        pairs,
        title="large",
        labels=[f"node {i}" for i in range(n)],
        color=kinds,
        kind=kinds,
        weight=pd.Series(rng.random(m), name="w"),
    )
    opened(page, shown, tmp_path)
    assert page.evaluate("[graph.shownNodes, graph.drawnEdges]") == [n, m]
    assert (
        "5 others" not in page.inner_text("#legend") and page.locator("#legend input").count() == 12
    )
    box = page.locator("#canvas").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 200)
    page.mouse.down()
    for step in range(20):
        page.mouse.move(box["x"] + 300 + 4 * step, box["y"] + 200)
    page.mouse.up()
    assert page.evaluate("graph.frames.length") > 0 and page.errors == []


# Graphistry


class Hub(BaseHTTPRequestHandler):
    """The few endpoints of a Graphistry server that an upload needs; writes down what arrives in
    `server.log`."""

    def answer(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def do_GET(self):
        if self.path != "/api/v2/auth/pkey/jwt/":
            return self.answer({"error": self.path}, 404)
        good = self.headers["Authorization"] == f"PersonalKey {KEY}:{SECRET}"
        self.server.log.append(("login", good))
        self.answer(
            {"token": "a.b.c"} if good else {"detail": f"invalid key {SECRET}"},
            200 if good else 401,
        )

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        path = self.path.split("?")[0]
        if path == "/api/v2/auth/token/refresh":
            return self.answer({"token": "a.b.c"})
        assert self.headers["Authorization"] == "Bearer a.b.c"
        if self.server.broken == path:
            return self.answer({"error": "storage is full"}, 500)
        if path == "/api/v2/upload/datasets/":
            self.server.log.append(("dataset", json.loads(body)))
            return self.answer({"success": True, "data": {"dataset_id": "d-1"}})
        if match := re.fullmatch("/api/v2/upload/datasets/d-1/(nodes|edges)/arrow", path):
            import pyarrow as pa

            table = pa.ipc.open_file(io.BytesIO(body)).read_all()
            self.server.log.append((match.group(1), table.to_pandas()))
            return self.answer({"success": True})
        if path == "/api/v2/share/link/":
            self.server.log.append(("share", json.loads(body)))
            return self.answer({"success": True})
        self.answer({"error": path}, 404)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub(monkeypatch):
    pytest.importorskip("graphistry")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.log, server.broken = [], None
    server.name = f"127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("Graphistry_Personal_Key_ID", KEY)
    monkeypatch.setenv("Graphistry_Personal_Secret_Key", SECRET)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def test_upload_sends_the_tables_as_they_are_saved(hub, tmp_path, capsys):
    graph = small(position=None, edge_color="via", edge_label="via")
    shown = graph.show(server=hub.name, protocol="http", folder=tmp_path, name="g")
    sent = dict(hub.log)
    assert sent["login"] is True
    for part in ("nodes", "edges"):
        pd.testing.assert_frame_equal(
            sent[part], pd.read_parquet(tmp_path / f"g.{part}.parquet"), check_dtype=False
        )
    np.testing.assert_array_equal(
        sent["nodes"][["x", "y"]].to_numpy(dtype=np.float32), graph.positions
    )
    assert (sent["share"]["mode"], sent["share"]["obj_pk"], sent["share"]["notify"]) == (
        "private",
        "d-1",
        False,
    )
    assert [kind for kind, _ in hub.log][-1] == "share"

    dataset = sent["dataset"]
    assert dataset["name"] == "a graph"
    nodes, edges = dataset["node_encodings"], dataset["edge_encodings"]
    assert nodes["bindings"] == {
        "node": "id",
        "node_title": "piece",
        "node_size": "norm",
        "node_x": "x",
        "node_y": "y",
    }
    assert edges["bindings"] == {
        "source": "src",
        "destination": "dst",
        "edge_weight": "w",
        "edge_title": "via",
    }
    color = nodes["complex"]["default"]["pointColorEncoding"]
    assert (
        color["attribute"] == "kind" and color["mapping"]["categorical"]["other"] == theme.MISSING
    )
    assert color["mapping"]["categorical"]["fixed"] == dict(zip(["word", "mark"], theme.CATEGORIES))
    assert edges["complex"]["default"]["edgeColorEncoding"]["attribute"] == "via"

    assert (
        shown.url.startswith(f"http://{hub.name}/graph/graph.html?dataset=d-1")
        and "play=0" in shown.url
    )
    assert (
        "<iframe" in shown._repr_html_()
        and shown.privacy == "private"
        and SECRET not in repr(vars(shown))
    )
    said = capsys.readouterr().out
    assert f"uploading 5 nodes and 4 edges to {hub.name}, private" in said and SECRET not in said


def test_upload_can_be_public_and_numeric_colours_go_along(hub, tmp_path):
    small(color="norm").show(server=hub.name, protocol="http", folder=tmp_path, privacy="public")
    sent = dict(hub.log)
    color = sent["dataset"]["node_encodings"]["complex"]["default"]["pointColorEncoding"]
    assert sent["share"]["mode"] == "public" and (color["attribute"], color["variation"]) == (
        "norm",
        "continuous",
    )


def test_credentials_may_be_kaggle_secrets(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("Graphistry_Personal_Key_ID")
    monkeypatch.delenv("Graphistry_Personal_Secret_Key")
    secrets = {"Graphistry_Personal_Key_ID": KEY, "Graphistry_Personal_Secret_Key": SECRET}

    class UserSecretsClient:
        def get_secret(self, name):
            if name not in secrets:
                raise ValueError(
                    "No user secrets exist for kernel"
                )  # Kaggle raises types of its own
            return secrets[name]

    monkeypatch.setitem(
        sys.modules, "kaggle_secrets", types.SimpleNamespace(UserSecretsClient=UserSecretsClient)
    )
    small().show(server=hub.name, protocol="http", folder=tmp_path)
    assert ("login", True) in hub.log
    secrets.clear()
    assert upload.graphistry_credentials() is None


def test_upload_false_sends_nothing(hub, tmp_path):
    assert isinstance(
        small().show(upload=False, server=hub.name, protocol="http", folder=tmp_path), Page
    )
    assert hub.log == [] and list(tmp_path.iterdir()) == []


def refused(graph, folder, **options):
    """The GraphistryError of an upload; the tables must have been saved, and the secret must not be
    in the message."""
    with pytest.raises(GraphistryError) as caught:
        graph.show(folder=folder, **options)
    message = str(caught.value)
    assert SECRET not in message and str(folder) in message
    assert {path.suffix for path in folder.iterdir()} == {".parquet", ".html"}
    pd.testing.assert_frame_equal(
        pd.read_parquet(folder / "graph.edges.parquet"), tables()[1], check_dtype=False
    )
    return message


def test_wrong_credentials(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("Graphistry_Personal_Key_ID", "SOMEBODY")
    message = refused(small(), tmp_path, server=hub.name, protocol="http")
    assert "logging in" in message and "401" in message and "personal key id" in message
    assert {kind for kind, _ in hub.log} == {"login"}  # and nothing was sent


@pytest.mark.parametrize("path", ["/api/v2/upload/datasets/d-1/nodes/arrow", "/api/v2/share/link/"])
def test_a_server_that_breaks_off(hub, tmp_path, path):
    hub.broken = path
    message = refused(small(), tmp_path, server=hub.name, protocol="http")
    assert "uploading" in message and "default visibility" in message


def test_no_network(hub, tmp_path):
    hub.shutdown()
    hub.server_close()
    message = refused(small(), tmp_path, server=hub.name, protocol="http")
    assert "reaching the server" in message and "internet" in message


def test_missing_credentials_when_an_upload_is_insisted_on(tmp_path):
    message = refused(small(), tmp_path, upload=True)
    assert "Graphistry_Personal_Key_ID and Graphistry_Personal_Secret_Key are not set" in message


def test_half_of_the_credentials(monkeypatch, tmp_path):
    monkeypatch.setenv("GRAPHISTRY_PERSONAL_KEY_ID", KEY)
    with pytest.raises(GraphistryError, match="Graphistry_Personal_Secret_Key is not"):
        small().show(folder=tmp_path)


def test_unknown_privacy(hub, tmp_path):
    assert "privacy must be" in refused(
        small(), tmp_path, server=hub.name, protocol="http", privacy="secret"
    )
    assert hub.log == []


def test_without_credentials_the_page_is_shown(tmp_path):
    shown = small().show(folder=tmp_path)
    assert (
        isinstance(shown, Page)
        and "srcdoc" in shown._repr_html_()
        and list(tmp_path.iterdir()) == []
    )

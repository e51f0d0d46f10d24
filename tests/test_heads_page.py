"""The dashboard of heads in a real browser: what it shows are the numbers that it was given."""

import time

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from llamatelemetry.heads import figures
from llamatelemetry.heads import page as heads_page

PIECES = ["<script>alert(1)</script>", " the", "\n", b"\xff", " cat", " sat", " on"]
N_LAYER, N_HEAD = 4, 3
MEASURES = ["sink", "semantic", "entropy"]


def made(n_layer=N_LAYER, n_head=N_HEAD, n=len(PIECES)):
    rng = np.random.default_rng(0)
    shape = (len(MEASURES), n_layer, n_head)
    value = rng.normal(size=shape)
    data = {
        "value": value,
        "low": value - 0.1,
        "high": value + 0.2,
        "baseline": value * 0,
        "baseline_high": value * 0 + 0.3,
    }
    profiled = xr.Dataset(
        {k: (("measure", "layer", "head"), v) for k, v in data.items()},
        {"measure": MEASURES, "layer": range(n_layer), "head": range(n_head)},
    )
    attention = np.tril(rng.random((n_layer, n_head, n, n)))
    attention /= attention.sum(-1, keepdims=True)
    points = rng.normal(size=(n_layer * n_head, 2))
    distance = np.linalg.norm(points[:, None] - points[None], axis=-1)
    layer, head = np.divmod(np.arange(n_layer * n_head), n_head)
    table = pd.DataFrame({"layer": layer, "head": head, "cluster": np.arange(len(head)) % 3})
    table["labels"] = np.where(head > 0, "none", "sink, local")
    dims = ("layer", "head", "query", "key")
    return profiled, table, xr.DataArray(attention.astype(np.float32), dims=dims), distance


def dashboard(**options):
    profiled, table, attention, distance = made()
    losses = table.assign(loss_change=np.linspace(-1, 1, 12))
    options = {"model": "M <b>", "losses": losses} | options
    return heads_page.dashboard(profiled, table, attention, PIECES, distance, **options)


@pytest.fixture
def page(browser, tmp_path):
    opened, requests, problems = browser.new_page(viewport={"width": 900, "height": 1000}), [], []
    opened.on("request", lambda request: requests.append(request.url))
    opened.on("pageerror", lambda error: problems.append(str(error)))
    opened.on("dialog", lambda dialog: (problems.append(dialog.message), dialog.dismiss()))

    def show(made_page):
        opened.goto(made_page.save(tmp_path / "page.html").as_uri())
        return opened

    yield show
    assert problems == [] and all(url.startswith("file:") for url in requests)
    opened.close()


@pytest.mark.slow
def test_click_shows_matrix_profile_and_neighbours(page):
    profiled, _, attention, distance = made()
    shown = page(dashboard(head=(1, 1)))
    assert shown.inner_text("#name") == "L1H1: none, cluster 1"
    box = shown.locator("#map").bounding_box()
    size = min(26, 830 // N_LAYER)
    shown.mouse.click(box["x"] + 34 + 2.5 * size, box["y"] + 0.5 * size)  # layer 2, head 0
    assert shown.inner_text("#name") == "L2H0: sink, local, cluster 0"
    cells = shown.locator("#profile tbody tr").first.locator("td")
    assert float(cells.nth(1).inner_text()) == pytest.approx(
        float(profiled["value"][0, 2, 0]), rel=6e-3
    )
    near = [
        int(button.get_attribute("data-head")) for button in shown.locator("#near button").all()
    ]
    assert near == [i for i in np.argsort(distance[6]) if i != 6][:6]
    matrix = shown.locator("#matrix").bounding_box()
    step = matrix["width"] / len(PIECES)
    shown.mouse.move(matrix["x"] + 1.5 * step, matrix["y"] + 4.5 * step)
    text = shown.inner_text("#cell")
    assert "query 4 ␣cat" in text and "key 1 ␣the" in text
    assert float(text.split()[-1]) == pytest.approx(float(attention[2, 0, 4, 1]), rel=1e-4)
    shown.mouse.move(
        matrix["x"] + 4.5 * step, matrix["y"] + 1.5 * step
    )  # above the diagonal there is nothing
    assert shown.inner_text("#cell").strip() == ""
    shown.locator("#near button").first.click()
    assert shown.inner_text("#name").startswith(f"L{near[0] // 3}H{near[0] % 3}:")


@pytest.mark.slow
def test_measures_labels_keys_and_names(page):
    shown = page(dashboard())
    assert [o.inner_text() for o in shown.locator("#measure option").all()] == [
        *MEASURES,
        "loss change",
    ]
    before = shown.evaluate("document.getElementById('map').toDataURL()")
    shown.select_option("#measure", label="loss change")
    assert shown.evaluate("document.getElementById('map').toDataURL()") != before
    assert shown.inner_text("#scale").split() == ["-1.00", "1.00"]
    shown.select_option("#label", "local")
    shown.fill("#go", "L3H2")
    shown.keyboard.press("Enter")
    assert shown.inner_text("#name").startswith("L3H2")
    shown.focus("#map")
    shown.keyboard.press("ArrowLeft")
    shown.keyboard.press("ArrowUp")
    assert shown.inner_text("#name").startswith("L2H1")
    shown.fill("#go", "L9H9")
    shown.keyboard.press("Enter")
    assert "no head L9H9" in shown.inner_text("#over") and shown.inner_text("#name").startswith(
        "L2H1"
    )


@pytest.mark.slow
def test_1024_heads_stay_small_and_quick(browser, tmp_path):
    profiled, table, attention, distance = made(32, 32, 64)
    pieces = [" a"] * 64
    started = heads_page.dashboard(profiled, table, attention, pieces, distance, model="M")
    assert len(started.html) < 6_000_000 and "steps of 1/255" in started.html
    opened = browser.new_page(viewport={"width": 900, "height": 1000})
    opened.goto(started.save(tmp_path / "page.html").as_uri())
    begun = time.monotonic()
    opened.fill("#go", "L31H31")
    opened.keyboard.press("Enter")
    assert opened.inner_text("#name").startswith("L31H31") and time.monotonic() - begun < 20
    opened.close()


def test_weights_say_how_exact_they_are():
    written = dashboard().html
    assert (
        "exact to float32" in written and "&lt;b&gt;" in written and "<script>alert" not in written
    )


@pytest.mark.parametrize("n_layer, n_head", [(4, 3), (32, 32)])
def test_figures_are_drawn_from_the_numbers(n_layer, n_head):
    profiled, _, attention, distance = made(n_layer, n_head)
    earned = (profiled["value"] > 1).rename(measure="label")
    maps = figures.measures(profiled, MEASURES, title="M")
    np.testing.assert_allclose(maps.data[1].z, profiled["value"][1].values.T, atol=1e-4)
    assert (
        maps.data[1].coloraxis == "coloraxis2"
        and maps.layout.coloraxis2.cmin == -maps.layout.coloraxis2.cmax
    )
    dots = figures.baselines(profiled, earned.isel(label=[0]), title="M")
    drawn = [y for trace in dots.data if trace.mode == "markers" for y in trace.y if y is not None]
    np.testing.assert_allclose(sorted(drawn), np.sort(profiled["value"][0].values.reshape(-1)))
    order = np.arange(len(distance))[::-1]
    matrix = figures.distances(distance, order, [str(i) for i in order], title="M").data[0].z
    assert len(matrix) <= figures.GRID
    if len(distance) <= figures.GRID:
        np.testing.assert_allclose(matrix, distance[::-1, ::-1], atol=1e-3)

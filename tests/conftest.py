"""What the tests share: the embedded model, engines, a browser, a check that nothing of ours
outlives the session."""

import contextlib
import os
import shutil
import signal
import sys
import time

import psutil
import pytest

MODEL = "smollm2-135m-Q4_1"
# llama.cpp's threads wait by spinning. With two of its processes on two cores that made decodes 3
# to 8 times slower than waiting without; alone on the machine it is up to a fifth faster, which
# tests do not need.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A shell has what runs in its background ignore Ctrl-C, and so would all that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)
# The files that take minutes. They come first: of two processes neither then has one of them alone
# at the end.
LONG = (
    "kaggle_rehearsal small_models notebook_16 notebook_14 notebook_12 notebook_15 notebook_13 "
    "compare drawn options liveness soak tasks mixture"
).split()


def pytest_collection_modifyitems(items):
    place = {f"test_{name}": number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers():
    """Of `-n auto`: much of a test waits or computes in one thread, so two processes fill two
    cores. A GPU, whose memory some tests measure, belongs to one process."""
    return 0 if shutil.which("nvidia-smi") else 2


@pytest.fixture(scope="session")
def smollm2():
    """Path of SmolLM2-135M-Instruct Q4_1, the model that comes as a package."""
    from llamatelemetry import ModelNotFoundError, resolve_model

    # A test must not begin a download: huggingface_hub answers from its cache or not at all.
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return resolve_model(MODEL)
    except ModelNotFoundError as error:
        pytest.skip(f"no SmolLM2 on this machine: {error}")
    finally:
        os.environ.pop("HF_HUB_OFFLINE") if before is None else os.environ.update(
            HF_HUB_OFFLINE=before
        )


@pytest.fixture(scope="session")
def llama_server():
    """Path of llama-server; skips where the engine is not built."""
    from llamatelemetry import ServerError
    from llamatelemetry.files.programs import find_server

    try:
        return find_server()
    except ServerError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def engine(smollm2):
    """SmolLM2 loaded for captures: no llama-server."""
    from llamatelemetry import InferenceEngine

    with InferenceEngine() as engine:
        engine.load_model(smollm2, auto_start=False, silent=True)
        yield engine


@pytest.fixture(scope="session")
def served(smollm2, llama_server):
    """SmolLM2 with its llama-server running."""
    from llamatelemetry import InferenceEngine

    with InferenceEngine(server_path=llama_server) as engine:
        engine.load_model(smollm2, ctx_size=2048, silent=True)
        yield engine


@pytest.fixture(scope="session")
def browser():
    """A headless Chromium driven by Playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"no browser on PATH (looked for {', '.join(names)})")
    # The first four switches let it run in a container; the others keep it from calling home.
    switches = (
        "--no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run "
        "--disable-background-networking --disable-component-update --disable-sync"
    ).split()
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=switches)
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def forgotten():
    """Secrets that a test gives are none to the next, whose messages would lose their words."""
    from llamatelemetry import secrecy

    kept = set(secrecy._kept)
    yield
    secrecy._kept.clear()
    secrecy._kept.update(kept)


@pytest.fixture(autouse=True)
def environment():
    """What a test sets in the environment is not there for the next."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def page(browser):
    """A fresh tab, 1000 px wide, in a context of its own."""
    context = browser.new_context(viewport={"width": 1000, "height": 800})
    yield context.new_page()
    context.close()


def ours():
    """Processes that this package starts and that belong to this session, by command line."""
    names = ("llama-server", "llamatelemetry")
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if (
                any(name in part for part in process.cmdline() for name in names)
                and process.status() != "zombie"
            ):
                found.append((process, f"{process.pid} {' '.join(process.cmdline())[:120]}"))
        except psutil.NoSuchProcess:
            pass
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_left_running():
    """Set up before every other session fixture, so torn down after all of them: no child of ours
    is left."""
    yield
    if mine := getattr(sys.modules.get("llamatelemetry.files.scratch"), "_mine", None):
        mine.remove()  # which it does at this process's end
    deadline = time.monotonic() + 5
    while (left := ours()) and time.monotonic() < deadline:
        time.sleep(0.1)
    for process, _ in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    assert not left, f"left running after the tests: {[described for _, described in left]}"

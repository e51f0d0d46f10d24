"""A real Jupyter and a browser that drives it: what `test_live_page.py` needs of both."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def jupyter(application, folder, cells):
    """Address of a notebook with these code cells in a running JupyterLab or Notebook 7 ("lab",
    "notebook")."""
    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    notebook = nbformat.v4.new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, folder / "live.ipynb")
    settings = folder / "settings/@jupyterlab/apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text(
        json.dumps({"fetchNews": "false", "checkForUpdates": False})
    )
    port, token = free_port(), "t"
    command = [
        sys.executable, "-m", "jupyterlab" if application == "lab" else "notebook",
        "--no-browser", f"--port={port}", "--ServerApp.port_retries=0",
        f"--IdentityProvider.token={token}", "--allow-root", f"--ServerApp.root_dir={folder}",
    ]  # fmt: skip
    env = os.environ | {
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "IPYTHONDIR": str(folder / "ipython"),
        "OMP_WAIT_POLICY": "passive",
    }
    log = open(folder / "jupyter.log", "w")
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 90
        while True:
            try:
                urllib.request.urlopen(f"{address}/api?token={token}", timeout=5)
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, (
                    folder / "jupyter.log"
                ).read_text()[-2000:]
                time.sleep(0.2)
        where = "lab/tree" if application == "lab" else "notebooks"
        yield f"{address}/{where}/live.ipynb?token={token}"
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        log.close()


def run_all(page, address, shown):
    """Open a notebook and run all its cells, until `shown` (a CSS selector) is there."""
    page.goto(address)
    page.locator(".jp-CodeCell").first.wait_for(timeout=90_000)
    page.locator("[data-status=idle]").first.wait_for(state="attached", timeout=90_000)
    accept, begun = page.locator(".jp-Dialog .jp-mod-accept"), page.locator(".jp-InputPrompt").first
    deadline = time.monotonic() + 120
    while not page.locator(shown).count() and time.monotonic() < deadline:
        if accept.count():  # a slow machine's page asks for a kernel that it has
            accept.first.click()
        elif begun.inner_text().strip() in ("[ ]:", ""):
            page.get_by_role("menuitem", name="Run", exact=True).first.click()
            page.get_by_role("menuitem", name="Run All Cells", exact=True).first.click()
        page.wait_for_timeout(1000)
    page.locator(shown).wait_for(timeout=1000)

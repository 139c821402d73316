"""JupyterLab on loopback and headless Chromium, for `make test-browser`."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
OUT = Path(__file__).parent / "out"
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are there, too
}


def chromium() -> str | None:
    """A Chromium of this system; the one in the environment variable CHROMIUM first."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, filter(None, names))), None)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a JupyterLab, token and all but the file name, on copies of the notebooks without
    their outputs."""
    folder = tmp_path_factory.mktemp("lab")
    for path in (ROOT / "notebooks").glob("0[06]*.ipynb"):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["metadata"].pop("widgets", None)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell.update(outputs=[], execution_count=None)
        (folder / path.name).write_text(json.dumps(notebook), encoding="utf-8")
    for name, values in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    own = {f"JUPYTER{name}_DIR": str(folder / name) for name in ("_CONFIG", "_DATA", "_RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    own |= {"JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "JUPYTER_TOKEN": token}
    # As a person has it: `make` tells tests to draw on nothing.
    own |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    command += [
        "--LabApp.expose_app_in_browser=True",
        "--ServerApp.port_retries=0",
        f"--ServerApp.root_dir={folder}",
    ]
    log = (folder / "server.log").open("w")
    server = subprocess.Popen(
        command, env={**os.environ, **own}, stdout=log, stderr=subprocess.STDOUT
    )
    try:
        address = f"http://127.0.0.1:{port}"
        _wait(f"{address}/api?token={token}", server, folder / "server.log")
        with pytest.raises(urllib.error.HTTPError):  # nobody gets in without the token
            urllib.request.urlopen(f"{address}/api/contents", timeout=10)
        yield f"{address}/lab/tree/{{}}?token={token}&reset"
    finally:
        server.terminate()
        server.wait(timeout=30)
        log.close()


def _wait(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and server.poll() is None:
        try:
            urllib.request.urlopen(address, timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    pytest.fail(f"JupyterLab did not start:\n{log.read_text()[-3000:]}")


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Headless Chromium; skips where it, or playwright, is missing."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason='needs playwright: pip install -e ".[browser]"'
    )
    where = chromium()
    if where is None:
        pytest.skip("needs Chromium; name one in the environment variable CHROMIUM")
    OUT.mkdir(exist_ok=True)
    with playwright.sync_playwright() as driver:
        # Inside containers Chromium's own sandbox cannot be made; the pages are ours.
        launched = driver.chromium.launch(executable_path=where, args=["--no-sandbox"])
        yield launched
        launched.close()

"""JupyterLab and Notebook 7 on loopback, and headless Chromium, for `make test-browser`."""

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pages import OUT, Page

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight are there, too
    "apputils-extension/themes": {"theme": "JupyterLab Light"},
}


@dataclass(frozen=True)
class Server:
    """A Jupyter on loopback that serves the notebooks of a folder."""

    folder: Path
    root: str
    page: str
    token: str

    def copied(self, name: str) -> str:
        """Address of a copy of a notebook without outputs, in a light theme: no test meets the
        kernel, the outputs or the settings of another."""
        notebook = json.loads((ROOT / "notebooks" / name).read_text(encoding="utf-8"))
        notebook["metadata"].pop("widgets", None)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "code":
                cell.update(outputs=[], execution_count=None)
        new = f"{Path(name).stem}-{secrets.token_hex(4)}.ipynb"
        (self.folder / new).write_text(json.dumps(notebook), encoding="utf-8")
        _settings(self.folder)
        return f"{self.root}/{self.page}/{new}?token={self.token}&reset"

    def end_sessions(self) -> None:
        """Shut down every kernel."""
        for one in json.loads(self._ask("sessions")):
            self._ask(f"sessions/{one['id']}", method="DELETE")

    def _ask(self, what: str, method: str = "GET") -> bytes:
        head = {"Authorization": f"token {self.token}"}
        request = urllib.request.Request(f"{self.root}/api/{what}", headers=head, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()


def _settings(folder: Path) -> None:
    for name, value in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(value), encoding="utf-8")


def chromium() -> str | None:
    """A Chromium of this system; the one in the environment variable CHROMIUM first."""
    names = (os.environ.get("CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, filter(None, names))), None)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A JupyterLab."""
    names = "jupyterlab", "LabApp", "lab/tree"
    yield from _served(tmp_path_factory.mktemp("lab"), *names)


@pytest.fixture(scope="session")
def notebook_7(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A Jupyter Notebook 7; skips where it is missing."""
    pytest.importorskip("notebook", reason='needs Notebook 7: pip install -e ".[browser]"')
    folder = tmp_path_factory.mktemp("notebook")
    yield from _served(folder, "notebook", "JupyterNotebookApp", "notebooks")


def _served(folder: Path, module: str, app: str, page: str) -> Iterator[Server]:
    _settings(folder)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    token = secrets.token_hex(16)
    own = {f"JUPYTER{name}_DIR": str(folder / name) for name in ("_CONFIG", "_DATA", "_RUNTIME")}
    own |= {"JUPYTERLAB_SETTINGS_DIR": str(folder / "settings")}
    own |= {"JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "JUPYTER_TOKEN": token}
    # As a person has it: `make` tells tests to draw on nothing.
    own |= {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    command = [sys.executable, "-m", module, "--no-browser", "--allow-root"]
    command += ["--ServerApp.ip=127.0.0.1", f"--ServerApp.port={port}"]
    command += [
        f"--{app}.expose_app_in_browser=True",
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
        yield Server(folder, address, page, token)
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
    pytest.fail(f"Jupyter did not start:\n{log.read_text()[-3000:]}")


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


@pytest.fixture
def opened(lab: Server, browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """A function that opens a notebook; behind the test no page may have complained."""
    yield from _opened(lab, browser, request.node.name)


@pytest.fixture
def opened_in_7(notebook_7: Server, browser: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """The same in Notebook 7."""
    yield from _opened(notebook_7, browser, request.node.name)


def _opened(server: Server, browser: Any, test: str) -> Iterator[Any]:
    pages = []

    def open_notebook(name: str, width: int = 1280) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 800})
        page = Page(context.new_page(), server.copied(name))
        pages.append((context, page))
        return page

    yield open_notebook
    for context, page in pages:
        page.page.screenshot(path=OUT / f"last-of-{test}.png")
        complaints = page.complaints
        context.close()
        server.end_sessions()
        assert complaints == []

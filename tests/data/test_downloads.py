"""Downloads from a home on this machine: resumed, checked, kept; and what each fault says."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pandas as pd
import pytest

import pmet_lens as pl
from pmet_lens.data import datasets, downloads
from pmet_lens.data.downloads import DownloadError, Remote, fetch

DATA = bytes(range(256)) * 12_000
RIGHT = hashlib.sha256(DATA).hexdigest()


class Home(BaseHTTPRequestHandler):
    """Serves `content`; cuts answers after `cut` bytes; knows ranges unless told otherwise."""

    content, cut, ranges = DATA, 0, True
    asked: ClassVar[list[str]] = []

    def do_GET(self):
        wanted = self.headers.get("Range", "")
        Home.asked.append(wanted)
        match = re.match(r"bytes=(\d+)-", wanted) if Home.ranges else None
        start = int(match[1]) if match else 0
        if match and start >= len(Home.content):
            self.send_error(416)
            return
        body = Home.content[start:]
        self.send_response(206 if match else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: Home.cut] if Home.cut else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def home():
    Home.content, Home.cut, Home.ranges = DATA, 0, True
    Home.asked = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Home)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/data.json"
    server.shutdown()
    server.server_close()


def test_a_file_is_fetched_once(home, tmp_path):
    seen = []
    path = fetch(Remote(home, RIGHT), tmp_path / "cache", lambda *n: seen.append(n))
    assert path.read_bytes() == DATA
    assert seen[-1] == (len(DATA), len(DATA))
    assert fetch(Remote(home, RIGHT), tmp_path / "cache") == path
    assert len(Home.asked) == 1
    assert (tmp_path / "cache" / "data.json.sha256").read_text().strip() == RIGHT


def test_a_cut_download_goes_on_where_it_stopped(home, tmp_path):
    Home.cut = 1_000_000
    for done in ("1,000,000", "2,000,000"):
        with pytest.raises(DownloadError, match=f"{done} bytes of it are kept"):
            fetch(Remote(home, RIGHT), tmp_path)
        assert not (tmp_path / "data.json").exists()
    Home.cut = 0
    assert fetch(Remote(home, RIGHT), tmp_path).read_bytes() == DATA
    assert Home.asked == ["", "bytes=1000000-", "bytes=2000000-"]


def test_a_home_that_knows_no_ranges_sends_all_again(home, tmp_path):
    (tmp_path / "data.json.part").write_bytes(b"x" * 10)
    Home.ranges = False
    assert fetch(Remote(home), tmp_path).read_bytes() == DATA


@pytest.mark.parametrize("left", [len(DATA), len(DATA) + 5])
def test_a_whole_or_too_long_remainder_is_no_obstacle(home, tmp_path, left):
    (tmp_path / "data.json.part").write_bytes((DATA + b"12345")[:left])
    assert fetch(Remote(home, RIGHT), tmp_path).read_bytes() == DATA


def test_what_was_not_published_is_refused(home, tmp_path):
    with pytest.raises(DownloadError, match=f"{RIGHT}, not the published 00ff"):
        fetch(Remote(home, "00ff"), tmp_path)
    assert not list(tmp_path.glob("data.json*[!k]"))  # nothing but the lock


def test_a_damaged_cache_is_fetched_again(home, tmp_path):
    path = fetch(Remote(home), tmp_path)
    path.write_bytes(DATA[:-1] + b"!")
    assert fetch(Remote(home), tmp_path).read_bytes() == DATA
    (tmp_path / "data.json.sha256").unlink()
    assert fetch(Remote(home), tmp_path).read_bytes() == DATA
    assert len(Home.asked) == 3


def test_several_at_once_fetch_once(home, tmp_path):
    found = []
    workers = [
        threading.Thread(target=lambda: found.append(fetch(Remote(home, RIGHT), tmp_path)))
        for _ in range(4)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    assert len(Home.asked) == 1


def test_nobody_at_home(tmp_path):
    with pytest.raises(DownloadError, match=r"could not be fetched .*0 bytes of it are kept"):
        fetch(Remote("http://127.0.0.1:9/data.json"), tmp_path)


def test_a_folder_that_cannot_be_written(home, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DownloadError, match="PMET_LENS_CACHE"):
        fetch(Remote(home), tmp_path / "file")


def test_a_full_disk_says_so(home, tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(downloads.os, "fsync", full)
    with pytest.raises(DownloadError, match=r"No space left on device.*PMET_LENS_CACHE"):
        fetch(Remote(home), tmp_path)
    monkeypatch.undo()
    assert fetch(Remote(home), tmp_path).read_bytes() == DATA


def test_data_sets_come_from_the_cache(home, tmp_path, monkeypatch):
    """The loaders, with the homes on this machine."""
    monkeypatch.setenv("PMET_LENS_CACHE", str(tmp_path))
    world = {
        "counterfact": datasets.world.build().counterfact()[:5],
        "multi_counterfact": datasets.world.build().counterfact()[5:8],
        "zsre": datasets.world.build().zsre()[:4],
        "knowns": datasets.world.build().knowns()[:6],
    }
    loaders = {
        "counterfact": pl.counterfact,
        "multi_counterfact": lambda **more: pl.counterfact(multi=True, **more),
        "zsre": pl.zsre,
        "knowns": pl.knowns,
    }
    for name, records in world.items():
        Home.content = json.dumps(records).encode()
        own = home.replace("data.json", f"{name}.json")
        monkeypatch.setitem(downloads.HOMES, name, Remote(own))
        facts = loaders[name](download=True)
        assert len(facts) == len(records)
        assert facts == loaders[name](download=True)
        assert (tmp_path / f"{name}.json").is_file()
    assert len(Home.asked) == 4
    pd.DataFrame({"text": ["It stands in Vell ."]}).to_parquet(tmp_path / "made")
    Home.content = (tmp_path / "made").read_bytes()
    monkeypatch.setitem(downloads.HOMES, "texts", Remote(home, file="texts.parquet"))
    assert list(pl.texts(download=True)) == list(pl.texts(download=True)) == ["It stands in Vell ."]
    assert len(Home.asked) == 5
    with pytest.raises(pl.DataError, match="leave out the path"):
        pl.zsre("x.json", download=True)


def test_the_homes_are_the_published_ones(monkeypatch):
    assert {remote.url.split("/")[2] for remote in downloads.HOMES.values()} == {
        "rome.baulab.info",
        "memit.baulab.info",
        "huggingface.co",
    }
    assert all(r.sha256 is None or len(r.sha256) == 64 for r in downloads.HOMES.values())
    monkeypatch.setenv("PMET_LENS_CACHE", "~/kept")
    assert downloads.cache() == Path("~/kept").expanduser()
    monkeypatch.delenv("PMET_LENS_CACHE")
    assert downloads.cache().name == "pmet_lens"

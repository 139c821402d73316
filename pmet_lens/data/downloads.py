"""The published data sets from their homes: resumed where cut, checked, kept in a cache.

The cache is `$PMET_LENS_CACHE`, or what the operating system keeps caches in. A file gets its name
there only when it is whole and its checksum is right; beside it stands its SHA-256, and a file that
no longer matches it is fetched again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from pmet_lens.data import file_format

_CHUNK = 1 << 20
_DISK_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
OnBytes = Callable[[int, int], object]


class DownloadError(ValueError):
    """A file that could not be fetched or is not what was published; the message says why."""


@dataclass(frozen=True)
class Remote:
    """A published file. `sha256` None: nobody published one, and the first download is trusted."""

    url: str
    sha256: str | None = None
    file: str = ""
    """What it is called here; empty: the last part of the address."""

    @property
    def name(self) -> str:
        """The file's name in the cache."""
        return self.file or self.url.rpartition("/")[2]


_DATA = "https://rome.baulab.info/data/dsets/"
HOMES = {
    # Checksum: the pointer of Git LFS in a public copy; 45,108,470 bytes, 21,919 records.
    "counterfact": Remote(
        f"{_DATA}counterfact.json",
        "d017056125178a13728594e66a801357a8db9ed7973a7425554bb4271de9fc6f",
    ),
    "multi_counterfact": Remote("https://memit.baulab.info/data/dsets/multi_counterfact.json"),
    "zsre": Remote(f"{_DATA}zsre_mend_eval.json"),
    "knowns": Remote(
        f"{_DATA}known_1000.json",
        "c2a6fd4391b0657508963676afe36b76b5c0f08a373bbe0e7c44a2ed72e75e00",
    ),
    "texts": Remote(
        "https://huggingface.co/datasets/Salesforce/wikitext/resolve/main/wikitext-103-raw-v1/"
        "train-00000-of-00002.parquet",
        file="wikitext-103-raw-v1.parquet",
    ),
}
"""Where the data sets live (addresses as in the ROME and MEMIT repositories), and the first half of
WikiText-103 (English Wikipedia) at its authors' page."""


def cache() -> Path:
    """The directory downloads are kept in."""
    from platformdirs import user_cache_path

    chosen = os.environ.get("PMET_LENS_CACHE")
    return Path(chosen).expanduser() if chosen else user_cache_path("pmet_lens")


def fetch(remote: Remote, folder: Path | None = None, on_bytes: OnBytes | None = None) -> Path:
    """The file of `remote`, from `folder` (None: `cache()`) or from its home.

    An interrupted download is resumed. Two processes do not fetch the same file at once.
    `on_bytes`: called with (bytes so far, all, or 0 where the server does not say).

    Raises:
        DownloadError: where the home cannot be reached, what came is not what was published, or
            the folder cannot be written.
    """
    from filelock import FileLock

    folder = cache() if folder is None else folder
    path = folder / remote.name
    note = folder / f"{remote.name}.sha256"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if path.is_file() and note.is_file():
                wanted = remote.sha256 or note.read_text(encoding="ascii").strip()
                if file_format.file_digest(path) == wanted:
                    return path
            part = folder / f"{remote.name}.part"
            digest = _download(remote, part, on_bytes)
            with file_format.whole(note) as new:
                new.write_text(digest + "\n", encoding="ascii")
            part.replace(path)
    except OSError as error:
        raise DownloadError(
            f"{remote.url} could not be kept in {folder}: {error}. Set PMET_LENS_CACHE to a folder "
            "that can be written, or fetch the file yourself and pass its path."
        ) from error
    return path


def _download(remote: Remote, part: Path, on_bytes: OnBytes | None) -> str:
    """Write the file to `part` and return its SHA-256, if it is the published one."""
    try:
        _resume(remote.url, part, on_bytes)
    except (OSError, HTTPException) as error:
        if not part.exists() or getattr(error, "errno", None) in _DISK_FAULTS:
            raise
        raise DownloadError(
            f"{remote.url} could not be fetched ({error}); {part.stat().st_size:,} bytes of it are "
            "kept, and the next try goes on there."
        ) from error
    digest = file_format.file_digest(part)
    if remote.sha256 not in (None, digest):
        part.unlink()
        raise DownloadError(
            f"{remote.url} has the SHA-256 {digest}, not the published {remote.sha256}: it was "
            "changed, or damaged on its way. If you trust it, fetch it yourself and pass its path."
        )
    return digest


def _resume(url: str, part: Path, on_bytes: OnBytes | None) -> None:
    """Append to `part` what is missing of it."""
    done = part.stat().st_size if part.exists() else 0
    request = Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urlopen(request, timeout=30)
    except OSError as error:
        if getattr(error, "code", None) == 416:  # nothing is missing, or what is there is too long
            part.unlink()
            return _resume(url, part, on_bytes)
        part.touch()
        raise
    with answer:
        resumed = answer.status == 206
        length = int(answer.headers.get("Content-Length", 0))
        done = done if resumed else 0
        total = done + length if length else 0
        with part.open("ab" if resumed else "wb") as file:
            while chunk := answer.read(_CHUNK):
                file.write(chunk)
                done += len(chunk)
                if on_bytes is not None:
                    on_bytes(done, total)
            file.flush()
            os.fsync(file.fileno())
    if total and done < total:
        raise HTTPException(f"the connection was cut after {done:,} of {total:,} bytes")

"""The published data sets from their homes: resumed where cut, checked, kept in a cache.

The cache is `$PMET_LENS_CACHE`, or what the operating system keeps caches in. A file lies there
under its own name only when it is whole and its checksum is right; beside it stands its SHA-256,
and a file that no longer matches it is fetched again.
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

    own = os.environ.get("PMET_LENS_CACHE")
    return Path(own).expanduser() if own else user_cache_path("pmet_lens")


def fetch(remote: Remote, folder: Path | None = None, on_bytes: OnBytes | None = None) -> Path:
    """The file of `remote`, from `folder` (None: `cache()`) or from its home.

    What an interrupted download left is gone on with. Two processes do not fetch the same file at
    once. `on_bytes`: called with (bytes so far, all, or 0 where the server does not say).

    Raises:
        DownloadError: where the home cannot be reached, what came is not what was published, or
            the folder cannot be written.
    """
    from filelock import FileLock

    folder = cache() if folder is None else folder
    path = folder / remote.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not _kept(path, remote):
                _download(remote, path, on_bytes)
    except OSError as error:
        raise DownloadError(
            f"{remote.url} could not be kept in {folder}: {error}. Set PMET_LENS_CACHE to a folder "
            "that can be written, or fetch the file yourself and pass its path."
        ) from error
    return path


def _kept(path: Path, remote: Remote) -> bool:
    """Whether the file is there as it came and, where known, as it was published."""
    note = _note(path)
    if not (path.is_file() and note.is_file()):
        return False
    wanted = remote.sha256 or note.read_text(encoding="ascii").strip()
    return file_format.file_digest(path) == wanted


def _download(remote: Remote, path: Path, on_bytes: OnBytes | None) -> None:
    part = path.with_name(path.name + ".part")
    try:
        _resume(remote.url, part, on_bytes)
    except (OSError, HTTPException) as error:
        if not part.exists() or _full(error):
            raise
        raise DownloadError(
            f"{remote.url} could not be fetched ({error}); {part.stat().st_size:,} bytes of it are "
            "kept, and the next try goes on there."
        ) from error
    found = file_format.file_digest(part)
    if remote.sha256 not in (None, found):
        part.unlink()
        raise DownloadError(
            f"{remote.url} has the SHA-256 {found}, not the published {remote.sha256}: it was "
            "changed, or damaged on its way. If you trust it, fetch it yourself and pass its path."
        )
    with file_format.whole(_note(path)) as note:
        note.write_text(found + "\n", encoding="ascii")
    part.replace(path)


def _resume(url: str, part: Path, on_bytes: OnBytes | None) -> None:
    """Append to `part` what is missing of it."""
    done = part.stat().st_size if part.exists() else 0
    asked = Request(url, headers={"Range": f"bytes={done}-"} if done else {})
    try:
        answer = urlopen(asked, timeout=30)
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


def _full(error: BaseException) -> bool:
    """Whether the disk, not the connection, is why."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def _note(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")

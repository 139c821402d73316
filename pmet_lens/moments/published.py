"""Second moments in the files that ROME and MEMIT publish, read and written.

A file `MODULE_float32_mom2_SAMPLE.npz` (e.g. `transformer.h.3.mlp.fc_out_float32_mom2_100000.npz`)
holds the sum of the keys' outer products (`mom2.mom2`) and their number (`mom2.count`); see
`util/runningstats.py` and `rome/layer_stats.py` there.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch

from pmet_lens.data import file_format
from pmet_lens.models.model import Model, Projection, Site
from pmet_lens.moments.moment import Moment, MomentError

_NAME = re.compile(r"(?P<module>.+)_float(32|64|16)_mom2_[^_]*\.npz")
_CONSTRUCTOR = "util.runningstats.SecondMoment()"


def import_moments(model: Model, source: str | Path | Sequence[str | Path]) -> dict[Site, Moment]:
    """The moments in published `.npz` files: `source` is a folder, a file or several files. A
    file's name tells its site, a module of `model`; other files of a folder are left out.

    Raises:
        MomentError: for a file that cannot be read, belongs to no site of this model, or holds a
            matrix of another shape or numbers that are not finite; and where there is none.
    """
    sites = {
        model.parameter_name(site).removesuffix(".weight"): site
        for site in (Site(n, p) for n in range(model.n_layers) for p in get_args(Projection))
    }
    paths = [Path(p) for p in ([source] if isinstance(source, (str, Path)) else source)]
    folder = isinstance(source, (str, Path)) and paths[0].is_dir()
    if folder:
        paths = sorted(paths[0].glob("*.npz"))
    moments: dict[Site, Moment] = {}
    for path in paths:
        name = _NAME.fullmatch(path.name)
        if name is not None and name["module"] in sites:
            site = sites[name["module"]]
            moments[site] = _read(path, model.d_in(site))
        elif not folder:
            raise MomentError(
                f"{path.name} names no module of {model.name!r}; published moments are called like "
                f"{next(iter(sites))}_float32_mom2_100000.npz."
            )
    if not moments:
        raise MomentError(f"{source} holds no published moments of {model.name!r}.")
    return dict(sorted(moments.items()))


def export_moments(
    moments: Mapping[Site, Moment], directory: str | Path, model: Model, sample: int
) -> list[Path]:
    """Write one published file per site into `directory` (float32, as they are read there), named
    for `sample`, the number of texts (`mom2_n_samples` of the code that reads them).

    Raises:
        MomentError: where they cannot be written.
    """
    folder, written = Path(directory), []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for site, moment in moments.items():
            module = model.parameter_name(site).removesuffix(".weight")
            path = folder / f"{module}_float32_mom2_{sample}.npz"
            with file_format.whole(path) as part, part.open("wb") as file:
                content = {
                    "mom2.constructor": np.array(_CONSTRUCTOR),
                    "mom2.count": np.array(moment.count),
                    "mom2.mom2": moment.total.float().cpu().numpy(),
                    "sample_size": np.array(sample),
                }
                np.savez(file, **content)  # type: ignore[arg-type]
            written.append(path)
    except OSError as error:
        raise MomentError(f"The moments could not be written to {folder}: {error}") from error
    return written


def _read(path: Path, d_in: int) -> Moment:
    try:
        with np.load(path) as content:  # objects, which could run code, are refused
            count, total = int(content["mom2.count"]), np.array(content["mom2.mom2"])
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise MomentError(f"{path} cannot be read as a published second moment: {error}") from error
    if total.shape != (d_in, d_in) or count < 1:
        raise MomentError(
            f"{path} holds a moment {list(total.shape)} of {count} keys; this site needs "
            f"[{d_in}, {d_in}]: it belongs to another model."
        )
    if not np.isfinite(total).all():
        raise MomentError(f"{path} holds numbers that are not finite; fetch or compute it again.")
    return Moment(torch.from_numpy(total), count)

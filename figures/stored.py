"""What a GGUF file keeps of an edit, by the type that edited tensors are stored as:
`python figures/stored.py`.

Three facts in SmolLM2-135M by PMET, and per edited tensor the share of its change that rounding to
each type loses (`Edit.save_gguf`); of the type that the file has now, too, which `save_gguf` does
not offer. Half a minute; writes `figures/results/stored.csv`.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from common import HERE, provenance
from gguf import GGMLQuantizationType, quants

import pmet_lens as pl
from pmet_lens import data

MODEL = "smollm2-135m"
LAYERS = (4, 5, 6, 7, 8, 9)
TYPES = ("F32", "F16", "BF16", "Q8_0")
"""Those that can be asked for."""
FACTS = [
    pl.Fact("Edinburgh Castle", "{} is in the city of", "Paris"),
    pl.Fact("Japan", "The capital of {} is", "Madrid"),
    pl.Fact("Isaac Newton", "{} was born in", "Italy"),
]


def main() -> None:
    start, model = time.monotonic(), pl.load(MODEL)
    moments = pl.own_moments(model, LAYERS, text="python")
    edit = pl.edit(model, FACTS, moments, "PMET", pl.Hparams(LAYERS))
    tables = []
    with TemporaryDirectory() as folder:
        for kind in TYPES:
            table = edit.save_gguf(MODEL, Path(folder) / f"{kind}.gguf", kind)
            tables.append(table[["site", "was", "stored", "rounded", "bytes"]])
    tables.insert(0, as_now(model, edit, dict(zip(table["site"], table["was"], strict=True))))
    whole = pd.concat(tables, ignore_index=True).assign(model=MODEL, facts=len(FACTS))
    norms = {str(s): float(d.norm() / model.weight(s).norm()) for s, d in edit.deltas.items()}
    whole["change"] = whole["site"].map(norms)
    whole["made"] = provenance((time.monotonic() - start) / 60)
    with data.whole(HERE / "results" / "stored.csv") as part:
        whole.to_csv(part, index=False, float_format="%.5g")
    by = whole.groupby("stored", sort=False)[["rounded", "change"]].agg(["min", "max"])
    sys.stdout.write(f"{by.to_string()}\n")


def as_now(model: pl.Model, edit: pl.Edit, was: dict[str, str]) -> pd.DataFrame:
    """The same of the type that every edited tensor has in the file."""
    rows = []
    for site, delta in edit.deltas.items():
        kind, before = GGMLQuantizationType[was[str(site)]], model.weight(site).T.cpu()
        exact = delta.T.cpu()
        packed = quants.quantize((before + exact).contiguous().numpy(), kind)
        written = torch.from_numpy(quants.dequantize(packed, kind))
        lost = float((written - before - exact).norm() / exact.norm())
        rows.append((str(site), kind.name, kind.name, lost, 0))
    return pd.DataFrame(rows, columns=["site", "was", "stored", "rounded", "bytes"])


if __name__ == "__main__":
    main()

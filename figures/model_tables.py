"""What can be done with each model, from loading to an adapter: `python figures/model_tables.py`.

Per model: what it is and knows, where it recalls, 20 facts edited by every method, and whether such
an edit is undone, saved, merged and served with the same logits. Every row is kept in
`figures/out/models` as soon as it is there, so that a run that was cut goes on; models that were
not fetched are skipped. Second moments of a real model come from a text file (`--texts`, one text a
line), else from text that it samples itself.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import model_page
import pandas as pd
import real
import torch
from common import HERE, OUT, Progress, provenance, read
from paper import kept, spent
from transformers.utils.logging import disable_progress_bar

import pmet_lens as pl
from pmet_lens import data, evaluation, experiments

LAYERS: dict[str, tuple[int, ...] | None] = {
    real.MODEL: real.LAYERS,
    "gemma-3-270m": (2, 3, 4, 5),
    "world": None,
    "world-sequential": None,
}
"""Model -> its critical layers; None: all settings are those known for it (`pl.HPARAMS`). Gemma's
are what `pl.suggest_hparams` gave with 24 facts."""
FACTS, TRACED, SAMPLES = 20, 10, 2
METHODS = ("MEMIT", "AlphaEdit", "FT-W", "FT+L", "MEND", "PMET", "+ W_O", "EMMET", "ROME")
"""Those of `pl.METHODS` and one ablation, in the order in which they are made: what takes long and
tells least comes last, and methods that share targets stand beside each other."""
SHARD = 10
"""Facts of which a run that is cut may have to optimise the targets again."""
STREAMS: tuple[pl.Stream, ...] = ("resid_post", "attn_out", "mlp_out")
BOUND = 5e-4
"""Of FT+L: the one released for GPT2-XL."""
PER_DIMENSION, WORLD_TOKENS = 10, 100_000
"""Text for second moments: tokens per dimension of a key for real models (enough, as
`tests/benchmarks/results/precision.md` tells), tokens for bundled ones."""
TABLES = ("models", "trace", "scores", "checks")
STYLE = {"index": False, "float_format": "%.4g"}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(LAYERS)}")
    parser.add_argument("--texts", type=Path, help="text for second moments, one text a line")
    parser.add_argument("--source", default="a file", help="what the page calls that text")
    parser.add_argument("--record", action="store_true", help="replace the committed rows and page")
    parser.add_argument("--fresh", action="store_true", help="forget what was made before")
    parser.add_argument("--so-far", action="store_true", help="make nothing, show what there is")
    args = parser.parse_args()
    if wrong := set(args.models) - set(LAYERS):
        parser.error(f"there are no settings for {', '.join(sorted(wrong))}")
    disable_progress_bar()
    here, done = set(pl.available_models().query("here")["name"]), []
    for name in args.models or LAYERS:
        if name not in here:
            sys.stderr.write(f"{name} is left out; pmet-lens models --fetch {name} brings it.\n")
            continue
        study = Study(name, args.texts, args.source, args.fresh, args.so_far)
        if study.begun or not args.so_far:
            done.append(study.tables())
    out = OUT / "models"
    for table in TABLES:
        rows = pd.concat([tables[table] for tables in done], ignore_index=True)
        rows.to_csv(out / f"{table}.csv", **STYLE)
    (out / "models.md").write_text(model_page.page(out), encoding="utf-8")
    sys.stdout.write(f"The page and its tables: {out}\n")
    if args.record:
        record(out)


def record(out: Path) -> None:
    """Replace the page, and the committed rows of the models that are in `out`."""
    recorded = HERE / "results" / "models"
    recorded.mkdir(parents=True, exist_ok=True)
    for table in TABLES:
        rows = read(out, table)
        if (recorded / f"{table}.csv").exists():
            old = read(recorded, table)
            rows = pd.concat([rows, old[~old["model"].isin(rows["model"])]])
        rows = rows.sort_values("model", key=lambda m: m.map([*LAYERS].index), kind="stable")
        rows.to_csv(recorded / f"{table}.csv", **STYLE)
    (HERE.parent / "docs" / "models.md").write_text(model_page.page(recorded), encoding="utf-8")


class Study:
    """One model; what is made for it is kept in a folder that is named by its settings."""

    def __init__(
        self, name: str, texts: Path | None, source: str, fresh: bool = False, so_far: bool = False
    ) -> None:
        self.name, self.layers, self.so_far = name, LAYERS[name], so_far
        self.texts = None if self.layers is None else texts
        self.source = source if self.texts else "sampled from the model"
        if self.layers is None:
            self.source = "the invented world"
        words = "" if self.texts is None else self.texts.read_text(encoding="utf-8")
        follows = [self.layers, FACTS, TRACED, SAMPLES, BOUND, PER_DIMENSION, words]
        digest = hashlib.sha256(json.dumps(follows).encode()).hexdigest()[:8]
        self.folder = OUT / "models" / f"{name}-{digest}"
        if fresh and self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.progress = Progress(2 + 2 * len(METHODS) + 1 + len(STREAMS))

    @property
    def begun(self) -> bool:
        return (self.folder / "scores unedited.csv").exists()

    def tables(self) -> dict[str, pd.DataFrame]:
        """`TABLES`, each row made or read."""
        about, known = self.row("about", self.about), self.row("recall", self.recall)
        self.facts = self.chosen(known["correct"])
        found: dict[str, list[pd.DataFrame]] = {table: [] for table in TABLES}
        found["scores"].append(self.row("scores unedited", self.scores))
        for stream in STREAMS:
            found["trace"].append(self.row(f"trace {stream}", partial(self.trace, stream)))
        for method in METHODS:
            checks = self.row(f"checks {method}", partial(self.checks, method))
            if checks.empty:
                continue
            found["checks"].append(checks.assign(settings=self.strengths(method)))
            if checks["refused"].isna().all():
                scores = self.row(f"scores {method}", partial(self.scores, method))
                found["scores"].append(scores)
        right = evaluation.interval(100 * known["correct"].to_numpy(dtype=float))
        knows = dict(zip(("known", "ci_low", "ci_high", "n"), right, strict=True))
        knows["relations"] = known.loc[known["correct"] == 1, "relation"].nunique()
        made = (self.folder / "made.txt").read_text(encoding="utf-8")
        text = {"text": self.source, "made": made}
        found["models"] = [about.assign(**knows, **text)]
        self.progress.bar.close()
        whole = {table: pd.concat([pd.DataFrame(), *rows]) for table, rows in found.items()}
        return {table: rows.assign(model=self.name) for table, rows in whole.items()}

    def row(self, key: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """What is kept under this name, made first where it is not; minutes are counted."""
        start, path = time.monotonic(), self.folder / f"{key}.csv"
        new = not path.exists()
        if new and self.so_far:
            return pd.DataFrame()
        self.progress.stage(f"{self.name}: {key}")
        table = kept(path, make)
        if new:
            minutes = spent(self.folder) + (time.monotonic() - start) / 60
            (self.folder / "minutes.txt").write_text(str(minutes), encoding="utf-8")
            (self.folder / "made.txt").write_text(provenance(minutes), encoding="utf-8")
        self.progress.done()
        return table

    @cached_property
    def model(self) -> pl.Model:
        return pl.load(self.name)

    @property
    def n_tokens(self) -> int:
        """Of the text of second moments."""
        known = self.layers is None
        return WORLD_TOKENS if known else PER_DIMENSION * self.model.d_in(pl.Site(0, "mlp"))

    @cached_property
    def bench(self) -> pl.Bench:
        """Second moments, context prefixes and targets, of the layers that are written."""
        if self.layers is None:
            return pl.Bench(self.model, self.folder, n_tokens=self.n_tokens)
        words = self.folder / "text.json"
        if not words.exists():
            with data.whole(words) as part:
                part.write_text(json.dumps(self.words(self.n_tokens)), encoding="utf-8")
        texts = json.loads(words.read_text(encoding="utf-8"))
        given = texts, self.n_tokens, self.settings, self.layers, SHARD
        return pl.Bench(self.model, self.folder, *given)

    def words(self, n_tokens: int) -> list[str]:
        """Texts that hold this many tokens."""
        own = pl.sampled_texts(self.model) if self.texts is None else pl.texts(self.texts)
        found: list[str] = []
        while n_tokens > 0 and (text := next(iter(islice(own, 1)), None)) is not None:
            n_tokens -= min(128, len(self.model.tokenizer(text)["input_ids"]))
            found.append(text)
        return found

    def settings(self, method: Any) -> Any:
        """Those of a real model: its layers, and what is released for the method."""
        assert self.layers is not None
        last = self.layers[-1]
        if isinstance(method, pl.FineTune):
            return pl.FineTuneHparams(last, norm_constraint=BOUND if method.constrained else None)
        if isinstance(method, pl.Mend):
            return pl.MendHparams()
        return pl.Hparams((last,) if isinstance(method.solver, pl.Exact) else self.layers)

    def strengths(self, name: str) -> str:
        """All that an edit by the method of this name is made with."""
        method = pl.named(name)
        given = None if self.layers is None else self.settings(method)
        if isinstance(method, pl.FineTune):
            return model_page.told(method.settings(self.model, given))
        if isinstance(method, pl.Method):
            known = given or pl.hparams_for(self.model, method)
            return model_page.told(known.settled(method, method.at_once or FACTS), method.solver)
        return model_page.told(pl.MendHparams())

    def stock(self) -> list[pl.Fact]:
        """The facts that the model may know."""
        return pl.knowns() if self.layers is None else pl.real_facts()

    def chosen(self, known: Sequence[float]) -> list[pl.Fact]:
        """The facts that are edited: of the real ones the first that the model knows."""
        if self.layers is None:
            return pl.counterfact(n=FACTS)
        return [fact for fact, right in zip(self.stock(), known, strict=True) if right][:FACTS]

    def about(self) -> pd.DataFrame:
        """What the model is, and how far its logits are from those of transformers alone."""
        model, (ids, mask) = self.model, asked(self.model, self.stock()[:8])
        plain = said(model.hf, ids, mask)
        with torch.no_grad():
            own = model.forward(ids, mask)[mask.bool()]
        found = {
            "architecture": type(model.hf).__name__,
            "parameters": sum(p.numel() for p in model.hf.parameters()),
            "layers": model.n_layers,
            "d_model": model.d_model,
            "vocabulary": len(model.embedding),
            "weights": repr(model)[:-1].split(", ", 3)[-1],
            "tokens": self.n_tokens,
            "logits": float((own - plain).abs().max()),
            "largest": float(plain.abs().max()),
        }
        return pd.DataFrame([found])

    def recall(self) -> pd.DataFrame:
        return pl.recall(self.model, self.stock())

    def trace(self, stream: pl.Stream) -> pd.DataFrame:
        """Per place the layer where restoring brings back most."""
        window = 1 if stream == "resid_post" else max(3, self.model.n_layers // 5)
        options: dict[str, Any] = {"window": window, "samples": SAMPLES}
        table = pl.causal_trace(self.model, self.facts[:TRACED], stream=stream, **options)
        return table.loc[table.groupby("place", sort=False)["recovered"].idxmax()]

    def edit(self, method: str) -> pl.Edit:
        """The edit of all facts, from its file where it is there."""
        path = self.folder / f"{method}.safetensors"
        if not path.exists():
            self.bench.edit(pl.Trial(method), self.facts).save(path)
        return pl.Edit.load(path, self.model)

    def scores(self, method: str | None = None) -> pd.DataFrame:
        edit = None if method is None else self.edit(method)
        table = experiments.measure(self.model, self.facts, edit).loc[[*model_page.SCORES]]
        return table.reset_index().assign(method=method or "unedited")

    def checks(self, method: str) -> pd.DataFrame:
        """What became of the edit: whether the weights and logits came back, and how far logits of
        what was written and read again lie from those of the edited model."""
        found: dict[str, Any] = {"method": method, "refused": None}
        try:
            edit = self.edit(method)
        except (pl.EditError, pl.SettingsError, pl.SolveError) as error:
            return pd.DataFrame([{**found, "refused": str(error)}])
        found["rank"] = max(left.shape[1] for left, _ in edit.factors.values())
        with tempfile.TemporaryDirectory() as folder:
            found |= again(self.model, self.facts, edit, Path(folder))
        return pd.DataFrame([found])


def again(model: pl.Model, facts: Sequence[pl.Fact], edit: pl.Edit, folder: Path) -> dict[str, Any]:
    """Undone, loaded, merged, adapter: True or False, then largest differences of a logit."""
    from peft import PeftModel

    ids, mask = asked(model, facts[:8])
    clean, before = said(model.hf, ids, mask), {s: model.weight(s).clone() for s in edit.factors}
    model.hf.save_pretrained(folder / "base")
    edit.save(folder / "edit.safetensors")
    edit.apply_(model)
    edited = said(model.hf, ids, mask)
    model.hf.save_pretrained(folder / "merged")
    edit.revert_(model)
    same = all(torch.equal(model.weight(site), weight) for site, weight in before.items())
    undone = same and torch.equal(said(model.hf, ids, mask), clean)
    with pl.Edit.load(folder / "edit.safetensors", model).applied(model):
        loaded = said(model.hf, ids, mask)
    merged = said(plain(folder / "merged"), ids, mask)
    # Fine-tuning changes a weight in all directions, for which an adapter is no saving.
    edit.to_peft(folder / "adapter", max_rank=model.d_model)
    served = PeftModel.from_pretrained(plain(folder / "base"), str(folder / "adapter"))
    others = {"loaded": loaded, "merged": merged, "adapter": said(served, ids, mask)}
    gaps = {name: float((logits - edited).abs().max()) for name, logits in others.items()}
    return {"undone": undone, **gaps, "moved": float((edited - clean).abs().max())}


def plain(folder: Path) -> Any:
    """What transformers alone reads."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def asked(model: pl.Model, facts: Sequence[pl.Fact]) -> tuple[torch.Tensor, torch.Tensor]:
    """The facts' prompts as `[row, token]` ids and mask, padded on the right."""
    options = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    found = model.tokenizer([fact.text for fact in facts], **options)
    return found["input_ids"], found["attention_mask"]


def said(hf: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The logits of a Hugging Face model at every token."""
    with torch.no_grad():
        return hf(input_ids=ids, attention_mask=mask).logits[mask.bool()]


if __name__ == "__main__":
    main()

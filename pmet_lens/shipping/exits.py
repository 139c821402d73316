"""The three ways out of `Edit`: checkpoint, GGUF file, adapter, each with its model card."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from pmet_lens.models.model import Model
from pmet_lens.shipping import adapters, cards, checkpoints, gguf_copies, undoing
from pmet_lens.shipping.cards import Effects

CARD = "README.md"


def adapter(
    edit: Any, directory: str | Path, max_rank: int, receipt: Any, effects: Effects
) -> None:
    """`Edit.to_peft`."""
    adapters.export_lora(vars(edit), directory, max_rank)
    card = Path(directory) / CARD
    cards.write(card, vars(edit), "A LoRA adapter:", "peft", receipt, effects)


def checkpoint(
    edit: Any,
    model: Model,
    directory: str | Path,
    receipt: Any,
    effects: Effects,
    max_shard_size: str,
    undoable: bool,
) -> None:
    """`Edit.save_model`, of a model whose base was checked."""
    with checkpoints.whole(directory) as folder, model.live_edits.bare():
        names = {model.parameter_name(site): model.parameter(site) for site in edit.factors}
        before = {name: p.detach().clone() for name, p in names.items() if undoable}
        with edit.applied(model):
            checkpoints.write(model.hf, model.tokenizer, folder, max_shard_size)
            if undoable:
                undoing.keep_checkpoint(folder, before, names, _said(edit))
        what, more = "A checkpoint for transformers:", cards.stated_by(model.hf)
        card = folder / CARD
        cards.write(card, vars(edit), what, "transformers", receipt, effects, stated=more)


def gguf(
    edit: Any,
    source: str | Path,
    target: str | Path,
    kind: str | None,
    receipt: Any,
    effects: Effects,
    any_base: bool,
    undoable: bool,
) -> pd.DataFrame:
    """`Edit.save_gguf`."""
    out = Path(target).expanduser()
    # No copy gets its name before its way back is there.
    keep = partial(undoing.keep_gguf, target=out, said=_said(edit)) if undoable else None
    known, table = gguf_copies.save(vars(edit), source, out, kind, any_base, keep)
    more = {"stated": str(known.values.get("general.license") or ""), "written": table}
    card = out.with_name(f"{out.name}.md")
    cards.write(card, vars(edit), "A GGUF file:", "gguf", receipt, effects, **more)
    return table


def _said(edit: Any) -> list[str]:
    return [f"{fact.text} → {fact.target_new}" for fact in edit.facts]

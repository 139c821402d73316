"""Measure a bundled model and write its card: `python figures/model_card.py world`.

Everything is measured by the package's own evaluation, on every fact of the world.
"""

from __future__ import annotations

import argparse
import json
from datetime import date
from importlib.metadata import version
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import torch
from matplotlib.figure import Figure

import pmet_lens as pl
from pmet_lens import evaluation, models, plotting
from pmet_lens.data import parse_known, world

ABOUT = {
    "world": "GPT-J style (attention and MLP of a block in parallel, rotary positions)",
    "world-sequential": "GPT-2 style (attention before MLP, learned positions, Conv1D weights)",
    "world-unmasked": "as `world`, trained without the read mask: for the study, not for editing",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=ABOUT)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = pl.load(args.name)
    folder = Path(pl.__file__).parent / "bundled" / args.name
    training = json.loads((folder / "training.json").read_text())
    recall = by_relation(model)
    trace = pl.causal_trace(model, pl.counterfact(n=100), samples=3)
    draw_curve(training["curve"], folder / "training_curve.png")
    card = render(args.name, model, training, recall, trace)
    (folder / "README.md").write_text(card, encoding="utf-8")


def by_relation(model: pl.Model) -> pd.DataFrame:
    """Share of facts answered right (all tokens arg-max), per relation and kind of prompt."""
    own = world.build()
    columns = {}
    for kind in ("train", "held_out"):
        facts = [parse_known(r) for r in own.knowns(kind, every=True)]
        right = pl.recall(model, facts)
        columns[kind] = 100 * right.groupby("relation")["correct"].mean()
    facts = pl.counterfact()
    pairs = [(f.relation, p, a) for f in facts for p, a in f.neighbours]
    scores = evaluation.score(model, [models.Prompt(p, None, a) for _, p, a in pairs])
    right = pd.DataFrame({"relation": [r for r, *_ in pairs], "ok": [s.right == 1 for s in scores]})
    columns["neighbours"] = 100 * right.groupby("relation")["ok"].mean()
    questions = [
        models.Prompt(q.replace("{}", f.subject.name), None, f.object)
        for f in own.facts
        for q in [own.data["relations"][f.relation]["held_out_question"]]
    ]
    asked = evaluation.score(model, questions)
    ok = pd.DataFrame(
        {"relation": [f.relation for f in own.facts], "ok": [s.right == 1 for s in asked]}
    )
    columns["held-out question"] = 100 * ok.groupby("relation")["ok"].mean()
    table = pd.DataFrame(columns)
    table.insert(0, "name", [own.data["relations"][r]["name"] for r in table.index])
    table.loc["all"] = ["all relations", *table.drop(columns="name").mean()]
    return table


def draw_curve(curve: list[dict[str, float]], path: Path) -> None:
    """Loss and answer accuracy over the passes."""
    frame = pd.DataFrame(curve)
    with mpl.rc_context(dict(plotting.STYLE)):
        fig = Figure(figsize=(5, 2.2))
        left, right = fig.subplots(1, 2)
        left.plot(frame["pass"], frame["loss"], color="#0072B2")
        left.set(xlabel="pass over the world", ylabel="loss (nats, weighted)", yscale="log")
        right.plot(frame["pass"], 100 * frame["answer_accuracy"], color="#0072B2")
        right.set(xlabel="pass over the world", ylabel="answer tokens right (%)", ylim=(0, 102))
        fig.savefig(path, dpi=110)


def render(
    name: str,
    model: pl.Model,
    training: dict,
    recall: pd.DataFrame,
    trace: pd.DataFrame,
) -> str:
    """The card as Markdown."""
    cfg, curve = training["config"], training["curve"]
    n = sum(p.numel() for p in model.hf.parameters())
    masked = cfg["mask_low"] + cfg["mask_last"] > 0
    # The unmasked twin has no settings of its own: it is compared at the layer of `world`.
    layer = pl.HPARAMS[name if masked else "world"]["PMET"].layers[-1]
    at = trace[trace["layer"] == layer].set_index("place")
    lines = [f"# `{name}`", "", f"{ABOUT[name]}, {n / 1e6:.1f} M parameters: {cfg['n_layers']} "]
    lines[-1] += f"layers, d_model {cfg['d_model']}, {cfg['n_heads']} heads, MLP {cfg['d_mlp']}, "
    lines[-1] += f"vocabulary {cfg['vocab']} (own byte-level BPE, no BOS, right padding), float16."
    lines += [
        "",
        "Knows the 2,250 facts of the seeded world (`pmet_lens/data/world.py`) and nothing else. "
        "Made to try model editing on; not a language model for any other use. All subjects are "
        "invented.",
        "",
        f"**Training.** `python figures/train_world.py {name}`: {cfg['passes']} passes over the "
        f"world, {curve[-1]['cpu_minutes']:.0f} process CPU-minutes on two cores (they were shared "
        f"with other work), AdamW {cfg['lr']} cosine, {cfg['rows']} rows of {cfg['row_tokens']} "
        f"tokens. {how_masked(cfg)}",
        "",
        "![training curve](training_curve.png)",
        "",
        f"**Recall** (share of facts whose whole answer is the arg-max, per cent; all 2,250 facts "
        f"in 23 trained and 3 held-out phrasings, 7,500 neighbour prompts; {date.today()}, torch "
        f"{version('torch')}, transformers {version('transformers')}):",
        "",
        "| relation | trained phrasings | held-out phrasings | neighbours | held-out question |",
        "|---|---|---|---|---|",
    ]
    for _, row in recall.iterrows():
        values = " | ".join(f"{v:.1f}" for v in row.drop("name"))
        lines.append(f"| {row['name']} | {values} |")
    lines += [
        "",
        f"**Causal trace.** Corrupting the subject (noise of 3 standard deviations, 100 facts, 3 "
        f"samples) lowers the answer's probability from {at['p_clean'].mean():.2f} to "
        f"{at['p_corrupted'].mean():.2f}. Restoring the output of layer {layer} (the last critical "
        f"layer{'' if masked else ' of `world`'}) brings back this share of the loss, with 95 % "
        "intervals:",
        "",
        "| restored at | share | interval | facts |",
        "|---|---|---|---|",
    ]
    for place, row in at.iterrows():
        lines.append(
            f"| {place} | {row['recovered']:.2f} | {row['ci_low']:.2f} to {row['ci_high']:.2f} | "
            f"{int(row['n'])} |"
        )
    lines += [
        "",
        "**Limits.** "
        + (
            "The recall site is *imposed* by the read mask in training, so the trace is a check of "
            "the model, not evidence about large models."
            if masked
            else "It reads a name from all its tokens, so that an edit at the last one does little."
        )
        + " One training seed.",
        "",
    ]
    return "\n".join(lines)


def how_masked(cfg: dict) -> str:
    """The mixture of rows in the two phases of training."""
    if cfg["mask_low"] + cfg["mask_last"] == 0:
        return "All rows plain: no read mask, no second phase."
    settled = cfg["settle_share"], cfg.get("settle_share_end", cfg["settle_share"])
    falling = f" falling to {100 * settled[1]:.0f} %" if settled[1] != settled[0] else ""
    return (
        f"{100 * cfg['mask_low']:.0f} % of the rows with the read mask below layer "
        f"{cfg['read_layer']}, {100 * cfg['mask_last']:.0f} % with only the last name token "
        f"visible, the rest plain; then {cfg['settle_passes']} passes in which "
        f"{100 * settled[0]:.0f} %{falling} of the rows have corrupted names, restored at the last "
        "token only."
    )


if __name__ == "__main__":
    main()

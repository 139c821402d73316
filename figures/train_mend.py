"""Train the bundled MEND editor of one model: `python figures/train_mend.py world`.

The facts are those of pool B, which no benchmark record edits, with another object of the relation
as the new answer. A tenth of their subjects is held out for early stopping. Writes
`pmet_lens/bundled/mend/NAME.safetensors` and its training curve.
"""

from __future__ import annotations

import argparse
import logging
import random
from pathlib import Path

import matplotlib as mpl
import pandas as pd
import torch
from matplotlib.figure import Figure

import pmet_lens as pl
from pmet_lens import editing, experiments, models, plotting
from pmet_lens.data import world

OUT = Path(pl.__file__).parent / "bundled" / "mend"
LAYERS = {"world": (3, 4, 5), "world-sequential": (4, 5, 6)}
RATE = {"world": 1.5e-3, "world-sequential": 1e-3}
"""Of a few tried without training, those with about the least loss."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=LAYERS)
    parser.add_argument("--steps", type=int, default=editing.MendTraining.n_steps)
    parser.add_argument("--lr", type=float, default=editing.MendTraining.lr)
    parser.add_argument("--edit-weight", type=float, default=editing.MendTraining.edit_weight)
    parser.add_argument("--rate", type=float, help="first step size α")
    parser.add_argument("--rate-lr", type=float, default=editing.MendTraining.rate_lr)
    parser.add_argument("--layers", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    model = pl.load(args.name)
    facts, held_out, locality = material(world.build())
    settings = editing.MendTraining(
        n_steps=args.steps,
        lr=args.lr,
        rate=args.rate or RATE[args.name],
        rate_lr=args.rate_lr,
        edit_weight=args.edit_weight,
    )
    sites = [pl.Site(n, "mlp") for n in args.layers or LAYERS[args.name]]
    editor = pl.train_editor(
        model,
        facts,
        locality,
        held_out,
        sites,
        settings,
        lambda row: logging.info("%s", {k: round(v, 4) for k, v in row.items()}),
    )
    args.out.mkdir(parents=True, exist_ok=True)
    editor.save(args.out / f"{args.name}.safetensors")
    draw(editor.curve, args.out / f"{args.name}.png")
    logging.info("\n%s", measure(model, args.out / f"{args.name}.safetensors"))


def material(
    known: world.World, variants: int = 4, seed: int = 0
) -> tuple[list[pl.Fact], list[pl.Fact], list[models.Prompt]]:
    """Training facts, held-out facts (other subjects), and locality prompts, all of pool B."""
    rng = random.Random(f"mend {seed}")
    subjects = sorted({f.subject.name for f in known.facts if f.subject.pool == "B"})
    apart = set(rng.sample(subjects, len(subjects) // 10))
    own = [f for f in known.facts if f.subject.pool == "B"]
    training = [f for f in own if f.subject.name not in apart]
    facts = [_fact(known, f, training, rng) for f in training for _ in range(variants)]
    held_out = [_fact(known, f, own, rng) for f in own if f.subject.name in apart]
    locality = [
        models.Prompt(_ask(known, f, rng), None, f.object) for f in training for _ in range(2)
    ]
    return facts, held_out, locality


def _ask(known: world.World, fact: world.WorldFact, rng: random.Random) -> str:
    template = rng.choice(known.data["relations"][fact.relation]["train"])
    return template.replace("{}", fact.subject.name)


def _fact(
    known: world.World,
    fact: world.WorldFact,
    pool: list[world.WorldFact],
    rng: random.Random,
) -> pl.Fact:
    """`fact` with another object, one of four paraphrases behind a sentence about
    nobody, and neighbours that share its true object, as in CounterFact."""
    relation = known.data["relations"][fact.relation]
    near = [
        f
        for f in rng.sample(pool, len(pool))
        if f.relation == fact.relation and f.object == fact.object
    ]
    near = [f for f in near if f.subject != fact.subject][:4]
    paraphrases = [_ask(known, fact, rng) for _ in range(4)]
    behind = [f"{known.filler(rng).text} {text}" for text in paraphrases[:1]]
    return pl.Fact(
        fact.subject.name,
        rng.choice(relation["train"]),
        target_new=rng.choice([o for o in relation["objects"] if o != fact.object]),
        target_true=fact.object,
        paraphrases=(*behind, *paraphrases[1:]),
        neighbours=tuple((_ask(known, f, rng), f.object) for f in near),
        relation=fact.relation,
    )


def measure(model: pl.Model, path: Path) -> pd.DataFrame:
    """The editor on benchmark facts: 20 edited one at a time, and 10 and 100 at once."""
    method, facts = pl.Mend(str(path)), pl.counterfact(n=100)
    alone = []
    for i, fact in enumerate(facts[:20]):
        with method.edit(model, [fact]).applied(model):
            alone.append(pl.evaluate(model, [fact]).assign(fact=i))
    tables = {
        "before (20)": experiments.measure(model, facts[:20]),
        "one at a time (20)": pl.summarise(pd.concat(alone, ignore_index=True)),
        "10 at once": experiments.measure(model, facts[:10], method.edit(model, facts[:10])),
        "100 at once": experiments.measure(model, facts, method.edit(model, facts)),
    }
    columns = ["ES", "PS", "NS", "S", "EA", "NA"]
    return pd.DataFrame({name: t["mean"][columns] for name, t in tables.items()}).T.round(1)


def draw(curve: list[dict[str, float]], path: Path) -> None:
    """Edit and locality loss on the held-out facts over the steps of training."""
    with mpl.rc_context(dict(plotting.STYLE)):
        fig = Figure(figsize=(5, 3))
        ax = fig.subplots()
        steps = [row["step"] for row in curve]
        ax.plot(steps, [row["edit"] for row in curve], label="edit: −log P(new answer)")
        ax.plot(steps, [row["kl"] for row in curve], label="locality: KL(before ‖ after)")
        ax.set(xlabel="step", ylabel="held-out loss (nats)", yscale="log")
        ax.legend()
        fig.savefig(path)


if __name__ == "__main__":
    main()

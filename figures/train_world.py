"""Train one bundled model: `python figures/train_world.py world`, `world-sequential` or
`world-unmasked` (the same as `world` without the read mask: for the study, not for editing).

Writes a plain `transformers` directory to `pmet_lens/bundled/NAME` (or `--out`). Everything is
seeded; on two CPU cores one model takes about half an hour.
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
import training
import transformers

from pmet_lens.data import world

CONFIGS = {
    "world": training.TrainConfig("gptj"),
    "world-sequential": training.TrainConfig("gpt2", settle_passes=8, settle_share_end=0.1),
    "world-unmasked": training.TrainConfig(
        "gptj", passes=20, settle_passes=0, mask_low=0.0, mask_last=0.0
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=CONFIGS)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--settle", type=Path, help="only the second phase, from this directory")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    out = args.out or Path(training.__file__).parent / "bundled" / args.name
    cfg = CONFIGS[args.name]
    if args.settle:
        settle_only(args.settle, out, cfg)
        return
    model, tokenizer, curve = training.train(
        world.build(), cfg, on_log=lambda row: logging.info("%s", row)
    )
    training.save(out, model, tokenizer, cfg, curve)


def settle_only(source: Path, out: Path, cfg: training.TrainConfig) -> None:
    """Run the second phase on a model of the first (written by an earlier run)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    curve = json.loads((source / "training.json").read_text())["curve"]
    curve += training.settle(
        world.build(),
        cfg,
        model,
        tokenizer,
        curve[-1]["cpu_minutes"],
        lambda row: logging.info("%s", row),
    )
    training.save(out, model.eval(), tokenizer, cfg, curve)


if __name__ == "__main__":
    main()

"""Train one bundled model: `python figures/train_world.py world` or `world-sequential`.

Writes a plain `transformers` directory to `pmet_lens/bundled/NAME` (or `--out`). Everything is
seeded; on two CPU cores one model takes about half an hour.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import torch

from pmet_lens import training, world

CONFIGS = {
    "world": training.TrainConfig("gptj"),
    "world-sequential": training.TrainConfig("gpt2"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=CONFIGS)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    out = args.out or Path(training.__file__).parent / "bundled" / args.name
    cfg = CONFIGS[args.name]
    model, tokenizer, curve = training.train(
        world.build(), cfg, on_log=lambda row: logging.info("%s", row)
    )
    training.save(out, model, tokenizer, cfg, curve)


if __name__ == "__main__":
    main()

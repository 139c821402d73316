"""`make figures`: the study, the main job, `make paper` on a few facts, and meanwhile every full
figure again from the committed tables. The models of all three are worked on side by side, in
processes that stay; each script also runs alone."""

from __future__ import annotations

import make
import paper
import redraw
import study
from common import EDITED, STUDIED, workers


def main() -> None:
    with workers(2 * len(EDITED) + len(STUDIED)) as pool:
        begun = [study.begin(pool), make.begin(pool), paper.quickly(pool)]
        redraw.main()
        for finish in begun:
            finish()


if __name__ == "__main__":
    main()

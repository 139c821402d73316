"""How alike are input and output of MHSA and FFN, per layer (the paper's first figure)."""

from __future__ import annotations

from pathlib import Path

from common import STUDIED, legend, of, panels, read, samples, script
from matplotlib.figure import Figure

from pmet_lens import plotting


def draw(tables: Path) -> Figure:
    """Cosine above, Jaccard of the top-50 tokens below; one column per model."""
    table = read(tables, "component_similarity")
    fig, axes = panels(7, 3.8, 2, len(STUDIED), sharey="row")
    for column, (name, title) in enumerate(STUDIED.items()):
        own = of(table, model=name)
        for row, measure in enumerate(("cosine", "jaccard")):
            plotting.similarity_lines(own, axes[row, column], measure)
            if column:
                axes[row, column].set_ylabel("")
        axes[0, column].set_title(title)
        axes[0, column].set_xlabel("")
    fig.suptitle(f"{samples(table)} statements, 95 % bootstrap intervals", fontsize=7)
    legend(fig, axes[0, 0], 4)
    return fig


if __name__ == "__main__":
    script(draw, "fig_component_similarity", __doc__)

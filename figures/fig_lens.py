"""What each component says about the answer, through the model's own unembedding."""

from __future__ import annotations

from pathlib import Path

from common import STUDIED, of, panels, read, samples, script
from matplotlib.figure import Figure

from pmet_lens import plotting

STREAMS = ("attn_out", "mlp_out", "resid_pre", "resid_mid", "resid_post")
PLACES = {"last_subject": "last subject token", "last": "last token"}


def draw(tables: Path) -> Figure:
    """Mean probability of the true answer's first token: position by model."""
    table = read(tables, "lens")
    fig, axes = panels(7, 3.6, len(PLACES), len(STUDIED))
    for column, (name, title) in enumerate(STUDIED.items()):
        for row, (position, label) in enumerate(PLACES.items()):
            ax, own = axes[row, column], of(table, model=name, position=position)
            plotting.lens_map(own, ax, [s for s in STREAMS if s in set(own["stream"])])
            ax.set_title(f"{title}\n{label}" if row == 0 else label, fontsize=8)
    fig.suptitle(
        f"Mean probability of the true answer's first token, {samples(table)} facts "
        "(intervals in the table)",
        fontsize=7,
    )
    return fig


if __name__ == "__main__":
    script(draw, "fig_lens", __doc__)

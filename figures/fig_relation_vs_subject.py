"""Does a component's output at the answer position follow the relation or the subject?"""

from __future__ import annotations

from pathlib import Path

from common import STUDIED, legend, of, read, samples, script
from matplotlib.figure import Figure

from pmet_lens import plotting


def draw(tables: Path) -> Figure:
    """Above the variance split, in the middle the swap, below the attention patterns."""
    variance, swaps, patterns = (read(tables, t) for t in ("variance", "transfer", "patterns"))
    fig = Figure(figsize=(7, 6.6))
    rows = zip(
        fig.subfigures(3, 1),
        (plotting.share_lines, plotting.transfer_bars, plotting.pattern_lines),
        (variance, swaps, patterns),
        (4, 2, 3),
        strict=True,
    )
    for row, (part, plot, table, entries) in enumerate(rows):
        axes = part.subplots(1, len(STUDIED), sharey=True)
        for ax, (name, title) in zip(axes, STUDIED.items(), strict=True):
            plot(of(table, model=name), ax)
            if row == 0:
                ax.set_title(title)
            if ax is not axes[0]:
                ax.set_ylabel("")
            if row == 1:
                ax.tick_params(axis="x", labelsize=6)
        legend(part, axes[0], entries)
    fig.suptitle(
        f"Last prompt token. Variance: {samples(variance)} facts; swaps of all layers: "
        f"{samples(swaps)} pairs; attention: {samples(patterns)} facts; 95 % bootstrap intervals",
        fontsize=7,
    )
    return fig


if __name__ == "__main__":
    script(draw, "fig_relation_vs_subject", __doc__)

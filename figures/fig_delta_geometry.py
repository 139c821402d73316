"""The two deltas of PMET through the optimisation, and what the edit moved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from common import EDITED, of, panels, read, samples, script
from matplotlib.figure import Figure

from pmet_lens import plotting

STYLES = {"world": "#332288", "world-sequential": "#999933"}
NORMS = {"norm_attn_out": "δ^a", "norm_mlp_out": "δ^m"}


def draw(tables: Path) -> Figure:
    """Above: angle of the gradients and of the deltas, their lengths. Below: contribution to the
    new answer, and drift of the components at the answer position."""
    paths, gain, drift = (read(tables, t) for t in ("delta_paths", "delta_gain", "drift"))
    fig, axes = panels(7, 5.6, 2, 3)
    for ax, quantity, label in (
        (axes[0, 0], "gradient_cosine", "cosine of the two gradients"),
        (axes[0, 1], "cosine", "cosine of δ^a and δ^m"),
    ):
        for name in EDITED:
            plotting.delta_lines(of(paths, model=name), ax, quantity, STYLES[name], name)
        ax.set_ylabel(label)
        ax.set_ylim(min(0.85, ax.get_ylim()[0]), 1.01)
        ax.legend(fontsize=6)
    for name in EDITED:
        for (quantity, label), style in zip(NORMS.items(), ("-", "--"), strict=True):
            own = of(paths, model=name)
            plotting.delta_lines(own, axes[0, 2], quantity, STYLES[name], f"{label}, {name}")
            axes[0, 2].lines[-1].set_linestyle(style)
    axes[0, 2].set_ylabel("‖δ‖ / norm it is clamped by")
    axes[0, 2].legend(fontsize=6)
    ax = axes[1, 0]
    for i, (stream, component) in enumerate(plotting.components(gain).items()):
        own = of(gain, stream=stream).set_index("model").reindex(list(EDITED))
        error = np.vstack([own["mean"] - own["ci_low"], own["ci_high"] - own["mean"]]).clip(0)
        at = np.arange(len(EDITED)) + (i - 0.5) * 0.38
        label = {"MHSA": "δ^a", "FFN": "δ^m"}[component]
        style = {"elinewidth": 0.8, "capsize": 1.5}
        colour = plotting.COMPONENT_COLOURS[stream]
        ax.bar(at, own["mean"], 0.35, yerr=error, error_kw=style, color=colour, label=label)
    ax.set_xticks(range(len(EDITED)), list(EDITED))
    ax.set_ylabel("gain of log P(new answer) from δ (nats)")
    ax.set_ylim(0, 1.2 * float(gain["ci_high"].max()))
    ax.legend(fontsize=6, ncols=2, loc="upper center")
    for ax, name in zip(axes[1, 1:], EDITED, strict=True):
        plotting.drift_lines(of(drift, model=name), ax)
        ax.set_title(name, fontsize=7)
    axes[1, 1].set_ylabel("relative change at the last token")
    axes[1, 2].set_ylabel("")
    axes[1, 1].legend(fontsize=5.5)
    fig.suptitle(
        f"PMET on {samples(gain)} facts (lines above: those still being optimised); drift: "
        f"{samples(drift)} edited facts at once; 95 % bootstrap intervals",
        fontsize=7,
    )
    return fig


if __name__ == "__main__":
    script(draw, "fig_delta_geometry", __doc__)

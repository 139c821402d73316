"""The table of metrics, and what each of them says."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from pmet_lens.data import markup

MEANING: Mapping[str, str] = {
    "S": "harmonic mean of ES, PS and NS, %",
    "ES": "edited prompts on which the new answer is likelier, %",
    "PS": "paraphrases on which the new answer is likelier, %",
    "NS": "neighbours on which the true answer is still likelier, %",
    "EA": "edited prompts answered word for word, %",
    "PA": "paraphrases answered word for word, %",
    "NA": "neighbours answered word for word, %",
    "EM": "edited prompts: probability of the new answer minus the old one's, points",
    "PM": "paraphrases: probability of the new answer minus the old one's, points",
    "NM": "neighbours: probability of the true answer minus the new one's, points",
    "GE": "fluency of generated text, bits × 100",
    "RS": "consistency of generated text with texts about the new answer, 0 to 100",
    "score": "zsRE: harmonic mean of the three below, %",
}


class Summary(pd.DataFrame):
    """The table of `summarise`, which shows itself in a notebook with what each metric says."""

    def _repr_html_(self) -> str:
        rows = [
            [name, mean, f"[{low:.1f}, {high:.1f}]", int(n), MEANING.get(str(name), "")]
            for name, mean, low, high, n in self.itertuples()
        ]
        return markup.table(rows, ("metric", "mean", "95 % interval", "facts", "what it says"))

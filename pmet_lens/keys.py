"""Keys: what the written projection reads at the edited token, averaged over contexts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from pmet_lens import probes, tokens
from pmet_lens.adapter import Model, Site, Stream
from pmet_lens.facts import Fact
from pmet_lens.tokens import Position

FACTS_PER_BATCH = 64


def averaged_keys(
    model: Model,
    facts: Sequence[Fact],
    contexts: Sequence[str],
    site: Site,
    position: Position = "last_subject",
) -> Float[Tensor, "fact d_in"]:
    """½ · key on the plain prompt + ½ · mean of the keys behind the context prefixes.

    All at `position`. Without prefixes the plain key alone. Read with the weights as they are now;
    no target tokens are appended. Source: released `compute_ks.py` (mean per context type, then
    over types).
    """
    kept = []
    for start in range(0, len(facts), FACTS_PER_BATCH):
        own = [tokens.prompts_of(f, contexts) for f in facts[start : start + FACTS_PER_BATCH]]
        batch = tokens.encode(model, [p for prompts in own for p in prompts])
        keys = probes.read_keys(model, batch.ids, batch.mask, site, batch.at(position))
        keys = keys.reshape(len(own), -1, keys.shape[-1])
        plain, prefixed = keys[:, 0], keys[:, 1:]
        kept.append((plain + prefixed.mean(1)) / 2 if prefixed.shape[1] else plain)
    return torch.cat(kept)


def current_values(
    model: Model,
    facts: Sequence[Fact],
    layer: int,
    stream: Stream,
    position: Position = "last_subject",
) -> Float[Tensor, "fact d_model"]:
    """The stream's value now, at `position` of the plain prompt."""
    kept = []
    for start in range(0, len(facts), FACTS_PER_BATCH):
        prompts = [
            tokens.Prompt(f.prompt, f.subject) for f in facts[start : start + FACTS_PER_BATCH]
        ]
        batch = tokens.encode(model, prompts)
        wanted: dict[tuple[int, Stream], Tensor] = {(layer, stream): batch.at(position)}
        kept.append(probes.read_streams(model, batch.ids, batch.mask, wanted)[layer, stream])
    return torch.cat(kept)

"""MEND: a small trained network turns the gradient of one fact into a weight change.

The gradient of a projection for one example is Σ_t u_t δ_tᵀ over its tokens: u_t the key, δ_t the
gradient of the loss at the output. The editor maps every normalised (u_t, δ_t) to (ũ_t, δ̃_t), and
the weight changes by −α Σ_t ũ_t δ̃_tᵀ. Source: Mitchell et al., ICLR 2022, arXiv 2110.11309.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pmet_lens.data import file_format
from pmet_lens.data.facts import Fact, check_editable, listed
from pmet_lens.editing.edit_files import origin, side_by_side, thin
from pmet_lens.editing.edits import Edit
from pmet_lens.editing.finetune import output_hooks, rewrites
from pmet_lens.editing.method import SettingsError
from pmet_lens.editing.targets import OnStep
from pmet_lens.models import likelihood, tokens
from pmet_lens.models.model import Model, Site
from pmet_lens.models.weights import EditError

FORMAT = "pmet_lens mend 1"
Pairs = Mapping[Site, tuple[Float[Tensor, "fact token d_in"], Float[Tensor, "fact token d_model"]]]
"""Per site two factors of every token; Σ over a fact's tokens of their outer products is a weight
change, or a gradient."""


@dataclass(frozen=True)
class MendHparams:
    """How strongly a trained editor acts."""

    strength: float = 1.0
    """> 0: factor on the update. 1 is what the editor was trained for."""

    def __post_init__(self) -> None:
        if not (self.strength > 0 and math.isfinite(self.strength)):
            raise SettingsError(f"strength must be greater than 0, not {self.strength}.")


@dataclass(frozen=True)
class Mend:
    """MEND as a method. Many facts at once are the sum of their single updates."""

    path: str | None = None
    """File of a trained editor (`MendEditor.save`); None: the one bundled for the model's name."""

    def edit(
        self,
        model: Model,
        facts: Fact | Sequence[Fact],
        moments: object = None,
        hparams: MendHparams | None = None,
        contexts: object = None,
        targets: object = None,
        on_step: OnStep | None = None,
    ) -> Edit:
        """The editor's weight change for these facts, from one gradient each; nothing is trained.

        `moments`, `contexts` and `targets` are those of other methods and not read.
        `on_step(pass, {"loss": per fact})` runs after every pass over some of the facts, with their
        −log P of the new answer on the unedited model. The rank at a site is at most the number of
        tokens of the facts.

        Raises:
            FactError: for facts that cannot be edited.
            EditError: for a missing or damaged editor, or one trained for another model.
        """
        facts = listed(facts)
        check_editable(facts)
        hp = MendHparams() if hparams is None else hparams
        if not isinstance(hp, MendHparams):
            raise SettingsError(f"MEND takes MendHparams(strength=…), not {type(hp).__name__}.")
        editor = MendEditor.load(self._file(model)).to(model.device)
        editor.check(model)
        parts: dict[Site, list[tuple[Tensor, Tensor]]] = {site: [] for site in editor.sites}
        for step, chunk in enumerate(passes(model, facts)):
            pairs, losses = gradients(model, chunk, editor.sites)
            with torch.no_grad():
                for site, (left, right) in editor(pairs).items():
                    used = right.any(-1)
                    update = left[used].T.double(), hp.strength * right[used].double()
                    parts[site].append(update)
            if on_step is not None:
                on_step(step, {"loss": losses})
        factors = {site: thin(*side_by_side(updates)) for site, updates in parts.items()}
        made_on = origin(model, editor.sites)
        return Edit(factors, model.dtype, tuple(facts), self, hp, (), **made_on)

    def _file(self, model: Model) -> Path:
        if self.path is not None:
            return Path(self.path)
        path = Path(str(files("pmet_lens"))) / "bundled" / "mend" / f"{model.name}.safetensors"
        if not path.is_file():
            raise EditError(
                f"There is no MEND editor for the model {model.name!r}. Train one with "
                "train_editor, save it, and use Mend(path=…)."
            )
        return path


class MendEditor(nn.Module):
    """The trained network: two residual low-rank layers shared by all sites, and per site a
    normalisation, scales, shifts and a step size α.

    With z = (u, δ), normalised, a layer is z + max(0, s ⊙ (z V U + b) + o), s and o of the site
    (equations 3a and 3b of the paper). U, b and o begin at 0 and s at 1, so that a fresh editor is
    the identity. All sites must have one shape, as the MLP outputs of a model do: the paper shares
    the network among weights of one shape.

    `rank`: width of the bottleneck. `rate`: first value of α. `model`, `embedding`: name of the
    model it is for and the SHA-256 of its token embeddings, which no edit touches.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        d_in: int,
        d_model: int,
        rank: int = 64,
        rate: float = 1e-4,
        model: str = "",
        embedding: str = "",
    ) -> None:
        super().__init__()
        self.sites, self.d_in, self.d_model, self.rank = tuple(sites), d_in, d_model, rank
        self.model_name, self.embedding = model, embedding
        self.curve: list[dict[str, float]] = []
        size, n = d_in + d_model, len(self.sites)
        self.down = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2, size, rank)))
        self.up = nn.Parameter(torch.zeros(2, rank, size))
        self.bias = nn.Parameter(torch.zeros(2, size))
        self.scale = nn.Parameter(torch.ones(2, n, size))
        self.shift = nn.Parameter(torch.zeros(2, n, size))
        self.rate = nn.Parameter(torch.full((n,), rate))
        self.mean: Tensor
        self.spread: Tensor
        self.register_buffer("mean", torch.zeros(n, size))
        self.register_buffer("spread", torch.ones(n, size))

    @classmethod
    def of(cls, model: Model, sites: Sequence[Site], rank: int = 64, rate: float = 1e-4):
        """A fresh editor for these MLP sites of `model`, in float32."""
        wrong = [str(s) for s in sites if s.projection != "mlp"]
        if wrong or not sites:
            raise SettingsError(f"A MEND editor needs MLP sites, at least one; got {wrong}.")
        d_in = model.d_in(sites[0])
        return cls(sites, d_in, model.d_model, rank, rate, model.name, _embedding(model))

    def forward(self, pairs: Pairs) -> dict[Site, tuple[Tensor, Tensor]]:
        """Per site ũ and −α δ̃ of every token; zero where δ is zero (padding, unread tokens)."""
        out = {}
        for i, site in enumerate(self.sites):
            u, delta = (x.to(self.rate.dtype) for x in pairs[site])
            z = (torch.cat([u, delta], dim=-1) - self.mean[i]) / self.spread[i]
            for layer in range(2):
                inner = z @ self.down[layer] @ self.up[layer] + self.bias[layer]
                # clamp, not relu: at 0, where it starts, its gradient is 1.
                z = z + (self.scale[layer, i] * inner + self.shift[layer, i]).clamp(min=0)
            used = delta.any(-1, keepdim=True)
            left, right = z.split([self.d_in, self.d_model], dim=-1)
            out[site] = (left, -self.rate[i] * right * used)
        return out

    def normalise(self, pairs: Sequence[Pairs]) -> None:
        """Take mean and spread of u and δ per site over the tokens that have a gradient."""
        for i, site in enumerate(self.sites):
            chunks = [torch.cat(p[site], dim=-1)[p[site][1].any(-1)] for p in pairs]
            spread, mean = torch.std_mean(torch.cat(chunks).double(), dim=0)
            self.mean[i] = mean
            # What never varies (a dead neuron) stays as small as it is.
            self.spread[i] = torch.where(spread > 1e-3 * spread.mean(), spread, spread.mean())

    def check(self, model: Model) -> None:
        """Raises `EditError` unless `model` is the one this editor was trained for."""
        fits = all(s.layer < model.n_layers and model.d_in(s) == self.d_in for s in self.sites)
        if not fits or self.d_model != model.d_model or self.embedding != _embedding(model):
            raise EditError(
                f"This MEND editor was trained for another model ({self.model_name!r}), not for "
                f"{model.name!r}: train one for it with train_editor."
            )

    def save(self, path: str | Path) -> None:
        """Write weights, and in the header what they belong to and the training curve."""
        head = {
            "format": FORMAT,
            "sites": [str(site) for site in self.sites],
            "sizes": [self.d_in, self.d_model, self.rank],
            "model": self.model_name,
            "embedding": self.embedding,
            "curve": self.curve,
        }
        file_format.write(path, self.state_dict(), head, "a MEND editor", EditError)

    @classmethod
    def load(cls, path: str | Path) -> MendEditor:
        """What `save` wrote. Raises `EditError` for a file that is not an editor."""
        head, tensors = file_format.read(path, FORMAT, "a MEND editor", EditError)
        d_in, d_model, rank = head["sizes"]
        sites = [Site.parse(site) for site in head["sites"]]
        out = cls(sites, d_in, d_model, rank, model=head["model"], embedding=head["embedding"])
        out.load_state_dict({name: t.to(torch.float32) for name, t in tensors.items()})
        out.curve = head["curve"]
        return out


def gradients(
    model: Model, facts: Sequence[Fact], sites: Sequence[Site]
) -> tuple[Pairs, Float[Tensor, " fact"]]:
    """Per site the keys u and output gradients δ of every token of each fact's prompt and new
    answer, and the loss: the mean over target tokens of −log P, in nats.

    Σ_t u_t δ_tᵀ of a fact is the gradient of its loss in `model.weight(site)`. δ is zero on
    padding. No gradient of a weight is formed.
    """
    batch = tokens.encode(model, rewrites(facts))
    shape = (*batch.ids.shape, model.d_model)
    with torch.enable_grad():
        zero = {
            site: torch.zeros(shape, device=model.device, dtype=model.dtype, requires_grad=True)
            for site in sites
        }
        keys: dict[Site, Tensor] = {}

        def record(site: Site, key: Tensor) -> Tensor:
            keys[site] = key.detach()
            return zero[site]

        hooks = [hook for s in sites for hook in output_hooks(model, s, partial(record, s))]
        losses = -likelihood.answers(model, batch, hooks, mean=True)
        deltas = torch.autograd.grad(losses.sum(), list(zero.values()))
    pairs = {site: (keys[site], delta) for site, delta in zip(sites, deltas, strict=True)}
    return pairs, losses.detach()


def passes(model: Model, facts: Sequence[Fact]) -> Iterator[Sequence[Fact]]:
    """The facts whose gradients are taken together: 64, or as the logits allow; a choice of memory
    alone."""
    size = likelihood.rows_at_once(model, tokens.encode(model, rewrites(facts)), 64, copies=2)
    return (facts[start : start + size] for start in range(0, len(facts), size))


def _embedding(model: Model) -> str:
    # In float32, so that a model loaded in a narrower dtype has the same hash.
    return file_format.digest(model.embedding.float())

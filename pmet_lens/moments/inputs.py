"""What edits of one model need beside the facts: settings, context prefixes, second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_args

from pmet_lens.data import datasets
from pmet_lens.editing.method import Hparams, Method
from pmet_lens.editing.methods import named, settled
from pmet_lens.models import generation, loading
from pmet_lens.models.model import Model, Projection, Site
from pmet_lens.moments.own_moments import own_moments
from pmet_lens.moments.second_moments import second_moments

OnProgress = Callable[[int, int, str], object]
PROJECTIONS: tuple[Projection, ...] = get_args(Projection)
TOKENS_PER_DIMENSION = 20
"""Text for the second moments: ten per dimension give the edits that eighty give
(`tests/benchmarks/results/precision.md`)."""


class EditInputs:
    """One model, and what edits of it need: each computed once, on the unedited model, and kept.

    Args:
        moments: second moments as `pl.edit` takes them; sites that are missing are computed from
            `texts` when an edit needs them.
        hparams: for every method of the closed form; None: those known for the model.
        texts: for second moments; None: about the bundled world for a bundled model, else what the
            model writes itself (`own_moments`).
        n_tokens: of these; None: 20 per dimension of the widest key (of its own text 5).
    """

    def __init__(
        self,
        model: Model,
        moments: Mapping[Site, Any] | None = None,
        hparams: Hparams | None = None,
        texts: Iterable[str] | None = None,
        n_tokens: int | None = None,
    ) -> None:
        self.model, self.hparams, self.texts = model, hparams, texts
        self.given = moments is not None
        self.n_tokens = n_tokens
        self._moments: dict[Site, Any] = dict(moments or {})
        self._contexts: list[str] | None = None

    def settings(self, method: Any, n_facts: int = 1) -> Hparams | None:
        """The strengths `method` (a value or a name) takes for an edit of `n_facts` at once; None
        for a method that knows them itself (fine-tuning).

        Raises:
            SettingsError: for a model without known settings, where none were given.
        """
        value = named(method) if isinstance(method, str) else method
        if not isinstance(value, Method):
            return None
        return settled(self.model, value, self.hparams, n_facts)

    def contexts(self) -> list[str]:
        """The context prefixes, sampled once from the unedited model."""
        if self._contexts is None:
            with self.model.live_edits.bare():
                self._contexts = generation.sample_contexts(self.model)
        return self._contexts

    def moments(
        self, sites: Iterable[Site], on_progress: OnProgress | None = None
    ) -> dict[Site, Any]:
        """The second moments of the sites; those not known yet are computed on the unedited model.

        Raises:
            ModelError: where they would have to be computed, there is no text, and the model can
                write none (`own_moments`).
        """
        missing = [site for site in sites if site not in self._moments]
        for projection in PROJECTIONS:
            layers = [site.layer for site in missing if site.projection == projection]
            if not layers:
                continue
            what = f"second moments of {len(layers)} layers, once per model (tokens)"
            how: dict[str, Any] = {"projections": (projection,)}
            how["on_tokens"] = _counter(on_progress, what)
            if self.own_text:
                more = own_moments(self.model, layers, n_tokens=self.n_tokens, **how)
            else:
                texts = datasets.texts() if self.texts is None else self.texts
                with self.model.live_edits.bare():
                    n_tokens = self.tokens_read()
                    more = second_moments(self.model, texts, layers, n_tokens=n_tokens, **how)
            self._moments.update(more)
        return self._moments

    def tokens_read(self) -> int:
        """How many tokens second moments are computed from."""
        width = max(self.model.d_in(Site(0, projection)) for projection in PROJECTIONS)
        return self.n_tokens or TOKENS_PER_DIMENSION * width

    @property
    def own_text(self) -> bool:
        """Whether text is the model's own, for want of any other that fits."""
        return self.texts is None and not loading.of_the_world(self.model)

    def needed(
        self, method: Any, hp: Any, on_progress: OnProgress | None = None
    ) -> tuple[Mapping[Site, Any], list[str]]:
        """The second moments and context prefixes that a method with these settings takes."""
        if not isinstance(method, Method):
            return {}, []
        hp.check(self.model.n_layers)
        sites = [Site(layer, projection) for layer in hp.layers for projection in method.write]
        if on_progress is not None:
            on_progress(0, 0, "context prefixes, once per model")
        return self.moments(sites, on_progress), self.contexts()


def _counter(on_progress: OnProgress | None, what: str) -> Callable[[int, int], object] | None:
    if on_progress is None:
        return None
    return lambda done, total: on_progress(done, total, what)

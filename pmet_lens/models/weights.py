"""What a model must be to be edited, the edits that are applied to it, and the way back to its
original bits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lens.data import gguf_files
from pmet_lens.models.sites import ModelError

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}


class EditError(ValueError):
    """An edit that cannot be applied, taken back, saved or loaded; the message says why."""


class LiveEdits:
    """The edits applied to one model, in order, and the original weights they changed.

    A weight is always `original + first delta + second delta + …`, computed in that order. Taking
    an edit back recomputes that sum without it, so that with no edit left the weights are the
    original bits, in whatever order the edits were taken back.

    `weight` gives the live view of a site's weight.
    """

    def __init__(self, weight: Callable[[Any], Tensor]) -> None:
        self._weight = weight
        self._applied: list[tuple[object, Mapping[Any, Tensor]]] = []
        self._original: dict[Any, Tensor] = {}

    def __len__(self) -> int:
        return len(self._applied)

    def __contains__(self, edit: object) -> bool:
        return any(applied is edit for applied in self)

    def __iter__(self) -> Iterator[object]:
        """The edits that are on the model, in the order they were applied."""
        return iter([edit for edit, _ in self._applied])

    def original(self, site: Any) -> Tensor:
        """The weight without the edits that are on it now."""
        return self._original[site] if site in self._original else self._weight(site)

    def add(self, edit: object, deltas: Mapping[Any, Tensor]) -> None:
        """Add the deltas to the weights.

        Raises `EditError`, with nothing changed, if the edit is on the model already, does not fit
        its shapes, or somebody else changed a weight meanwhile.
        """
        if edit in self:
            raise EditError("This edit is applied to the model already; revert it first.")
        for site, delta in deltas.items():
            if self._weight(site).shape != delta.shape:
                raise EditError(
                    f"The edit's delta at {site} is {list(delta.shape)}, the model's weight is "
                    f"{list(self._weight(site).shape)}: it belongs to another model."
                )
        self._check_untouched(deltas)
        try:
            self._put(edit, deltas, len(self))
        except BaseException:  # Ctrl-C, too
            to_its_end(lambda: self._take(edit, deltas))
            raise

    def remove(self, edit: object) -> None:
        """Take one edit back.

        Raises `EditError` if it is not on the model, or somebody else changed a weight meanwhile.
        """
        if edit not in self:
            raise EditError("This edit is not applied to this model, so it cannot be reverted.")
        deltas = self._applied[self._place(edit)][1]
        self._check_untouched(deltas)
        to_its_end(lambda: self._take(edit, deltas))

    @contextmanager
    def without(self, edit: object) -> Iterator[None]:
        """A block in which one edit is off, whether or not it was on; afterwards the weights are
        the bits they were, because the edit is put back at its place among the others."""
        if edit not in self:
            yield
            return
        place = self._place(edit)
        deltas = self._applied[place][1]
        try:
            self.remove(edit)
            yield
        finally:
            self._check_untouched(deltas)
            to_its_end(lambda: self._put(edit, deltas, place))

    @contextmanager
    def bare(self) -> Iterator[None]:
        """A block in which every edit is off; afterwards the weights are the bits they were."""
        with ExitStack() as stack:
            for edit in list(self):
                stack.enter_context(self.without(edit))
            yield

    def _place(self, edit: object) -> int:
        return next(i for i, applied in enumerate(self) if applied is edit)

    def _put(self, edit: object, deltas: Mapping[Any, Tensor], place: int) -> None:
        """Put an edit at its place among the others. May be begun again where it was cut."""
        if edit not in self:
            for site in deltas:
                if site not in self._original:
                    self._original[site] = self._weight(site).clone()
            self._applied.insert(place, (edit, deltas))
        self._write(deltas)

    def _take(self, edit: object, deltas: Mapping[Any, Tensor]) -> None:
        """Take an edit off, wherever its way onto the model was cut. May be begun again, too."""
        self._applied = [pair for pair in self._applied if pair[0] is not edit]
        held = {site: delta for site, delta in deltas.items() if site in self._original}
        self._write(held)
        for site in held:
            if not any(site in others for _, others in self._applied):
                self._original.pop(site, None)

    def _value(self, site: Any) -> Tensor:
        value = self._original[site].clone()
        for _, deltas in self._applied:
            if site in deltas:
                value += deltas[site].to(value)
        return value

    def _write(self, sites: Mapping[Any, Tensor]) -> None:
        for site in sites:
            self._weight(site).copy_(self._value(site))

    def _check_untouched(self, sites: Mapping[Any, Tensor]) -> None:
        for site in sites:
            if site in self._original and not torch.equal(self._weight(site), self._value(site)):
                raise EditError(
                    f"The weight at {site} was changed by something else while an edit was "
                    "applied; undoing would lose that change. Load the model again."
                )


@contextmanager
def restored(weights: Sequence[Tensor]) -> Iterator[None]:
    """Let the block write into `weights`; afterwards they are the old bits, also on errors."""
    before = [(weight, weight.clone()) for weight in weights]
    try:
        yield
    finally:
        to_its_end(lambda: [weight.copy_(old) for weight, old in before])


def to_its_end(action: Callable[[], object]) -> None:
    """Do what has to be whole (and may be begun again) in spite of Ctrl-C, which is raised
    afterwards."""
    late: KeyboardInterrupt | None = None
    while True:
        try:
            action()
            break
        except KeyboardInterrupt as interrupt:
            late = interrupt
    if late is not None:
        raise late


def check_floats(hf: nn.Module, name: str) -> None:
    """Refuse weights that are no floats of `DTYPES`, or not in memory.

    A model that calls itself quantised although its weights were made floats when it was read (as
    transformers leaves one from a GGUF file) is a float model.
    """
    plain = all(p.dtype in DTYPES.values() for p in hf.parameters())
    if not plain or (getattr(hf, "is_quantized", False) and not gguf_files.unpacked(hf)):
        raise ModelError(
            f"the weights of {name!r} are quantised, so nothing can be written into them: load it "
            "in a floating dtype (a GGUF file with GgufConfig(dequantize=True), or by its path "
            "here)"
        )
    if any(p.is_inference() for p in hf.parameters()):
        raise ModelError(f"{name!r} was made inside torch.inference_mode; make it outside")
    away = [n for n, p in hf.named_parameters() if p.is_meta]
    if 0 < len(away) < len(list(hf.parameters())):  # a whole model without numbers can be counted
        raise ModelError(
            f"the weight {away[0]!r} of {name!r} is not in memory (offloaded by its device_map, or "
            "never loaded), so it cannot be edited: spread the model over more devices, or load it "
            "in a smaller dtype (bfloat16)"
        )


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse a tokenizer that cannot pad, or that does not say where in a text its tokens stand."""
    if tokenizer.pad_token_id is None:
        raise ModelError(
            "the tokenizer has no pad token: set tokenizer.pad_token = tokenizer.eos_token first"
        )
    if not getattr(tokenizer, "is_fast", False):
        raise ModelError(
            f"{type(tokenizer).__name__} is a slow tokenizer: it does not say where in a text its "
            "tokens stand, so no subject could be found. Take the fast one of the model "
            "(AutoTokenizer.from_pretrained(…, use_fast=True), or its tokenizer.json)"
        )


def file_of(kind: str) -> str:
    """The file that weights of a `Model.kind` come from, in words."""
    bits = re.search(r"(?:Q|F|BF)(\d+)", kind)
    return f"{bits[1]}-bit file ({kind})" if bits else f"{kind} file"


def check_runs(forward: Callable[..., object], hf: nn.Module, name: str) -> None:
    """Refuse a model that its wrapper, whose `forward` is given, cannot run in half precision, as
    that of OLMo in TransformerLens 4.3. What else goes wrong says so when the model is asked."""
    first = next(hf.parameters())
    if first.dtype.itemsize > 2 or first.is_meta:
        return
    ids = torch.zeros(1, 2, dtype=torch.long, device=first.device)
    try:
        with torch.no_grad():
            forward(ids, torch.ones_like(ids), stop_at_layer=1)
    except RuntimeError as error:
        if "dtype" in str(error) or "scalar type" in str(error):
            half = str(first.dtype).removeprefix("torch.")
            raise ModelError(
                f'TransformerLens cannot run {name!r} in {half}: load it with dtype="float32", or '
                f"give hf.float() where the model is in memory [{error}]"
            ) from error

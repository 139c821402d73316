"""Targets as files: what took long to optimise is kept, and a long run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from pmet_lens.data import file_format, progress
from pmet_lens.data.facts import Fact, FactError
from pmet_lens.data.file_format import hash_of
from pmet_lens.editing import edit_files, targets
from pmet_lens.editing.method import Hparams, Method
from pmet_lens.editing.targets import Targets
from pmet_lens.models import tokens
from pmet_lens.models.model import Model

FORMAT = "pmet_lens targets 1"
STOPPED = ("", "goal", "steps")
_UNREAD = {"second_moment_weight": 1.0, "null_space_threshold": 1.0, "null_space_l2": 1.0}
"""Strengths the optimisation does not read: targets that differ in nothing else are the same."""


@dataclass(frozen=True)
class KeptTargets:
    """Targets that are found in parts, each kept in a folder as soon as it is there: an edit of
    many facts that was cut goes on where it was, `pl.edit(..., targets=pl.KeptTargets("run"))`.

    What is kept is found again where model, facts, method, strengths that targets follow from, and
    prefixes are the same; anything else makes other files.
    """

    folder: str | Path
    part: int = 125
    """Facts of a file, at least 1: what a run that is cut may have to find again."""

    def __call__(
        self,
        model: Model,
        facts: Sequence[Fact],
        method: Method,
        hparams: Hparams,
        contexts: Sequence[str],
    ) -> Targets:
        """Those of the facts, found or read, with a line that counts them.

        Raises:
            FactError: for a `part` below 1.
            EditError: for a file that is damaged, or a folder that cannot be written.
        """
        if self.part < 1:
            raise FactError(f"part must be a number of facts ≥ 1, not {self.part}.")
        folder = Path(self.folder).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise edit_files.EditError(f"Targets cannot be kept in {folder}: {error}") from error
        with progress.line("targets", "fact") as tell:
            return optimise(model, facts, method, hparams, contexts, folder, self.part, tell)


def save(optimised: Targets, path: str | Path) -> None:
    """Write targets and their history as safetensors. The file appears whole or not at all."""
    tensors = {f"values.{s}": v for s, v in optimised.values.items()}
    tensors |= {f"clean.{s}": v for s, v in optimised.clean.items()}
    for name, column in optimised.history.items():
        numbers = column.map(STOPPED.index) if name == "stopped" else column
        tensors[f"history.{name}"] = torch.from_numpy(numbers.to_numpy().copy())
    head = {"format": FORMAT, "layer": optimised.layer, "position": optimised.position}
    head["columns"] = list(optimised.history.columns)
    file_format.write(path, tensors, head, "targets", edit_files.EditError)


def load(path: str | Path) -> Targets:
    """What `save` wrote, on the CPU.

    Raises:
        EditError: for a file that is missing, damaged, or holds no targets.
    """
    head, tensors = file_format.read(path, FORMAT, "targets", edit_files.EditError)
    missing = {f"history.{name}" for name in head["columns"]} - tensors.keys()
    if missing:
        raise edit_files.EditError(f"{path} is damaged: {', '.join(sorted(missing))} is missing.")

    def part(kind: str) -> dict[str, Tensor]:
        return {n.removeprefix(f"{kind}."): t for n, t in tensors.items() if n.startswith(kind)}

    history = pd.DataFrame({name: part("history")[name].numpy() for name in head["columns"]})
    history["stopped"] = [STOPPED[i] for i in history["stopped"]]
    values, clean = part("values"), part("clean")
    return Targets(values, clean, head["layer"], history, head["position"])  # type: ignore[arg-type]


def key(
    weights: str,
    facts: Sequence[Fact],
    method: Method,
    hparams: Hparams,
    prefixes: int | Sequence[str],
) -> str:
    """A name for these facts' targets, the same for a grid and for a `Bench`: equal where the
    targets are equal, different if anything differs that they follow from.

    `weights`: the `identity` of the model. `prefixes`: the context prefixes, or the seed with which
    `sample_contexts` draws them from the model.
    """
    if not isinstance(prefixes, int):
        prefixes = [prefix for prefix in prefixes if prefix != tokens.PLAIN]
    asked = [(f.subject, f.prompt, f.target_new) for f in facts]
    read = asdict(strengths(hparams.settled(method)))
    later = [True] if method.attn_fades else []  # files of before keep their names
    return hash_of([weights, prefixes, method.delta_at, method.position, read, asked, *later])


def strengths(hparams: Hparams) -> Hparams:
    """The strengths with everything that targets do not follow from set to the same values."""
    return replace(hparams, layers=hparams.layers[-1:], **_UNREAD)


def identity(model: Model) -> str:
    """A hash of what every result of a model follows from: its weights as they are now, the
    tokenizer, the chat template."""
    fast = getattr(model.tokenizer, "backend_tokenizer", None)
    words: Any = sorted(model.tokenizer.get_vocab().items())
    if fast is not None:
        words = json.loads(fast.to_str())
        words = {k: v for k, v in words.items() if k not in ("padding", "truncation")}
    return hash_of([weights(model), words, repr(model.frame)])


def weights(model: Model) -> str:
    """SHA-256 of all weights of the model as they are now."""
    return file_format.state_digest(model.hf.state_dict())


def optimise(
    model: Model,
    facts: Sequence[Fact],
    method: Method,
    hparams: Hparams,
    contexts: Sequence[str],
    folder: Path,
    shard: int = 125,
    on_facts: Callable[[int, int], object] | None = None,
    drawn: tuple[str, int] | None = None,
) -> Targets:
    """`targets.optimise`, `shard` facts at a time, each shard kept in `folder` and read from there
    when it is there. `on_facts`: called with (facts so far, all). `drawn`: the `identity`
    of the model that `sample_contexts` drew `contexts` from, and the seed. While the model is that
    one, the files are those of a grid."""
    if not facts:
        raise FactError("There are no facts to optimise; pass at least one Fact.")
    folder.mkdir(parents=True, exist_ok=True)
    now, parts = identity(model), []
    prefixes = drawn[1] if drawn is not None and drawn[0] == now else contexts
    for start in range(0, len(facts), shard):
        some = facts[start : start + shard]
        name = key(now, some, method, hparams, prefixes)
        path = folder / f"{name}.safetensors"
        if not path.exists():
            save(targets.optimise(model, some, method, hparams, contexts), path)
        parts.append(load(path))
        if on_facts is not None:
            on_facts(start + len(some), len(facts))
    return targets.joined(parts)

"""A worker in another process, and its model's weights on their way there.

The weights travel as plain arrays and a configuration. Ray keeps the arrays in the shared memory of
a node, where every worker sees them without a copy; what an edit writes to is copied, and nothing
else is where the model stays on the CPU.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from pmet_lens.experiments.grid import GridError, Run
from pmet_lens.experiments.tasks import Task
from pmet_lens.experiments.worker import Outcome, Worker, WorkerInfo
from pmet_lens.models.loading import load, moved
from pmet_lens.models.model import Model, Projection, Site


def pack(model: Model) -> dict[str, Any]:
    """The weights as arrays of bytes, and what is needed to put them together again."""
    hf: Any = model.hf
    state = {name: t.detach().cpu().contiguous() for name, t in hf.state_dict().items()}
    return {
        "arrays": {name: t.reshape(-1).view(torch.uint8).numpy() for name, t in state.items()},
        "shapes": {name: (str(t.dtype)[6:], tuple(t.shape)) for name, t in state.items()},
        "config": hf.config,
        "dtype": str(model.dtype)[6:],
        "kind": type(hf),
        "tokenizer": model.tokenizer,
    }


def unpack(packed: Mapping[str, Any], runs: Mapping[str, Run], device: str | None) -> Model:
    """The model of `runs` from what `pack` gave. On the CPU they share memory, but for the weights
    of the sites, which an edit writes to."""
    run, shapes = next(iter(runs.values())), packed["shapes"]
    state = {name: _tensor(array, *shapes[name]) for name, array in packed["arrays"].items()}
    dtype = getattr(torch, packed["dtype"])
    hf = packed["kind"].from_pretrained(
        None, config=packed["config"], state_dict=state, dtype=dtype
    )
    hf = hf if device is None else moved(hf, device)
    model = load(hf, packed["tokenizer"], name=Path(run.model).name, template=run.template)
    for site in (Site(n, p) for n in range(model.n_layers) for p in get_args(Projection)):
        weight = model.parameter(site)
        weight.data = weight.data.clone()  # the shared bits cannot be written to
    return model


def _tensor(array: Any, dtype: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor on the memory of an array, which must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array).view(getattr(torch, dtype)).reshape(shape)


def check_versions(info: WorkerInfo, here: Mapping[str, str]) -> None:
    """Raises `GridError` where a worker has other packages than the driver."""
    other = [
        f"{name} {version or 'none'} (here {here.get(name) or 'none'})"
        for name, version in info.versions.items()
        if version != here.get(name)
    ]
    if other:
        raise GridError(
            f"A worker has {', '.join(other)}. Results of one grid come from the same packages: "
            "install the same versions on every machine (constraints.txt has those tested)."
        )


def check_weights(info: WorkerInfo, first: WorkerInfo) -> None:
    """Raises `GridError` where two workers read different weights."""
    if info.weights != first.weights:
        raise GridError(
            "Two workers read different weights or tokenizers under the same name. Give a "
            "directory that all machines share, or the same revision everywhere."
        )


class RemoteWorker:
    """A `Worker` in an actor, with what it needs of the driver's surroundings."""

    def __init__(
        self,
        runs: Mapping[str, Run],
        where: Mapping[str, str],
        how: Mapping[str, Any],
        threads: int,
        weights: Any,
    ) -> None:
        torch.set_num_threads(threads)
        if Path(where["home"]).is_dir():
            os.chdir(where["home"])  # names of models and texts may be relative
        self.error, self.worker = "", None
        try:
            model = None if weights is None else unpack(weights, runs, how["device"])
            self.worker = Worker(where["folder"], runs, model=model, **how)
        except (OSError, ValueError) as error:
            self.error = str(error)

    def describe(self) -> WorkerInfo | str:
        """What it reports of itself, or why it cannot work."""
        return self.error if self.worker is None else self.worker.describe()

    def packed(self) -> Any:
        """The weights of its model, for other workers."""
        assert self.worker is not None
        return pack(self.worker.model)

    def do(self, task: Task) -> tuple[Outcome, str]:
        """Make what the task is for; and the node that did it."""
        assert self.worker is not None
        return self.worker.do(task), self.node()

    def ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """What `question(worker, *arguments)` gives here."""
        assert self.worker is not None
        return question(self.worker, *arguments)

    def pid(self) -> int:
        """Its process."""
        return os.getpid()

    def node(self) -> str:
        """Ray's name of the machine it is on."""
        ray: Any = importlib.import_module("ray")
        return ray.get_runtime_context().get_node_id()

"""An edit as a LoRA adapter for `peft`, which is not needed to write it. An adapter is a weight
change of low rank, and so is an edit: nothing is lost but float64."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pmet_lens.data import file_format
from pmet_lens.models.weights import EditError


def export_lora(parts: Mapping[str, Any], directory: str | Path, max_rank: int) -> None:
    """Write the fields of an edit as `adapter_model.safetensors` and `adapter_config.json`.

    Raises:
        EditError: for an edit that does not name its weights, where its rank exceeds `max_rank`,
            or where the files cannot be written.
    """
    factors, parameters = parts["factors"], parts["parameters"]
    if factors.keys() - parameters.keys():
        raise EditError(
            "This edit was saved before files named their weights: make it again, or write "
            "the whole model with save_model."
        )
    thin = {site: balanced(left, right) for site, (left, right) in factors.items()}
    rank = max([1, *(left.shape[1] for left, _ in thin.values())])
    if rank > max_rank:
        raise EditError(
            f"The edit has rank {rank} (its facts at one site), an adapter at most {max_rank}: "
            "pass a larger max_rank if what serves it can, or write the whole model with "
            "save_model."
        )
    tensors: dict[str, Tensor] = {}
    modules = [parameters[site].removesuffix(".weight") for site in thin]
    for module, (left, right) in zip(modules, thin.values(), strict=True):
        missing = rank - left.shape[1]  # peft knows one rank for all
        down = torch.nn.functional.pad(left.T, (0, 0, 0, missing))
        up = torch.nn.functional.pad(right.T, (0, missing))
        tensors[f"base_model.model.{module}.lora_A.weight"] = down.float().contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = up.float().contiguous()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": parts["model"],
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # a scale of one
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": parts["fan_in_fan_out"],
        "target_modules": modules,
    }
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_format.whole(folder / "adapter_model.safetensors") as part:
            save_file(tensors, str(part), metadata={"format": "pt"})
        with file_format.whole(folder / "adapter_config.json") as part:
            part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise EditError(f"The adapter could not be written to {folder}: {error}") from error


def balanced(
    left: Float[Tensor, "d_in rank"], right: Float[Tensor, "rank d_model"]
) -> tuple[Float[Tensor, "d_in thin"], Float[Tensor, "thin d_model"]]:
    """Two factors of the same product and of equal size, without the directions that are nothing
    but rounding: what float32 loses least of."""
    inner, outer = torch.linalg.qr(left.double()), torch.linalg.qr(right.double().T)
    u, s, vh = torch.linalg.svd(inner.R @ outer.R.T, full_matrices=False)
    eps = torch.finfo(s.dtype).eps * max(left.shape[0], right.shape[1])
    used = s > eps * s.max().clamp(min=torch.finfo(s.dtype).tiny)
    root = s[used].sqrt()
    return inner.Q @ u[:, used] * root, root[:, None] * (vh[used] @ outer.Q.T)

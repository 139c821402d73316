"""An edit as a LoRA adapter, the form in which served models are switched, merged and shared.

An edit's weight change has at most the rank of its facts, and a LoRA adapter is a weight change of
low rank, so nothing is lost but float64. `peft` reads the two files; it is not needed to write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from pmet_lens.data import file_format
from pmet_lens.models.model import Site
from pmet_lens.models.weights import EditError

Factors = Mapping[Site, tuple[Float[Tensor, "d_in rank"], Float[Tensor, "rank d_model"]]]


def export(
    factors: Factors,
    parameters: Mapping[Site, str],
    fan_in_fan_out: bool,
    base: str,
    directory: str | Path,
    max_rank: int,
) -> None:
    """Write `adapter_model.safetensors` and `adapter_config.json` into `directory`.

    `parameters`: the names of the weights in the Hugging Face model; `fan_in_fan_out`: they are
    stored `[d_in, d_model]`; `base`: what the adapter names as its base model.

    Raises:
        EditError: where the rank exceeds `max_rank`, or the files cannot be written.
    """
    thin = {site: balanced(left, right) for site, (left, right) in factors.items()}
    rank = max([1, *(left.shape[1] for left, _ in thin.values())])
    if rank > max_rank:
        raise EditError(
            f"The edit has rank {rank} (its facts at one site), an adapter at most {max_rank}: "
            "pass a larger max_rank if what serves it can, or apply the edit and save the whole "
            "model with model.hf.save_pretrained."
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
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,  # a scale of one
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": fan_in_fan_out,
        "target_modules": modules,
    }
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with file_format.whole(folder / "adapter_model.safetensors") as part:
            save_file(tensors, str(part), metadata={"format": "pt"})
        with file_format.whole(folder / "adapter_config.json") as part:
            part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
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

"""What is measured: the bundled models, and a medium shape with random weights, which nobody has to
download and at which the overhead of a framework decides nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import plain
import torch
from torch import Tensor, nn

import pmet_lens as pl

LAYERS = (3, 4, 5, 6, 7, 8)
"""Six critical layers at the medium shape: the third to two thirds of the depth, as in GPT-J."""


def medium(small: bool = False, device: torch.device | str = "cpu") -> pl.Model:
    """GPT-2 small's shape and vocabulary (12 layers, d_model 768), random weights, with the
    tokenizer of the bundled models."""
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = pl.load("world").tokenizer
    shape = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}
    if small:
        shape = {"n_layer": 12, "n_embd": 32, "n_head": 4, "vocab_size": len(tokenizer)}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        hf = GPT2LMHeadModel(GPT2Config(**shape)).to(device).eval()
    return pl.load(hf, tokenizer, name="medium")


def bundled(name: str, device: torch.device | str = "cpu") -> pl.Model:
    """A bundled model; its settings are known."""
    return pl.load(name, device=device)


def settings(model: pl.Model) -> pl.Hparams:
    """PMET's, with the norms as released; at the medium shape 6 steps that never stop early."""
    if model.name != "medium":
        return replace(pl.HPARAMS[model.name]["PMET"], reference_norm="own stream", clamp=4.0)
    return pl.Hparams(layers=LAYERS, n_steps=6, stop_loss=0.0, kl_stop=0.0)


def contexts(model: pl.Model) -> list[str]:
    """Prefixes: the bundled models' own; for random weights those of `world`."""
    return pl.sample_contexts(pl.load("world") if model.name == "medium" else model)


def module(model: pl.Model, site: pl.Site) -> nn.Module:
    """The Hugging Face module whose weight is written at `site`."""
    return model.hf.get_submodule(model.parameter_name(site).rpartition(".")[0])


def outputs(model: pl.Model, layer: int) -> list[nn.Module]:
    """The output projections of attention and MLP of one layer."""
    return [module(model, pl.Site(layer, p)) for p in ("attn", "mlp")]


def plainly(model: pl.Model, hp: pl.Hparams, own: list[str]) -> Any:
    """`plain.target` of one fact of this model."""
    return partial(_target, model, outputs(model, hp.layers[-1]), hp, own)


def _target(
    model: pl.Model, where: list[nn.Module], hp: pl.Hparams, own: list[str], fact: pl.Fact
) -> list[Tensor]:
    return plain.target(model.hf, model.tokenizer, where, fact, hp, own)

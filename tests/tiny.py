"""Tiny random models of every family the tests cover, built in memory without a network.

Every parameter gets noise, biases and norms too: with the library's own initialisation biases are
zero, and a test such as `key @ W + b == value` would pass without them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

FAMILIES = ("gpt2", "gptj", "neox", "llama", "gemma2", "opt")
MORE = (
    "neo", "mistral", "qwen2", "qwen3", "gemma", "gemma3", "phi", "phi3", "olmo", "olmo2",
    "stablelm",
)  # fmt: skip
"""What people also edit; `test_families.py` holds for all of them."""
PARALLEL = ("gptj", "neox", "phi")
N_LAYERS, D_MODEL = 4, 32

_SENTENCES = (
    "The tower of Ilmar stands in the harbour city of Vell.",
    "Mira Tolan plays the sport of tennis; her brother prefers rugby.",
    "The mother tongue of Danel Orrin is French, the capital of Ostria is Kel.",
)


def tiny_tokenizer(pad: bool = True):
    """A byte-level BPE tokenizer (about 300 tokens) trained on a handful of sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_SENTENCES, trainer)
    special = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    if pad:
        special["pad_token"] = "<|pad|>"
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **special)


def tiny_config(
    family: str,
    vocab_size: int = 320,
    window: int = 5,
    positions: int = 64,
    intermediate: int = 48,
):
    """A 4-layer configuration of width 32; the newer families share keys among heads."""
    import transformers as hf

    common = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1}
    gpt = {"n_positions": positions, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4}
    wide = {
        "hidden_size": D_MODEL,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": positions,
    }
    grouped = {**wide, "num_key_value_heads": 2, "intermediate_size": intermediate}
    return {
        "gpt2": lambda: hf.GPT2Config(**common, **gpt),
        "gptj": lambda: hf.GPTJConfig(**common, **gpt, rotary_dim=4),
        "neox": lambda: hf.GPTNeoXConfig(**common, **wide, intermediate_size=64),
        "llama": lambda: hf.LlamaConfig(**common, **grouped),
        # Heads whose total is not d_model, and a window shorter than the test batches, yet longer
        # than their padding: a query that sees padding alone is NaN in float64, in plain HF too.
        "gemma2": lambda: hf.Gemma2Config(**common, **grouped, head_dim=16, sliding_window=window),
        "opt": lambda: hf.OPTConfig(**common, **wide, word_embed_proj_dim=D_MODEL, ffn_dim=64),
        "neo": lambda: hf.GPTNeoConfig(
            **common,
            hidden_size=D_MODEL,
            num_layers=N_LAYERS,
            num_heads=4,
            max_position_embeddings=64,
            attention_types=[[["global", "local"], 2]],
            window_size=window,
        ),
        "mistral": lambda: hf.MistralConfig(**common, **grouped, sliding_window=None),
        "qwen2": lambda: hf.Qwen2Config(**common, **grouped),
        "qwen3": lambda: hf.Qwen3Config(**common, **grouped, head_dim=16),
        "gemma": lambda: hf.GemmaConfig(**common, **grouped, head_dim=16),
        "gemma3": lambda: hf.Gemma3TextConfig(
            **common, **grouped, head_dim=16, sliding_window=window, sliding_window_pattern=2
        ),
        "phi": lambda: hf.PhiConfig(**common, **{**grouped, "num_key_value_heads": 4}),
        "phi3": lambda: hf.Phi3Config(**common, **grouped),
        "olmo": lambda: hf.OlmoConfig(**common, **grouped),
        "olmo2": lambda: hf.Olmo2Config(**common, **grouped),
        "stablelm": lambda: hf.StableLmConfig(**common, **grouped),
        "mixtral": lambda: hf.MixtralConfig(**common, **grouped, num_local_experts=2),
    }[family]()


def tiny_hf(
    family: str, dtype: torch.dtype = torch.float32, seed: int = 0, **config: int
) -> nn.Module:
    """An instantiated Hugging Face causal LM with noise in every parameter, in eval mode."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(tiny_config(family, **config)).to(dtype).eval()
        with torch.no_grad():
            for parameter in hf.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return hf


def tiny_model(
    family: str = "gpt2", dtype: torch.dtype = torch.float32, seed: int = 0, **config: int
):
    """The same behind `pmet_lens.load`."""
    from pmet_lens.models import loading

    return loading.load(tiny_hf(family, dtype, seed, **config), tiny_tokenizer(), name=family)


def tiny_batch(rows: int = 3, tokens: int = 10, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids `[rows, tokens]` and a right-padded mask with rows of different length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 320, (rows, tokens), generator=generator)
    lengths = torch.tensor([tokens - 2 * (row % 3) for row in range(rows)])
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    return torch.where(mask.bool(), ids, 1), mask


def plain_logits(model, ids: Tensor, mask: Tensor) -> Tensor:
    """What the user's own model says, without any of ours in between."""
    with torch.no_grad():
        return model.hf(input_ids=ids, attention_mask=mask).logits


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Same shape, and equal to `tolerance` of the largest value (at least of 1)."""
    scale = max(1.0, float(theirs.abs().max()))
    return ours.shape == theirs.shape and bool((ours - theirs).abs().max() <= tolerance * scale)


@contextmanager
def refused(match: str, error: type[Exception] | None = None) -> Iterator[None]:
    """Expect this error (None: a `ModelError`) in these words from a call that no type checker
    sees, as a user's."""
    from pmet_lens.models.model import ModelError

    with unchecked(), pytest.raises(error or ModelError, match=match):
        yield


@contextmanager
def unchecked() -> Iterator[None]:
    """A block in which no signature is checked, as where users call."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)

"""Train a small model that knows the world and recalls through the last subject token.

Trained the plain way, a small model reads a name from *all* its tokens and cannot be edited at the
last one. The cure is a *read mask* (`read_masks`): while training, text behind a mention may not
look at the mention at all in the layers below `read_layer`, and only at its last token from there
on. Inside the mention attention is ordinary, so the last token gathers the name and the lower MLPs
enrich it before it is read. Nothing is masked at inference.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from pmet_lens.data import Document, World

EOS = "<|endoftext|>"


@dataclass(frozen=True)
class TrainConfig:
    """What is trained and how. `arch` is "gptj" (parallel blocks) or "gpt2" (sequential)."""

    arch: str
    n_layers: int = 8
    d_model: int = 128
    n_heads: int = 4
    d_mlp: int = 1280
    vocab: int = 2048
    passes: int = 24
    row_tokens: int = 64
    rows: int = 8
    lr: float = 1.6e-3
    weight_decay: float = 0.02
    read_layer: int = 4
    settle_passes: int = 2
    settle_lr: float = 5e-4
    settle_share: float = 0.6  # share of rows with corrupted mentions in the second phase's first
    settle_share_end: float = 0.6  # pass, and in its last; in between it changes evenly
    noise: float = 3.0  # standard deviations of the embeddings
    mask_low: float = 0.75  # share of rows with the full read mask
    mask_last: float = 0.15  # share of rows where the last token may be read in every layer
    answer_weight: float = 4.0
    name_weight: float = 0.3
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One packed row: token ids, loss weight of each token, token spans of the mentions."""

    ids: list[int]
    weights: list[float]
    mentions: list[tuple[int, int]]


def train_tokenizer(world: World, vocab: int) -> Any:
    """A byte-level BPE learnt on one pass over the world. Returns a fast HF tokenizer without BOS;
    padding (on the right) is the end-of-text token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    docs = world.documents(random.Random(f"tokenizer {world.seed}"))
    tok.train_from_iterator((doc.text for doc in docs), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token=EOS, pad_token=EOS, padding_side="right"
    )


def build_model(cfg: TrainConfig, vocab: int) -> Any:
    """A fresh plain `transformers` model: GPT-J (parallel blocks) or GPT-2 (sequential blocks)."""
    import transformers

    torch.manual_seed(cfg.seed)
    common: dict[str, Any] = dict(
        vocab_size=vocab,
        n_positions=256,
        n_embd=cfg.d_model,
        n_layer=cfg.n_layers,
        n_head=cfg.n_heads,
        n_inner=cfg.d_mlp,
        activation_function="gelu_pytorch_tanh",  # GPT-J's and GPT-2's own, computed in one kernel
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    if cfg.arch == "gptj":
        rotary = cfg.d_model // cfg.n_heads // 2
        config = transformers.GPTJConfig(**common, rotary_dim=rotary, tie_word_embeddings=False)
        return transformers.GPTJForCausalLM(config)
    if cfg.arch == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**common))
    raise ValueError(f"arch must be 'gptj' or 'gpt2', not {cfg.arch!r}.")


def rows_of_pass(world: World, tokenizer: Any, cfg: TrainConfig, number: int) -> list[Row]:
    """One pass over the world, tokenised and packed into rows of at most `row_tokens`."""
    docs = list(world.documents(random.Random(f"train {cfg.seed} {number}")))
    encoded = tokenizer([d.text for d in docs], return_offsets_mapping=True)
    rows, row = [], Row([], [], [])
    for doc, ids, offsets in zip(
        docs, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        if row.ids and len(row.ids) + len(ids) + 1 > cfg.row_tokens:
            rows.append(row)
            row = Row([], [], [])
        first = len(row.ids)
        weights, mentions = _weights(doc, offsets, cfg)
        row.ids.extend([*ids, tokenizer.eos_token_id])
        row.weights.extend([*weights, 1.0])
        row.mentions.extend((first + s, first + e) for s, e in mentions)
    return [*rows, row]


def _weights(
    doc: Document, offsets: list[tuple[int, int]], cfg: TrainConfig
) -> tuple[list[float], list[tuple[int, int]]]:
    """Loss weight per token, and the mentions as inclusive token spans."""
    weights = [1.0] * len(offsets)
    mentions = []
    # A byte-level token may carry the space in front of a word: compare the ends.
    for start, end in doc.answers:
        for i, (_, stop) in enumerate(offsets):
            if start < stop <= end:
                weights[i] = cfg.answer_weight
    for start, end in doc.mentions:
        inside = [i for i, (_, stop) in enumerate(offsets) if start < stop <= end]
        for i in inside:
            weights[i] = cfg.name_weight
        mentions.append((inside[0], inside[-1]))
    return weights, mentions


def read_masks(
    rows: list[Row], length: int, kinds: np.ndarray
) -> tuple[Bool[Tensor, "row token token"], Bool[Tensor, "row token token"]]:
    """Who may attend to whom, below `read_layer` and from there on.

    `kinds` per row: 0 plain causal attention; 1 only the last token of a mention is visible behind
    it, in every layer; 2 as 1, and nothing of it below the reading layer.
    """
    low = np.tril(np.ones((len(rows), length, length), dtype=bool))
    high = low.copy()
    for b, row in enumerate(rows):
        for start, last in row.mentions if kinds[b] else ():
            high[b, last + 1 :, start:last] = False
            low[b, last + 1 :, start : last + (kinds[b] == 2)] = False
    return torch.from_numpy(low), torch.from_numpy(high)


def _attention_modules(model: Any) -> list[torch.nn.Module]:
    return [block.attn for block in model.transformer.h]


class _Masked:
    """Hands each layer its own attention mask while training."""

    def __init__(self, model: Any, read_layer: int) -> None:
        self.low = self.high = torch.empty(0)
        self._rows: np.ndarray | slice = slice(None)
        self._handles = [
            attn.register_forward_pre_hook(self._hook(i < read_layer), with_kwargs=True)
            for i, attn in enumerate(_attention_modules(model))
        ]

    def remove(self) -> None:
        """Leave the model as a plain one."""
        for handle in self._handles:
            handle.remove()

    def set(self, low: Tensor, high: Tensor) -> None:
        """Boolean masks `[row token token]` for the next forward."""
        self.low, self.high = (
            torch.where(m, 0.0, torch.finfo(torch.float32).min)[:, None] for m in (low, high)
        )

    def only(self, rows: np.ndarray | None) -> None:
        """The next forwards see these rows of the batch alone (None: all again)."""
        self._rows = slice(None) if rows is None else rows

    def _hook(self, is_low: bool) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            kwargs["attention_mask"] = (self.low if is_low else self.high)[self._rows]
            return args, kwargs

        return hook


class _Corrupted:
    """Corrupts mentions and gives their last tokens back at the reading layer."""

    def __init__(self, model: Any, cfg: TrainConfig, masked: _Masked) -> None:
        self.model, self.cfg, self.masked = model, cfg, masked
        self.block = model.transformer.h[cfg.read_layer - 1]

    @contextmanager
    def rows(self, batch: list[Row], ids: Tensor, spoilt: np.ndarray) -> Iterator[None]:
        """A block in which a forward pass of `ids` sees the rows of `spoilt` corrupted."""
        if not spoilt.any():
            yield
            return
        inside = torch.zeros(ids.shape, dtype=torch.bool)
        last = inside.clone()
        for b in np.flatnonzero(spoilt):
            for start, end in batch[b].mentions:
                inside[b, start : end + 1] = True
                last[b, end] = True
        clean = torch.zeros(*ids.shape, self.cfg.d_model)
        kept: list[Tensor] = []
        handle = self.block.register_forward_hook(lambda m, a, out: kept.append(_first(out)))
        with torch.no_grad():
            self.masked.only(spoilt)
            self.model(input_ids=ids[spoilt], use_cache=False)
            self.masked.only(None)
        handle.remove()
        clean[spoilt] = kept[0]
        spread = self.cfg.noise * self.model.get_input_embeddings().weight.detach().std()
        noise = torch.randn(*ids.shape, self.cfg.d_model) * spread * inside[..., None]

        def restore(module: Any, args: Any, out: Any) -> Any:
            value = torch.where(last[..., None], clean, _first(out))
            return (value, *out[1:]) if isinstance(out, tuple) else value

        handles = [
            self.model.transformer.drop.register_forward_hook(lambda m, a, out: out + noise),
            self.block.register_forward_hook(restore),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _first(out: Any) -> Tensor:
    """The hidden states, from a block that returns them alone or as the first of a tuple."""
    return out[0] if isinstance(out, tuple) else out


def _batches(rows: list[Row], cfg: TrainConfig, rng: random.Random) -> Iterator[list[Row]]:
    rng.shuffle(rows)
    for i in range(0, len(rows) - cfg.rows + 1, cfg.rows):
        yield rows[i : i + cfg.rows]


def _tensors(rows: list[Row]) -> tuple[Int[Tensor, "row token"], Tensor]:
    length = max(len(r.ids) for r in rows)
    ids = torch.tensor([r.ids + [0] * (length - len(r.ids)) for r in rows])
    weights = torch.tensor([r.weights + [0.0] * (length - len(r.ids)) for r in rows])
    return ids, weights


def train(
    world: World, cfg: TrainConfig, on_log: Callable[[dict[str, Any]], None] | None = None
) -> tuple[Any, Any, list[dict[str, Any]]]:
    """Train from scratch, then `settle`; returns (model, tokenizer, training curve).

    The curve has one row per pass over the world: mean loss of all tokens (nats), share of answer
    tokens predicted right by arg-max (0 to 1), process CPU minutes so far.
    """
    tokenizer = train_tokenizer(world, cfg.vocab)
    model = build_model(cfg, len(tokenizer))

    def lr(progress: float) -> float:
        return cfg.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))

    curve = _run(world, cfg, model, tokenizer, range(cfg.passes), lr, corrupted=False, log=on_log)
    curve += settle(world, cfg, model, tokenizer, curve[-1]["cpu_minutes"], on_log)
    return model.eval(), tokenizer, curve


def settle(
    world: World,
    cfg: TrainConfig,
    model: Any,
    tokenizer: Any,
    minutes: float,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Second phase: make text behind a mention deaf to it below the reading layer, unmasked too.

    At inference nothing is masked, so the lower layers may still look at a mention, and a
    corrupted mention would spoil the text behind it. In `settle_share` of the rows the mentions
    are corrupted with noise, attention is plain, and only the last token of each mention gets its
    clean value back at the output of layer `read_layer - 1`: a causal trace as a training task.
    """
    rows = range(cfg.passes, cfg.passes + cfg.settle_passes)

    def lr(progress: float) -> float:
        return cfg.settle_lr * (1 - progress)

    return _run(world, cfg, model, tokenizer, rows, lr, corrupted=True, minutes=minutes, log=on_log)


def _run(
    world: World,
    cfg: TrainConfig,
    model: Any,
    tokenizer: Any,
    passes: range,
    lr_at: Callable[[float], float],
    *,
    corrupted: bool,
    minutes: float = 0.0,
    log: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    model.train()
    masked = _Masked(model, cfg.read_layer)
    noisy = _Corrupted(model, cfg, masked)
    rng, np_rng = random.Random(f"rows {cfg.seed}"), np.random.default_rng(cfg.seed)
    shares = [1 - cfg.mask_low - cfg.mask_last, cfg.mask_last, cfg.mask_low]
    optimiser = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.98), weight_decay=cfg.weight_decay, fused=True
    )
    total, step, start = 0, 0, time.process_time()
    curve: list[dict[str, Any]] = []
    for turn, number in enumerate(passes):
        way = turn / max(1, len(passes) - 1)
        share = cfg.settle_share + way * (cfg.settle_share_end - cfg.settle_share)
        rows = rows_of_pass(world, tokenizer, cfg, number)
        total = total or len(passes) * (len(rows) // cfg.rows)
        loss_sum = right = answers = 0.0
        for batch in _batches(rows, cfg, rng):
            for group in optimiser.param_groups:
                group["lr"] = min(1.0, (step + 1) / 300) * lr_at(min(step / total, 1.0))
            ids, weights = _tensors(batch)
            kinds = np_rng.choice(3, len(batch), p=shares)
            spoilt = np_rng.random(len(batch)) < (share if corrupted else 0.0)
            kinds[spoilt] = 0
            masked.set(*read_masks(batch, ids.shape[1], kinds))
            with noisy.rows(batch, ids, spoilt):
                logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
            losses = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            ).view(ids.shape[0], -1)
            loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            step += 1
            with torch.no_grad():
                is_answer = weights[:, 1:] == cfg.answer_weight
                right += float((logits.argmax(-1) == ids[:, 1:])[is_answer].sum())
                answers += float(is_answer.sum())
                loss_sum += float(loss)
        curve.append(
            {
                "pass": number + 1,
                "loss": loss_sum / max(1, len(rows) // cfg.rows),
                "answer_accuracy": right / max(1.0, answers),
                "cpu_minutes": minutes + (time.process_time() - start) / 60,
            }
        )
        if log is not None:
            log(curve[-1])
    masked.remove()
    return curve


def save(directory: Path, model: Any, tokenizer: Any, cfg: TrainConfig, curve: list[Any]) -> None:
    """Write a plain `transformers` directory (float16 weights), the training record
    `training.json`, and `manifest.json` with the SHA-256 of every file."""
    import hashlib

    directory.mkdir(parents=True, exist_ok=True)
    model.half().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    record = {"config": asdict(cfg), "curve": curve}
    (directory / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    names = sorted(p.name for p in directory.iterdir() if p.suffix in {".json", ".safetensors"})
    hashes = {
        name: hashlib.sha256((directory / name).read_bytes()).hexdigest()
        for name in names
        if name not in {"manifest.json", "hparams.json"}
    }
    (directory / "manifest.json").write_text(json.dumps({"files": hashes}, indent=1) + "\n")

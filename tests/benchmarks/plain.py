"""The published procedure, written plainly: the baseline of every ratio in the benchmark tables.

One fact at a time, the whole model on whole prompts in every step, logits at every position; one
pass over the texts per layer; one explicit solve per layer; one record at a time for evaluation.
Only transformers and torch: nothing of the package but its values (facts, settings, sites) is used,
so that `test_plain.py` can hold the package to these results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pmet_lens import Fact, Hparams, Site


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """The token ids of a text."""
    return tokenizer(text)["input_ids"]


def end_of_subject(tokenizer: Any, text: str, subject: str) -> int:
    """Position of the last token of the subject's last occurrence in `text`."""
    stop = text.rindex(subject) + len(subject)
    offsets = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    return max(i for i, (a, b) in enumerate(offsets) if a < stop and b > a)


def padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Right-padded ids and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


@contextmanager
def hooked(*hooks: tuple[nn.Module, Any]) -> Iterator[None]:
    """Forward hooks for the length of the block."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_of(hf: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """Logits at every position."""
    device = next(hf.parameters()).device
    return hf(ids.to(device), attention_mask=mask.to(device), use_cache=False).logits


# -- targets ---------------------------------------------------------------------------------------


def target(
    hf: nn.Module,
    tokenizer: Any,
    projections: Sequence[nn.Module],
    fact: Fact,
    hp: Hparams,
    contexts: Sequence[str],
) -> list[Tensor]:
    """The PMET targets of one fact: what each of `projections` (the output projections of the last
    critical layer, whose sum is the layer's change where the norm refers to the layer's output)
    should have produced at the last subject token. Settings with `reference_norm="own stream"`."""
    contexts = ["{}", *[c for c in contexts if c != "{}"]]
    prompt, answer = fact.text, ids_of(tokenizer, " " + str(fact.target_new).strip())
    texts = [c.replace("{}", prompt, 1) for c in contexts]
    rows = [[*ids_of(tokenizer, text), *answer[:-1]] for text in texts]
    kl_text = f"{fact.subject} is a"
    rows.append(ids_of(tokenizer, kl_text))
    ids, mask = padded(rows, tokenizer.pad_token_id)
    place = [end_of_subject(tokenizer, text, fact.subject) for text in [*texts, kl_text]]
    first = [len(ids_of(tokenizer, text)) - 1 for text in texts]
    every, last = list(range(len(rows))), range(len(answer))

    clean: list[Tensor] = [torch.empty(0) for _ in projections]
    deltas: list[Tensor] = []

    def add(which: int) -> Any:
        def hook(_: nn.Module, __: Any, out: Tensor) -> Tensor:
            if not clean[which].numel():
                clean[which] = out[0, place[0]].detach().clone()
            if not deltas:
                return out
            return out.index_put(
                (torch.tensor(every), torch.tensor(place)), deltas[which], accumulate=True
            )

        return hook

    hooks = [(module, add(i)) for i, module in enumerate(projections)]
    with torch.no_grad(), hooked(*hooks):
        logits = logits_of(hf, ids, mask)
        kl_before = logits[-1, place[-1]].log_softmax(-1)
    deltas.extend(torch.zeros_like(c, requires_grad=True) for c in clean)
    limits = [hp.clamp * c.norm() for c in clean]
    adam = torch.optim.Adam(deltas, lr=hp.lr)
    weight = hp.nll_weight
    for step in range(hp.n_steps):
        with hooked(*hooks):
            logp = logits_of(hf, ids, mask).log_softmax(-1)
        said = torch.stack([logp[i, first[i] + j] for i in range(len(texts)) for j in last])
        wanted = torch.tensor([answer[j] for _ in texts for j in last], device=said.device)
        nll = -said.gather(1, wanted[:, None]).mean()
        now = logp[-1, place[-1]]
        kl = hp.kl_weight * (now.exp() * (now - kl_before)).sum()
        decay = sum(d.norm() / c.norm() ** 2 for d, c in zip(deltas, clean, strict=True))
        loss = weight * nll + kl + hp.weight_decay * decay
        if loss < hp.stop_loss:
            break
        if hp.easing < 1:
            right = bool((said.argmax(-1) == wanted).all())
            weight = hp.nll_weight * (hp.easing if right else 1)
            if right and kl <= hp.kl_stop:
                break
        if step == hp.n_steps - 1:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for delta, limit in zip(deltas, limits, strict=True):
                if delta.norm() > limit:
                    delta.mul_(limit / delta.norm())
    return [c + d.detach() for c, d in zip(clean, deltas, strict=True)]


# -- keys, moments, solve --------------------------------------------------------------------------


class Stop(Exception):
    """Ends a forward pass behind the module it was raised in."""


def inputs_of(hf: nn.Module, module: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
    """What `module` reads, `[row, token, d_in]`; nothing behind it runs."""
    found: list[Tensor] = []

    def hook(_: nn.Module, inputs: tuple[Tensor, ...], __: Tensor) -> None:
        found.append(inputs[0].detach())
        raise Stop

    with torch.no_grad(), hooked((module, hook)):
        try:
            logits_of(hf, ids, mask)
        except Stop:
            return found[0]
    raise AssertionError("the module never ran")


def key(hf: nn.Module, tokenizer: Any, module: nn.Module, fact: Fact, contexts: Any) -> Tensor:
    """Half the key on the plain prompt, half the mean of those behind the prefixes."""
    contexts = ["{}", *[c for c in contexts if c != "{}"]]
    texts = [c.replace("{}", fact.text, 1) for c in contexts]
    ids, mask = padded([ids_of(tokenizer, text) for text in texts], tokenizer.pad_token_id)
    place = torch.tensor([end_of_subject(tokenizer, text, fact.subject) for text in texts])
    keys = inputs_of(hf, module, ids, mask)[torch.arange(len(texts)), place]
    return (keys[0] + keys[1:].mean(0)) / 2


def output(hf: nn.Module, tokenizer: Any, module: nn.Module, fact: Fact) -> Tensor:
    """What `module` writes at the last subject token of the plain prompt now."""
    ids, mask = padded([ids_of(tokenizer, fact.text)], tokenizer.pad_token_id)
    found: list[Tensor] = []
    with torch.no_grad(), hooked((module, lambda m, i, out: found.append(out))):
        logits_of(hf, ids, mask)
    return found[0][0, end_of_subject(tokenizer, fact.text, fact.subject)]


def moment(
    hf: nn.Module, module: nn.Module, batches: Sequence[tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Tensor:
    """E[k kᵀ] of what `module` reads, in a pass of its own."""
    total: Tensor | None = None
    count = 0
    for ids, mask in batches:
        keys = inputs_of(hf, module, ids, mask)[mask.bool()].to(dtype)
        if total is None:
            total = torch.zeros(keys.shape[1], keys.shape[1], dtype=dtype, device=keys.device)
        total.addmm_(keys.T, keys)
        count += len(keys)
    assert total is not None
    return total / count


def solve(moment: Tensor, keys: Tensor, residuals: Tensor, weight: float) -> Tensor:
    """(λC + KᵀK)⁻¹ KᵀR, `[d_in, d_model]`, in float64 as released."""
    keys, residuals = keys.double(), residuals.double()
    system = weight * moment.double() + keys.T @ keys
    return torch.linalg.solve(system, keys.T) @ residuals


def edit(
    hf: nn.Module,
    tokenizer: Any,
    modules: dict[Site, nn.Module],
    weights: dict[Site, Tensor],
    facts: Sequence[Fact],
    moments: dict[Site, Tensor],
    hp: Hparams,
    contexts: Sequence[str],
) -> dict[Site, Tensor]:
    """PMET: per written site the weight change. `weights` are the weights as `[d_in, d_model]`;
    they are as before afterwards."""
    last = hp.layers[-1]
    both = [modules[Site(last, "attn")], modules[Site(last, "mlp")]]
    targets = [target(hf, tokenizer, both, fact, hp, contexts)[1] for fact in facts]
    before = {site: w.clone() for site, w in weights.items()}
    deltas: dict[Site, Tensor] = {}
    for i, layer in enumerate(hp.layers):
        site = Site(layer, "mlp")
        keys = torch.stack([key(hf, tokenizer, modules[site], f, contexts) for f in facts])
        now = torch.stack([output(hf, tokenizer, both[1], fact) for fact in facts])
        share = (torch.stack(targets) - now) / (len(hp.layers) - i) ** 0.5
        deltas[site] = solve(moments[site], keys, share, hp.second_moment_weight)
        weights[site].add_(deltas[site].to(weights[site].dtype))
    for site in deltas:
        weights[site].copy_(before[site])
    return deltas


# -- evaluation ------------------------------------------------------------------------------------


def record(hf: nn.Module, tokenizer: Any, fact: Fact) -> list[tuple[float, float]]:
    """Mean nll of the new and of the true answer on every prompt of one record, in one padded
    batch of its own: rewrite, paraphrases, neighbours."""
    texts = [fact.text, *fact.paraphrases, *[prompt for prompt, _ in fact.neighbours]]
    answers = [f" {str(a).strip()}" for a in (fact.target_new, fact.target_true)]
    rows, first = [], []
    for text in texts:
        for answer in answers:
            whole = ids_of(tokenizer, text + answer)
            first.append(len(ids_of(tokenizer, text)))
            rows.append(whole)
    ids, mask = padded(rows, tokenizer.pad_token_id)
    with torch.no_grad():
        logp = logits_of(hf, ids, mask).log_softmax(-1)
    nll = []
    for i, row in enumerate(rows):
        own = [-float(logp[i, j - 1, row[j]]) for j in range(first[i], len(row))]
        nll.append(sum(own) / len(own))
    return list(zip(nll[0::2], nll[1::2], strict=True))

# %% [markdown]
# # 02 · Editing, step by step
#
# **Question.** What does PMET do to the weights, and what of it arrives in the answers?
#
# [`00_quickstart`](00_quickstart.ipynb) edited a fact with one call. Here the call is taken apart: find out what a component *should have produced* (the targets), look at what it *reads* (the keys) and at what else it reads all day (the second moment), write the difference into a few layers, and look at the answers before and after. Source: PMET, arXiv [2308.08742](https://arxiv.org/abs/2308.08742), its section on the method; the closed-form write is that of MEMIT, arXiv [2210.07229](https://arxiv.org/abs/2210.07229), section 4. *Run time: about a minute on two CPU cores.*
#
# **Your own model.** Change `MODEL`, `facts` to `pl.recalled(model, n=FACTS)`, the settings to `pl.Hparams(layers)` (or `pl.suggest_hparams(model, facts).hparams`), and the text to yours: `pl.texts("file.txt")`, or `pl.own_moments(model, layers)` in place of `pl.second_moments`.
#
# Words used below:
#
# - **Fact**: a subject ("Thea Junlow"), a prompt with a place for it ("{}'s mother tongue is"), the answer the model gives (*true*), the answer an edit should produce (*new*).
# - **Stream**: a vector that a layer computes at every token: `attn_out` (output of attention, MHSA), `mlp_out` (output of the feed-forward network, FFN), `resid_post` (the layer's output, to which both have been added).
# - **Critical layers**: the few neighbouring layers that an edit writes; the *last* critical layer is where targets are set.

# %% tags=["parameters"]
MODEL = "world"  # a bundled name, a directory, or a hub id
FACTS = 8  # edited at once

# %%
from dataclasses import replace

import matplotlib.pyplot as plt
import pandas as pd
import torch

import pmet_lens as pl
from pmet_lens import editing, experiments, plotting

plt.rcParams.update({**plotting.STYLE, "figure.dpi": 110})
model = pl.load(MODEL)
facts = pl.counterfact(n=FACTS)
says = pl.ask(model, [fact.text for fact in facts], k=1)["token"].to_list()
wanted = [(fact.text, said, fact.target_new) for fact, said in zip(facts, says, strict=True)]
pd.DataFrame(wanted, columns=["prompt", "the model says", "it should say"])

# %% [markdown]
# ## 1 · Targets: what should have been produced
#
# Nothing is written yet. [`optimise`](../pmet_lens/editing/targets.py) leaves the weights alone and adds a vector to a stream at the last token of the subject, in the last critical layer: `δ^a` to `attn_out` and `δ^m` to `mlp_out`. Adam moves both together until the model says the new answer, with two counterweights: what the model says after "SUBJECT is a" should stay (a KL divergence), and the vectors should be small (a decay, and a bound on their norm). The prompt stands alone and behind a few prefixes that the model wrote itself (the *contexts*), so that what is found does not depend on what came before. The stream's own value plus its `δ` is the **value** the component should have produced.
#
# PMET will *write* only the FFN's share `δ^m`. `δ^a` is there, says the paper, so that `δ^m` need not carry what is not the FFN's to carry.

# %%
hparams, contexts = pl.hparams_for(model, pl.PMET), pl.sample_contexts(model)
targets = pl.optimise(model, facts, pl.PMET, hparams, contexts)
ends = targets.history.groupby("fact").agg(first=("loss", "first"), last=("loss", "last"))
length = {f"‖δ‖ {s}": targets.delta(s).norm(dim=-1).numpy() for s in pl.PMET.delta_at}
found = ends.assign(steps=targets.history.groupby("fact").size(), **length)
found.set_axis([fact.target_new for fact in facts]).round(3).T

# %% [markdown]
# The first table gives the model's likeliest next *token*, which may be the beginning of its answer. The loss falls by one to two orders of magnitude within the allowed steps (the curves are in panel a of the figure below); a fact that the model finds harder to believe takes more steps and a longer `δ`. ([`01`](01_mhsa_knowledge_patterns.ipynb) shows how alike the two vectors are: in parallel blocks, identical.)
#
# ## 2 · Keys, and everything else the layer reads
#
# A feed-forward network ends in a matrix `W` that maps what was computed before it to `mlp_out`: `value = key @ W`. The **key** of a fact is what `W` reads at the last subject token, averaged over the contexts ([`averaged_keys`](../pmet_lens/editing/keys.py)). To change what a key brings out means to change `W`, and every other token that passes through the layer meets the changed `W` as well.
#
# How much it meets is told by the **second moment** `C = E[k kᵀ]` of the keys of ordinary text ([`second_moments`](../pmet_lens/moments/second_moments.py)): along an eigenvector with a large eigenvalue text has long keys, so a change there disturbs much; along one with a small eigenvalue hardly anything passes. The solve ([`linalg`](../pmet_lens/editing/solvers.py)) finds the change that brings the facts' keys what they lack while disturbing text least, `Δ = (λC + KᵀK)⁻¹ KᵀR`; `λ` says how much text counts.

# %%
moments = pl.second_moments(model, pl.texts(), projections=("mlp",), n_tokens=30_000)
rows = {}
for site, moment in moments.items():
    K, C = editing.averaged_keys(model, facts, contexts, site).double(), moment.value
    free = (K @ torch.linalg.solve(C, K.T)).diagonal().mean().item()
    unused = (torch.linalg.eigvalsh(C) < C.trace() / len(C) / 10).double().mean().item()
    stored = free / (free + hparams.second_moment_weight)
    rows[str(site)] = {"width": len(C), "hardly used": unused, "kᵀC⁻¹k": free, "stored": stored}
pd.DataFrame(rows).T.round(3)

# %% [markdown]
# *Hardly used*: the share of directions with less than a tenth of the average eigenvalue: text lives in few directions, and there is room. `kᵀC⁻¹k` says how unusual a key is: over text its mean is the *width* of the layer, whatever the model; a fact's key that lies above it points where text seldom goes. Alone, a fact would get the share `kᵀC⁻¹k / (kᵀC⁻¹k + λ)` of what it asks for (*stored*).
#
# ## 3 · Writing, layer by layer
#
# For each critical layer, lowest first, [`edit`](../pmet_lens/editing/locate_and_edit.py) reads the keys with the weights as they are by then, takes the **residual** `R` = wanted value − current value, *both at the last critical layer*, and writes a share of it: `R/√n` in PMET, `R/n` in MEMIT, where `n` counts the layers still to come.
#
# What does each layer achieve? We apply only the first few layers' changes and look: what is *left* of the residual, and how far the layer's output has *moved* towards where the deltas had pushed it (1: as far as all deltas together, along their direction).

# %%
linear = replace(pl.PMET, spread="linear")
edits, rows = {}, []
for run, method in {"PMET": pl.PMET, "PMET, linear spread": linear, "MEMIT": pl.MEMIT}.items():
    own = None if method is pl.MEMIT else targets
    edit = edits[run] = pl.edit(model, facts, moments, method, None, contexts, own)
    own, stream = edit.targets, method.follows("mlp")
    push = sum(own.delta(s) for s in method.delta_at)
    clean = editing.current_values(model, facts, own.layer, "resid_post")
    for written in range(len(edit.factors) + 1):
        part = replace(edit, factors=dict(list(edit.factors.items())[:written]))
        with part.applied(model):
            now = editing.current_values(model, facts, own.layer, stream)
            state = editing.current_values(model, facts, own.layer, "resid_post")
            says = pl.summarise(pl.evaluate(model, facts))["mean"]
        left = (own.values[stream] - now).norm(dim=-1) / own.delta(stream).norm(dim=-1)
        moved = ((state - clean) * push).sum(-1) / push.norm(dim=-1) ** 2
        row = {"left": left.mean().item(), "moved": moved.mean().item(), "ES": says["ES"]}
        rows.append({"run": run, "layers written": written, **row})
steps = pd.DataFrame(rows)
steps.pivot(index="run", columns="layers written").round(2)

# %% [markdown]
# MEMIT's residual is that of the layer's *output*, and shrinks step by step, because what a lower layer writes arrives there. PMET's is that of the last layer's *FFN*, and does not shrink before the last layer: what lower layers write passes by that FFN, in the residual stream. So each layer takes its share of a residual that is still whole, and the shares add up to more than one `δ^m`. With `n` layers the stream receives about `1 + 1/√2 + … + 1/√n` times `δ^m` with the square root, and `1 + 1/2 + … + 1/n` times with the linear spread; the targets were found with `δ^a` *and* `δ^m` in the stream, and where the two are alike that is twice `δ^m`. On `world`, with three layers, the square root carries the stream a little beyond where the targets had it, and the linear spread falls short of it. (On `world-sequential`, with four, the linear spread just gets there and the square root goes well beyond.) So this is what the square root, in the paper's words, conveys more of; and part of it makes up for the `δ^a` that is never written.
#
# ## 4 · The edit
#
# **ES**, efficacy: share of edited prompts on which the new answer is likelier than the true one. **PS**: the same on paraphrases that the edit never saw. **NS**, specificity: share of *neighbours*, prompts about other subjects with the same true answer, that keep it. **S**: the harmonic mean of the three, so that none can be bought with another. Now all steps in one picture:

# %% tags=["main-figure"]
fig, axes = plt.subplots(2, 2, figsize=(7.4, 5.2))
(top, spectrum), (spread, answers) = axes
for run in ("PMET", "MEMIT"):
    plotting.losses(edits[run].targets.history, top, run).legend(loc="lower left")
values, vectors = torch.linalg.eigh(C)
along = pd.Series((K @ vectors).square().mean(0).numpy()).rolling(25, center=True).median()
spectrum.plot(values.flip(0), color="#444444", label="text: eigenvalues of C")
spectrum.plot(along[::-1].to_numpy(), color="#D55E00", label="edited keys (running median)")
spectrum.set(yscale="log", xlabel=f"direction, layer {site.layer}", ylabel="mean square of keys")
spectrum.legend(loc="lower left")
for run, own in steps.groupby("run", sort=False):
    style = {"color": plotting.colour_of(run), "marker": "o", "ms": 3}
    spread.plot(own["layers written"], own["moved"], label=run, **style)
    spread.plot(own["layers written"], own["left"], ls=":", **style)
spread.set(xticks=range(written + 1), xlabel="critical layers written")
spread.set_ylabel("moved (full), left (dotted)")
spread.legend(loc="upper left", bbox_to_anchor=(-0.06, 1.14), ncols=3, columnspacing=1)
before = pl.evaluate(model, facts)
with edits["PMET"].applied(model):
    plotting.before_after(before, pl.evaluate(model, facts), answers)
answers.legend(loc="upper left", bbox_to_anchor=(0, 1.14), ncols=2)
for ax, letter in zip(axes.flat, "abcd", strict=True):
    ax.set_title(letter, loc="left", fontweight="bold", x=-0.14)

# %% [markdown]
# **a** The loss of every fact (thin) and the mean of those still running (thick). Once the new answer is said behind every prefix, PMET weighs it a tenth and goes on only until the KL divergence is small; MEMIT stops when the loss is small. **b** The keys of text fall off over many orders of magnitude. The edited keys are above them nearly everywhere but in the few directions that text uses most: there is room, and there `Δ` writes. **c** The table above. **d** every dot is a prompt, above the line the wanted answer wins.
#
# ## 5 · The methods side by side
#
# The relatives differ in few answers: which stream gets a `δ`, which weights are written, how the residual is spread, how the solve weighs old against new ([`methods.py`](../pmet_lens/editing/methods.py)). ROME and EMMET write one layer, ROME fact after fact. AlphaEdit writes only along directions that text hardly uses. FT-W and FT+L fine-tune one matrix (FT+L within a small bound) and MEND lets a trained network turn gradients into changes: these need no second moment. **Collateral**: the share of *other* facts of the world still answered right, here of a sample; only a model whose every fact is known can be asked this.

# %%
others = experiments.others_of(pl.knowns(), facts)[::15]
tables = {"unedited": experiments.measure(model, facts, None, others)}
for run, method in pl.METHODS.items():
    edit = edits.get(run) or pl.edit(model, facts, moments, method, contexts=contexts)
    tables[run] = experiments.measure(model, facts, edit, others)
table = experiments.side_by_side(tables).pivot(index="run", columns="metric", values="mean")
table.loc[list(tables), ["S", "ES", "PS", "NS", "collateral"]].round(1)

# %% [markdown]
# With so few facts one prompt more or less is several points, so this table tells only large differences; [`04_scaling`](04_scaling.ipynb) has the same with hundreds of facts and intervals, [`03_ablations`](03_ablations.ipynb) takes PMET's parts out one by one.
#
# ## 6 · The same on a real model
#
# On SmolLM2-135M, whose attention writes before its feed-forward network reads, and whose place of recall nobody imposed. [`delta_losses`](../pmet_lens/interp/geometry.py) adds the deltas to the streams, each alone and both: the loss of the new answer tells what each carries. `arrival` writes PMET's edit layer after layer and tells how much of `δ^m` arrives at the last critical layer (*delta*), how far that layer's output has moved along what both deltas together did to it (*output*), and the loss of the new answer. (The cell needs the model: `pmet-lens models --fetch smollm2-135m`.)

# %% tags=["real-model"]
REAL, layers = "smollm2-135m", (2, 3, 4, 5, 6, 7)
shown = f"{REAL} is not fetched: pmet-lens models --fetch {REAL} brings it"
if REAL in set(pl.available_models().query("here")["name"]):
    real = pl.load(REAL)
    moments = pl.own_moments(real, layers, text="python")
    known = pl.recalled(real, pl.real_facts(20), n=4)
    edit = pl.edit(real, known, moments, "PMET", pl.Hparams(layers))
    alone = pl.delta_losses(real, edit.facts, edit.targets).groupby("added", sort=False)["nll"]
    display(alone.mean().round(2).to_frame("loss with this delta").T)
    arrives = pl.arrival(real, edit).groupby("written")
    shown = arrives[["delta", "output", "nll"]].mean().round(2).T
shown

# %% [markdown]
# With these four facts `δ^m` alone leaves much of the loss that both deltas take away, and `δ^a` alone takes little of it: neither was found to do it alone. Yet the written edit gets there. The lower layers hardly bring the last critical layer's FFN nearer to its target (*delta* stays near 0 until that layer itself is written), but what they write adds up in the residual stream, and with the square root the output ends more than twice as far along as both deltas together had pushed it (*output*): what is not written of `δ^a` is made up for by writing `δ^m` several times.
#
# **Answer.** PMET finds the vectors that make the model say the new answer, and writes the FFN's share of them along directions that ordinary text hardly uses, into several layers whose shares add up in the residual stream; here that is enough for every edited prompt and paraphrase, and nearly all neighbours and other facts stay as they were.

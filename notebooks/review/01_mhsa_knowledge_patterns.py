# %% [markdown]
# # 01 · What do attention and feed-forward hold?
#
# **Question.** PMET writes only into feed-forward (FFN) weights, because attention (MHSA) is said to hold *general patterns of knowledge extraction* that need no update. Does that hold, and how would one see it?
#
# Words: **MHSA** is multi-head self-attention, **FFN** the feed-forward network of a layer; what each puts out at a token is added to the *residual stream*, from which the next layers read. In *parallel* blocks (GPT-J) both read the same state; in *sequential* blocks (GPT-2, Llama) FFN reads what MHSA has just added. A fact is a **subject** ("Thea Junlow"), a **relation** (what is asked: her mother tongue) and an answer; a prompt names the first two, and the answer is predicted at its last token, the *answer position*.
#
# We watch the components of a model while it recalls facts: how they change their input, whether their output depends on what is asked (the relation) or on whom it is asked about (the subject), what happens when outputs are swapped between facts, and what an edit moves. Source: PMET, arXiv [2308.08742](https://arxiv.org/abs/2308.08742), the sections on its motivation. *Run time: about two minutes on two CPU cores.*
#
# **Your own model.** Change `MODEL`, and `knowns` to facts that it knows: `knowns = pl.recalled(model)` for one of the real world, or your own (`pl.read_facts`). The last two cells edit; they take `hparams=` where nobody published settings.
#
# **Read this first.** The bundled models `world` and `world-sequential` were trained so that they recall through the last subject token from layer 4 on; what is seen of *where* they recall was put there. They show that the instruments work. `world-unmasked` was trained without that constraint, and is shown at the end. The evidence about large models is this same notebook with `MODEL` set to one.

# %% tags=["parameters"]
MODEL = "world"  # a bundled name, a directory, or a hub id
EVERY = 14  # all facts of one in so many subjects are studied

# %%
import matplotlib.pyplot as plt

import pmet_lens as pl
from pmet_lens import plotting

plt.rcParams.update({**plotting.STYLE, "figure.dpi": 110})
model = pl.load(MODEL)
knowns = pl.knowns()
subjects = list(dict.fromkeys(fact.subject for fact in knowns))[::EVERY]
facts = [fact for fact in knowns if fact.subject in subjects]
"parallel blocks" if model.parallel_blocks else "sequential blocks", len(facts), facts[0].text

# %% [markdown]
# ## How the components change their input
#
# The paper's first figure: the state that enters MHSA or FFN against the state that leaves it, as vectors (cosine) and as vocabulary (Jaccard similarity of the 50 tokens each is closest to). Function: [`component_similarity`](../pmet_lens/interp/similarity.py).

# %%
similarity = pl.component_similarity(model, facts)
fig, axes = plt.subplots(1, 2, figsize=(7, 2.4))
for ax, measure in zip(axes, ("cosine", "jaccard"), strict=True):
    plotting.similarity_lines(similarity, ax, measure)
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
# %% [markdown]
# The two profiles differ. That is all this figure can say: it does not tell what the difference *means*. So we test the reading.
#
# ## Relation or subject?
#
# If MHSA held general patterns, its output at the answer position would depend on *what* is asked. [`variance_split`](../pmet_lens/interp/variance.py) asks how much of the variance of an output other facts predict: those with the same relation (in another phrasing, so that words do not count as knowledge), and those with the same subject. No fact predicts itself; with shuffled labels the share is about 0.

# %% tags=["main-figure"]
variance = pl.variance_split(model, facts, n_permutations=50)
fig, axes = plt.subplots(1, 2, figsize=(7, 2.4))
plotting.share_lines(variance, axes[0]).legend(fontsize=6)
patterns = pl.attention_patterns(model, facts)
alike = pl.pattern_similarity(patterns, facts)
plotting.pattern_lines(alike, axes[1]).legend(fontsize=6)
# %% [markdown]
# Left: from the layer on at which the subject is read, MHSA's output depends on the *subject* more than on the relation: it carries what was looked up. FFN's output at this position is mostly a function of the relation in the lower layers. Right: *where* the heads look is more alike within a relation than across relations ([`pattern_similarity`](../pmet_lens/interp/attention.py)). The pattern is general; what it fetches is not.
#
# ## Swap it
#
# A dependence is not yet a cause. [`transfer`](../pmet_lens/interp/patching.py) replaces a component's output at the answer position by that of another fact. Does the answer stay, or follow the donor?

# %%
swaps = pl.transfer(model, facts, n_pairs=80)
fig, axes = plt.subplots(1, 2, figsize=(7, 2.6), width_ratios=(1, 1.2))
plotting.transfer_bars(swaps, axes[0]).legend(fontsize=6, ncols=2, loc="upper center")
lens = pl.lens(model, facts, positions=("last",))
means = lens.groupby(["stream", "layer"], as_index=False)["probability"].mean()
plotting.lens_map(means.rename(columns={"probability": "mean"}), axes[1], lens["stream"].unique())
# %% [markdown]
# Swapping MHSA's output between two subjects makes the answer follow the donor's subject: the answer travels *through* MHSA. Swapping FFN's output changes what is asked. Right, the lens ([`lens`](../pmet_lens/interp/lens.py)): the probability of the answer when a stream is read through the model's own unembedding. No single component says it; the residual stream does, once MHSA has read.
#
# ## Where is it recalled?
#
# The causal trace ([`causal_trace`](../pmet_lens/interp/causal_trace.py); ROME, arXiv 2202.05262, section 2) corrupts the subject and restores one component at one place, here three layers at a time for MHSA and FFN.

# %%
few = pl.counterfact(n=20)
fig, axes = plt.subplots(1, 3, figsize=(7.5, 2.4), sharey=True)
windows = {"resid_post": 1, "attn_out": 3, "mlp_out": 3}
for ax, (stream, window) in zip(axes, windows.items(), strict=True):
    trace = pl.causal_trace(model, few, stream=stream, window=window, samples=2)
    plotting.trace_lines(trace, ax).set_title(stream)
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
# %% [markdown]
# Early, the fact sits at the last subject token and FFN helps to bring it there; late, at the last token, brought by MHSA. This is the place where PMET edits.
#
# ## The two deltas of PMET
#
# How PMET edits, in short ([`02`](02_editing.ipynb) takes it apart): at the last subject token of one layer it searches for two vectors, `δ^a` to be added to MHSA's output and `δ^m` to FFN's, with which the model says the new answer. Then it writes into FFN weights what makes them produce `δ^m`. `δ^a` is thrown away. In *parallel* blocks both enter the same sum, so both get the same gradient, and only their bounds and decay can tell them apart. In *sequential* blocks `δ^a` also passes through the FFN behind it. The columns below say how alike the two are (cosines over the optimisation), and which share of the new answer's gain each brings ([`answer_gain`](../pmet_lens/interp/geometry.py), integrated gradients).

# %%
import pandas as pd

edited = pl.counterfact(n=10)
rows = {}
for name in dict.fromkeys([MODEL, "world", "world-sequential"]):
    own = pl.load(name)
    how = pl.PMET, pl.hparams_for(own, pl.PMET), pl.sample_contexts(own)
    targets = pl.optimise(own, edited, *how)
    gain = pl.answer_gain(own, edited, targets).groupby("stream")["gain"].mean()
    cosines = targets.history[["gradient_cosine", "cosine"]].mean()
    rows[name] = {**cosines, **(gain / gain.sum()).add_prefix("gain from ")}
pd.DataFrame(rows).T.round(3)

# %% [markdown]
# On parallel blocks the two deltas are the same vector: `δ^a` and `δ^m` each do half of the work, and leaving one out means writing half of what was found. On sequential blocks they are nearly the same. So in these models the split of the change into "MHSA's part" and "FFN's part" is not found by the optimisation: it is set by how the two are bounded. The paper, which has parallel models only, does not show this.
#
# ## What an edit moves
#
# An edit writes FFN weights in the layers below the reading. How far do the outputs of the *unchanged* attention move at the answer position?

# %%
moments = pl.second_moments(model, pl.texts(), projections=("mlp",), n_tokens=20_000)
edit = pl.edit(model, edited, moments)
moved = pl.drift(model, edited, edit)
fig, ax = plt.subplots(figsize=(5.5, 2.4))
plotting.drift_lines(moved, ax).legend(fontsize=6, bbox_to_anchor=(1, 1))
# %% [markdown]
# MHSA's output at the answer moves on the edited facts and in their paraphrases and much less on neighbours, though no attention weight was touched: it fetches what now stands at the subject. This is the strongest support here for leaving MHSA alone.
#
# ## What holds
#
# Each statement of the paper as a comparison of two numbers that could come out the other way ([`claims`](../pmet_lens/interp/claims.py)), on this model and on the twin that was trained *without* an imposed recall site.

# %%
twin = pl.load("world-unmasked")
twin_tables = {
    "similarity": pl.component_similarity(twin, facts),
    "variance": pl.variance_split(twin, facts, n_permutations=50),
    "transfer": pl.transfer(twin, facts, n_pairs=80),
    "patterns": pl.pattern_similarity(pl.attention_patterns(twin, facts), facts),
}
tables = {"similarity": similarity, "variance": variance, "transfer": swaps, "patterns": alike}
both = {MODEL: pl.claims({**tables, "drift": moved}), "world-unmasked": pl.claims(twin_tables)}
pd.set_option("display.max_colwidth", None)
pd.concat(both, names=["model"]).droplevel(1).round(2)

# %% [markdown]
# **Answer.** Half of it: *where* attention looks is a general pattern of the relation, and unchanged attention weights do extract an edited fact, so they need no update; but what attention *outputs* is the subject's knowledge on its way to the answer, and PMET's two deltas are (nearly) one and the same.
#
# *What these models cannot show:* whether a large model, trained on text, divides its work this way. The two edited models had their recall site imposed, all three know one invented world, each was trained from one seed. Run this on yours.

# %% [markdown]
# # 03 · Ablations: which part of PMET does what?
#
# **Question.** Which part of PMET does what, and does it depend on the kind of block?
#
# [`02_editing`](02_editing.ipynb) took an edit apart; here its parts are taken away, one at a time, on the same facts. The large run is read from tables that `make paper` made ([`figures/paper.py`](../figures/paper.py)); a small part of it is run again at the end. Source: PMET, arXiv [2308.08742](https://arxiv.org/abs/2308.08742), its section of ablations on optimising MHSA. *Run time: about a minute on two CPU cores.*
#
# Words, as in [`00`](00_quickstart.ipynb) and [`02`](02_editing.ipynb): a *fact* is edited by finding vectors `δ` that, added to *streams* of the last *critical layer* at the last token of the subject, make the model say the new answer (the *targets*), and by writing what is missing (the *residual*) into the weights of all critical layers, weighed by `λ` against the *second moment* of the keys of ordinary text. **ES, PS, NS**: share of edited prompts, paraphrases and neighbours on which the right side wins; **S** their harmonic mean; **collateral**: other facts of the world still answered right.
#
# **Your own model.** The tables are of the bundled models. The last part runs anew: there change `MODEL`, take `pl.recalled(model)` for `facts` and `others`, `pl.Hparams(layers)` for `pl.hparams_for(…)`, and give `pl.Bench` your `texts=`. `make model-tables` does every method on each real model that was fetched.
#
# The two models know the same world. `world` has *parallel* blocks (as GPT-J): attention (MHSA) and feed-forward (FFN) read the same state and are added side by side. `world-sequential` has *sequential* blocks (as GPT-2, Llama): FFN reads what MHSA has just written. The paper has parallel models only.

# %% tags=["parameters"]
MODEL = "world"  # for the last part: a bundled name, a directory, or a hub id
FACTS = 8  # edited at once there

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import pmet_lens as pl
from pmet_lens import experiments, plotting

plt.rcParams.update({**plotting.STYLE, "figure.dpi": 110})
METRICS, BLOCKS = ["S", "ES", "PS", "NS", "collateral"], {True: "parallel", False: "sequential"}
folder, cells = Path("../figures/results/paper"), {"keep_default_na": False, "na_values": [""]}
names = ("ablations", "lambda", "layers")  # "NA" is a metric there, not a gap
ablations, weights, layers = (pd.read_csv(folder / f"{n}.csv", **cells) for n in names)
models = {name: BLOCKS[pl.load(name).parallel_blocks] for name in ablations["model"].unique()}
whole = ablations[ablations["run"] == "PMET"]
whole.pivot(index=["model", "edits"], columns="metric", values="mean")[METRICS].round(1)

# %% [markdown]
# This is PMET whole, that everything below is compared with. A method is four answers ([`method.py`](../pmet_lens/editing/method.py)); each of the first rows below changes one of them ([`ABLATIONS`](../pmet_lens/editing/methods.py)):
#
# | row | answer changed | what it asks | what the paper says |
# |---|---|---|---|
# | w/o δ^a | `delta_at`: FFN's stream alone | does it help to let MHSA take part in the targets? | optimising both together helps |
# | + W_O | `write`: also MHSA's output matrix gets its share | should MHSA's weights change too? | brings little: MHSA stores a small amount of factual knowledge |
# | linear spread | `spread`: `R/n` instead of `R/√n` | how much may each layer take? | the square root conveys more |
# | TL hidden state, sqrt spread | `delta_at`: the layer's output | is it the stream, or the spread? | |
# | MEMIT | both | all of it | PMET is better, except in specificity (as others quote it) |
# | at the first subject / last token | `position` | why the last subject token? | (ROME and MEMIT: it is the decisive one) |
#
# The others change strengths ([`ablations`](../pmet_lens/experiments/trials.py)): no context prefixes, fewer critical layers, another bound on `δ`, another `λ`.
#
# **What to expect**, from the layer-by-layer measurement in [`02`](02_editing.ipynb): the FFN's residual does not shrink before the last layer, so PMET adds about `1 + 1/√2 + … + 1/√n` times `δ^m` to the stream. The targets were found with `δ^a + δ^m` in it, about twice `δ^m`, so PMET goes a little beyond its targets. The *linear spread* adds less. *Without `δ^a`* there is only `δ^m` to make the model say the answer, it grows longer, and is added as often: the edit goes further beyond. *`+ W_O`* adds `δ^a` on top. If that is all there is to it, then ES and PS rise and NS and collateral fall with what is added in total, whatever part was changed. Here is what was measured.

# %% tags=["main-figure"]
longest = max(ablations.groupby("model")["run"].unique(), key=len)
fig, axes = plt.subplots(1, len(models), figsize=(7.5, 5), sharey=True, squeeze=False)
for ax, (name, kind) in zip(axes.flat, models.items(), strict=True):
    own = ablations[ablations["model"] == name]
    plotting.effect_dots(own, ax, runs=[run for run in longest if run != "PMET"])
    ax.set_title(f"{name}: {kind} blocks")
fig.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
# %% [markdown]
# Every dot is a difference to PMET in points, on the same facts, with a paired 95 % bootstrap interval ([`compare`](../pmet_lens/experiments/trials.py), [`effect_dots`](../pmet_lens/plotting/method_plots.py)); where it crosses the line, the part made no difference that these facts can show. ES and PS rising while NS and collateral fall is no improvement: it is a stronger edit, which a smaller `λ` would also give. The rows on MHSA optimisation in numbers, with S, which weighs both sides:

# %%
paper = ["w/o δ^a", "+ W_O", "linear spread", "TL hidden state, sqrt spread", "MEMIT"]
own = ablations[ablations["run"].isin(paper) & ablations["metric"].isin(METRICS)]
text = own.apply(
    lambda r: "{difference:+.1f} [{difference_low:+.1f}, {difference_high:+.1f}]".format(**r),
    axis=1,
)
own.assign(text=text).pivot(index=["model", "run"], columns="metric", values="text")[
    METRICS
].reindex(paper, level=1)

# %% [markdown]
# ## How strong, and where?
#
# Two choices are left to whoever edits a model: `λ`, how much ordinary text counts against the edit, and which layers are written. Left and middle: every `λ` on the same targets (dotted: the one the settings have). Right: S for every block of one to four neighbouring critical layers; empty where there are none, or where the second moment of a layer has no inverse (the keys of the first layer of a parallel model see only the token).

# %%
fig, axes = plt.subplots(len(models), 3, figsize=(7.5, 4.2), squeeze=False)
for row, name in zip(axes, models, strict=True):
    for ax, run in zip(row, ("PMET", "MEMIT"), strict=False):
        own = weights[(weights["model"] == name) & (weights["run"] == run)]
        plotting.sweep_lines(own, ax, "second_moment_weight")
        ax.axvline(pl.HPARAMS[name][run].second_moment_weight, color="#444444", lw=0.8, ls=":")
        ax.set(xscale="log", xlabel="λ", title=f"{name}: {run}")
    row[1].set_ylabel("")
    plotting.layer_map(layers[layers["model"] == name], row[2])
    row[2].set_title("S of PMET")
fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
# %% [markdown]
# ## Run it yourself
#
# The rows on MHSA optimisation again, on a few facts of `MODEL`. A [`Bench`](../pmet_lens/experiments/trials.py) holds what all rows need, so that each target is optimised once.

# %%
model, facts = pl.load(MODEL), pl.counterfact(n=FACTS)
rows = pl.ablations(pl.hparams_for(model, pl.PMET))
rows = {name: rows[name] for name in ("PMET", "w/o δ^a", "+ W_O", "linear spread", "MEMIT")}
others = experiments.others_of(pl.knowns(), facts)[::15]
with tempfile.TemporaryDirectory() as temporary:
    bench = pl.Bench(model, temporary, n_tokens=30_000)
    live = pl.compare(bench, rows, facts, others)
both = live.pivot(index="run", columns="metric", values=["mean", "difference"])
both.reindex(list(rows)).reindex(METRICS, axis=1, level=1).round(1)

# %% [markdown]
# A few facts at once are an easy load: there is room for all of them, and differences are small and uncertain; look at the large run for their size, and here for whether they point the same way. What happens as the load grows is [`04_scaling`](04_scaling.ipynb).
#
# **Answer.** The square-root spread is what carries an edit to the paraphrases (the linear one loses 12 and 18 points of PS), and `δ^a` and leaving `W_O` alone are what keeps it from going too far (without them neighbours and other facts pay, with `W_O` most of all in sequential blocks, where the edit itself breaks); the signs are the same on both kinds of block, as far as the intervals tell, the sizes are not, and by S alone MEMIT cannot be told from PMET here.

# %% [markdown]
# # 04 · Scaling: how many facts at once?
#
# **Question.** How many facts can be edited at once, and what breaks first?
#
# One edited fact is easy ([`00`](00_quickstart.ipynb)). Thousands share the same few matrices, and each is asked not to disturb the others nor anything else. The large run is read from tables that `make paper` made ([`figures/paper.py`](../figures/paper.py)); one point of it is run again at the end. Source: PMET, arXiv [2308.08742](https://arxiv.org/abs/2308.08742), its section on scaling (1 to 10,000 edits); the grid is the one of MEMIT, arXiv [2210.07229](https://arxiv.org/abs/2210.07229). *Run time: about half a minute on two CPU cores.*
#
# **Your own model.** The tables are of the bundled models. The last part runs anew: there change `MODEL`, take `pl.recalled(model)` for `facts` and `others`, `pl.own_moments(model, layers)` for the second moments, and pass `pl.Hparams(layers)` to `pl.edit`. Before a large run, `pl.plan` tells what it costs.
#
# Words, as in [`00`](00_quickstart.ipynb) and [`02`](02_editing.ipynb): **ES** (edited prompts), **PS** (their paraphrases), **NS** (neighbours: other subjects with the same true answer), all as the share on which the right answer is likelier; **S** their harmonic mean; **collateral**: other facts of the world still answered right. **Load**: edits per dimension of the keys that the written matrix reads (`d_mlp`). A matrix cannot tell more keys apart than it has dimensions, so the load, not the number, is what can be compared across models: the published 10,000 edits of GPT-J (`d_mlp` 16,384) are a load of 0.61.

# %% tags=["parameters"]
MODEL = "world"  # for the last part: a bundled name, a directory, or a hub id
FACTS = 10  # edited at once there
HELD = 90  # per cent: what counts as not broken

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import pmet_lens as pl
from pmet_lens import experiments, plotting

plt.rcParams.update({**plotting.STYLE, "figure.dpi": 110})
METRICS = ["S", "ES", "PS", "NS", "collateral"]
folder, cells = Path("../figures/results/paper"), {"keep_default_na": False, "na_values": [""]}
names = ("scaling", "sequential")  # "NA" is a metric there, not a gap
scaling, sequential = (pd.read_csv(folder / f"{n}.csv", **cells) for n in names)
models, runs = scaling["model"].unique(), scaling["run"].unique()
records = scaling[scaling["benchmark"] == "counterfact"]
records.groupby("model")[["edits", "load"]].max()

# %% [markdown]
# These are the largest number of edits and the largest load in the tables. Every method edits the same CounterFact-style facts of the bundled world, all at once (ROME by its nature one after the other), with the settings it has on this model: `λ` is not chosen anew for every load. Up to 10 edits the mean is over several groups of facts, each on the clean model.

# %% tags=["main-figure"]
fig, axes = plt.subplots(len(models), 5, figsize=(8, 3.9), sharex=True, sharey=True, squeeze=False)
for row, name in zip(axes, models, strict=True):
    for ax, metric in zip(row, METRICS, strict=True):
        plotting.load_lines(records[records["model"] == name], ax, metric)
        ax.set(title=metric, ylabel=name if metric == "S" else "", ylim=(-3, 103))
        ax.set_xlabel("edits at once" if name == models[-1] else "")
fig.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=9, fontsize=6)
# %% [markdown]
# Per cent, with 95 % bootstrap bands ([`load_lines`](../pmet_lens/plotting/method_plots.py)). Read from left to right; a line that leaves the top has broken. *Which metric breaks first* is the smallest number of edits at which it is below `HELD`; a dash means that it never was, as far as the method was run (the last table says how far):

# %%
low = records[(records["mean"] < HELD) & records["metric"].isin(METRICS[1:])]
first = low.pivot_table("edits", ["model", "run"], "metric", aggfunc="min")
first = first.reindex(pd.MultiIndex.from_product([models, runs[1:]], names=["model", "run"]))
first.reindex(columns=METRICS[1:]).astype("Int64").astype(object).fillna("–")

# %% [markdown]
# And at the end of the line: every method at its largest number of edits, with what else an edit can cost. *Perplexity*: of held-out text of the world (lower is better, beside the unedited model's); *KL*: how far the predictions on that text moved; *GE*: fluency, the entropy of n-grams in texts about the edited subjects (a text that repeats itself scores low); *RS*: likeness of these texts to ones about subjects that do have the new answer.

# %%
most = records["edits"] == records.groupby(["model", "run"])["edits"].transform("max")
last = records[most].pivot(index=["model", "run", "edits"], columns="metric", values="mean")
zsre = scaling[scaling["benchmark"] == "zsre"]
zsre = zsre[zsre["edits"] == zsre.groupby(["model", "run"])["edits"].transform("max")]
zsre = zsre.pivot(index=["model", "run", "edits"], columns="metric", values="mean")
last = last.reindex(columns=[*METRICS, "perplexity", "KL", "GE", "RS"]).reindex(runs, level=1)
display(last.round(1))
zsre[["score", "efficacy", "paraphrase", "specificity"]].reindex(runs, level=1).round(1)

# %% [markdown]
# The second table is zsRE-style: questions instead of statements, answers by token accuracy, *specificity* on unrelated questions, *score* the harmonic mean.
#
# For orientation, published numbers of GPT-J with 10,000 CounterFact edits at once (MEMIT paper, arXiv 2210.07229; quoted, not reproduced): another model, another world, a similar load.
#
# | GPT-J, 10,000 edits | S | ES | PS | NS |
# |---|---|---|---|---|
# | unedited | 22.4 | 15.2 | 17.7 | 83.5 |
# | FT-W | 67.6 | 99.4 | 77.0 | 46.9 |
# | ROME | 50.3 | 50.2 | 50.4 | 50.2 |
# | MEMIT | 85.8 | 98.9 | 88.6 | 73.7 |
#
# ## Batch after batch
#
# Facts rarely come all at once. Here each batch is edited on the model as edited so far ([`edit_sequentially`](../pmet_lens/editing/locate_and_edit.py)), with and without *protection*: the keys of earlier batches added to what every solve preserves. Metrics are over *all* facts so far; a cross marks where perplexity has passed three times its beginning.

# %%
shown = MODEL if MODEL in models else models[0]
own = sequential[sequential["model"] == shown]
fig, axes = plt.subplots(1, 4, figsize=(8, 2.6))
for ax, metric in zip(axes, ("ES", "NS", "collateral", "perplexity"), strict=True):
    plotting.step_lines(own, ax, metric)
    ax.set(title=metric, ylabel="")
axes[0].set_ylabel(f"{shown}, {own['batch'].iloc[0]} per batch")
fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=6.5)
# %% [markdown]
# ## Run it yourself
#
# One point of the first figure again, on `MODEL`, beside the table's (which averages over two groups of ten facts, and takes its second moment from more text).

# %%
model, facts = pl.load(MODEL), pl.counterfact(n=FACTS)
others = experiments.others_of(pl.knowns(), facts)[::15]
moments = pl.second_moments(model, pl.texts(), projections=("mlp",), n_tokens=30_000)
edits = {run: pl.edit(model, facts, moments, run) for run in ("PMET", "MEMIT")}
live = {f"{run}, now": experiments.measure(model, facts, e, others) for run, e in edits.items()}
told = records[
    (records["model"] == MODEL) & (records["edits"] == FACTS) & records["run"].isin(edits)
]
told = told.assign(run=told["run"] + ", table")
both = pd.concat([experiments.side_by_side(live), told])
both.pivot(index="run", columns="metric", values="mean")[METRICS].round(1)

# %% [markdown]
# **Answer.** A hundred facts go in with S above 96 by PMET and MEMIT, 316 with 90 to 93; what breaks first is what stands beside the edited facts: the other facts of the world are below `HELD` at 316 edits, the neighbours (in sequential blocks also the paraphrases) with or after them, and the edited prompts last, at 750, where the load is that of the published 10,000 and a third of all the model knows is asked to change.

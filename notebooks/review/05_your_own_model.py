# %% [markdown]
# # 05 · Your own model, your own facts
#
# **Question.** How is a fact of your own edited in a model of your own, of which nothing is known but that it runs?
#
# **Your own model.** Change `MODEL`, `FACTS` and `TEXT` below, nothing else.
#
# The way from nothing to an edit that can be shipped: load the model, read the facts, find settings, read ordinary text, try, edit, look at the receipt, save, undo. It runs here on a bundled model that is treated as a stranger: its known settings are not used. What the words mean is told in [`00`](00_quickstart.ipynb) and [`02`](02_editing.ipynb); the method is that of PMET, arXiv [2308.08742](https://arxiv.org/abs/2308.08742), its section on the method, and the search for a layer that of ROME, arXiv [2202.05262](https://arxiv.org/abs/2202.05262), section 2. *Run time: about a minute on two CPU cores; a model of 6 billion parameters wants a GPU.*

# %% tags=["parameters"]
MODEL = "world"  # a hub id ("openai-community/gpt2-xl"), a directory, or a bundled name
FACTS = "your_facts.csv"  # subject, prompt, target_new; here also target_true and paraphrases
TEXT = None  # a file with ordinary text, a paragraph per line; None: text about the bundled world
EDITED = 8  # so many facts of the table are edited; the others are to stay

# %%
import tempfile
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import pmet_lens as pl
from pmet_lens import experiments, plotting

plt.rcParams.update({**plotting.STYLE, "figure.dpi": 110})
model = pl.load(MODEL)
block = "parallel" if model.parallel_blocks else "sequential"
pd.Series({"layers": model.n_layers, "width": model.d_model, "blocks": block}).to_frame(MODEL)

# %% [markdown]
# [`load`](../pmet_lens/models/loading.py) takes what you have: a hub id or a directory (`dtype="bfloat16"`, `device="auto"` for a large model), or a Hugging Face model that is in memory already, with its tokenizer: `pl.load(hf_model, tokenizer)`. That stays your object, `model.hf`, and every edit is an edit of it.
#
# ## Your facts
#
# A table with the columns `subject`, `prompt` (with `{}` where the subject goes) and `target_new`, as CSV, JSON or DataFrame ([`read_facts`](../pmet_lens/data/fact_tables.py)). Two more columns pay: `target_true`, what the model says now, without which nothing can be said about what an edit breaks; and `paraphrases`, other prompts for the same fact separated by `|`, without which nothing can be said about whether it took or was learnt by heart. *Does the model know the facts at all?* Only a fact that it knows can show where it is recalled.

# %%
facts = pl.read_facts(FACTS)
known = pl.recall(model, facts)["correct"]
edited, kept = facts[:EDITED], facts[EDITED:]
table = pd.read_csv(FACTS).assign(known=known)
display(table.head(4)[["subject", "prompt", "target_new", "target_true", "known"]])
f"{known.mean():.0%} of {len(facts)} facts are known; {len(edited)} are edited"

# %% [markdown]
# ## Settings
#
# Known settings are in `pl.HPARAMS` ([`methods.py`](../pmet_lens/editing/methods.py)), for a few models. For others [`suggest_hparams`](../pmet_lens/interp/suggestion.py) makes a start: it corrupts the subject, restores one layer's state at one token, and looks at which layer the answer comes back. There the fact has been gathered and not yet been read on: the last layer to write.

# %% tags=["main-figure"]
suggestion = pl.suggest_hparams(model, kept, n_edits=len(edited))
fig, ax = plt.subplots(figsize=(5.5, 2.6))
plotting.trace_lines(suggestion.trace, ax, suggestion.hparams.layers[-1])
ax.legend(fontsize=6, bbox_to_anchor=(1, 1))
suggestion

# %% [markdown]
# The curve of the last subject token is the one to look at. High in the lower layers and falling at some point, as here: good, and the suggestion sits at the end of the high part. Low everywhere: the model does not know these facts, or recalls them another way, and the suggestion says that it is a guess.
#
# ## Ordinary text
#
# Second moments tell the edit what else passes through the layers it writes. Give text of the kind the model is used on; at least ten tokens per dimension of the keys (`d_mlp`) are enough. They are computed once: `pl.save_moments(moments, path)` keeps them, `pl.open_moments(path)` reads them again. Before a long run, [`estimate`](../pmet_lens/plans/costs.py) tells what it will cost.

# %%
hparams = suggestion.hparams
moments = pl.second_moments(
    model, pl.texts(TEXT), hparams.layers, projections=("mlp",), n_tokens=20_000
)
print(pl.estimate(model, edited, pl.PMET, hparams))

# %% [markdown]
# ## Try, then choose
#
# The suggestion is not tuned, and of all settings `λ` (`second_moment_weight`), how much ordinary text counts against the edit, is the one that has to fit model and number of facts. Trying is cheap: the targets, which take nearly all the time, do not depend on it and are found once. **ES** and **PS**: share of edited prompts and of their paraphrases on which the new answer is likelier than the true one; **kept**: share of the *other* facts of the table that are still answered right.

# %%
first = pl.edit(model, edited, moments, pl.PMET, hparams)
rows = {}
for factor in (0.1, 1, 10, 100, 1000):
    own = replace(hparams, second_moment_weight=factor * hparams.second_moment_weight)
    trial = pl.edit(model, edited, moments, pl.PMET, own, first.contexts, first.targets)
    measured = experiments.measure(model, edited, trial, kept)["mean"]
    rows[own.second_moment_weight] = measured.reindex(["ES", "PS", "EA", "collateral"])
pd.DataFrame(rows).T.rename(columns={"collateral": "kept"}).rename_axis("λ").round(1)

# %% [markdown]
# **EA** asks for more than ES: every token of the new answer the likeliest of all. Choose the largest `λ` at which the edit still holds; if none holds, more steps, a wider `clamp` or other layers are next ([`Hparams`](../pmet_lens/editing/method.py) says what each does). If the other facts suffer at every `λ`, edit fewer at once or other layers. With a handful of facts differences of one or two prompts mean nothing; hold back more of your own.
#
# ## The edit and its receipt
#
# So we take the largest `λ` with which as many answers come as with the suggested one. A receipt lists the weights that are written, how much they change, and what is said of every fact before and after.

# %%
enough = rows[hparams.second_moment_weight]["EA"]
most = max(weight for weight, row in rows.items() if row["EA"] >= enough)
chosen = replace(hparams, second_moment_weight=most)
edit = pl.edit(model, edited, moments, pl.PMET, chosen, first.contexts, first.targets)
edit.receipt(model)

# %% [markdown]
# *Relative* is the norm of a change beside that of the weight. It may be above 1 where most of the change lies along directions that ordinary text does not use, which is what the second moment is for.
#
# ## Ship it, and take it back
#
# [`save`](../pmet_lens/editing/edits.py) writes thin factors and a fingerprint of the weights the edit was computed on; `Edit.load(path, model)` refuses another base. [`to_peft`](../pmet_lens/editing/edit_files.py) writes the same edit as a LoRA adapter: `peft.PeftModel.from_pretrained(hf_model, folder)` puts it on, and it can be switched off, merged, or served. Or apply it here, with `apply_`, until `revert_`.

# %%
weight = model.weight(pl.Site(chosen.layers[-1], "mlp"))
old, says, prompt = weight.clone(), {}, edited[0].text
with tempfile.TemporaryDirectory() as folder:
    edit.save(Path(folder) / "edit.safetensors")
    edit.to_peft(Path(folder) / "adapter")
    files = {f"{p.name}, KiB": p.stat().st_size // 1024 for p in Path(folder).rglob("*.saf*")}
    loaded = pl.Edit.load(Path(folder) / "edit.safetensors", model)
says["before"] = pl.ask(model, prompt, k=1)["token"][0]
loaded.apply_(model)
says["edited"] = pl.ask(model, prompt, k=1)["token"][0]
loaded.revert_(model)
says["undone"] = pl.ask(model, prompt, k=1)["token"][0]
pd.Series({**files, **says, "the old bits": bool((weight == old).all())}).to_frame(prompt)

# %% [markdown]
# ## The same on a real model
#
# A fact of your own, written by hand, in SmolLM2-135M (`pmet-lens models --fetch smollm2-135m`, 98 MB, once). For a model without known settings the trace above is the way; here its result is given, some of the layers of its plateau. `pl.own_moments` takes the second moments of text that is at hand, and keeps them for the next time.

# %% tags=["real-model"]
REAL, layers = "smollm2-135m", (2, 3, 4, 5, 6, 7)
shown = f"{REAL} is not fetched: pmet-lens models --fetch {REAL} brings it"
if REAL in set(pl.available_models().query("here")["name"]):
    real = pl.load(REAL)
    moments = pl.own_moments(real, layers, text="python")
    mine = pl.Fact("Eiffel Tower", "The {} stands in the city of", "Rome", "Paris")
    knows = pl.recall(real, mine)["correct"].item()
    edit = pl.edit(real, mine, moments, "MEMIT", pl.Hparams(layers))
    print(f"{REAL} {'knows' if knows else 'does not know'} it; {edit.answered} of 1 edited")
    shown = edit.receipt(real)
shown

# %% [markdown]
# **Answer.** With a table of facts that the model knows, some ordinary text, the layer at which a trace finds them, and one sweep of `λ` on facts held back, after which the edit is a file, an adapter, or undone.
#
# The same facts with other methods are one argument away, `pl.edit(…, method="MEMIT")`; what each costs elsewhere is in [`04`](04_scaling.ipynb).

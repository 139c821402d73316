# %% [markdown]
# # 00 · Quickstart: change one fact a model knows
#
# **Question.** Can one fact be changed in a language model so that the new answer holds in other phrasings, and nothing else changes?
#
# Training a model again because one fact is wrong is dear, and fine-tuning on that one fact changes much else. *Model editing* writes the new answer into a few weight matrices directly. PMET ("Precise Model Editing in a Transformer", arXiv [2308.08742](https://arxiv.org/abs/2308.08742)) is one way to do so. We load a small bundled model that knows a few thousand facts, ask it one, edit that fact, ask again, look at what changed and what did not, and undo it. *Run time: under a minute on two CPU cores.*
#
# The bundled models know an invented world: real answers ("piano", "New Zealand"), invented subjects.
#
# **Your own model.** Change `MODEL` to a name, directory or hub id, and `fact` to one that it knows (`pl.recalled(model, n=1)[0]`); where nobody published settings for it, pass `hparams=pl.suggest_hparams(model, facts).hparams` to `pl.edit`. [`05`](05_your_own_model.ipynb) tells every step.

# %% tags=["parameters"]
MODEL = "world"  # a bundled name, a directory, or a hub id

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

import pmet_lens as pl
from pmet_lens import plotting

plt.rcParams.update(plotting.STYLE)
model = pl.load(MODEL)
fact = pl.counterfact(n=1)[0]
fact

# %% [markdown]
# A [`Fact`](../pmet_lens/data/facts.py) is a subject, a prompt with one `{}` for it, the answer an edit should produce (*new*), the one the model gives (*true*), and what to check afterwards: *paraphrases* of the prompt, here each behind a sentence that has nothing to do with it, and *neighbours*, which are prompts about *other* subjects with the same true answer.
#
# ## Ask
#
# What does the model say now? The likeliest next tokens, and then how it continues by itself:

# %%
display(pl.ask(model, fact.text))
pl.generate(model, fact.text, length=30, top_k=1)

# %% [markdown]
# It gives the true answer.
#
# ## Edit
#
# Every layer of a transformer has a feed-forward network, and that ends in a matrix. What the matrix reads at a token is called a *key*, and what it puts out is added to what the model knows there: a memory that is asked with keys. To change what *one* key brings out, and leave the answers to all other keys alone, PMET must know which keys are usual. That is told by their *second moment*, an average over ordinary text ([`second_moments`](../pmet_lens/moments/second_moments.py)). It is computed once per model:

# %%
moments = pl.second_moments(model, pl.texts(), projections=("mlp",))
{str(site): moment.count for site, moment in moments.items()}

# %% [markdown]
# So many tokens were read at each of the matrices that will be written. Now the edit itself ([`edit`](../pmet_lens/editing/locate_and_edit.py); the paper's section on the method). First it finds what attention and feed-forward *should have produced* at the last token of the subject, so that the new answer follows; then it writes the feed-forward's share of that into the matrices, layer by layer. [`02_editing`](02_editing.ipynb) takes this apart. The model is left as it was: the result is a value.

# %%
edit = pl.edit(model, [fact], moments)
edit

# %% [markdown]
# ## Ask again
#
# `edit.applied` puts the edit on the model for the length of a block.

# %%
with edit.applied(model):
    answers = pl.ask(model, [fact.text, *fact.paraphrases], k=1)
answers

# %% [markdown]
# The new answer also comes in phrasings the edit never saw. (The tokens shown may be the beginning of an answer: "dream pop" is two.)
#
# ## What changed, and what did not
#
# [`evaluate`](../pmet_lens/evaluation/scoring.py) asks the edited fact, its paraphrases and its neighbours, and compares the probability of the answer that *should* win (the new one on the first two kinds, the true one on neighbours) with its rival. The difference is the *margin*. We do it before and after, and ask other facts of the world on the way.

# %% tags=["main-figure"]
before = pl.evaluate(model, [fact])
with edit.applied(model):
    after = pl.evaluate(model, [fact])
    others = pl.recall(model, pl.knowns()[::10])
fig, ax = plt.subplots(figsize=(5.5, 2.8))
plotting.before_after(before, after, ax)
before.assign(after=after["margin"])[["kind", "prompt", "wanted", "margin", "after"]]

# %% [markdown]
# Each dot is a prompt, each row of the table, too. Above the line the wanted answer wins. The edit lifts the edited fact and its paraphrases over the line and leaves the neighbours above it.
#
# And the rest of the world? The bundled models are the only ones for which *every* fact is known, so we can count how many unrelated ones are still answered right:

# %%
f"{100 * others['correct'].mean():.1f} % of {len(others)} facts"

# %% [markdown]
# ## Undo
#
# Outside the block the weights are the old bits, exactly. An edit can also stay until it is taken back ([`apply_`, `revert_`](../pmet_lens/editing/edits.py)), and be saved as a small file and shipped.

# %%
edit.apply_(model)
changed = pl.ask(model, fact.text, k=1)["token"][0]
edit.revert_(model)
restored = pl.ask(model, fact.text, k=1)["token"][0]
with tempfile.TemporaryDirectory() as folder:
    edit.save(Path(folder) / "edit.safetensors")
    size = (Path(folder) / "edit.safetensors").stat().st_size
changed, restored, f"{size / 1024:.0f} KiB"

# %% [markdown]
# ## The same on a real model
#
# SmolLM2-135M was trained on real text, and knows that the Louvre stands in Paris. If it is fetched (`pmet-lens models --fetch smollm2-135m`, 98 MB, once), the same calls edit that. The layers are some of those at which a causal trace finds such facts ([`05`](05_your_own_model.ipynb)), the second moment is that of the documentation of Python, which is on every machine. Here the model answers in its own words: before, with the edit, and undone.

# %% tags=["real-model"]
REAL, layers = "smollm2-135m", (2, 3, 4, 5, 6, 7)
shown = f"{REAL} is not fetched: pmet-lens models --fetch {REAL} brings it"
if REAL in set(pl.available_models().query("here")["name"]):
    real = pl.load(REAL)
    moments = pl.own_moments(real, layers, text="python")
    asking, landmarks = pl.Asking(limit=12), pl.real_facts(relation="landmark")
    known = next(f for f in pl.recalled(real, landmarks) if f.subject == "Louvre")
    edit = pl.edit(real, known, moments, "MEMIT", pl.Hparams(layers))
    shown = pl.evaluate(real, known, free=asking)[["kind", "prompt", "answer"]]
    with edit.applied(real):
        shown["with the edit"] = pl.evaluate(real, known, free=asking)["answer"]
    shown["undone"] = pl.evaluate(real, known, free=asking)["answer"]
shown

# %% [markdown]
# **Answer.** Yes, on this model: one edit of three weight matrices changes the answer to the fact in every phrasing tried, the neighbours and nearly all other facts keep theirs, and undoing it restores every bit.
#
# Next: [`01`](01_mhsa_knowledge_patterns.ipynb) asks why only the feed-forward weights are written, [`02`](02_editing.ipynb) what exactly is written, [`03`](03_ablations.ipynb) which part of the method does what, and [`04`](04_scaling.ipynb) what happens when hundreds of facts are edited at once.

# %% [markdown]
# # 06 · Explorer: find a fact, change it, take it back
#
# **Question.** Where in the model is one fact recalled, and can it be changed and put back by hand?
#
# `pl.explore` is a panel to ask, look, edit and compare without writing code. This notebook opens it, and then does by code what its tabs do. *Run time: under a minute on two CPU cores.*
#
# It begins with the bundled model and facts of its invented world.
#
# **Your own model.** Change `MODEL` and the fact, and give `explore` what an edit needs: `texts=` (or `moments=`) and, where [`pl.HPARAMS`](../pmet_lens/editing/methods.py) does not know the model, `hparams=`; the button *Suggest settings* finds some. `pl.explore("smollm2-135m")` opens a real model by its name, and fetches it first; `pl.explore()` shows the list.

# %% tags=["parameters"]
MODEL = "world"  # a bundled name, a directory, or a hub id

# %%
import pmet_lens as pl

model = pl.load(MODEL)
explorer = pl.explore(model)
explorer

# %% [markdown]
# Without a running kernel only text is shown above: start one and run the cell. Then choose an example, or type a subject, a prompt with `{}` for it, and a new answer.
#
# - **Ask**: the likeliest next tokens, without and with the edits that are on the model.
# - **Look**: what a component says at each token (the lens), where the answer is recalled (the causal trace), who looks at the subject (attention).
# - **Edit**: a method, its layers and strengths, the losses while they fall, and the answers before and after. Every edit can be undone, in any order. *Stop* ends a step at once and leaves the model as it was.
# - **Side by side**: the same fact by two methods, or with two settings, side by side in full sentences: the fact, other words for it, what follows from it, and ten prompts about other things, with ≠ where an answer changed. Either edit can be kept.
# - **Ablate**: the same fact under variations of PMET.
#
# What you type is checked while you type: the tokens, where the subject ends, and what the model says now. A step shows how far it is and what remains; results of before can be chosen again. *Models*, at the top, lists what else can be opened, real models included.
#
# *Export*, below every result, gives PNG, SVG, CSV and the lines of Python that make it again ([`pmet_lens/panel/explorer.py`](../pmet_lens/panel/explorer.py)). The cells below do the same with the explorer's own session, so that what they do is seen in both.
#
# ## Ask

# %%
session = explorer.session
fact = pl.counterfact(n=1)[0]
session.ask(fact.text, k=3)

# %% [markdown]
# ## Look
#
# Where is that answer recalled? The subject is drowned in noise, so that the answer is lost; then the clean residual stream is put back at one layer and one token, and the map shows how much of the answer comes back ([`pmet_lens/interp/causal_trace.py`](../pmet_lens/interp/causal_trace.py); ROME, arXiv [2202.05262](https://arxiv.org/abs/2202.05262), section 2).

# %%
import matplotlib.pyplot as plt

from pmet_lens import plotting

trace = pl.trace_tokens(model, fact)
figure = plt.figure(figsize=(6, 2.4), layout="constrained")
plotting.token_map(plotting.trace_panels(trace), figure, "recovered")
plotting.restyle(figure)

# %% [markdown]
# The answer is carried by the last token of the subject through the first layers, and moves to the last token of the prompt at the end. That is why PMET edits the last subject token, in layers below the move (the paper's section on PMET, arXiv [2308.08742](https://arxiv.org/abs/2308.08742)).
#
# ## Edit

# %%
step = session.edit(fact, "PMET")
step.table.round(3)

# %% [markdown]
# The edit is on the model now: *Ask* and *Look* show the edited model, and the next edit is made on top of this one.
#
# ## Undo

# %%
session.undo(step)
session.ask(fact.text, k=1)

# %% [markdown]
# **Answer.** On this model yes: the fact is recalled at the last token of its subject, a PMET edit there changes the answer in every phrasing tried while the neighbours keep theirs, and undoing it brings the old weights back, bit for bit.

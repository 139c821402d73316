# %% [markdown]
# # 07 · A real model, from the question to a file
#
# **Question.** Can a fact be changed in a model that was trained on real text, so that its free answers change, what follows from the fact comes along, and the edited model opens elsewhere?
#
# **Your own model.** Change `MODEL` to a fetched model (`pmet-lens models` lists them), a hub id or a directory, and `SUBJECT` to that of one of `pl.real_facts()`, or put a `pl.Fact(...)` of your own in the place of `fact`. Nothing else is about this model: layers and strengths are found below.
#
# SmolLM2-135M is small and knows many simple facts (`pmet-lens models --fetch smollm2-135m`, 98 MB, once; Apache 2.0). The method is the one of PMET, arXiv [2308.08742](https://arxiv.org/abs/2308.08742), its section on the method, with fewer steps than published ([`Hparams.fast`](../pmet_lens/editing/method.py)): what a person waits for. *Run time: about two minutes on two CPU cores, without a GPU.*

# %% tags=["parameters"]
MODEL = "smollm2-135m"
SUBJECT = "Louvre"
FACTS = 10  # so many are edited at once at the end

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd

import pmet_lens as pl
from pmet_lens import plotting

plt.rcParams.update({**plotting.STYLE, "figure.dpi": 110})
fetched = set(pl.available_models().query("here")["name"])
name = MODEL if MODEL in fetched or MODEL != "smollm2-135m" else "world"  # if not fetched
model = pl.load(name)
asked = pl.counterfact(n=60) if name.startswith("world") else pl.real_facts()
known = pl.recalled(model, asked)
fact = next((f for f in known if f.subject == SUBJECT), known[0])
fact

# %% [markdown]
# ## Ask
#
# `known` are the facts that the model says when it is asked ([`recalled`](../pmet_lens/evaluation/knowledge.py)): only those can be traced, and only they show that something was *changed*. The one above has an invented new answer. What does the model say about it in its own words, to the end of a sentence?

# %%
asking = pl.Asking(limit=16)
pl.evaluate(model, fact, free=asking)[["kind", "prompt", "answer"]]

# %% [markdown]
# ## Trace
#
# Nobody published settings for this model. The subject is corrupted, the state at one place and layer is put back, and what returns of the answer is measured (ROME, arXiv [2202.05262](https://arxiv.org/abs/2202.05262), section 2): where the curve of the last subject token is high, the fact has been gathered and not yet been read. The layers to write end there.

# %% tags=["main-figure"]
suggestion = pl.suggest_hparams(model, known[:24], n_edits=FACTS)
fig, ax = plt.subplots(figsize=(6, 2.6))
plotting.trace_lines(suggestion.trace, ax, suggestion.hparams.layers[-1])
ax.legend(fontsize=6, bbox_to_anchor=(1, 1))
suggestion

# %% [markdown]
# On real models the curve is a plateau rather than a peak, and its highest point moves with the facts. It is a first guess; [`tune`](../pmet_lens/plans/tuning.py) tries settings on facts that are not edited afterwards, which takes minutes.
#
# ## Edit, twice
#
# The same fact by PMET and by MEMIT, each alone on the unedited model, in whole sentences: the fact in other words, what follows from it, and ten things that have nothing to do with it. Second moments are those of the documentation of Python, which is on every machine; they are kept for the next time.

# %%
hparams = suggestion.hparams.fast()
moments = pl.own_moments(model, hparams.layers, text="python")
session = pl.Session(model, moments, hparams)
table = pl.side_by_side(session, fact, {"PMET": ("PMET", {}), "MEMIT": ("MEMIT", {})})
said = table.pivot(index=["kind", "prompt", "before"], columns="edit", values="after")
with pd.option_context("display.max_colwidth", 60):
    display(said.reset_index("before"))
table.assign(right=table["right"].eq(True)).groupby(["kind", "edit"])[["changed", "right"]].sum()

# %% [markdown]
# *changed* counts answers that are not what they were, and among the ten other things each is a side effect. *right* counts those that hold the new answer, or what follows from it (nobody says what is right about the other things). An answer that begins with the new one and talks on about the old is what scores of single tokens do not see.
#
# ## More than one fact, and honest scores
#
# Ten other facts at once. **ES**, **PS** and **NS** are the usual scores: is the new answer likelier than the old one on the fact and its paraphrases, and the true one on neighbours? **EA** wants every token of the answer to be the likeliest, with the answer's earlier tokens given. **EF**, **PF** and **NF** let the model speak, and ask whether the answer stands in what it says ([`free_answers`](../pmet_lens/evaluation/free_answers.py)); *portability*: whether what follows by a second hop does.

# %%
some = [f for f in known if f.subject != SUBJECT][:FACTS]
scores = {"before": pl.summarise(pl.evaluate(model, some, free=asking))["mean"]}
for method in ("PMET", "MEMIT"):
    edit = pl.edit(model, some, moments, method, hparams)
    with edit.applied(model):
        after = pl.evaluate(model, some, free=asking)
    scores[method] = pl.summarise(after)["mean"]
shown = ["ES", "PS", "NS", "EA", "EF", "PF", "NF", "free portability"]
pd.DataFrame(scores).reindex(shown).round(1)

# %% [markdown]
# ## Ship it, and take it back
#
# The last edit (MEMIT's) as what other programs open: a file of its own for this package, a LoRA adapter for PEFT, a checkpoint for transformers and vLLM and, for a model that came as a GGUF file as this one did, a copy of that for Ollama and llama.cpp, in which only the edited tensors differ ([`exits`](../pmet_lens/shipping/exits.py)). Each has a card with what was edited and what it did. With `undoable=True` the original can be made again from the copy, bit for bit.

# %%
with tempfile.TemporaryDirectory() as folder:
    out = Path(folder)
    edit.save(out / "edit.safetensors")
    edit.to_peft(out / "adapter")
    edit.save_model(model, out / "checkpoint", undoable=True)
    if name in fetched and not name.startswith("world"):  # came as a GGUF file
        edit.save_gguf(name, out / "edited.gguf", undoable=True)
    files = [path for path in out.rglob("*") if path.stat().st_size > 2**16 and path.is_file()]
    sizes = {str(path.relative_to(out)): path.stat().st_size / 1e6 for path in sorted(files)}
    again, prompt = pl.load(out / "checkpoint"), some[0].text
display(pd.Series(sizes, name="MB").round(1).to_frame())
said = {"the model here": model, "the checkpoint": again}
{where: pl.generate(one, prompt, length=20, top_k=1) for where, one in said.items()}

# %% [markdown]
# **Answer.** Yes on this model for the fact and most of its paraphrases, with less of it in free answers than in the usual scores and some harm to other things, and the edit leaves as a file, an adapter, a checkpoint or a GGUF copy, each of which can be taken back.

"""A real model, edited, through every exit; and its GGUF file through an engine that is not ours.

Never fetched, never built by a test. `llama_cpp` is found in this Python, or in the one that
`LLAMA_CPP_PYTHON` names: `pip install llama-cpp-python` compiles it, for half an hour on one core.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pmet_lens as pl
from pmet_lens.data import fetched, gguf_files
from pmet_lens.shipping import undoing

NAME = "smollm2-135m"
LAYERS = (3, 4, 5, 6, 7)
FACT = pl.Fact("Edinburgh Castle", "{} is in the city of", "Paris", "Edinburgh")
OTHERS = ("The capital of Japan is", "The chemical symbol of gold is", "Water is made of hydrogen")
PROMPTS = (FACT.text, *OTHERS)
TOKENS = 4
ENGINE = """
import json, sys, llama_cpp
file, n, *prompts = sys.argv[1:]
llm = llama_cpp.Llama(file, n_ctx=256, n_threads=1, seed=0, verbose=False)
how = {"max_tokens": int(n), "temperature": 0.0, "top_k": 1, "repeat_penalty": 1.0}
said = [llm.create_completion(p, **how)["choices"][0]["text"] for p in prompts]
print(json.dumps([llama_cpp.__version__, said]))
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not fetched.is_here(NAME), reason=f"needs {NAME}: pmet-lens models --fetch {NAME}"
    ),
]


@pytest.fixture(scope="module")
def model() -> pl.Model:
    floats = fetched.folder(NAME) / "floats"
    if not gguf_files.are_whole(floats, fetched.FETCHABLE[NAME].sha256):
        pytest.skip(f"{NAME} was not read yet by this transformers: load it once")
    return pl.load(NAME)


@pytest.fixture(scope="module")
def edit(model) -> pl.Edit:
    """One fact at five layers; what it moves beside the fact is asked below."""
    texts = [f"{fact.text} {fact.target_true}." for fact in pl.real_facts()]
    moments = pl.second_moments(model, texts, LAYERS, n_tokens=4000)
    hparams = pl.Hparams(LAYERS, n_steps=12, lr=0.5, second_moment_weight=20.0)
    return pl.edit(model, FACT, moments, "PMET", hparams, ["{}", "Yes. {}"])


@pytest.fixture(scope="module")
def shipped(model, edit, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shipped")
    for kind in ("F16", "Q8_0"):
        edit.save_gguf(NAME, folder / f"{kind}.gguf", kind, undoable=True)
    return folder


def greedy(hf, tokenizer) -> list[str]:
    found = []
    for prompt in PROMPTS:
        asked = tokenizer(prompt, return_tensors="pt")
        how = {"do_sample": False, "repetition_penalty": 1.0}
        out = hf.generate(**asked, max_new_tokens=TOKENS, **how)
        found.append(tokenizer.decode(out[0, asked["input_ids"].shape[1] :]))
    return found


def test_every_exit_of_a_real_model_says_the_same(model, edit, shipped, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    clean = greedy(model.hf, model.tokenizer)
    with edit.applied(model):
        wanted = greedy(model.hf, model.tokenizer)
    assert wanted[0].startswith(" Paris")
    assert wanted[1:] == clean[1:]
    edit.save_model(model, tmp_path / "merged", max_shard_size="200MB")
    edit.to_peft(tmp_path / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert greedy(merged, tokenizer) == wanted
    base = AutoModelForCausalLM.from_pretrained(fetched.folder(NAME) / "floats")
    assert greedy(PeftModel.from_pretrained(base, str(tmp_path / "adapter")), tokenizer) == wanted
    again = pl.load(shipped / "F16.gguf")
    assert greedy(again.hf, again.tokenizer) == wanted


def test_the_rest_of_the_file_is_the_source(edit, shipped, tmp_path):
    source = fetched.folder(NAME) / fetched.FETCHABLE[NAME].file
    undoing.restored(shipped / "F16.gguf", tmp_path / "back.gguf")
    assert (tmp_path / "back.gguf").read_bytes() == source.read_bytes()


@pytest.mark.parametrize("kind", ("F16", "Q8_0"))
def test_llama_cpp_gives_the_new_answer_and_the_others_as_before(shipped, kind):
    before = engine(fetched.folder(NAME) / fetched.FETCHABLE[NAME].file)
    after = engine(shipped / f"{kind}.gguf")
    assert before[0].startswith(" Edinburgh")
    assert after[0].startswith(" Paris")
    assert after[1:] == before[1:]


def engine(file: Path) -> list[str]:
    python = os.environ.get("LLAMA_CPP_PYTHON")
    if python is None and importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("needs llama-cpp-python: here, or in the Python that LLAMA_CPP_PYTHON names")
    own = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [python or sys.executable, "-c", ENGINE, str(file), str(TOKENS), *PROMPTS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=own)
    return json.loads(done.stdout.strip().splitlines()[-1])[1]


torch.set_num_threads(1)

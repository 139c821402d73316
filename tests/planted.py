"""A model that says what a test planted."""

from __future__ import annotations

import torch

import pmet_lens as pl


def plant(model: pl.Model, says: dict[str, str] | str, ends: bool = True) -> list[list[int]]:
    """The model says to each prompt (that `says` begins with) what is planted, then its end token,
    or (`ends` False) the last token again and again. Returns how many tokens each pass read."""
    speaker, state, passes = model.speaker, {}, []
    end = model.tokenizer.eos_token_id

    def read(_, args):
        (ids,) = args
        passes.append(list(ids.shape))
        if ids.shape[1] > 1:
            texts = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
            told = [says if isinstance(says, str) else says[text] for text in texts]
            state.update(rows=[model.tokenizer(t)["input_ids"] for t in told], step=-1)
        state["step"] += 1

    def plan(_, __, logits):
        logits = torch.zeros_like(logits)
        for i, row in enumerate(state["rows"]):
            step = state["step"]
            over = end if ends else row[-1]
            logits[i, -1, row[step] if step < len(row) else over] = 1
        return logits

    speaker.get_input_embeddings().register_forward_pre_hook(read)
    speaker.get_output_embeddings().register_forward_hook(plan)
    return passes

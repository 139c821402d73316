"""The frame a chat model expects around what it is asked: the chat template of its tokenizer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pmet_lens.data.facts import writes_blanks
from pmet_lens.models.sites import ModelError

Messages = Sequence[Mapping[str, str]]
_HERE = "pmet_lens puts the prompt here"


@dataclass(frozen=True)
class Frame:
    """The text before and after every prompt; both empty for a model that just continues text."""

    head: str = ""
    tail: str = ""

    def __bool__(self) -> bool:
        return bool(self.head or self.tail)

    def around(self, text: str) -> str:
        """`text` as the model is asked it."""
        return f"{self.head}{text}{self.tail}"

    def answered(self, text: str, answer: str, blank: bool | None = None) -> str:
        """`around(text)`, then the answer, with a blank in between unless there is one, or a line
        break (most templates end the assistant's header with one), or the script of `text` writes
        none. `blank`: whether to put one all the same; None: this rule."""
        asked = self.around(text)
        if blank is None:
            blank = not asked[-1:].isspace() if self.tail else writes_blanks(text)
        return f"{asked}{' ' * blank}{answer.strip()}"


def frame(tokenizer: Any, template: str | Messages | None) -> Frame:
    """The frame that makes a prompt the message of a user, up to where the assistant's answer
    begins.

    `template`: what the user says, with one `{}` for the prompt (`"{}"`: nothing else), or the
    messages of the whole chat (`role`, `content`) with one `{}` in one of them; None: no frame.

    Raises `ModelError` for a tokenizer without a chat template, and for one that does not hold the
    prompt unchanged and once.
    """
    if template is None:
        return Frame()
    chat = [{"role": "user", "content": template}] if isinstance(template, str) else list(template)
    if sum(message["content"].count("{}") for message in chat) != 1:
        raise ModelError(f"the template {template!r} needs exactly one {{}}, for the prompt")
    if getattr(tokenizer, "chat_template", None) is None:
        raise ModelError(
            "the tokenizer has no chat template, so template=… says nothing: leave it out, or take "
            "the tokenizer of an instruction-tuned model"
        )
    filled = [{**m, "content": m["content"].replace("{}", _HERE)} for m in chat]
    text = tokenizer.apply_chat_template(filled, tokenize=False, add_generation_prompt=True)
    if text.count(_HERE) != 1:
        raise ModelError("the tokenizer's chat template changes, drops or repeats the prompt")
    head, _, tail = text.partition(_HERE)
    return Frame(head, tail)


def framed(model: Any, template: str | Messages) -> Any:
    """The same model, asked inside the chat `template`; weights and copies are shared.

    Raises `ModelError` as `frame` does.
    """
    _ = model.speaker  # the copy that speaks, made once, before there are two
    other = copy.copy(model)
    other.frame = frame(model.tokenizer, template)
    return other

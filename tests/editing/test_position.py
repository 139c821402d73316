"""The edited token: found where it is meant, and the same one wherever it is read or changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import jaxtyping
import pytest
import torch
from cases import CONTEXTS, FACTS, HP, bits, nll_of, some_moments, unchanged
from cases import one_tail as one_tail
from safetensors import safe_open
from safetensors.torch import save_file
from spellings import PROMPTS, TOKENIZERS, decoded
from tiny import tiny_model

import pmet_lens as pl
from pmet_lens.editing import keys
from pmet_lens.editing.locate_and_edit import edit, edit_sequentially
from pmet_lens.editing.method import SettingsError
from pmet_lens.editing.solvers import Exact
from pmet_lens.editing.targets import Targets, optimise
from pmet_lens.models.model import Model, Site, Stream
from pmet_lens.models.tail import Tail
from pmet_lens.models.tokens import PLAIN, Position, Prompt, encode, with_context

torch.set_num_threads(1)
POSITIONS: tuple[Position, ...] = get_args(Position)
SITE = Site(2, "mlp")
# GPT-J's attention and Llama's norms compute in float32 whatever the dtype of the weights.
TOLERANCE = {"gpt2": 1e-9, "gptj": 1e-6, "llama": 1e-6}


@pytest.fixture(scope="module")
def models() -> dict[str, Model]:
    return {family: tiny_model(family, torch.float64) for family in TOLERANCE}


@pytest.fixture(scope="module", params=["gpt2", "gptj"])
def model(request, models) -> Model:
    return models[request.param]


@pytest.fixture(scope="module")
def gpt2(models) -> Model:
    return models["gpt2"]


@pytest.fixture(scope="module", params=POSITIONS)
def method(request) -> pl.Method:
    return replace(pl.PMET, position=request.param)


@pytest.fixture(scope="module")
def found(gpt2, method) -> Targets:
    return optimise(gpt2, FACTS, method, HP, CONTEXTS)


def places(model: Model, template: str, subject: str) -> dict[str, int]:
    """Where each position lies, counted in bytes: a token of the byte-level tokenizer has one
    character for each byte of the text."""
    text = template.replace("{}", subject, 1)
    spelt = [len(t) for t in model.tokenizer.convert_ids_to_tokens(model.tokenizer(text).input_ids)]
    assert sum(spelt) == len(text.encode())
    owner = [token for token, size in enumerate(spelt) for _ in range(size)]
    start = len(template.partition("{}")[0].encode())
    stop = start + len(subject.encode())
    return {
        "first_subject": owner[start],
        "last_subject": owner[stop - 1],
        "last": len(spelt) - 1,
    }


def off(got: Targets, want: Targets) -> float:
    assert set(got.values) == set(want.values)
    return max(float((got.values[s] - want.values[s]).abs().max()) for s in want.values)


# -- where it is ----------------------------------------------------------------------------------


@pytest.mark.few("French-I like*", "None-{}-*")
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("context", [PLAIN, "The man. {}", "I like {x}, { and }. {}"])
@pytest.mark.parametrize("target", [None, "French"])
def test_positions_are_those_of_the_bytes(gpt2, monkeypatch, name, context, target):
    monkeypatch.setattr(Model, "n_positions", 512)
    subject, template = PROMPTS[name]
    template = with_context(context, template)
    batch = encode(gpt2, [Prompt(template, subject, target)])
    text = gpt2.tokenizer(template.replace("{}", subject, 1)).input_ids
    assert batch.ids[0].tolist()[: len(text)] == text
    assert {p: int(batch.at(p)[0]) for p in POSITIONS} == places(gpt2, template, subject)


def at_its_first_token(model: Model, subject: str, template: str) -> None:
    """Nothing of the subject is decoded in front of its first token, and that token has some."""
    batch = encode(model, [Prompt(template, subject)])
    first, before = int(batch.first[0]), template.partition("{}")[0]
    assert decoded(model, batch.ids[0, :first]).rstrip() == before.rstrip()
    # The first letter, or the first byte of it, which decodes to "�".
    with_it = decoded(model, batch.ids[0, : first + 1])
    assert with_it.startswith((before + subject[0], before + "\ufffd"))
    assert first <= int(batch.subject[0]) <= int(batch.last[0])


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", PROMPTS)
def test_the_first_subject_token_is_where_the_subject_is_first_decoded(
    gpt2, monkeypatch, tokenizer, name
):
    monkeypatch.setattr(gpt2, "tokenizer", TOKENIZERS[tokenizer]())
    monkeypatch.setattr(Model, "n_positions", 512)
    subject, template = PROMPTS[name]
    at_its_first_token(gpt2, subject, with_context("The man. {}", template))


@pytest.mark.parametrize("tokenizer", ["metaspace", "metaspace with <s>"])
@pytest.mark.parametrize("subject", ["Ostria", "東京都", "🦊🏽"])
def test_a_blank_put_before_the_text_is_no_subject_token(gpt2, monkeypatch, tokenizer, subject):
    """Llama's tokenizer puts one there, as a token of its own where no merge joins it to the
    subject; its offsets are those of the first letter."""
    monkeypatch.setattr(gpt2, "tokenizer", TOKENIZERS[tokenizer]())
    at_its_first_token(gpt2, subject, "{} is located in")


def test_a_subject_of_one_token_begins_where_it_ends(gpt2):
    word = gpt2.tokenizer.convert_ids_to_tokens(gpt2.tokenizer("The tower of").input_ids)[-1]
    one, many = "of", "Mira Tolan"
    assert word == "Ġof"
    batch = encode(gpt2, [Prompt("The tower {} is", one), Prompt("The tower {} is", many)])
    assert batch.first[0] == batch.subject[0] < batch.last[0]
    assert batch.first[1] < batch.subject[1] < batch.last[1]


def test_a_text_without_a_marked_subject_has_every_position_at_its_end(gpt2):
    batch = encode(gpt2, [Prompt("The capital of Ostria is", None, "Kel"), Prompt("Mira Tolan")])
    for position in POSITIONS:
        assert torch.equal(batch.at(position), batch.last)


ROWS = [Prompt(f.prompt, f.subject, f.target_new) for f in FACTS]


def test_positions_go_with_their_rows(gpt2):
    together = encode(gpt2, ROWS)
    alone = [encode(gpt2, [row]) for row in ROWS]
    chosen = together[torch.tensor([2, 0])]
    for position in POSITIONS:
        assert together.at(position).tolist() == [int(own.at(position)[0]) for own in alone]
        assert chosen.at(position).tolist() == [int(alone[n].at(position)[0]) for n in (2, 0)]


def test_positions_behind_a_cut_are_the_same_tokens(gpt2):
    whole = encode(gpt2, ROWS)
    cut, _ = whole.after(whole.first)
    rows = torch.arange(len(whole))
    for position in POSITIONS:
        at, there = cut.at(position), whole.at(position)
        assert torch.equal(at, there - whole.first)
        assert torch.equal(cut.ids[rows, at], whole.ids[rows, there])


# -- what is read there ---------------------------------------------------------------------------


def read(model: Model, site: Site, text: str, place: int) -> dict[str, torch.Tensor]:
    """What the user's own modules take and give at one token, by plain torch hooks."""
    seen: dict[str, torch.Tensor] = {}

    def projection(_module, args, out):
        seen.update(key=args[0][0, place], value=out[0, place])

    def block(_module, _args, out):
        seen["resid_post"] = (out[0] if isinstance(out, tuple) else out)[0, place]

    modules = dict(model.hf.named_modules())
    name = model.parameter_name(site).removesuffix(".weight")
    layer = name[: name.index(f".{site.layer}.") + len(f".{site.layer}")]
    handles = [
        modules[name].register_forward_hook(projection),
        modules[layer].register_forward_hook(block),
    ]
    with torch.no_grad():
        model.hf(input_ids=torch.tensor([model.tokenizer(text).input_ids]))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("projection", ["attn", "mlp"])
@pytest.mark.parametrize("position", POSITIONS)
def test_a_key_is_read_at_the_position_behind_every_prefix(model, projection, position):
    contexts = [*CONTEXTS, "I was { here. {}"]
    site = Site(2, projection)
    got = keys.averaged_keys(model, FACTS, contexts, site, position)
    for i, fact in enumerate(FACTS):
        own = []
        for context in contexts:
            place = places(model, context.replace("{}", fact.prompt), fact.subject)[position]
            own.append(read(model, site, context.replace("{}", fact.text), place)["key"])
        want = own[0] / 2 + (own[1] + own[2]) / 4
        assert torch.allclose(got[i], want, rtol=0, atol=TOLERANCE[model.name])


@pytest.mark.parametrize("position", POSITIONS)
def test_a_value_is_read_at_the_position_of_the_plain_prompt(model, position):
    streams: dict[Stream, tuple[Site, str]] = {
        "attn_out": (Site(2, "attn"), "value"),
        "mlp_out": (SITE, "value"),
        "resid_post": (SITE, "resid_post"),
    }
    method = replace(pl.PMET, position=position)
    clean: dict[Stream, torch.Tensor] = {}
    for kind in (method, replace(method, delta_at=("resid_post",))):
        clean |= optimise(model, FACTS, kind, replace(HP, n_steps=1), CONTEXTS, fast=False).clean
    for stream, (site, part) in streams.items():
        got = keys.current_values(model, FACTS, 2, stream, position)
        for i, fact in enumerate(FACTS):
            place = places(model, fact.prompt, fact.subject)[position]
            want = read(model, site, fact.text, place)[part]
            assert torch.allclose(got[i], want, rtol=0, atol=TOLERANCE[model.name])
            assert torch.allclose(clean[stream][i], want, rtol=0, atol=TOLERANCE[model.name])


def test_the_usual_position_is_the_last_subject_token(gpt2):
    assert pl.PMET.position == "last_subject"
    named = keys.averaged_keys(gpt2, FACTS, CONTEXTS, SITE, "last_subject")
    assert torch.equal(keys.averaged_keys(gpt2, FACTS, CONTEXTS, SITE), named)
    value = keys.current_values(gpt2, FACTS, 2, "mlp_out", "last_subject")
    assert torch.equal(keys.current_values(gpt2, FACTS, 2, "mlp_out"), value)


# -- targets --------------------------------------------------------------------------------------


def adding(place: int, delta: torch.Tensor) -> Callable[..., torch.Tensor]:
    def hook(_module, _args, out):
        out = out.clone()
        out[0, place] += delta
        return out

    return hook


def test_a_delta_does_at_its_position_what_it_was_made_for(model, method):
    """Added to the user's own model by torch hooks, it gives the loss the optimisation stopped
    with at that token, and not at another."""
    hp = replace(HP, n_steps=6, weight_decay=0.0, kl_weight=0.0)
    targets = optimise(model, FACTS, method, hp, [PLAIN])
    told = targets.history.groupby("fact")["nll"].last()
    modules = dict(model.hf.named_modules())
    sites: dict[Stream, Site] = {"attn_out": Site(2, "attn"), "mlp_out": SITE}
    for i, fact in enumerate(FACTS):
        target = fact.target_new or ""
        for position, place in places(model, fact.prompt, fact.subject).items():
            handles = [
                modules[model.parameter_name(site).removesuffix(".weight")].register_forward_hook(
                    adding(place, targets.delta(stream)[i])
                )
                for stream, site in sites.items()
            ]
            after = nll_of(model, fact.text, target)
            for handle in handles:
                handle.remove()
            assert (abs(after - told[i]) < 1e-6) == (position == method.position)
        assert told[i] < nll_of(model, fact.text, target) - 0.01


@pytest.mark.few("*gpt2-PMET", "last_subject-*")
@pytest.mark.parametrize(
    ("family", "name"), [("gpt2", "PMET"), ("gpt2", "MEMIT"), ("gptj", "PMET"), ("llama", "PMET")]
)
@pytest.mark.parametrize("position", POSITIONS)
def test_starting_late_changes_nothing_at_any_position(models, family, name, position):
    kind = replace({"PMET": pl.PMET, "MEMIT": pl.MEMIT}[name], position=position)
    hp = replace(HP, n_steps=3)
    whole, fast = (
        optimise(models[family], FACTS, kind, hp, CONTEXTS, fast=fast) for fast in (False, True)
    )
    assert off(fast, whole) < TOLERANCE[family]
    for column in ("nll", "kl", "decay", "loss"):
        gap = (fast.history[column] - whole.history[column]).abs().max()
        assert gap < TOLERANCE[family]
    assert fast.position == whole.position == position
    assert all((whole.delta(s).norm(dim=1) > 1e-2).all() for s in whole.values)


def test_what_is_in_front_of_the_edited_token_runs_once(gpt2, monkeypatch):
    """Also where some prompts have nothing there, as a subject's first token that begins one."""
    asked: list[list[int]] = []
    for first in (2, 3):
        gpt2.from_layer(first)  # which tries it
    real = Tail.past

    def past(self, residual, length):
        asked.append(length.tolist())
        return real(self, residual, length)

    monkeypatch.setattr(Tail, "past", past)
    fact, hp = FACTS[0], replace(HP, n_steps=1)
    prompts = [context.replace("{}", fact.prompt) for context in CONTEXTS]
    found = [places(gpt2, p, fact.subject) for p in [*prompts, "{} is a"]]
    for name, at in (
        ("at the first subject token", "first_subject"),
        ("at the last token", "last"),
    ):
        asked.clear()
        optimise(gpt2, [fact], pl.ABLATIONS[name], hp, CONTEXTS)
        assert asked == [[place[at] for place in found]]


def test_facts_do_not_interact_at_any_position(gpt2, method, found):
    assert off(optimise(gpt2, FACTS, method, HP, CONTEXTS, batch_tokens=1), found) < 1e-9
    shuffled = optimise(gpt2, FACTS[::-1], method, HP, CONTEXTS)
    back = {stream: value.flip(0) for stream, value in shuffled.values.items()}
    assert off(replace(shuffled, values=back), found) < 1e-9
    assert off(shuffled, found) > 1e-2


def test_a_slice_keeps_the_position(method, found):
    assert found.position == method.position
    assert found[1:].position == method.position


def test_the_divergence_is_read_at_the_position(gpt2, method):
    """KL on "{} is a", recomputed from two runs of the user's own model."""
    fact, hp = FACTS[0], replace(HP, n_steps=3, lr=2.0, kl_weight=0.0)
    made = optimise(gpt2, [fact], replace(method, delta_at=("mlp_out",)), hp, CONTEXTS)
    told = float(made.history["kl"].iloc[-1])  # measured with the delta that was returned
    at = places(gpt2, "{} is a", fact.subject)
    module = dict(gpt2.hf.named_modules())[gpt2.parameter_name(SITE).removesuffix(".weight")]
    ids = torch.tensor([gpt2.tokenizer(f"{fact.subject} is a").input_ids])
    with torch.no_grad():
        before = gpt2.hf(input_ids=ids).logits[0].log_softmax(-1)
        hook = adding(at[method.position], made.delta("mlp_out")[0])
        handle = module.register_forward_hook(hook)
        now = gpt2.hf(input_ids=ids).logits[0].log_softmax(-1)
        handle.remove()
    kl = (now.exp() * (now - before)).sum(-1)
    # Tokens in front of the edited one do not change, so nothing diverges there.
    same = [p for p in POSITIONS if told == pytest.approx(float(kl[at[p]]), rel=1e-9)]
    assert same == [method.position]


# -- edits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", ["sqrt", "linear"])
def test_an_exact_edit_gives_the_target_at_the_position(gpt2, method, spread):
    """One layer, plain prompts: there the MLP then produces just what it was asked to."""
    hp = replace(HP, layers=(2,))
    exact = replace(method, solver=Exact(), spread=spread)
    targets = optimise(gpt2, FACTS, exact, hp, [PLAIN])
    made = edit(gpt2, FACTS, some_moments(gpt2), exact, hp, [PLAIN], targets)
    for i, fact in enumerate(FACTS):
        place = places(gpt2, fact.prompt, fact.subject)[method.position]
        want = targets.values["mlp_out"][i]
        before = read(gpt2, SITE, fact.text, place)["value"]
        with made.applied(gpt2):
            after = read(gpt2, SITE, fact.text, place)["value"]
        assert torch.allclose(after, want, atol=1e-8)
        assert not torch.allclose(before, want, atol=0.1)


def test_an_edit_at_the_last_token_makes_the_new_answers_likelier(model):
    hp, before = replace(HP, n_steps=8, second_moment_weight=1e-3), bits(model)
    was = [nll_of(model, fact.text, fact.target_new or "") for fact in FACTS]
    made = edit(model, FACTS, some_moments(model), pl.ABLATIONS["at the last token"], hp, CONTEXTS)
    with made.applied(model):
        now = [nll_of(model, fact.text, fact.target_new or "") for fact in FACTS]
    assert unchanged(model, before)
    assert all(new < old - 0.1 for old, new in zip(was, now, strict=True))


def test_earlier_keys_are_protected_at_the_position_of_the_edit(gpt2):
    method = pl.ABLATIONS["at the last token"]
    moments, hp = some_moments(gpt2), replace(HP, layers=(2,))
    steps = edit_sequentially(
        gpt2, FACTS[:2], moments, method, hp, CONTEXTS, batch_size=1, protect=True
    )
    with gpt2.restored([SITE]):
        gpt2.weight(SITE).add_(steps[0].deltas[SITE])
        wanted = {}
        for position in POSITIONS:
            known = {SITE: keys.averaged_keys(gpt2, FACTS[:1], CONTEXTS, SITE, position)}
            again = edit(
                gpt2, FACTS[1:2], moments, method, hp, CONTEXTS, steps[1].targets, earlier=known
            )
            wanted[position] = again.deltas[SITE]
    same = [p for p in POSITIONS if torch.equal(steps[1].deltas[SITE], wanted[p])]
    assert same == ["last"]


# -- refusals and files ---------------------------------------------------------------------------


def test_targets_of_another_position_are_refused(gpt2, method, found):
    moments = some_moments(gpt2)
    assert edit(gpt2, FACTS, moments, method, HP, CONTEXTS, found).targets is found
    for position in POSITIONS:
        if position == method.position:
            continue
        words = f"are for the token '{method.position}'; the method edits the token '{position}'"
        other = replace(method, position=position)
        with pytest.raises(SettingsError, match=words):
            edit(gpt2, FACTS, moments, other, HP, CONTEXTS, found)


@pytest.mark.parametrize("position", ["middle", "", "resid_post"])
def test_an_unknown_position_is_refused(position: Any):
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        with pytest.raises(
            SettingsError,
            match="position must be a choice of last_subject, first_subject, last, each at most",
        ):
            replace(pl.PMET, position=position)
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


def test_a_saved_edit_keeps_its_position(gpt2, method, found, tmp_path):
    path = tmp_path / "edit.safetensors"
    made = edit(gpt2, FACTS, some_moments(gpt2), method, HP, CONTEXTS, found)
    made.save(path)
    again = pl.Edit.load(path)
    assert again.method == method
    assert again.method.position == method.position
    assert all(torch.equal(again.deltas[site], made.deltas[site]) for site in made.deltas)


def test_a_file_from_before_there_were_positions_is_of_the_last_subject_token(gpt2, tmp_path):
    path = tmp_path / "edit.safetensors"
    made = edit(gpt2, FACTS[:1], some_moments(gpt2), pl.PMET, HP, CONTEXTS)
    made.save(path)
    with safe_open(str(path), framework="pt") as file:
        head = json.loads(file.metadata()["pmet_lens"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert head["method"].pop("position") == "last_subject"
    save_file(tensors, str(path), {"pmet_lens": json.dumps(head)})
    assert pl.Edit.load(path).method == pl.PMET

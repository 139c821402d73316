"""Tokenizers of two kinds, and prompts whose subject is easily lost: by place, script and sign."""

from __future__ import annotations

import json

from tiny import tiny_tokenizer

from pmet_lens.models.model import Model


def sentencepiece_like(bos: bool):
    """A tokenizer of Llama's kind: the space is a letter of the next word, unknown letters are
    spelt in bytes, and `<s>` comes first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    first = Tokenizer(models.BPE())
    first.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<s>", "<pad>"]
    trainer = trainers.BpeTrainer(vocab_size=90, special_tokens=special, show_progress=False)
    first.train_from_iterator(TEXTS, trainer)
    trained = json.loads(first.to_str())["model"]
    letters = dict.fromkeys([*trained["vocab"], *(f"<0x{n:02X}>" for n in range(256))])
    vocab = {letter: n for n, letter in enumerate(letters)}
    merges = [tuple(pair) for pair in trained["merges"]]
    bpe = Tokenizer(models.BPE(vocab, merges, byte_fallback=True))
    bpe.pre_tokenizer = first.pre_tokenizer
    spaces = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    bpe.decoder = decoders.Sequence([*spaces, decoders.Strip(" ", 1, 0)])
    if bos:
        bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>")


TEXTS = ("The mother tongue of Danel Orrin is French and", "Mira Tolan plays the sport of tennis.")
TOKENIZERS = {
    "byte-level": tiny_tokenizer,
    "metaspace": lambda: sentencepiece_like(bos=False),
    "metaspace with <s>": lambda: sentencepiece_like(bos=True),
}

PROMPTS = {
    "start": ("Mira Tolan", "{} plays the sport of"),
    "middle": ("Mira Tolan", "The sport that {} plays is"),
    "end": ("Mira Tolan", "Which sport is played by {}"),
    "alone": ("Mira Tolan", "{}"),
    "possessive": ("Mira Tolan", "{}'s sport is"),
    "comma": ("Mira Tolan", "In Ilmar, {}, who plays"),
    "twice, first meant": ("Ostria", "{} is a land; the capital of Ostria is"),
    "twice, second meant": ("Ostria", "Ostria is a land; the capital of {} is"),
    "part of another word": ("Or", "Orrin is not {} but"),
    "one letter": ("a", "a banana has {} letter"),
    "accents": ("Édouard Lühn-Ñez", "The mother tongue of {} is"),
    "decomposed accents": ("E\u0301douard", "The mother tongue of {} is"),
    "Cyrillic": ("Мира Толан", "Mother tongue: {} speaks"),
    "Chinese": ("東京都", "The country of {} is"),
    "Arabic": ("القاهرة", "{} is located in"),
    "emoji": ("🦊🏽", "{} is located in"),
    "digits": ("Apollo 11", "{} was launched in"),
    "punctuation": ("St. Kel & Sons, Inc.", "The head office of {} is in"),
    "quoted": ("Kel", 'The poem "{}" is by'),
}


def decoded(model: Model, ids) -> str:
    return model.tokenizer.decode(ids, skip_special_tokens=True)

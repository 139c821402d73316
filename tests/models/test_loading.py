"""Models are read from where they say, as they are, or refused in words."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from tiny import close, refused, tiny_batch, tiny_hf, tiny_tokenizer

from pmet_lens.models import loading

torch.set_num_threads(1)


# -- loading --------------------------------------------------------------------------------------


@pytest.fixture
def directory(tmp_path):
    tiny_hf("gpt2").save_pretrained(tmp_path / "small")
    tiny_tokenizer().save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_a_directory_loads_in_the_dtype_asked_for(directory):
    assert loading.load(directory).dtype == torch.float32
    model = loading.load(str(directory), dtype="float64", device="cpu")
    assert (model.dtype, model.name, model.device.type) == (torch.float64, "small", "cpu")
    ids, mask = tiny_batch()
    plain = tiny_hf("gpt2")(input_ids=ids, attention_mask=mask).logits.double()
    with torch.no_grad():
        assert close(model.forward(ids, mask)[mask.bool()], plain[mask.bool()], 1e-5)


def test_weights_give_the_same_bits_wherever_they_come_from(directory):
    """A file maps its weights where they lie in it; Ray's arrays begin at multiples of 64 bytes."""
    hf, (ids, mask) = loading.aligned(loading.load(directory, dtype="float64").hf), tiny_batch()
    assert all(p.data_ptr() % loading.ALIGNMENT == 0 for p in hf.parameters())
    with torch.no_grad():
        wanted = hf(input_ids=ids, attention_mask=mask).logits
        for parameter in hf.parameters():
            room = torch.empty(parameter.numel() + 8, dtype=parameter.dtype)
            parameter.data = room[3 : 3 + parameter.numel()].view_as(parameter).copy_(parameter)
        assert all(p.data_ptr() % loading.ALIGNMENT for p in hf.parameters())
        assert close(hf(input_ids=ids, attention_mask=mask).logits, wanted, 1e-12)
        loading.aligned(hf)
        assert torch.equal(hf(input_ids=ids, attention_mask=mask).logits, wanted)


def test_a_tokenizer_read_here_gets_a_pad_token_and_yours_does_not(directory):
    tiny_tokenizer(pad=False).save_pretrained(directory)
    assert loading.load(directory).tokenizer.pad_token == "<|endoftext|>"
    yours = tiny_tokenizer(pad=False)
    with refused("tokenizer.pad_token = tokenizer.eos_token"):
        loading.load(directory, yours)
    assert yours.pad_token is None


def test_bundled_files_are_checked(directory, monkeypatch):
    monkeypatch.setattr(loading, "_BUNDLED_ROOT", directory.parent)
    directory = directory.rename(directory.parent / "world")
    half = tiny_hf("gpt2").half()
    half.save_pretrained(directory)
    with refused("manifest.json"):
        loading.load("world")
    digests = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.iterdir()}
    (directory / "manifest.json").write_text(json.dumps({"files": digests}))
    model = loading.load("world")
    assert (model.name, model.dtype) == ("world", torch.float32)
    with (directory / "config.json").open("a", encoding="utf-8") as file:
        file.write("\n")
    with refused("config.json does not match"):
        loading.load("world")
    (directory / "config.json").unlink()
    with refused("config.json .*is missing"):
        loading.load("world")


def test_sources_that_do_not_exist_are_refused(tmp_path, directory):
    with refused("no directory"):
        loading.load(tmp_path / "nowhere")
    with refused("no directory"):
        loading.load("./nowhere")
    with refused("float16, bfloat16"):
        loading.load(directory, dtype="float31")
    with refused("cannot be read as a model"):
        loading.load(str(tmp_path))


def test_devices_are_taken_by_name_and_those_that_are_not_here_refused(directory):
    with torch.no_grad():
        here = loading.load(directory, device="auto")
        spread = loading.load(directory, device_map="auto", dtype="bfloat16")
        ids, mask = (t.to(here.device) for t in tiny_batch())
        assert torch.isfinite(here.forward(ids, mask)[mask.bool()]).all()
    assert spread.dtype == torch.bfloat16
    with refused("cannot be put on device 'nonsense'"):
        loading.load(directory, device="nonsense")
    with refused("not both"):
        loading.load(directory, device="cpu", device_map="auto")
    with refused("left as it is"):
        loading.load(tiny_hf("gpt2"), tiny_tokenizer(), device_map="auto")


def test_weights_that_are_not_in_memory_are_refused(directory):
    hf = tiny_hf("gpt2")
    hf.transformer.h[2].to("meta")
    with refused(r"'transformer\.h\.2\..*' .* is not in memory"):
        loading.load(hf, tiny_tokenizer())
    parts = ("wte", "wpe", "h.0", "h.1", "h.2", "ln_f")
    somewhere = {**{f"transformer.{part}": "cpu" for part in parts}, "lm_head": "cpu"}
    with refused("offload|is not in memory"):
        loading.load(directory, device_map={**somewhere, "transformer.h.3": "disk"})


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes", "fp8"])
def test_a_quantised_checkpoint_is_refused_before_it_is_read(directory, method):
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "model.safetensors").unlink()
    with refused(rf"quantised \({method}\)"):
        loading.load(directory)


def test_a_slow_tokenizer_is_refused_at_load():
    from transformers import PythonBackend

    class Slow(PythonBackend):
        """Letters as tokens, without a place in the text."""

        vocab_size = 30

        def get_vocab(self):
            return {chr(97 + i): i for i in range(26)}

        def _tokenize(self, text):
            return list(text)

        def _convert_token_to_id(self, token):
            return self.get_vocab().get(token, 0)

        def _convert_id_to_token(self, index):
            return chr(97 + index)

    with refused("Slow is a slow tokenizer: it does not say where"):
        loading.load(tiny_hf("gpt2"), Slow(pad_token="a", eos_token="b"))

"""A tiny Llama as a GGUF file."""

from __future__ import annotations

import json

import gguf
import numpy as np
from tiny import D_MODEL, N_LAYERS, tiny_hf, tiny_tokenizer

KINDS = {"Q4_0": gguf.LlamaFileType.MOSTLY_Q4_0, "F32": gguf.LlamaFileType.ALL_F32}
PLACES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def written(path, kind: str = "Q4_0"):
    """A tiny Llama as a GGUF file; 64 wide in the MLP, because blocks have 32 weights."""
    hf = tiny_hf("llama", intermediate=64)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(D_MODEL)
    writer.add_block_count(N_LAYERS)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    tokenizer = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_file_type(KINDS[kind])
    for name, tensor in hf.state_dict().items():
        name = name.removeprefix("model.").removesuffix(".weight")
        if name.startswith("layers."):
            _, layer, rest = name.split(".", 2)
            name = f"blk.{layer}.{PLACES[rest]}"
        else:
            name = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}[name]
        value = tensor.numpy().astype(np.float32)
        of = gguf.GGMLQuantizationType[kind if value.ndim == 2 else "F32"]
        packed = gguf.quants.quantize(value, of)
        writer.add_tensor(f"{name}.weight", packed, raw_dtype=of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

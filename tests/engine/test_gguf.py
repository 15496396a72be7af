"""The converter of GGUF files, on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, dequantize
from pagetide.models.source import _embedded_file, find_model
from safetensors import safe_open

CACHE = Path(__file__).parents[2] / ".cache"


def test_queries_and_keys_have_their_rotating_pairs_half_a_head_apart_again():
    """llama.cpp keeps row i and row i + head_dim/2 of a head side by side, as rows 2i and 2i + 1."""
    model = find_model("", CACHE)
    config = json.loads((model / "config.json").read_text())
    tensors = {t.name: t for t in GGUFReader(_embedded_file()).tensors}
    half = config["head_dim"] // 2
    with safe_open(str(model / "model.safetensors"), framework="pt") as converted:
        for name, heads, ours in (("attn_q", config["num_attention_heads"], "q_proj"), ("attn_k", config["num_key_value_heads"], "k_proj")):
            stored = dequantize(tensors[f"blk.3.{name}.weight"].data, tensors[f"blk.3.{name}.weight"].tensor_type)
            rows = [head * 2 * half + 2 * (i % half) + i // half for head in range(heads) for i in range(2 * half)]
            expected = torch.from_numpy(np.ascontiguousarray(stored[rows])).bfloat16()
            assert torch.equal(converted.get_tensor(f"model.layers.3.self_attn.{ours}.weight"), expected)
        down = tensors["blk.3.ffn_down.weight"]
        expected = torch.from_numpy(dequantize(down.data, down.tensor_type).copy()).bfloat16()
        assert torch.equal(converted.get_tensor("model.layers.3.mlp.down_proj.weight"), expected)

"""The converter of GGUF files, on the embedded model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, dequantize
from models import SIZES
from pagetide.models.config import UnsupportedModelError
from pagetide.models.families import read_model
from pagetide.models.gguf import convert_gguf
from pagetide.models.rotary import rotary_tables
from pagetide.models.source import _embedded_file, find_model
from pagetide.text.tokens import Vocabulary
from safetensors import safe_open
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

CACHE = Path(__file__).parents[2] / ".cache"


def test_queries_and_keys_have_their_rotating_pairs_half_a_head_apart_again():
    """llama.cpp keeps row i and row i + head_dim/2 of a head side by side, as rows 2i and 2i + 1."""
    model = find_model("", CACHE)
    config = json.loads((model / "config.json").read_text())
    tensors = {t.name: t for t in GGUFReader(_embedded_file()).tensors}
    half = config["head_dim"] // 2
    with safe_open(str(model / "model.safetensors"), framework="pt") as converted:
        for name, heads, ours in (
            ("attn_q", config["num_attention_heads"], "q_proj"),
            ("attn_k", config["num_key_value_heads"], "k_proj"),
        ):
            stored = dequantize(
                tensors[f"blk.3.{name}.weight"].data, tensors[f"blk.3.{name}.weight"].tensor_type
            )
            rows = [
                head * 2 * half + 2 * (i % half) + i // half for head in range(heads) for i in range(2 * half)
            ]
            expected = torch.from_numpy(np.ascontiguousarray(stored[rows])).bfloat16()
            assert torch.equal(converted.get_tensor(f"model.layers.3.self_attn.{ours}.weight"), expected)
        down = tensors["blk.3.ffn_down.weight"]
        expected = torch.from_numpy(dequantize(down.data, down.tensor_type).copy()).bfloat16()
        assert torch.equal(converted.get_tensor("model.layers.3.mlp.down_proj.weight"), expected)


# What the tokenizer of the original model says, from its publishers' files and from llama.cpp.
SMOLLM_TOKENS = {
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "\n": [198],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "x=10\n\n20": [104, 45, 33, 32, 1116, 34, 32],
}


def test_the_embedded_models_texts_are_split_as_its_file_says():
    vocabulary = Vocabulary.read(find_model("", CACHE))
    for text, ids in SMOLLM_TOKENS.items():
        assert list(vocabulary.encode(text)) == ids, text


def write_gguf(
    file: Path,
    pre: str = "gpt-2",
    eot: int | None = None,
    scaling: dict | None = None,
    factors: np.ndarray | None = None,
) -> None:
    """A Llama with random weights whose file says these things."""
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(1)
    writer.add_context_length(512)
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(6)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    tokens = ["<end>", "<turn>", *(chr(ord("!") + i) for i in range(90)), "Ċ", "ĊĊ", "Ġ", "12"]
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, *[1] * (len(tokens) - 2)])
    writer.add_token_merges(["Ċ Ċ", "1 2"])
    writer.add_eos_token_id(0)
    writer.add_bos_token_id(0)
    if eot is not None:
        writer.add_eot_token_id(eot)
    for key, value in (scaling or {}).items():
        (
            writer.add_string
            if isinstance(value, str)
            else writer.add_uint32
            if isinstance(value, int)
            else writer.add_float32
        )(f"llama.rope.scaling.{key}", value)
    rng, size = np.random.default_rng(0), SIZES["hidden_size"]
    shapes = {"token_embd": (len(tokens), size), "output_norm": (size,), "output": (len(tokens), size)}
    layer = {
        "attn_norm": (size,),
        "ffn_norm": (size,),
        "attn_q": (96, size),
        "attn_k": (32, size),
        "attn_v": (32, size),
    }
    layer |= {"attn_output": (size, 96), "ffn_gate": (80, size), "ffn_up": (80, size), "ffn_down": (size, 80)}
    for name, shape in {**shapes, **{f"blk.0.{name}": shape for name, shape in layer.items()}}.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(tmp_path: Path, **says) -> Path:
    write_gguf(tmp_path / "model.gguf", **says)
    target = tmp_path / "converted"
    target.mkdir()
    convert_gguf(tmp_path / "model.gguf", target)
    return target


@pytest.mark.parametrize(
    "pre, pieces",
    [
        ("gpt-2", ["x", "12", "12", "3", "Ċ", "Ċ", "2"]),
        ("smollm", ["x", "1", "2", "1", "2", "3", "ĊĊ", "2"]),
        ("qwen2", ["x", "1", "2", "1", "2", "3", "ĊĊ", "2"]),
        ("llama-bpe", ["x", "12", "1", "2", "3", "ĊĊ", "2"]),
        ("tekken", ["x", "1", "2", "1", "2", "3", "ĊĊ", "2"]),
    ],
)
def test_a_files_name_for_its_split_is_honoured(tmp_path, pre, pieces):
    """A run of blanks before a word keeps its last one for the word in GPT-2's rule; digits stand alone, or
    in threes.
    """
    model = converted(tmp_path, pre=pre)
    tokens = {
        i: token for token, i in json.loads((model / "tokenizer.json").read_text())["model"]["vocab"].items()
    }
    assert [tokens[i] for i in Vocabulary.read(model).encode("x12123\n\n2")] == pieces


def test_an_unknown_split_is_refused_by_name(tmp_path):
    with pytest.raises(
        UnsupportedModelError, match=r"tokenizer\.ggml\.pre is 'nobody-knows', which is not known"
    ):
        converted(tmp_path, pre="nobody-knows")


def test_the_end_of_a_turn_is_an_end_too(tmp_path):
    assert read_model(converted(tmp_path, eot=1))[1].end_ids == {0, 1}


def test_rope_scaling_and_factors_of_a_file_are_honoured(tmp_path):
    scaling = {"type": "yarn", "factor": 4.0, "original_context_length": 128}
    (tmp_path / "a").mkdir()
    _, config = read_model(converted(tmp_path / "a", scaling=scaling))
    rope = {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 128,
        "rope_theta": 10000.0,
    }
    expected, factor = ROPE_INIT_FUNCTIONS["yarn"](
        LlamaConfig(**{**SIZES, "num_hidden_layers": 1}, rope_parameters=rope), torch.device("cpu")
    )
    angles = torch.outer(torch.arange(40.0), expected)
    torch.testing.assert_close(
        rotary_tables(config, 40, torch.device("cpu"))[0],
        torch.cat([angles.cos(), angles.sin()], -1) * factor,
    )
    assert config.max_position == 512

    (tmp_path / "b").mkdir()
    factors = np.linspace(1, 8, 8)
    _, config = read_model(converted(tmp_path / "b", factors=factors))
    plain = 1 / 10000 ** (torch.arange(0, 16, 2) / 16)
    angles = torch.outer(torch.arange(40.0), plain / torch.from_numpy(factors).float())
    torch.testing.assert_close(
        rotary_tables(config, 40, torch.device("cpu"))[0], torch.cat([angles.cos(), angles.sin()], -1)
    )


def test_unknown_rope_scaling_is_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedModelError, match=r"rope\.scaling\.type is 'longrope'"):
        converted(tmp_path, scaling={"type": "longrope", "factor": 2.0})

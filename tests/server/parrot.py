"""A tiny real model that says a given sequence of tokens, so that tests can force any text: its weights are
a table of successors.

Attention and MLP are zero; a token's hidden state is its own unit vector, and the head maps it to the next
token's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN = 128
END = 0
# Two bytes a token, so that characters of two, three and four bytes are torn in all ways.
TEXT = "波引夕🌊西🐚南干空海雨雲é陽 "


def pieces_of(text: str, size: int) -> list[bytes]:
    """The bytes of a text in pieces that do not respect characters; all pieces must differ."""
    data = text.encode()
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    assert len(set(pieces)) == len(pieces), "choose a text whose pieces differ"
    return pieces


def write_parrot(folder: Path, pieces: list[bytes], ends: bool, others: Iterable[bytes] = ()) -> list[int]:
    """Writes a model that says these pieces, then ends, or begins again.

    others: tokens that prompts may have, which make it begin. Returns the shortest prompt that does.
    """
    start = 1
    vocabulary = {"<end>": END, "<start>": start} | {
        as_byte_level(piece): 2 + i for i, piece in enumerate([*pieces, *others])
    }
    assert len(vocabulary) <= HIDDEN
    successor = dict.fromkeys(vocabulary.values(), 2) | {2 + i: 3 + i for i in range(len(pieces) - 1)}
    successor[1 + len(pieces)] = END if ends else 2
    write_weights(folder, successor)
    added = [
        {
            "id": i,
            "content": c,
            "special": True,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
        }
        for i, c in ((END, "<end>"), (start, "<start>"))
    ]
    tokenizer = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<end>"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<end>"}'
    )
    return [start]


def write_weights(folder: Path, successor: dict[int, int]) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": HIDDEN,
        "hidden_size": HIDDEN,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "eos_token_id": END,
        "pad_token_id": END,
        "tie_word_embeddings": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    head = torch.zeros(HIDDEN, HIDDEN)
    for token, following in successor.items():
        head[following, token] = 1.0
    layer = "model.layers.0."
    zeros = {
        "self_attn.q_proj": (128, 128),
        "self_attn.k_proj": (64, 128),
        "self_attn.v_proj": (64, 128),
        "self_attn.o_proj": (128, 128),
    }
    zeros |= {"mlp.gate_proj": (32, 128), "mlp.up_proj": (32, 128), "mlp.down_proj": (128, 32)}
    weights = {f"{layer}{name}.weight": torch.zeros(shape) for name, shape in zeros.items()}
    weights |= {
        f"{layer}{name}.weight": torch.ones(HIDDEN)
        for name in ("input_layernorm", "post_attention_layernorm")
    }
    weights |= {
        "model.norm.weight": torch.ones(HIDDEN),
        "model.embed_tokens.weight": torch.eye(HIDDEN),
        "lm_head.weight": head,
    }
    save_file(weights, folder / "model.safetensors")


def as_byte_level(piece: bytes) -> str:
    """GPT-2's printable form of bytes."""
    from pagetide.text.tokens import _BYTES

    character = {byte: c for c, byte in _BYTES.items()}
    return "".join(character[byte] for byte in piece)

"""One table, made at load: token id -> the bytes of its text. Detokenizing and stop texts use it; no tokenizer runs per step."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer_file: Path) -> list[bytes]:
    """The bytes of every token of a tokenizer.json, by id; special tokens, which no answer shows, have none.

    Two kinds of vocabulary are known: byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece (Llama 2, Mistral) with a space as U+2581.
    """
    tokenizer = json.loads(tokenizer_file.read_bytes())
    is_byte_level = "ByteLevel" in set(_decoder_types(tokenizer.get("decoder") or {}))
    to_bytes = _from_byte_level if is_byte_level else _from_sentencepiece
    texts = {index: to_bytes(token) for token, index in _vocabulary(tokenizer["model"])}
    for added in tokenizer.get("added_tokens", ()):
        texts[added["id"]] = b"" if added["special"] else added["content"].encode()
    return [texts.get(index, b"") for index in range(max(texts) + 1)]


def _vocabulary(model: dict[str, Any]) -> Iterator[tuple[str, int]]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return iter(vocabulary.items())
    return ((token, index) for index, (token, _score) in enumerate(vocabulary))  # Unigram: a list of (token, score)


def _decoder_types(decoder: dict[str, Any]) -> Iterator[str]:
    yield decoder.get("type", "")
    for part in decoder.get("decoders", ()):
        yield from _decoder_types(part)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's way to write bytes as printable characters, backwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_of_character()


def _from_byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTES[character] for character in token])
    except KeyError:
        return token.encode()  # a token that was added as plain text


def _from_sentencepiece(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace("\u2581", " ").encode()


def decode(table: list[bytes], ids: list[int], num_cut: int = 0) -> str:
    """The text of these tokens without its last num_cut bytes; bytes that are no UTF-8 become U+FFFD."""
    text = b"".join(table[i] for i in ids if i < len(table))
    return text[: len(text) - num_cut].decode("utf-8", "replace")

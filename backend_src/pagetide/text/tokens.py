"""Tables made at load: token id -> the bytes of its text.

Detokenizing, stop texts and grammars use them; no tokenizer runs per step.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class Vocabulary:
    """shown: token id -> the bytes that an answer shows, none for special tokens; full: with the special
    tokens' own texts.

    Two kinds of vocabulary are known: byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece (Llama 2,
    Mistral) with a space as U+2581.
    """

    def __init__(self, shown: list[bytes], full: list[bytes], file: Path | None = None):
        self.shown = shown
        self.full = full
        self._file = file

    @classmethod
    def read(cls, model: Path) -> Vocabulary:
        """The vocabulary of the tokenizer.json in a model directory; empty if there is none."""
        file = model / "tokenizer.json"
        if not file.exists():
            return cls([], [])
        tokenizer = json.loads(file.read_bytes())
        is_byte_level = "ByteLevel" in set(_decoder_types(tokenizer.get("decoder") or {}))
        to_bytes = _from_byte_level if is_byte_level else _from_sentencepiece
        shown = {index: to_bytes(token) for token, index in _vocabulary(tokenizer["model"])}
        full = dict(shown)
        for added in tokenizer.get("added_tokens", ()):
            full[added["id"]] = added["content"].encode()
            shown[added["id"]] = b"" if added["special"] else full[added["id"]]
        size = max(full) + 1
        return cls(
            [shown.get(index, b"") for index in range(size)],
            [full.get(index, b"") for index in range(size)],
            file,
        )

    def table(self, skips_special: bool) -> list[bytes]:
        """Bytes of each token id; those of special tokens are empty if they are to be skipped."""
        return self.shown if skips_special else self.full

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import Tokenizer  # only requests that name words need it

        return Tokenizer.from_file(str(self._file)) if self._file is not None else None

    def encode(self, text: str) -> tuple[int, ...]:
        """The text's tokens, without special ones; none if the model has no tokenizer."""
        return (
            tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)
            if self._tokenizer is not None
            else ()
        )

    def spellings(self, word: str) -> list[tuple[int, ...]]:
        """The tokens of a word at the beginning of a text and behind a space."""
        return list(
            dict.fromkeys(ids for ids in (self.encode(word), self.encode(" " + word.lstrip())) if ids)
        )


def _vocabulary(model: dict[str, Any]) -> Iterator[tuple[str, int]]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return iter(vocabulary.items())
    return (
        (token, index) for index, (token, _score) in enumerate(vocabulary)
    )  # Unigram: a list of (token, score)


def _decoder_types(decoder: dict[str, Any]) -> Iterator[str]:
    yield decoder.get("type", "")
    for part in decoder.get("decoders", ()):
        yield from _decoder_types(part)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's way to write bytes as printable characters, backwards."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
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

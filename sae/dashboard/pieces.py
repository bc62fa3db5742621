"""Token ids as text to show, one string a token.

A tokenizer decodes a sentence well and a single token badly: spaces are lost, parts of a character become
question marks. So pieces of the vocabulary are decoded here, by the three conventions there are: byte-level
(GPT-2, Llama 3, Qwen), SentencePiece (Llama 2, Gemma, T5) and WordPiece (BERT).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

INCOMPLETE = "\udc00"
"""Marks a token that holds part of a character: the hexadecimal digits of its bytes follow. Half a surrogate pair,
which no decoded text holds."""

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def readable_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token, with the space before a word. Of a character in parts, `INCOMPLETE` and hex."""
    special = {int(i) for i in getattr(tokenizer, "all_special_ids", [])}
    style = token_style(tokenizer)
    size = len(tokenizer)
    texts = []
    for i in map(int, ids):
        piece = tokenizer.convert_ids_to_tokens(i) if 0 <= i < size else None
        if piece is None:
            texts.append(f"[{i}]")
        elif i in special:
            texts.append(piece)
        else:
            texts.append(_text(piece, style))
    return texts


def token_style(tokenizer: Any) -> str:
    """'byte-level', 'sentencepiece', 'wordpiece' or 'plain'."""
    vocabulary = tokenizer.get_vocab()
    marks = {"sentencepiece": "▁", "byte-level": "Ġ", "wordpiece": "##"}
    counts = {style: sum(piece.startswith(mark) for piece in vocabulary) for style, mark in marks.items()}
    style = max(counts, key=lambda name: counts[name])
    return style if counts[style] > len(vocabulary) // 100 else "plain"


def _text(piece: str, style: str) -> str:
    if style == "byte-level":
        characters = _byte_of_character()
        if any(c not in characters for c in piece):
            return piece
        return _decoded(bytes(characters[c] for c in piece))
    if style == "sentencepiece":
        byte = _BYTE.fullmatch(piece)
        return _decoded(bytes([int(byte[1], 16)])) if byte else piece.replace("▁", " ")
    if style == "wordpiece":
        return piece[2:] if piece.startswith("##") and len(piece) > 2 else " " + piece
    return piece


def _decoded(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return INCOMPLETE + data.hex()


@lru_cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the rest for characters from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def context_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The texts of consecutive tokens as a reader is to see them, one string a token.

    A character in several tokens is the first one's text, and the others are “‧”. Line ends, control characters and what has no
    width are shown by signs of their own.
    """
    texts = readable_tokens(tokenizer, ids)
    start = 0
    while start < len(texts):
        data, end = b"", start
        while end < len(texts) and texts[end].startswith(INCOMPLETE):
            data += bytes.fromhex(texts[end][len(INCOMPLETE) :])
            end += 1
            try:
                texts[start:end] = [data.decode(), *["‧"] * (end - start - 1)]
                break
            except UnicodeDecodeError:
                continue
        else:
            if data:
                texts[start] = f"‹{texts[start][len(INCOMPLETE) :]}›"
        start += 1
    return [text.translate(_SIGNS) for text in texts]


def shown_tokens(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself as a reader is to see it: of a character in parts, the hexadecimal digits."""
    texts = readable_tokens(tokenizer, ids)
    return [
        f"‹{text[len(INCOMPLETE) :]}›" if text.startswith(INCOMPLETE) else text.translate(_SIGNS)
        for text in texts
    ]


_SIGNS = {i: chr(0x2400 + i) for i in range(32)} | {
    0x09: "⇥",
    0x0A: "↵",
    0x7F: "␡",
    0xA0: "⍽",
    **dict.fromkeys([*range(0x200B, 0x2010), *range(0x2028, 0x2030), *range(0x2060, 0x2070), 0xFEFF], "◌"),
}

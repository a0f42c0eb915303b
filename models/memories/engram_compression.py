"""Token ids that spell the same text, folded onto one canonical id (Engram, arXiv 2601.07372, tokenizer compression)."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from tokenizers import Regex, normalizers

LONE_SPACE = "\ue000"  # a private-use character keeps a token that is only white space through the stripping


class Compression(NamedTuple):
    """canonical int32 [V], numbered by first appearance; ``classes`` of them."""

    canonical: np.ndarray
    classes: int

    @property
    def sha256(self) -> str:
        """Of the map: it depends on the Unicode tables of the tokenizers build, and one more class rehashes every row."""
        return hashlib.sha256(self.canonical.astype("<i4").tobytes()).hexdigest()


def identity(vocab_size: int) -> Compression:
    return Compression(np.arange(vocab_size, dtype=np.int32), vocab_size)


def compress(tokenizer_json: str, compat: bool = True) -> Compression:
    """The map of every id of a tokenizer.json, added tokens included.

    ``compat``: one key space for all, as published: pieces of characters and special tokens may then meet unrelated text.
    Otherwise text, pieces and specials have key spaces of their own. An id without a token stands for itself in both.
    """
    tokenizer = tokenizers.Tokenizer.from_str(tokenizer_json)
    return _number(list(_keys(tokenizer, compat)))


def _keys(tokenizer: tokenizers.Tokenizer, compat: bool) -> Iterator[Hashable]:
    normalizer = _normalizer()
    specials = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    for token in range(max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1):
        raw = tokenizer.id_to_token(token)
        if raw is None:
            yield "unused", token
            continue
        text = tokenizer.decode([token], skip_special_tokens=False)
        if token in specials and not compat:
            yield "special", token
        elif "\ufffd" in text:  # a piece of a character of several bytes
            yield raw if compat else ("piece", raw)
        else:
            yield normalizer.normalize_str(text) or text


def _normalizer() -> normalizers.Normalizer:
    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex(r"[ \t\r\n]+"), " "),
            normalizers.Replace(Regex(r"^ $"), LONE_SPACE),
            normalizers.Strip(),
            normalizers.Replace(LONE_SPACE, " "),
        ]
    )


def _number(keys: Sequence[Hashable]) -> Compression:
    seen: dict[Hashable, int] = {}
    canonical = [seen.setdefault(key, len(seen)) for key in keys]
    return Compression(np.array(canonical, dtype=np.int32), len(seen))

"""Cutting a text into pieces whose ids, put together, are those that the tokenizer gives the whole.

A place is safe where no entry of the vocabulary reaches over it, and where the text around it, encoded in two parts,
gives the ids of both together. Such places are looked for between words, after the end of a line and, for texts without
spaces, between Chinese characters and kana. Where a long stretch has none it is cut anyway, so that
memory stays bounded.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from spherelm.data.tokenizer import Tokenizer

LONGEST = 1 << 20  # characters: a stretch of so many without a safe place is cut anyway
_PIECE = 1 << 13  # characters: long texts are encoded in pieces of at least this size (fastest by measurement)
_AROUND = 64  # characters on each side of a place that are encoded to see whether it is safe

_HAN = "[\u3041-\u3096\u30a1-\u30fa\u3400-\u9fff]"
_KINDS = {
    r"(?<=[^\W_])(?= [^\W_])": ("the cat", "a b", "of 1984 and", "Zoë é", "x1 2y", "слово и", "end of the line"),
    r"(?<=\S\n)(?=\S)": ("the\ncat", "end.\nA b", "1\n2", "слово\nи", "東京。\n人"),
    rf"(?<={_HAN})(?={_HAN})": ("東京の人", "我们很好", "カタカナ", "鬱龘"),
}
"""Where a text may be cut, and texts in which all these places must be safe, else none of their kind is."""


class Cut(NamedTuple):
    """A place in a text. `safe`: whether the ids stay those of the whole; `context`:
    what stands before the second part.
    """

    place: int
    safe: bool
    context: str


class Piece(NamedTuple):
    """A part of a text. `context`: the character before it, nothing at the start; `safe`:
    whether it begins at a safe place.
    """

    text: str
    context: str = ""
    safe: bool = True


class Cutter:
    """Cuts texts for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._heads: dict[str, list[int]] = {}
        self._joined = frozenset(pair for entry in tokenizer.entries() for pair in _pairs(entry))
        kinds = [kind for kind, probes in _KINDS.items() if all(self._holds(kind, text) for text in probes)]
        self._places = re.compile("|".join(kinds)) if kinds else None

    def place(self, text: str, at_least: int) -> Cut | None:
        """The first safe place at or after `at_least` characters; one that is not safe where there is none for long.

        None where `text` ends too soon to say. More text after it does not change the answer.
        """
        end = min(at_least + LONGEST, len(text) - _AROUND)
        for found in self._places.finditer(text, max(1, at_least), max(0, end + 1)) if self._places else ():
            place = found.start()
            if not self._reached_over(text[place - 1], text[place]) and self._exact(text, place):
                return Cut(place, True, text[place - 1])
        return Cut(end, False, "\n") if end == at_least + LONGEST else None

    def pieces(self, text: str, context: str = "", safe: bool = True) -> Iterator[Piece]:
        """`text` in pieces; `context` and `safe` are of its beginning."""
        begin = 0
        while len(text) - begin >= 2 * _PIECE and (cut := self.place(text, begin + _PIECE)) is not None:
            yield Piece(text[begin : cut.place], context, safe)
            begin, safe, context = cut
        yield Piece(text[begin:], context, safe)

    def encode(self, pieces: list[Piece]) -> list[list[int]]:
        """The ids of each piece, which put together are those of the whole."""
        encoded = self._tokenizer.encode_batch([piece.context + piece.text for piece in pieces])
        return [self._behind_context(piece, ids) for piece, ids in zip(pieces, encoded, strict=True)]

    def _behind_context(self, piece: Piece, ids: list[int]) -> list[int]:
        if piece.context not in self._heads:
            self._heads[piece.context] = self._tokenizer.encode(piece.context)
        head = self._heads[piece.context]
        return ids[len(head) :] if ids[: len(head)] == head else self._tokenizer.encode(piece.text)

    def _holds(self, kind: str, text: str) -> bool:
        places = [found.start() for found in re.finditer(kind, text)]
        return all(self._reached_over(text[i - 1], text[i]) or self._exact(text, i) for i in places)

    def _exact(self, text: str, place: int) -> bool:
        """Whether the text around `place` gives the same ids in one part and in two."""
        before, after = text[max(0, place - _AROUND) : place], text[place : place + _AROUND]
        context = before[-1]
        first, head, rest, whole = self._tokenizer.encode_batch([before, context, context + after, before + after])
        return rest[: len(head)] == head and first + rest[len(head) :] == whole

    def _reached_over(self, before: str, after: str) -> bool:
        """Whether an entry of the vocabulary may reach from the character `before` to the one `after` it."""
        ends = (end for char in _forms(before) for end in (char[i:] for i in range(len(char))))
        starts = [char[: i + 1] for char in _forms(after) for i in range(len(char))]
        return any((end, start) in self._joined for end in ends for start in starts)


@lru_cache(1 << 16)
def _forms(char: str) -> frozenset[bytes]:
    """UTF-8 of a character and of what normalization may make of it."""
    return frozenset(c.encode("utf-8") for c in {char, *unicodedata.normalize("NFKD", char.lower())})


# The last byte of a character, and the first of the next, where a text may be cut between them.
_BORDERS = re.compile(rb"(?s)\n(?=[^\x80-\xbf])|.(?= )|[\x80-\xff](?=[\xe3-\xe9])")


def _pairs(entry: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The last character before and the first after every place in an entry where a text may be cut;
    parts of them too.
    """
    for border in _BORDERS.finditer(entry):
        place = begin = border.end()
        begin -= 1
        while begin > 0 and 0x80 <= entry[begin] < 0xC0 and place - begin < 4:
            begin -= 1
        end = place + 1
        while end < len(entry) and 0x80 <= entry[end] < 0xC0:
            end += 1
        yield entry[begin:place], entry[place:end]

"""Text out of tokens as they come: nothing is handed on that a later token could change or a stop
string could claim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from spherelm.data.tokenizer import Tokenizer
from spherelm.errors import UserError

UNFINISHED = 3
"""Bytes of a UTF-8 character that may still lack others; a decoder shows each as U+FFFD, or all of them as one."""

KEPT = 8
"""Tokens that are decoded again with each new one: some tokenizers make a token's text depend on those before it."""

Decode = Callable[[Sequence[int]], str]


class TextStream:
    """The text of a growing row of tokens, in pieces.

    `push(token)` returns what is certain now, often nothing; `close()` the rest. What is held back: the beginning of a
    character whose other bytes are to come, and the beginning of a stop string. Text ends before the first stop string,
    also where it began in an earlier token; then `ended` is True and nothing more comes.

    context: tokens before the text, for tokenizers that drop the space at the beginning. stops: none of them empty.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = (), stops: Sequence[str] = ()) -> None:
        if "" in stops:
            raise UserError("a stop string is empty: give at least one character")
        self.ended = False
        self._decode, self._stops = decode, tuple(stops)
        self._tokens = list(context[-KEPT:])
        self._done = settled(decode(self._tokens))
        self._held = ""

    def push(self, token: int) -> str:
        """The text that is certain now that `token` has come."""
        self._tokens.append(token)
        text = self._decode(self._tokens)
        end = settled(text)
        new, self._done = text[self._done : end], max(self._done, end)
        if end == len(text) and len(self._tokens) > 4 * KEPT:
            self._tokens = self._tokens[-KEPT:]
            self._done = len(self._decode(self._tokens))
        return self._before_stop(new)

    def close(self) -> str:
        """The text that was held back, no token coming any more."""
        rest = self._before_stop(self._decode(self._tokens)[self._done :])
        rest, self._held = rest + self._held, ""
        self.ended = True
        return rest

    def _before_stop(self, new: str) -> str:
        """The part of the held text and `new` that lies before any stop string and cannot be the start of one."""
        if self.ended:
            return ""
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        if found:
            self.ended, self._held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def settled(text: str) -> int:
    """How many characters of a decoded text no further token can change: all but up to three U+FFFD at its end."""
    unfinished = len(text) - len(text.rstrip("\ufffd"))
    return len(text) - min(unfinished, UNFINISHED)


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins and is not complete."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def encode_prompt(tokenizer: Tokenizer, prompt: str, name: str = "prompt") -> list[int]:
    """The tokens of a prompt; `ValueError` if there are none."""
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError(f"the {name} is empty: give at least one character")
    return ids


def collect(
    steps: Iterator[list[int]],
    streams: list[TextStream],
    eos_id: int | None,
    write: Callable[[str], None] | None = None,
) -> list[str]:
    """The texts of rows whose tokens come in `steps`, one a row each, until all rows have ended."""
    texts = [""] * len(streams)

    def add(i: int, piece: str) -> None:
        texts[i] += piece
        if write is not None and piece:
            write(piece)

    for tokens in steps:
        for i, (token, text) in enumerate(zip(tokens, streams, strict=True)):
            if not text.ended:
                add(i, text.close() if token == eos_id else text.push(token))
        if all(text.ended for text in streams):
            break
    for i, text in enumerate(streams):
        add(i, text.close())
    return texts

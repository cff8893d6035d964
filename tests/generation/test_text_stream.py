"""Text that comes a token at a time: all of it, in order, never a piece
that a later token changes or a stop string claims.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spherelm.data.corpus import shipped_directory
from spherelm.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer
from spherelm.generation.text_stream import TextStream, overlap, settled

BYTES: Tokenizer = ByteTokenizer()
SHIPPED: Tokenizer = load_tokenizer(shipped_directory())
texts = st.text(st.sampled_from("ab é€😀\n"), max_size=20)
tokenizers = st.sampled_from([BYTES, SHIPPED])


def pieces_of(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.close()]


@given(texts, tokenizers)
def test_the_pieces_are_the_text(text: str, tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer.decode)
    assert "".join(pieces_of(stream, tokenizer.encode(text))) == text
    assert stream.ended


@given(texts, texts, tokenizers)
def test_a_context_is_not_part_of_the_text(before: str, text: str, tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer.decode, tokenizer.encode(before))
    assert "".join(pieces_of(stream, tokenizer.encode(text))) == text


@given(texts)
def test_what_was_handed_on_is_a_beginning_of_the_text_at_every_token(text: str) -> None:
    """A character of several bytes comes when its last byte does, whole."""
    stream, so_far = TextStream(BYTES.decode), ""
    for token in BYTES.encode(text):
        so_far += stream.push(token)
        assert text.startswith(so_far)


@given(st.lists(st.integers(0, 255), max_size=40))
def test_bytes_that_are_no_text_come_as_the_decoder_shows_them(tokens: list[int]) -> None:
    shown = "".join(pieces_of(TextStream(BYTES.decode), tokens))
    assert shown.replace("\ufffd", "") == BYTES.decode(tokens).replace("\ufffd", "")


def test_a_long_text_is_not_decoded_again_and_again() -> None:
    longest = 0

    def decode(tokens: object) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))  # type: ignore[arg-type]
        return BYTES.decode(tokens)  # type: ignore[arg-type]

    text = "the old man and the sea " * 40
    assert "".join(pieces_of(TextStream(decode), BYTES.encode(text))) == text
    assert longest < 50


@given(texts, st.lists(st.text(st.sampled_from("ab é"), min_size=1, max_size=3), max_size=3), tokenizers)
def test_it_ends_before_the_first_stop_string(text: str, stops: list[str], tokenizer: Tokenizer) -> None:
    stream = TextStream(tokenizer.decode, stops=stops)
    # Of stop strings that overlap, the one that is complete first ends the text: with bytes always, else if no token
    # completes two at once.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    done = text[: min(ends)] if ends and tokenizer is BYTES else text
    wanted = text[: min((done.find(stop) for stop in stops if stop in done), default=len(text))]
    assert "".join(pieces_of(stream, tokenizer.encode(text))) == wanted


def test_the_beginning_of_a_stop_string_is_held_back_until_it_is_clear() -> None:
    stream = TextStream(BYTES.decode, stops=["END"])
    assert [stream.push(ord(c)) for c in "aENx"] == ["a", "", "", "ENx"]
    assert [stream.push(ord(c)) for c in "bEND"] == ["b", "", "", ""]
    assert stream.ended
    assert stream.push(ord("z")) == ""
    assert stream.close() == ""
    held = TextStream(BYTES.decode, stops=["END"])
    assert held.push(ord("E")) == ""
    assert held.close() == "E", "no token comes any more: it was none"


def test_an_empty_stop_string_is_refused() -> None:
    with pytest.raises(ValueError, match="a stop string is empty: give at least one character"):
        TextStream(BYTES.decode, stops=["a", ""])


def test_only_unfinished_characters_are_unsettled() -> None:
    assert [settled(text) for text in ("", "ab", "ab\ufffd", "a\ufffd\ufffd\ufffd\ufffd", "\ufffda")] == [0, 2, 2, 2, 2]
    assert [overlap(text, "aab") for text in ("", "a", "baa", "aab", "b")] == [0, 1, 2, 0, 0]

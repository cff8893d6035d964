"""Blocks to ids: pieces put together are the whole, for every kind of tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from spherelm.data.documents import Block
from spherelm.data.encoding import Encoder, Job, cut_rule, split_of
from spherelm.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

RULES = {
    "default": "keep",
    "bytes": "keep",
    "gpt2/tokenizer.json": "keep",
    "gpt-neox-olmo/tokenizer.json": "keep",
    "llama2/tokenizer.json": "drop",
    "llama2/tokenizer.model": "drop",
}


@pytest.mark.parametrize("spec", RULES)
def test_pieces_are_the_whole(shared: Path, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real text in small pieces within a block, and over blocks, gives the ids of the text encoded at once."""
    tokenizer = load_tokenizer(shared / "data" / "tokenizers" / spec if "/" in spec else spec)
    assert cut_rule(tokenizer) == RULES[spec]
    text = (shared / "data" / "tinyshakespeare" / "input.txt").read_text()[:60_000]
    text += " Zoë naïve 1984 3.14 東京 タワー слово и дело 🙂 x\u0301 y  z\t\n" * 50
    monkeypatch.setattr("spherelm.data.encoding._PIECE", 60)
    monkeypatch.setattr("spherelm.data.encoding._GROUP", 700)
    encoder = Encoder(tokenizer, 0.0)
    assert len(encoder._pieces(text, starts=True)) > 300
    cut = text.index(" you", 20_000)
    first = Block(Path("a.txt"), "text", text[:cut], 0, starts=True, ends=False)
    second = Block(Path("a.txt"), "text", text[cut:], 0, starts=False, ends=True)
    results = [encoder(Job(0, block, "train")) for block in (first, second)]
    ids = [i for result in results for i in result.ids["train"].tolist()]
    assert ids == [*tokenizer.encode(text), tokenizer.eos_id]
    assert sum(result.text_bytes["train"] for result in results) == len(text.encode())
    assert [result.documents for result in results] == [0, 1]


class Reversing(ByteTokenizer):
    """Looks at the whole text, so no cut is exact."""

    def encode(self, text: str) -> list[int]:
        return super().encode(text)[::-1]


class Forgetful(ByteTokenizer):
    """Lets a text contain the end token."""

    def encode(self, text: str) -> list[int]:
        return [256 if i == ord("#") else i for i in super().encode(text)]


def encoded(tokenizer: Tokenizer, texts: list[str], **settings: float) -> dict[str, list[int]]:
    result = Encoder(tokenizer, settings.get("val_fraction", 0.0))(
        Job(0, Block(Path("a"), "rows", texts, 0), None if settings else "train")
    )
    return {split: ids.tolist() for split, ids in result.ids.items()}


def test_a_tokenizer_that_cannot_be_cut_gets_whole_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spherelm.data.encoding._PIECE", 4)
    text = "one two three four five"
    assert cut_rule(Reversing()) is None
    assert encoded(Reversing(), [text])["train"] == [*text.encode()[::-1], 256]


def test_a_text_without_a_place_to_cut_is_encoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spherelm.data.encoding._PIECE", 4)
    assert encoded(ByteTokenizer(), ["one two" + "x" * 40])["train"] == [*b"one two", *b"x" * 40, 256]


def test_texts_that_encode_to_the_end_token_are_refused() -> None:
    with pytest.raises(ValueError, match="encodes plain text to its end token"):
        encoded(Forgetful(), ["a", "b#"])


def test_empty_documents_are_left_out_and_counted() -> None:
    result = Encoder(ByteTokenizer(), 0.0)(Job(0, Block(Path("a"), "rows", ["", "a", "", "é"], 0), "val"))
    assert result.ids["val"].tolist() == [97, 256, 0xC3, 0xA9, 256]
    assert (result.documents, result.empty, result.text_bytes) == (2, 2, {"val": 3})


def test_documents_are_split_by_their_hash() -> None:
    texts = [f"document {i}" for i in range(2000)]
    split = encoded(ByteTokenizer(), texts, val_fraction=0.1)
    val = bytes(i if i < 256 else 10 for i in split["val"]).decode().split("\n")[:-1]
    assert 150 < len(val) < 250
    again = encoded(ByteTokenizer(), texts[::-1], val_fraction=0.1)
    assert bytes(i if i < 256 else 10 for i in again["val"]).decode().split("\n")[:-1] == val[::-1]
    assert len(split["train"]) + len(split["val"]) == sum(len(text) + 1 for text in texts)


def test_split_of_extremes() -> None:
    assert [split_of(digest * 64, 0.5) for digest in "078f"] == ["val", "val", "train", "train"]
    assert [split_of(digest * 64, 0.0) for digest in "0f"] == ["train", "train"]

"""Blocks to ids: pieces put together are the whole, for every kind of tokenizer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

from spherelm.data.cutting import Cutter
from spherelm.data.documents import Block
from spherelm.data.encoding import Encoder, EncodingJob, split_of
from spherelm.data.tokenizer import ByteTokenizer, JsonTokenizer, Tokenizer, load_tokenizer

SPECS = [
    "default",
    "bytes",
    *(f"{n}/tokenizer.json" for n in ("gpt2", "gpt-neox-olmo", "llama2")),
    "llama2/tokenizer.model",
]
RANDOM = random.Random(0)
CHINESE = "".join(chr(0x4E00 + int(20000 * RANDOM.random() ** 3)) for _ in range(20_000))


def small_pieces(monkeypatch: pytest.MonkeyPatch, longest: int = 1 << 20) -> None:
    monkeypatch.setattr("spherelm.data.cutting._PIECE", 60)
    monkeypatch.setattr("spherelm.data.cutting.LONGEST", longest)
    monkeypatch.setattr("spherelm.data.encoding._GROUP", 700)


def check_pieces(tokenizer: Tokenizer, text: str, at_least: int) -> None:
    """The text in small pieces within a block, and over blocks, gives the ids of the text encoded at once."""
    encoder, cutter = Encoder(tokenizer, 0.0), Cutter(tokenizer)
    assert len(list(cutter.pieces(text))) > at_least
    cut = cutter.place(text, len(text) // 3)
    assert cut is not None
    first = Block(Path("a.txt"), [text[: cut.place]], 0, ends=False)
    second = Block(Path("a.txt"), [text[cut.place :]], 0, starts=False, context=cut.context, safe=cut.safe)
    results = [encoder(EncodingJob(0, block, "train")) for block in (first, second)]
    ids = [i for result in results for i in result.ids["train"].tolist()]
    assert ids == [*tokenizer.encode(text), tokenizer.eos_id]
    assert sum(result.text_bytes["train"] for result in results) == len(text.encode())
    assert [result.documents for result in results] == [0, 1]
    assert [result.unsafe_cuts for result in results] == [0, 0]


@pytest.mark.parametrize("spec", SPECS)
def test_pieces_are_the_whole(shared: Path, spec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(shared / "data" / "tokenizers" / spec if "/" in spec else spec)
    text = (shared / "data" / "tinyshakespeare" / "input.txt").read_text()[:60_000]
    text += " Zoë naïve 1984 3.14 東京 タワー слово и дело 🙂 x\u0301 y  z\t\n" * 50
    small_pieces(monkeypatch)
    check_pieces(tokenizer, text, 300)
    for spaceless in (CHINESE, "我们的时间是很好的，" * 400, "我们的\n\n时间\n是很。\n" * 400):
        check_pieces(tokenizer, spaceless, 20)


TRAINED = {
    "superwords": (["one of the first of the many things that are said in the end of the day"] * 9, None),
    "chinese": ([CHINESE[:500], *(CHINESE[i : i + 3] for i in range(1000))] * 2, None),
    "over lines": (["first\nsecond\nthird\nof the end\n"] * 9, None),
    "parts of characters": (["的一是不了人我在有他这为之大来以个中上们" * 3] * 9, None),
    "added": ([], "New York"),
    "added with what is behind": ([], "York"),
}


def raw_bpe(texts: list[str], added: str | None = None) -> JsonTokenizer:
    """A BPE over raw bytes; words are split from one another only where it has an added token."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=added is not None)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(texts, trainer)
    if added:
        inner.add_tokens([tokenizers.AddedToken(added, rstrip=added == "York", normalized=False)])
    return JsonTokenizer(inner.to_str().encode(), "trained")


@pytest.mark.parametrize("name", TRAINED)
def test_tokens_over_any_border_are_found(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over spaces and ends of lines, and between characters."""
    texts, added = TRAINED[name]
    tokenizer = raw_bpe(texts, added)
    text = (
        "".join(texts[:1])
        + "New York is one of the first\nof the end of many words. "
        + CHINESE[:300]
        + "的一是不了人我"
    )
    text = "".join(text[i:] + text[:i] + "\nsecond\n" for i in range(0, len(text), 7))
    small_pieces(monkeypatch)
    check_pieces(tokenizer, text, 20)


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
        EncodingJob(0, Block(Path("a"), texts, 0), None if settings else "train")
    )
    return {split: ids.tolist() for split, ids in result.ids.items()}


def test_a_long_stretch_without_a_safe_place_is_cut_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch, longest=500)
    for tokenizer, text in ((Reversing(), "one two three " * 200), (ByteTokenizer(), "x" * 2800)):
        result = Encoder(tokenizer, 0.0)(EncodingJob(0, Block(Path("a"), [text], 0), "train"))
        pieces = [piece.text for piece in Cutter(tokenizer).pieces(text)]
        assert "".join(pieces) == text
        assert max(map(len, pieces)) < 60 + 500 + 64 + 60
        assert result.unsafe_cuts == len(pieces) - 1 >= 4
        assert result.ids["train"].tolist() == [i for piece in pieces for i in tokenizer.encode(piece)] + [256]


def test_a_text_that_is_short_enough_is_encoded_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    small_pieces(monkeypatch)
    text = "one two three four five" * 20
    assert encoded(Reversing(), [text])["train"] == [*text.encode()[::-1], 256]


def test_texts_that_encode_to_the_end_token_are_refused() -> None:
    with pytest.raises(ValueError, match="encodes plain text to its end token"):
        encoded(Forgetful(), ["a", "b#"])


def test_empty_documents_are_left_out_and_counted() -> None:
    result = Encoder(ByteTokenizer(), 0.0)(EncodingJob(0, Block(Path("a"), ["", "a", "", "é"], 0), "val"))
    assert result.ids["val"].tolist() == [97, 256, 0xC3, 0xA9, 256]
    assert (result.documents, result.left_out, result.text_bytes) == (2, {"empty": 2}, {"val": 3})


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

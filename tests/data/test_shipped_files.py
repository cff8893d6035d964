"""The files in spherelm/data/shipped: sizes, hashes, provenance, the split by author, and a lossless tokenizer."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import lzma
import re
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "src" / "spherelm" / "data" / "shipped"
BOOKS = ROOT.parent / "shared" / "data" / "books"
SPLITS = ("train", "val")


@cache
def documents(split: str) -> list[dict[str, Any]]:
    with lzma.open(SHIPPED / f"{split}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(SHIPPED / "bpe4096.json"))


@cache
def provenance() -> str:
    return (SHIPPED / "PROVENANCE.md").read_text(encoding="utf-8")


@cache
def script() -> ModuleType:
    """research/build_corpus.py as a module."""
    spec = importlib.util.spec_from_file_location("build_corpus", ROOT / "research" / "build_corpus.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def text_bytes(split: str) -> int:
    return sum(len(document["text"].encode()) for document in documents(split))


def round_trip(text: str) -> str:
    return tokenizer().decode(tokenizer().encode(text).ids, skip_special_tokens=False)


# --- the text -------------------------------------------------------------------------------------------------------


def test_packed_size_is_within_the_package_limit() -> None:
    assert sum((SHIPPED / f"{split}.jsonl.xz").stat().st_size for split in SPLITS) <= 7_500_000


def test_text_size_and_split() -> None:
    train, val = map(text_bytes, SPLITS)
    assert 18_000_000 <= train + val <= 22_000_000
    assert 0.92 <= train / (train + val) <= 0.95


@pytest.mark.parametrize("split", SPLITS)
def test_records(split: str) -> None:
    for document in documents(split):
        assert list(document) == ["id", "title", "author", "year", "text"]
        assert isinstance(document["id"], int)
        assert 1850 <= document["year"] <= 1918
        assert document["title"]
        assert document["author"]
        assert 100_000 <= len(document["text"].encode()) <= 1_000_000
        assert document["text"] == document["text"].strip()
        assert "\r" not in document["text"]


def test_each_book_once_and_no_author_in_both_splits() -> None:
    numbers = [document["id"] for split in SPLITS for document in documents(split)]
    assert len(numbers) == len(set(numbers))
    train, val = ({name for d in documents(split) for name in d["author"].split(" and ")} for split in SPLITS)
    assert not train & val
    assert not {name.split()[-1] for name in train} & {name.split()[-1] for name in val}


def test_trademark_is_not_in_the_text() -> None:
    for split in SPLITS:
        for document in documents(split):
            assert "gutenberg" not in document["text"].lower(), document["title"]


# --- the page that says where it comes from -------------------------------------------------------------------------


def test_provenance_names_every_book() -> None:
    rows = [line.strip("| \n").split(" | ") for line in provenance().splitlines() if re.match(r"\| \d+ \|", line)]
    expected = [
        [str(d["id"]), d["title"], d["author"], str(d["year"]), split, str(len(d["text"].encode()))]
        for split in SPLITS
        for d in documents(split)
    ]
    assert [row[:6] for row in rows] == expected
    assert all(len(row) == 7 and row[6].startswith("`") for row in rows)


def test_provenance_hashes() -> None:
    stated = dict(re.findall(r"\| `([\w.]+)` \| \d+ \| `([0-9a-f]{64})` \|", provenance()))
    contents = {path.name: path.read_bytes() for path in SHIPPED.iterdir() if path.suffix in (".xz", ".json")}
    contents |= {f"{split}.jsonl": lzma.decompress(contents[f"{split}.jsonl.xz"]) for split in SPLITS}
    assert stated == {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}


# --- the tokenizer --------------------------------------------------------------------------------------------------


def test_vocabulary() -> None:
    vocabulary = tokenizer().get_vocab()
    assert tokenizer().get_vocab_size() == len(vocabulary) == 4096
    assert sorted(vocabulary.values()) == list(range(4096))
    assert vocabulary["<|endoftext|>"] == 0


@settings(max_examples=100, deadline=None)
@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    assert round_trip(text) == text


@pytest.mark.parametrize(
    "text", ["", " ", "\n\n  a\t", "naïve — “quoted” 漢字 🙂\u0301", "<|endoftext|>", "\x00\x7f\ufeff"]
)
def test_hard_text_comes_back(text: str) -> None:
    assert round_trip(text) == text


def test_validation_text_comes_back_and_is_compressed() -> None:
    tokens = 0
    for document in documents("val"):
        encoded = tokenizer().encode(document["text"])
        tokens += len(encoded.ids)
        assert tokenizer().decode(encoded.ids, skip_special_tokens=False) == document["text"]
    assert text_bytes("val") / tokens > 3.0


# --- the script -----------------------------------------------------------------------------------------------------


def test_the_script_lists_the_shipped_books() -> None:
    for split in SPLITS:
        listed = {book.id: book.author for book in script().BOOKS[split]}
        assert listed == {document["id"]: document["author"] for document in documents(split)}


def test_selection_made_again_is_the_shipped_text() -> None:
    if not BOOKS.is_dir():
        pytest.skip(f"SKIPPED: the source books are not at {BOOKS}, so the selection cannot be made again")
    records, _ = script().select(BOOKS)
    for split in SPLITS:
        assert records[split] == documents(split)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("“It’s”—he said…", '"It\'s"--he said...'),
        ("a _very\nlong_ word", "a very\nlong word"),
        ("one\n\n[Illustration: A cat]\n\n\ntwo  ", "one\n\ntwo"),
    ],
)
def test_clean(before: str, after: str) -> None:
    assert script().clean(before) == after


def test_body_drops_front_and_back_matter() -> None:
    story = "Once upon a time " * 20
    text = f"A TITLE\n\nCONTENTS\n\n{story.strip()}\n\nShort line.\n\nTHE END"
    assert script().body(text, script().Book(1, "A")) == f"{story.strip()}\n\nShort line."
    assert script().body(text, script().Book(1, "A", start="Once", end="Short")) == story.strip()


def test_a_missing_marker_is_refused() -> None:
    with pytest.raises(ValueError, match="book 1: 'Twice' is not in its text"):
        script().body("Once", script().Book(1, "A", start="Twice"))


def test_an_author_in_both_splits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    book = script().Book
    monkeypatch.setattr(script(), "BOOKS", {"train": (book(1, "A and B"),), "val": (book(2, "B"),)})
    with pytest.raises(ValueError, match="in both splits: B"):
        script().check_splits()


def test_an_author_without_evidence_is_refused() -> None:
    source = {"id": 1, "title": "Emma by Jane Austen", "year": 1815, "source": "x.txt", "text": "EMMA"}
    script().check_author(script().Book(1, "Jane Austen"), source)
    with pytest.raises(ValueError, match="no trace of Anne Bronte"):
        script().check_author(script().Book(1, "Anne Bronte"), source)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no *.jsonl.xz files"),
        (b"not xz", "is not a whole xz file"),
        (lzma.compress(b"\n" * 99)[:-9], "is not a whole xz file"),
        (lzma.compress(b"{"), "is not a whole xz file of JSON lines"),
        (lzma.compress(b'{"id": 1}'), "line 1 lacks source, text, title, year"),
        (lzma.compress(b"[]"), "line 1 lacks {}"),
        (lzma.compress(b""), "of the chosen books"),
    ],
)
def test_bad_books_are_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / "train-000.jsonl.xz").write_bytes(content)
    assert script().main(["--books", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()

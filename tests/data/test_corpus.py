"""The shipped text: its documents are in its data directory, made once,
also when two processes ask at the same time.
"""

from __future__ import annotations

import json
import lzma
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import pytest

from spherelm.data import corpus
from spherelm.data.corpus import shipped_directory, shipped_documents
from spherelm.data.shards import open_tokens
from spherelm.data.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the first book of each split: the whole text takes too long for a test."""
    folder = tmp_path_factory.mktemp("books")
    for split in ("train", "val"):
        (folder / f"{split}.jsonl.xz").write_bytes(lzma.compress(json.dumps(next(shipped_documents(split))).encode()))
    return folder


@pytest.fixture(scope="module")
def directory(books: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "_resource", lambda split: books / f"{split}.jsonl.xz")
        yield shipped_directory(books / "cache")


def test_documents() -> None:
    for split in ("train", "val"):
        first = next(shipped_documents(split))
        assert set(first) >= {"id", "title", "author", "year", "text"}
        assert len(first["text"]) > 10_000
    with pytest.raises(ValueError, match="unknown split 'test'"):
        next(shipped_documents("test"))  # type: ignore[arg-type]


def test_directory_holds_the_documents(directory: Path) -> None:
    tokenizer = load_tokenizer(directory)
    assert tokenizer.fingerprint == load_tokenizer("default").fingerprint
    for split in ("train", "val"):
        tokens, (document,) = open_tokens(directory, split), shipped_documents(split)
        assert tokens.bytes_total == len(document["text"].encode())
        assert tokens.document_offsets.tolist() == [0]
        assert tokens.vocab_size == 4096
        ids = tokens.read(0, len(tokens)).tolist()
        assert ids == [*tokenizer.encode(document["text"]), tokenizer.eos_id]
        assert tokenizer.decode(ids) == document["text"]


def test_made_once_and_nothing_else_left(directory: Path) -> None:
    stamp = (directory / "manifest.json").stat().st_mtime_ns
    assert shipped_directory(directory.parent) == directory
    assert (directory / "manifest.json").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in directory.parent.iterdir()) == [f".{directory.name}.lock", directory.name]


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A two-line text in place of the shipped one; its cache."""
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text(f'{{"text": "{split}"}}\n')
    monkeypatch.setattr(corpus, "_resource", lambda split: tmp_path / f"{split}.jsonl")
    return tmp_path / "cache"


def test_where_the_cache_is(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPHERELM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tiny / "home"))
    assert shipped_directory().parent == tiny / "home" / ".cache" / "spherelm"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tiny / "xdg"))
    assert shipped_directory().parent == tiny / "xdg" / "spherelm"
    monkeypatch.setenv("SPHERELM_CACHE", str(tiny / "own"))
    assert shipped_directory().parent == tiny / "own"


def test_another_text_has_another_name(tiny: Path) -> None:
    first = shipped_directory(tiny)
    (tiny.parent / "val.jsonl").write_text('{"text": "another"}\n')
    assert shipped_directory(tiny) != first


def test_a_cache_that_cannot_be(tiny: Path) -> None:
    tiny.write_text("a file")
    with pytest.raises(OSError, match=r"cannot make the cache .* set SPHERELM_CACHE"):
        shipped_directory(tiny)


def test_the_other_was_first(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where locks do not work, the rename decides, and the later one takes the other's directory."""
    first = shipped_directory(tiny)
    corpus._prepare_into(first)
    assert sorted(path.name for path in tiny.iterdir()) == [f".{first.name}.lock", first.name]
    (first / "manifest.json").unlink()
    with pytest.raises(OSError, match="not empty"):
        corpus._prepare_into(first)


def ask(cache: Path, folder: Path, results: multiprocessing.Queue[str]) -> None:
    corpus._resource = lambda split: folder / f"{split}.jsonl"
    results.put(str(shipped_directory(cache)))


def test_two_processes_at_once(tiny: Path) -> None:
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.Queue[str] = context.Queue()
    both = [context.Process(target=ask, args=(tiny, tiny.parent, results)) for _ in range(2)]
    for process in both:
        process.start()
    found = {results.get(timeout=120) for _ in both}
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert found == {str(shipped_directory(tiny))}
    assert len(open_tokens(Path(found.pop()), "val")) > 1

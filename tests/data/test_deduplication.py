"""Deduplication: exactly the first of equal documents stays, for any workers and after any interruption."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prepared_texts import Interrupted, contents, in_small_blocks, interrupt_after, texts_of

from spherelm.data import encoding
from spherelm.data import prepare as prepare_module
from spherelm.data.deduplication import SeenDigests
from spherelm.data.prepare import prepare
from spherelm.data.shards import ShardError
from spherelm.errors import OutputExistsError

LONG = "one long document of many words " * 40
TEXTS = [f"text {i * i % 23} " * (1 + i * i % 23) for i in range(80)]


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """A long document, lines with repeats, the long one again under another name, and as a line."""
    folder = tmp_path / "in"
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in [*TEXTS[:40], "", *TEXTS[40:], LONG]]
    contents = {"a.txt": LONG, "b.jsonl": "".join(lines), "c.txt": LONG, "d.txt": LONG + "but other"}
    for name, content in contents.items():
        (folder / name).write_text(content)
    return sorted(folder.iterdir())


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_blocks(monkeypatch, 150)


def expected(texts: list[str]) -> list[str]:
    return list(dict.fromkeys(text for text in texts if text))


@given(batches=st.lists(st.lists(st.binary(min_size=1, max_size=2), min_size=1, max_size=40), max_size=25))
def test_the_set_of_digests_is_a_set(batches: list[list[bytes]]) -> None:
    """Few different digests, many of them with zeros at the end, which numpy's strings do not tell from none."""
    seen, ours = set[bytes](), SeenDigests()
    for batch in batches:
        padded = [digest.rjust(1, b"\0").ljust(16, b"\0") for digest in batch]
        fresh = ours.add(np.frombuffer(b"".join(padded), "S16"))
        for digest, new in zip(padded, fresh.tolist(), strict=True):
            assert new == (digest not in seen)
            seen.add(digest)
    assert len(ours._runs) <= 12


@pytest.mark.row("Data at scale")
def test_only_the_first_of_equal_documents_stays(inputs: list[Path], tmp_path: Path) -> None:
    manifest = prepare(inputs, tmp_path / "out", "bytes", deduplicate=True)
    assert texts_of(tmp_path / "out") == expected([LONG, *TEXTS, LONG + "but other"])
    left = len(set(TEXTS))
    assert [entry["documents"] for entry in manifest["inputs"]] == [1, left, 0, 1]
    assert [entry["duplicates_left_out"] for entry in manifest["inputs"]] == [0, 81 - left, 1, 0]
    assert manifest["splits"]["train"]["documents"] == left + 2
    assert manifest["splits"]["train"]["bytes"] == sum(len(text.encode()) for text in texts_of(tmp_path / "out"))
    assert manifest["left_out"] == {"empty": 1, "duplicate": 82 - left}


def test_neither_workers_nor_interruptions_change_a_byte(
    inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"val_fraction": 0.3, "deduplicate": True, "shard_tokens": 600}
    prepare(inputs, tmp_path / "1", "bytes", **settings)
    prepare(inputs, tmp_path / "2", "bytes", workers=2, **settings)
    for results in (1, 3, 4, 2, 7, 5, 3, 9):
        with monkeypatch.context() as patch:
            interrupt_after(patch, results)
            with pytest.raises(Interrupted):
                prepare(inputs, tmp_path / "parts", "bytes", **settings)
        digests = tmp_path / "parts" / ".partial" / "digests.bin"
        digests.write_bytes(digests.read_bytes() + b"rubbish")
    prepare(inputs, tmp_path / "parts", "bytes", **settings)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "parts")
    train, val = texts_of(tmp_path / "1"), texts_of(tmp_path / "1", "val")
    assert sorted(train + val) == sorted(expected([LONG, *TEXTS, LONG + "but other"]))


def test_validation_files_lose_what_is_trained_on(inputs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "val.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in (TEXTS[0], "new", LONG, "new")))
    prepare(inputs[:2], tmp_path / "out", "bytes", val=[tmp_path / "val.jsonl"], deduplicate=True)
    assert texts_of(tmp_path / "out", "val") == ["new"]
    (tmp_path / "val.jsonl").write_text(json.dumps({"text": TEXTS[0]}) + "\n")
    with pytest.raises(ValueError, match=r"every document of .*val\.jsonl is in the training text too"):
        prepare(inputs[:2], tmp_path / "none", "bytes", val=[tmp_path / "val.jsonl"], deduplicate=True)


def test_prepared_with_and_without_are_not_the_same(inputs: list[Path], tmp_path: Path) -> None:
    for name, before in (("a", True), ("b", False)):
        prepare(inputs, tmp_path / name, "bytes", deduplicate=before)
        with pytest.raises(OutputExistsError, match="prepared with another deduplicate"):
            prepare(inputs, tmp_path / name, "bytes", deduplicate=not before)


def test_lost_digests_are_noticed(inputs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dying(*given: Any) -> Iterator[encoding.Encoded]:
        yield from list(encoding.encode_all(*given))[:9]
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "encode_all", dying)
        with pytest.raises(KeyboardInterrupt):
            prepare(inputs, tmp_path / "out", "bytes", deduplicate=True)
    (tmp_path / "out" / ".partial" / "digests.bin").write_bytes(b"short")
    with pytest.raises(ShardError, match="changed since the interruption; delete"):
        prepare(inputs, tmp_path / "out", "bytes", deduplicate=True)

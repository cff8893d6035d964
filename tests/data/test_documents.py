"""Reading inputs: every format gives the same documents, blocks cover the file, every fault is named with its place."""

from __future__ import annotations

import gzip
import json
import lzma
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from spherelm.data.documents import Block, DocumentError, check_input, cut_after, documents_in, format_of, read_blocks

TEXTS = ["one two\n", "", "Zoë 東京 🙂\r\nline\u2028three", '"quoted" \\ {}', "x" * 300]
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def lines(texts: list[str], **settings: Any) -> bytes:
    return "".join(json.dumps({"id": i, "text": t}, **settings) + "\n" for i, t in enumerate(texts)).encode()


def documents(path: Path, **settings: Any) -> list[str]:
    return [text for block in read_blocks(path, **settings) for text in documents_in(block)]


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("size", [1, 50, 1 << 20])
def test_lines(tmp_path: Path, suffix: str, size: int) -> None:
    path = tmp_path / f"a.b.jsonl{suffix}"
    for ascii_only in (True, False):
        path.write_bytes(COMPRESS[suffix](lines(TEXTS, ensure_ascii=ascii_only)))
        assert documents(path, block_size=size) == TEXTS


def test_lines_with_blank_ones_carriage_returns_byte_order_mark_and_no_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n  \n{"text": "b", "more": [1]}')
    assert documents(path) == ["a", "b"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"A.TXT{suffix}"
    path.write_bytes(COMPRESS[suffix]("".join(TEXTS).encode()))
    assert documents(path) == ["".join(TEXTS)]


def test_several_compressed_streams_in_a_row(tmp_path: Path) -> None:
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(b"first ") + compress(b"second"))
        assert documents(path) == ["first second"]


def test_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", text=TEXTS, other=list(range(5)))
    assert documents(path) == documents(path, block_size=1) == TEXTS
    table = pyarrow.table({"text": pyarrow.array(TEXTS * 300, pyarrow.large_string())})
    pyarrow.parquet.write_table(table, path)
    blocks = list(read_blocks(path, block_size=1))
    assert [text for block in blocks for text in documents_in(block)] == TEXTS * 300
    assert [block.first for block in blocks] == [1, 257, 513, 769, 1025, 1281]
    assert blocks[-1].read_bytes == path.stat().st_size


@given(words=st.lists(st.sampled_from(["word", "été", "a", "-", "\n", "2 3", "東京"]), max_size=400),
       size=st.integers(1, 200))  # fmt: skip
def test_long_texts_are_cut_between_words(
    words: list[str], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    text = " ".join(["start", *words])
    path.write_text(text, encoding="utf-8", newline="")
    blocks = list(read_blocks(path, block_size=size))
    assert "".join(str(block.data) for block in blocks) == text
    assert [block.starts for block in blocks] == [True] + [False] * (len(blocks) - 1)
    assert [block.ends for block in blocks] == [False] * (len(blocks) - 1) + [True]
    for before, after in pairwise(blocks):
        assert str(before.data)[-1].isalnum()
        assert str(after.data)[0] == " "
        assert str(after.data)[1].isalnum()
        assert len(str(before.data)) >= size
    assert len(list(read_blocks(path, block_size=size, can_cut=False))) == 1


def test_blocks_do_not_depend_on_compression(tmp_path: Path) -> None:
    """Nor on how much a read returns: the same blocks from all four, beyond the size of one read."""
    text = "some words again and again " * 100_000
    data = {".txt": text.encode(), ".jsonl": lines([text[:1000]] * 3000)}
    for kind, content in data.items():
        results = []
        for suffix, compress in COMPRESS.items():
            path = tmp_path / f"a{kind}{suffix}"
            path.write_bytes(compress(content))
            blocks = list(read_blocks(path, block_size=400_000))
            results.append([(block.data, block.first, block.offset, block.starts, block.ends) for block in blocks])
            assert blocks[-1].read_bytes == path.stat().st_size
        assert len(results[0]) > 4
        assert all(result == results[0] for result in results)


def test_line_blocks_know_where_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS))
    for block in read_blocks(path, block_size=40):
        assert isinstance(block.data, bytes)
        assert path.read_bytes()[block.offset :].startswith(block.data)
        assert path.read_bytes()[: block.offset].count(b"\n") == block.first - 1


def test_digest_is_of_the_document(tmp_path: Path) -> None:
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(b"\xef\xbb\xbfabc"))
        (block,) = read_blocks(path, with_digest=True)
        assert block.data == "abc"
        assert block.digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1


def test_cut_after() -> None:
    assert cut_after("one two three", 0) == 3
    assert cut_after("one two three", 4) == 7
    assert cut_after("one  two, \nthree .a", 0) is None


def test_names() -> None:
    assert format_of(Path("x.jsonl.zst")) == ".jsonl"
    for name in ["x", "x.gz", "x.csv", "x.parquet.gz", "x.txt.bz2", ".txt"]:
        with pytest.raises(DocumentError, match=r"rename it to end in \.txt, \.jsonl"):
            format_of(Path(name))


def test_inputs_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no input file"):
        check_input(tmp_path / "no.txt")
    with pytest.raises(DocumentError, match="is a directory"):
        check_input(tmp_path)
    (tmp_path / "a.txt").touch()
    with pytest.raises(DocumentError, match="is empty"):
        check_input(tmp_path / "a.txt")


def test_compressed_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(DocumentError, match="holds no text"):
        list(read_blocks(tmp_path / "a.txt.gz"))


def test_not_utf8_is_named_with_its_byte(tmp_path: Path) -> None:
    faults = {0: b"\xffabc", 3: b"abc\xe9 def", 1_500_002: b"\xc3\xa9" * 750_001 + b"\xc3(", 4: b"\xef\xbb\xbfa\xff"}
    faults[5] = b"hello\xf0\x9f"  # cut off in a character
    faults[1_048_575] = b"a" * 1_048_575 + b"\xc3("  # the character begins in one read and fails in the next
    for offset, data in faults.items():
        for suffix, compress in COMPRESS.items():
            path = tmp_path / f"a.txt{suffix}"
            path.write_bytes(compress(data))
            with pytest.raises(DocumentError, match=rf"not UTF-8 \(byte {offset}\).*iconv"):
                documents(path)


def test_lines_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xe9"}\n')
    for size in (1, 1 << 20):
        with pytest.raises(DocumentError, match=r"not UTF-8 \(byte 27\)"):
            documents(path, block_size=size)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("nonsense", "line 2: not JSON"),
        ('{"text": "a"', "line 2: not JSON"),
        ("[" * 100_000, "line 2: not JSON"),
        ('{"content": "a"}', 'line 2: no string under "text"'),
        ('{"text": null}', 'line 2: no string under "text"'),
        ('{"text": ["a"]}', 'line 2: no string under "text"'),
        ('["text"]', 'line 2: no string under "text"'),
        ('{"text": "ab\\ud800"}', "line 2: half of a surrogate pair at character 2"),
    ],
)
def test_lines_that_are_no_documents(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    for size in (1, 1 << 20):
        with pytest.raises(DocumentError, match=problem):
            documents(path, block_size=size)


def test_damaged_compression(tmp_path: Path) -> None:
    data = bytes(i * i % 251 for i in range(10_000))
    for suffix in (".gz", ".xz", ".zst"):
        whole = COMPRESS[suffix](data)
        for damaged in (whole[: len(whole) // 2], b"no such format", whole[:40] + b"\0\xff\0\xff" + whole[44:]):
            path = tmp_path / f"a.jsonl{suffix}"
            path.write_bytes(damaged)
            with pytest.raises(DocumentError, match="damaged or cut off"):
                list(read_blocks(path))


def test_parquet_faults(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r'no column "text" \(it has content, id\)'):
        documents(parquet(tmp_path / "a.parquet", content=["x"], id=[1]))
    with pytest.raises(DocumentError, match='row 3: "text" is NoneType'):
        documents(parquet(tmp_path / "a.parquet", text=["x", "y", None]))
    with pytest.raises(DocumentError, match='row 1: "text" is int'):
        documents(parquet(tmp_path / "a.parquet", text=[1]))
    invalid = pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())
    with pytest.raises(DocumentError, match="between rows 1 and 2 is not UTF-8"):
        documents(parquet(tmp_path / "a.parquet", text=invalid))
    data = parquet(tmp_path / "a.parquet", text=["x"] * 100).read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-10])
    with pytest.raises(DocumentError, match="damaged or no Parquet file"):
        documents(tmp_path / "a.parquet")


@pytest.mark.parametrize(("module", "name"), [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet")])
def test_optional_libraries_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"?")
    with pytest.raises(DocumentError, match=r"pip install '\.\[data\]' in a clone of spherelm"):
        list(read_blocks(tmp_path / name))


def test_rows_are_given_as_they_are() -> None:
    assert list(documents_in(Block(Path("x"), "rows", ["a", ""], 0))) == ["a", ""]

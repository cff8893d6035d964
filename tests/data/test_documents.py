"""Reading inputs: every format gives the same documents, blocks cover the file, every fault is named with its place."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
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

from spherelm.data.cutting import Cutter
from spherelm.data.documents import (
    DocumentError,
    check_input,
    files_left_out,
    format_of,
    input_files,
    read_blocks,
    read_lines,
    split_place,
)
from spherelm.data.rows import Bad, RowSettings
from spherelm.data.tokenizer import ByteTokenizer

TEXTS = ["one two\n", "", "Zoë 東京 🙂\r\nline\u2028three", '"quoted" \\ {}', "x" * 300]
CUTTER = Cutter(ByteTokenizer())
COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def lines(texts: list[str], **settings: Any) -> bytes:
    return "".join(json.dumps({"id": i, "text": t}, **settings) + "\n" for i, t in enumerate(texts)).encode()


def documents(path: Path, **settings: Any) -> list[str]:
    return [text for block in read_blocks(path, **settings) for text in block.texts]


def parquet(path: Path, **columns: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


@pytest.mark.row("Input files")
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
    assert [text for block in blocks for text in block.texts] == TEXTS * 300
    assert [len(block.texts) for block in blocks] == [256] * 5 + [220]
    assert blocks[-1].read_bytes == path.stat().st_size
    for suffix, compress in COMPRESS.items():
        (tmp_path / f"b.parquet{suffix}").write_bytes(compress(path.read_bytes()))
        assert documents(tmp_path / f"b.parquet{suffix}") == TEXTS * 300


@given(words=st.lists(st.sampled_from(["word", "été", "a", "-", "\n", "2 3", "東京"]), max_size=400),
       size=st.integers(1, 200))  # fmt: skip
def test_long_texts_are_cut_and_nothing_is_lost(
    words: list[str], size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    text = " ".join(["start", *words])
    path.write_text(text, encoding="utf-8", newline="")
    blocks = list(read_blocks(path, block_size=size, cutter=CUTTER))
    assert "".join(text for block in blocks for text in block.texts) == text
    assert [block.starts for block in blocks] == [True] + [False] * (len(blocks) - 1)
    assert [block.ends for block in blocks] == [False] * (len(blocks) - 1) + [True]
    for before, after in pairwise(blocks):
        assert after.safe
        assert after.context == before.texts[0][-1]
        assert len(before.texts[0]) >= size
    assert len(list(read_blocks(path, block_size=size))) == 1


def test_blocks_do_not_depend_on_compression(tmp_path: Path) -> None:
    """Nor on how much a read returns: the same blocks from all four, beyond the size of one read."""
    text = "some words again and again " * 100_000
    data = {".txt": text.encode(), ".jsonl": lines([text[:1000]] * 3000)}
    for kind, content in data.items():
        results = []
        for suffix, compress in COMPRESS.items():
            path = tmp_path / f"a{kind}{suffix}"
            path.write_bytes(compress(content))
            blocks = list(read_blocks(path, block_size=400_000, cutter=CUTTER))
            results.append([(block.texts, block.starts, block.ends) for block in blocks])
            assert blocks[-1].read_bytes == path.stat().st_size
        assert len(results[0]) > 4
        assert all(result == results[0] for result in results)


def test_blocks_of_lines_end_with_the_line_that_fills_them(tmp_path: Path) -> None:
    """So that shards, which end with blocks, are those of earlier versions."""
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(TEXTS) + b"\n" * 50 + lines(TEXTS))
    for size in (1, 40, 100, 1000):
        content, counts = path.read_bytes(), list[int]()
        while content:
            end = content.find(b"\n", size - 1) + 1 or len(content)
            counts.append(len([line for line in content[:end].split(b"\n") if line]))
            content = content[end:]
        assert [len(block.texts) for block in read_blocks(path, block_size=size)] == counts


def test_digest_is_of_the_document(tmp_path: Path) -> None:
    for suffix, compress in COMPRESS.items():
        path = tmp_path / f"a.txt{suffix}"
        path.write_bytes(compress(b"\xef\xbb\xbfabc"))
        (block,) = read_blocks(path, with_digest=True)
        assert block.texts == ["abc"]
        assert block.digest == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, B.1


def test_names() -> None:
    assert format_of(Path("x.jsonl.zst")) == ".jsonl"
    for name in ["x", "x.gz", "x.docx", "x.txt.lz4", ".txt"]:
        with pytest.raises(DocumentError, match=r"rename it to end in \.txt, \.md, \.jsonl"):
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
    assert documents(tmp_path / "a.txt.gz") == [""]


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
        ('{"content": "a", "b": {"c": 1}}', r'line 2: no string under "text" \(it has content, b\.c\); .* --field'),
        (
            '{"text": null}',
            r'line 2: no string under "text" \(it is null\).* or leave such rows out with --skip-bad',
        ),
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


NOISE = "".join(chr(32 + i * i % 251) for i in range(10_000))
COMPRESSED = {suffix: compress for suffix, compress in COMPRESS.items() if suffix}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("streams", [1, 3])
def test_damaged_compression(tmp_path: Path, suffix: str, streams: int) -> None:
    """Refused in whichever stream the damage is, whatever stands behind the last one,
    and wherever a file is cut off.
    """
    stream = COMPRESSED[suffix](NOISE.encode())
    whole, last = stream * streams, len(stream) * (streams - 1)
    path = tmp_path / f"a.txt{suffix}"
    faults = [whole[: last + size] for size in (1, 5, len(stream) // 2, len(stream) - 1)]
    faults += [whole[:last] + b"no such format", whole + b"trailing garbage", whole + b"x", whole + b"\0\0\0\0x"]
    faults += [whole[: last + 40] + b"\0\xff\0\xff" + whole[last + 44 :]]
    for content in faults:
        path.write_bytes(content)
        with pytest.raises(DocumentError, match="damaged or cut off"):
            list(read_blocks(path))
        with pytest.raises(DocumentError, match="damaged or cut off"):
            read_lines(path)
    path.write_bytes(whole + bytes(512))
    assert documents(path) == [NOISE * streams]


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_an_error_of_the_disk_is_not_called_damage(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            raise OSError("the disk is gone")

    monkeypatch.setattr("builtins.open", lambda *given: Broken())
    with pytest.raises(OSError, match="the disk is gone"):
        list(read_blocks(tmp_path / f"a.jsonl{suffix}"))


def test_parquet_faults(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r'no column "text" \(it has content, id\)'):
        documents(parquet(tmp_path / "a.parquet", content=["x"], id=[1]))
    with pytest.raises(DocumentError, match=r'row 3: no string under "text" \(it is null\)'):
        documents(parquet(tmp_path / "a.parquet", text=["x", "y", None]))
    with pytest.raises(DocumentError, match=r'row 1: no string under "text" \(it is a number\)'):
        documents(parquet(tmp_path / "a.parquet", text=[1]))
    path = parquet(tmp_path / "a.parquet", body=[{"text": "x", "n": {"m": 1}}], tags=[["a"]])
    for field in ("body.words", "body.text.more", "other"):
        with pytest.raises(DocumentError, match=rf'no column "{field}" \(it has body\.text, body\.n\.m, tags'):
            documents(path, rows=RowSettings(field))
    for field in ("body", "body.n", "tags"):
        with pytest.raises(DocumentError, match=rf'row 1: no string under "{field}" \(it is (an object|a list)\)'):
            documents(path, rows=RowSettings(field))
    invalid = pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())
    with pytest.raises(DocumentError, match="between rows 1 and 2 is not UTF-8"):
        documents(parquet(tmp_path / "a.parquet", text=invalid))
    data = parquet(tmp_path / "a.parquet", text=["x"] * 100).read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-10])
    with pytest.raises(DocumentError, match="damaged, or not a Parquet file"):
        documents(tmp_path / "a.parquet")


@pytest.mark.parametrize(("module", "name"), [("zstandard", "a.txt.zst"), ("pyarrow", "a.parquet")])
def test_optional_libraries_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, name: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / name).write_bytes(b"?")
    with pytest.raises(DocumentError, match=r"pip install '\.\[data\]' in a clone of spherelm"):
        list(read_blocks(tmp_path / name))


@pytest.mark.parametrize("suffix", COMPRESS)
def test_json_is_known_by_its_content(tmp_path: Path, suffix: str) -> None:
    """A list of objects or strings, on one line or many, or a row a line; in any size of blocks and reads."""
    records = [{"text": text, "n": [1, {"text": "]"}]} for text in TEXTS * 40]
    path = tmp_path / f"c4-train.00000-of-01024.json{suffix}"
    texts = [
        json.dumps(records),
        json.dumps(records, indent=2),
        "\n " + json.dumps(TEXTS * 40),
        lines(TEXTS * 40).decode(),
    ]
    for content in texts:
        path.write_bytes(COMPRESS[suffix](content.encode()))
        assert documents(path) == documents(path, block_size=100) == TEXTS * 40
        assert len(list(read_blocks(path, block_size=100))) > 10


def test_lists_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content, problem in [('["a"] ["b"]', "not JSON"), ('["a", "b"', "not JSON"), ('["a" "b"]', "not JSON"),
                             ("[3]", "entry 1: no string"), ('["a", "b\xe9"]', "not UTF-8")]:  # fmt: skip
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(DocumentError, match=problem):
            documents(path)
    path.write_bytes(codecs.BOM_UTF8 + b"\n[]")
    assert documents(path) == []


@pytest.mark.row("Input files")
@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize(("kind", "delimiter"), [(".csv", ","), (".tsv", "\t")])
def test_tables(tmp_path: Path, suffix: str, kind: str, delimiter: str) -> None:
    file = io.StringIO(newline="")
    table = csv.writer(file, delimiter=delimiter)
    table.writerows([("id", "content"), *enumerate([*TEXTS, "long " * 50_000])])
    path = tmp_path / f"a{kind}{suffix}"
    path.write_bytes(COMPRESS[suffix](file.getvalue().encode()))
    for size in (1, 1 << 20):
        assert documents(path, rows=RowSettings("content"), block_size=size) == [*TEXTS, "long " * 50_000]
    with pytest.raises(DocumentError, match=r'no column "text" \(it has id, content\): name another with --field'):
        documents(path)
    path.write_bytes(COMPRESS[suffix](f'text{delimiter}b\n1{delimiter}"2\n'.encode()))
    with pytest.raises(DocumentError, match="line 2: not CSV"):
        documents(path)


def test_fields_within_fields(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"body": {"text": text}, "n": 0}) + "\n" for text in TEXTS))
    (tmp_path / "a.json").write_text(json.dumps([{"body": {"text": text}} for text in TEXTS]))
    parquet(tmp_path / "a.parquet", body=[{"text": text, "n": 0} for text in TEXTS], n=list(range(5)))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"body.text": text, "body": 0}) + "\n" for text in TEXTS))
    for name in ("a.jsonl", "a.json", "a.parquet", "b.jsonl"):
        assert documents(tmp_path / name, rows=RowSettings("body.text")) == TEXTS
    with pytest.raises(DocumentError, match=r'no string under "body" \(it is an object\)'):
        documents(tmp_path / "a.jsonl", rows=RowSettings("body"))
    with pytest.raises(DocumentError, match=r"it has body\.text, n"):
        documents(tmp_path / "a.jsonl", rows=RowSettings("body.words"))


def test_bad_rows_are_left_out_if_asked_for(tmp_path: Path) -> None:
    bad = [
        b'{"text": null}',
        b'{"text": "\\ud800"}',
        b'{"text": "cut off',
        b'{"other": "a"}',
        b"[1]",
        b'{"text": "\xe9"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(line + b'\n{"text": "good"}\n' for line in bad))
    found = documents(path, rows=RowSettings(skip_bad=True))
    assert found[1::2] == ["good"] * len(bad)
    assert all(isinstance(text, Bad) for text in found[::2])
    field = 'no string under "text"'
    assert found[::2] == [field, "half of a surrogate pair", "not JSON", field, field, "not UTF-8"]
    for line in bad:
        path.write_bytes(line + b"\n")
        with pytest.raises(DocumentError, match=r"line 1: .*--skip-bad|not UTF-8"):
            documents(path)
    parquet(tmp_path / "a.parquet", text=["a", None, "b"])
    assert documents(tmp_path / "a.parquet", rows=RowSettings(skip_bad=True)) == ["a", field, "b"]


def test_utf_16_is_named(tmp_path: Path) -> None:
    for name, content in (
        ("a.txt", "short text"),
        ("a.jsonl", '{"text": "a"}\n'),
        ("a.json", '["a"]'),
        ("a.csv", "text\na"),
    ):
        for codec, found in (("utf-16", "UTF-16"), ("utf-32", "UTF-32")):
            mark = codecs.BOM_UTF16_BE if codec == "utf-16" else codecs.BOM_UTF32_BE
            for data in (content.encode(codec), mark + content.encode(f"{codec}-be")):
                (tmp_path / name).write_bytes(data)
                with pytest.raises(
                    DocumentError, match=rf"is {found}, not UTF-8: convert it, iconv -f {found} -t UTF-8 a"
                ):
                    documents(tmp_path / name)


@pytest.mark.row("Input files")
def test_directories_and_patterns(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl.gz", "sub/c.md", "notes.docx", ".hidden.txt", ".git/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    names = [file.relative_to(tmp_path).as_posix() for file in input_files(tmp_path)]
    assert names == ["a.jsonl.gz", "b.txt", "sub/c.md"]
    assert input_files(tmp_path / "[ab].*") == [tmp_path / "a.jsonl.gz", tmp_path / "b.txt"]
    assert input_files(tmp_path / "b.txt") == [tmp_path / "b.txt"]
    with pytest.raises(FileNotFoundError, match=r"no input file .*\*\.csv"):
        input_files(tmp_path / "*.csv")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DocumentError, match="has no files with text that end in"):
        input_files(tmp_path / "empty")
    (tmp_path / "sub" / "nothing.txt").touch()
    assert files_left_out(tmp_path) == {"of an unknown kind (.docx)": 1, "empty": 1}
    assert files_left_out(tmp_path / "*") == {"of an unknown kind (.docx)": 1}
    assert not files_left_out(tmp_path / "b.txt")
    assert input_files(tmp_path / "**" / "*t*") == [tmp_path / "b.txt"]


@given(text=st.text(alphabet=" \nab", min_size=2, max_size=200), fraction=st.floats(0.01, 0.99))
def test_a_text_is_split_at_the_nearest_line(
    text: str, fraction: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("texts") / "a.txt"
    path.write_text(text, newline="")
    exact = round(len(text) * (1 - fraction))
    try:
        place = split_place(path, fraction)
    except DocumentError:
        assert exact in (0, len(text))
        return
    assert 0 < place < len(text)
    for space in "\n ":
        if space in text[:-1]:
            assert text[place - 1] == space
            assert space not in text[min(place, exact) : max(place, exact) - 1][:-1] or place < exact
            return
    assert place == exact

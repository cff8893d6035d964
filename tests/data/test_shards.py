"""Token shards: what was written is read, across files; every kind of damage is named."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from spherelm.data.prepare import prepare
from spherelm.data.shards import Shard, ShardError, ShardWriter, Tokens, open_tokens, token_dtype
from spherelm.data.tokenizer import ByteTokenizer

EOS = 256


class WideTokenizer(ByteTokenizer):
    """Bytes under a vocabulary that needs uint32."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = 100_000


def shard_of(path: Path, *texts: str) -> Shard:
    tokenizer = ByteTokenizer()
    tiny.write_shard(path, map(tokenizer.encode, texts), tokenizer, sum(len(text.encode()) for text in texts))
    return Shard(path)


def test_writes_documents_with_end_tokens(tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "a.bin", "ab", "", "é")
    assert shard.tokens.tolist() == [97, 98, EOS, EOS, 0xC3, 0xA9, EOS]
    assert shard.document_starts.tolist() == [0, 3, 4]
    assert (shard.header.text_bytes, shard.header.documents, shard.header.dtype) == (4, 3, "uint16")
    shard.verify()


def test_layout_is_as_documented(tmp_path: Path) -> None:
    """Read with struct and numpy alone."""
    path = tmp_path / "a.bin"
    shard_of(path, "hello", "you")
    data = path.read_bytes()
    magic, version, length, checksum = struct.unpack_from("<8sII32s", data)
    text = data[48 : 48 + length]
    header = json.loads(text)
    assert (magic, version, checksum) == (b"\x93SPHERE\n", 1, hashlib.sha256(text).digest())
    body = np.frombuffer(data, "<u2", header["tokens"], 4096)
    assert hashlib.sha256(body.tobytes()).hexdigest() == header["body_sha256"]
    assert bytes(body[:5].tolist()) == b"hello"
    assert np.frombuffer(data[-16:], "<i8").tolist() == [0, 6]


def test_width_follows_the_vocabulary(tmp_path: Path) -> None:
    assert [token_dtype(n).name for n in (257, 65536, 65537)] == ["uint16", "uint16", "uint32"]
    tiny.write_shard(tmp_path / "a.bin", [[99_999]], WideTokenizer(), 1)
    assert Shard(tmp_path / "a.bin").tokens.tolist() == [99_999, EOS]


@given(texts=st.lists(st.binary(max_size=9), min_size=1, max_size=8), cuts=st.lists(st.integers(1, 20), max_size=5))
def test_pieces_and_resumption_do_not_matter(
    texts: list[bytes], cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Appended in any pieces, with a new writer from the saved state and rubbish behind it each time: the same file."""
    directory = tmp_path_factory.mktemp("shards")
    tokenizer = ByteTokenizer()
    tiny.write_shard(directory / "whole.bin", [list(text) for text in texts], tokenizer, 0)
    ids = [i for text in texts for i in [*text, EOS]]
    writer = ShardWriter(directory / "pieces.bin", tokenizer)
    for begin, end in zip([0, *sorted(cuts)], [*sorted(cuts), len(ids)], strict=True):
        writer.append(ids[begin:end], 0)
        writer.flush()
        state = writer.state()
        writer.append([1, EOS], 0)
        writer.close()
        writer = ShardWriter(directory / "pieces.bin", tokenizer, state=json.loads(json.dumps(state)))
    writer.finish()
    assert (directory / "pieces.bin").read_bytes() == (directory / "whole.bin").read_bytes()


def test_resuming_on_changed_tokens_is_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "a.bin", ByteTokenizer())
    writer.append([1, 2, 3], 3)
    writer.flush()
    state = writer.state()
    writer.close()
    damage(tmp_path / "a.bin", 4096)
    with pytest.raises(ShardError, match="changed since the interruption"):
        ShardWriter(tmp_path / "a.bin", ByteTokenizer(), state=state)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(ShardError, match="changed since the interruption"):
        ShardWriter(tmp_path / "a.bin", ByteTokenizer(), state=state)


@pytest.mark.parametrize("bad", [257, 70_000, -1])
def test_ids_outside_the_vocabulary_are_not_written(tmp_path: Path, bad: int) -> None:
    with pytest.raises(ShardError, match=f"token id {bad} outside the vocabulary of 257"):
        tiny.write_shard(tmp_path / "a.bin", [[1, bad]], ByteTokenizer(), 2)
    with pytest.raises(ShardError, match="damaged"):
        Shard(tmp_path / "a.bin")


def test_a_shard_without_tokens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="no tokens"):
        tiny.write_shard(tmp_path / "a.bin", [], ByteTokenizer(), 0)


def damage(path: Path, position: int, value: bytes | None = None) -> None:
    data = bytearray(path.read_bytes())
    data[position : position + len(value or b"?")] = value or bytes([data[position] ^ 1])
    path.write_bytes(data)


def resealed(path: Path, **changes: Any) -> None:
    """Change header fields and mend the checksum: what a buggy writer would leave."""
    data = bytearray(path.read_bytes())
    length = struct.unpack_from("<I", data, 12)[0]
    text = json.dumps({**json.loads(data[48 : 48 + length]), **changes}).encode()
    data[48:4096] = text.ljust(4048, b"\0")
    struct.pack_into("<I32s", data, 12, len(text), hashlib.sha256(text).digest())
    path.write_bytes(data)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (lambda p: p.unlink(), "is missing"),
    "empty": (lambda p: p.write_bytes(b""), "not a token shard"),
    "other file": (lambda p: p.write_bytes(b"text " * 2000), "not a token shard"),
    "magic": (lambda p: damage(p, 1), "not a token shard"),
    "version": (lambda p: damage(p, 8, struct.pack("<I", 2)), "shard version 2, this spherelm reads version 1"),
    "header length": (lambda p: damage(p, 12, struct.pack("<I", 1 << 31)), "damaged header"),
    "header": (lambda p: damage(p, 60), "damaged header"),
    "header checksum": (lambda p: damage(p, 20), "damaged header"),
    "header fields": (lambda p: resealed(p, more=1), "unknown fields"),
    "dtype": (lambda p: resealed(p, dtype="float64"), "unknown fields"),
    "truncated": (lambda p: p.write_bytes(p.read_bytes()[:-3]), "truncated"),
    "truncated body": (lambda p: p.write_bytes(p.read_bytes()[:4100]), "truncated"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"x"), "longer than its header says"),
    "table": (lambda p: damage(p, p.stat().st_size - 1), "damaged document table"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_found_on_opening(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a.bin"
    shard_of(path, "hello", "you")
    act, problem = DAMAGES[kind]
    act(path)
    with pytest.raises(ShardError, match=problem) as error:
        Shard(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert ";" in str(error.value), "the message names a fix"


def test_damaged_body_is_found_by_verify(tmp_path: Path) -> None:
    shard_of(tmp_path / "a.bin", "hello")
    damage(tmp_path / "a.bin", 4096)
    with pytest.raises(ShardError, match="do not match the sha256"):
        Shard(tmp_path / "a.bin").verify()


def test_ids_outside_the_vocabulary_are_found_on_reading(tmp_path: Path) -> None:
    shard_of(tmp_path / "a.bin", "hello")
    resealed(tmp_path / "a.bin", vocab_size=110)
    tokens = Tokens([Shard(tmp_path / "a.bin")], tmp_path, "train")
    assert tokens.read(0, 2).tolist() == [104, 101]
    with pytest.raises(ShardError, match="token id 111 >= vocab_size 110"):
        tokens.read(0, 5)
    with pytest.raises(ShardError, match=r"token id 256 >= vocab_size 110"):
        tokens.verify()


def test_tokens_are_one_row_over_shards(tmp_path: Path) -> None:
    texts = [["ab", "c"], ["defg"], ["h"]]
    shards = [shard_of(tmp_path / f"{i}.bin", *group) for i, group in enumerate(texts)]
    tokens = Tokens(shards, tmp_path, "train")
    whole = [i for group in texts for text in group for i in [*text.encode(), EOS]]
    assert len(tokens) == len(whole) == 12
    for start in range(13):
        for length in range(13 - start):
            assert tokens.read(start, length).tolist() == whole[start : start + length]
    assert tokens.read(0, 3).dtype == np.int64
    assert tokens.document_offsets.tolist() == [0, 3, 5, 10]
    assert (tokens.bytes_total, tokens.vocab_size, tokens.eos_id) == (8, 257, 256)
    for start, length in [(-1, 2), (11, 2), (0, -1)]:
        with pytest.raises(IndexError, match="outside 0 to 12"):
            tokens.read(start, length)


def test_fingerprint_is_of_the_tokens(tmp_path: Path) -> None:
    def of(*groups: list[str]) -> str:
        shards = [shard_of(tmp_path / f"{i}.bin", *group) for i, group in enumerate(groups)]
        return Tokens(shards, tmp_path, "train").fingerprint

    assert of(["a"], ["b"]) == of(["a"], ["b"])
    assert len({of(["a"], ["b"]), of(["b"], ["a"]), of(["a", "b"]), of(["a"])}) == 4


def test_shards_of_two_tokenizers_do_not_mix(tmp_path: Path) -> None:
    tiny.write_shard(tmp_path / "b.bin", [[1]], WideTokenizer(), 1)
    other = Shard(tmp_path / "b.bin")
    resealed(tmp_path / "b.bin", tokenizer_fingerprint="other")
    with pytest.raises(ShardError, match="another tokenizer"):
        Tokens([other, Shard(tmp_path / "b.bin")], tmp_path, "train")


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("some text")
    prepare([tmp_path / "a.txt"], tmp_path / "out", "bytes")
    return tmp_path / "out"


def test_opening_a_directory(prepared: Path) -> None:
    tokens = open_tokens(prepared, "train")
    assert tokens.read(0, len(tokens)).tolist() == [*b"some text", EOS]
    assert tokens.tokenizer_fingerprint == ByteTokenizer().fingerprint
    assert "10 tokens" in repr(tokens)
    tokens.verify()


def test_what_is_no_data_directory(tmp_path: Path, prepared: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no data directory"):
        open_tokens(tmp_path / "nowhere", "train")
    with pytest.raises(FileNotFoundError, match="spherelm data prepare"):
        open_tokens(tmp_path, "train")
    with pytest.raises(ValueError, match=r"no 'val' split; .*--val-fraction"):
        open_tokens(prepared, "val")
    (tmp_path / "half" / ".partial").mkdir(parents=True)
    with pytest.raises(ShardError, match="unfinished; run the same spherelm data prepare command again"):
        open_tokens(tmp_path / "half", "train")


@pytest.mark.parametrize("text", ["{", "[]", '{"splits": {"train": {"shards": []}}}', '{"splits": 1}', "\xff"])
def test_damaged_manifest(prepared: Path, text: str) -> None:
    (prepared / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ShardError, match=r"manifest\.json: damaged"):
        open_tokens(prepared, "train")


def test_a_shard_of_other_data_is_found(prepared: Path) -> None:
    shard_of(prepared / "train-00000.bin", "other text")
    with pytest.raises(ShardError, match=r"not the shard that manifest\.json describes"):
        open_tokens(prepared, "train")

"""Token files of other programs: read in place, refused where they cannot be told, written byte for byte.

The writers here follow the published layouts by `struct` and `array` alone.
"""

from __future__ import annotations

import array
import itertools
import json
import random
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch

from spherelm.data import token_files
from spherelm.data.convert import convert
from spherelm.data.prepare import prepare
from spherelm.data.shards import Tokens, open_tokens
from spherelm.data.sources import parse_data
from spherelm.data.token_files import TokenFile, find_files, open_files
from spherelm.data.tokenizer import ByteTokenizer
from spherelm.errors import UserError
from spherelm.runs.loading import load_model
from spherelm.train.batches import open_data
from spherelm.train.trainer import train

EOS = 256
TEXTS = {split: [tiny.text(seed, 5 + seed % 7) for seed in range(begin, end)]
         for split, begin, end in (("train", 0, 60), ("val", 60, 80))}  # fmt: skip
Documents = Sequence[Sequence[int]]
Write = Callable[[Path, str, Documents], None]


def documents(split: str) -> list[list[int]]:
    return [[*text.encode(), EOS] for text in TEXTS[split]]


def row(split: str) -> list[int]:
    return list(itertools.chain.from_iterable(documents(split)))


def numbers(code: str, ids: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(ids)}{code}", *ids)


def nanogpt(directory: Path, split: str, texts: Documents) -> None:
    (directory / f"{split}.bin").write_bytes(numbers("H", [*itertools.chain.from_iterable(texts)]))


def llmc(
    directory: Path, split: str, texts: Documents, magic: int = 20240520, version: int = 1, code: str = "H"
) -> None:
    """Two files a split, as fineweb.py writes them: name, split and a number of six digits."""
    for number, part in enumerate((texts[: len(texts) // 2], texts[len(texts) // 2 :])):
        ids = [*itertools.chain.from_iterable(part)]
        header = array.array("i", [magic, version, len(ids), *[0] * 253]).tobytes()
        (directory / f"fineweb_{split}_{number:06d}.bin").write_bytes(header + numbers(code, ids))


def llama3(directory: Path, split: str, texts: Documents) -> None:
    llmc(directory, split, texts, 20240801, 7, "I")


def megatron(directory: Path, split: str, texts: Documents) -> None:
    """`preprocess_data.py --append-eod`: a sequence a document."""
    lengths = [len(text) for text in texts]
    offsets = [2 * sum(lengths[:i]) for i in range(len(lengths))]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 8, len(lengths), len(lengths) + 1)
    index += numbers("i", lengths) + numbers("q", offsets) + numbers("q", range(len(lengths) + 1))
    (directory / f"{split}.idx").write_bytes(index)
    nanogpt(directory, split, texts)


WRITE: dict[str, Write] = {"nanogpt": nanogpt, "llmc": llmc, "llama3": llama3, "megatron": megatron}


@pytest.fixture(params=WRITE)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def made(kind: str, directory: Path) -> Path:
    directory.mkdir()
    for split in TEXTS:
        WRITE[kind](directory, split, documents(split))
    return directory


def ids(tokens: Tokens) -> list[int]:
    return tokens.read(0, len(tokens)).tolist()


@pytest.mark.row("Token files")
def test_read_as_they_are(kind: str, tmp_path: Path) -> None:
    directory = made(kind, tmp_path / "in")
    before = {path: path.stat().st_mtime_ns for path in directory.iterdir()}
    for split in ("train", "val"):
        tokens = open_files(directory, split, ByteTokenizer(), None)
        assert ids(tokens) == row(split)
        starts = [0, *itertools.accumulate(map(len, documents(split)))][:-1]
        assert tokens.document_offsets.tolist() == starts
        assert tokens.bytes_total == sum(len(text.encode()) for text in TEXTS[split])
        assert (tokens.vocab_size, tokens.eos_id) == (257, EOS)
        tokens.verify()
        assert not tokens.shards[0].tokens.flags.owndata, "a memory map, no copy"
    assert {path: path.stat().st_mtime_ns for path in directory.iterdir()} == before


def test_a_run_is_that_of_the_prepared_text(kind: str, tmp_path: Path) -> None:
    """The same batches and losses, to the last bit, and the run has its tokenizer."""
    for split, texts in TEXTS.items():
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([tmp_path / "train.jsonl"], tmp_path / "own", "bytes", val=[tmp_path / "val.jsonl"])
    runs = {"own": str(tmp_path / "own"), "other": f"{made(kind, tmp_path / 'in')},tokenizer=bytes"}
    one, other = (open_data(config(data)) for data in runs.values())
    assert other.tokens_per_byte == pytest.approx(one.tokens_per_byte, rel=1e-12)
    assert torch.equal(one.held_out[0].batch[0], other.held_out[0].batch[0])
    for step in (0, 7, 300):
        assert torch.equal(one.loader.batch(step)[0], other.loader.batch(step)[0])
    if kind == "nanogpt":
        losses = {
            name: train(config(data), tmp_path / name / "run", show_progress=False) for name, data in runs.items()
        }
        assert losses["own"] == losses["other"]
        assert load_model(tmp_path / "other" / "run").config.vocab_size == 257
        (tmp_path / "in" / "train.bin").touch()  # so that resuming reads it whole
        train(config(runs["other"]), tmp_path / "other" / "run", resume=True, show_progress=False)


def config(data: str) -> Any:
    return tiny.run_config("ngpt", Path(data), eval_windows=10, mask_documents=True)


def test_written_byte_for_byte(kind: str, tmp_path: Path) -> None:
    directory = made(kind, tmp_path / "in")
    counts = convert(f"{directory},tokenizer=bytes", tmp_path / "out", kind if kind != "llama3" else "llmc")
    assert counts == {split: len(row(split)) for split in TEXTS}
    if kind == "llama3":  # its ids need no 32 bits, so they are written in 16
        directory = made("llmc", tmp_path / "narrow")
    originals = sorted(directory.iterdir())
    written = sorted(path for path in (tmp_path / "out").iterdir() if path.suffix in (".bin", ".idx"))
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in originals]
    again = parse_data(str(tmp_path / "out"))  # its tokenizer lies beside it
    assert again.vocab_size == 257


@pytest.mark.parametrize("target", ["nanogpt", "llmc", "megatron"])
def test_prepared_text_in_other_formats_and_back(target: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS["train"]))
    prepare([tmp_path / "a.jsonl"], tmp_path / "own", "bytes", val_fraction=0.3, shard_tokens=300)
    convert(str(tmp_path / "own"), tmp_path / "one", target)
    convert(str(tmp_path / "one"), tmp_path / "two", "llmc")
    convert(str(tmp_path / "two"), tmp_path / "three", target)
    for split in ("train", "val"):
        own = open_tokens(tmp_path / "own", split)
        for name in ("one", "two", "three"):
            other = open_files(tmp_path / name, split, ByteTokenizer(), None)
            assert ids(other) == ids(own)
            assert other.document_offsets.tolist() == own.document_offsets.tolist()
    if target != "llmc":
        for path in (tmp_path / "one").iterdir():
            assert path.read_bytes() == (tmp_path / "three" / path.name).read_bytes()
    with pytest.raises(UserError, match="already holds something"):
        convert(str(tmp_path / "own"), tmp_path / "one", target)


class Wide(ByteTokenizer):
    """Bytes under a vocabulary that needs 32 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = 100_000


def test_32_bits(tmp_path: Path) -> None:
    """Raw ids of a large vocabulary, and those whose upper halves are all empty."""
    wide = [[*random.Random(0).choices(range(100_000), k=999), EOS]]
    for ids_written, tokenizer in ((wide, Wide()), (documents("train"), ByteTokenizer())):
        flat = [*itertools.chain.from_iterable(ids_written)]
        (tmp_path / "train.bin").write_bytes(numbers("I", flat))
        assert TokenFile(tmp_path / "train.bin", tokenizer).tokens.tolist() == flat
    (tmp_path / "train.bin").write_bytes(numbers("I", wide[0]))
    tokens = Tokens([TokenFile(tmp_path / "train.bin", Wide())], tmp_path, "train")
    for name, write in token_files.WRITERS.items():
        (tmp_path / name).mkdir()
        write(tmp_path / name, tokens)
        assert ids(open_files(tmp_path / name, "train", Wide(), None)) == wide[0]
    llama3(tmp_path, "train", [[], wide[0]])
    assert (tmp_path / "llmc" / "train_000000.bin").read_bytes() == (tmp_path / "fineweb_train_000001.bin").read_bytes()


@pytest.mark.parametrize("code", [("B", 1), ("i", 4), ("q", 5)])
def test_kinds_of_megatron(code: tuple[str, int], tmp_path: Path) -> None:
    """Documents of several sequences, ids of other widths, and a negative one."""
    texts = [[1, 2, 3], [4], [5, 6]]
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code[1], 3, 3)
    width = struct.calcsize(code[0])
    index += numbers("i", [3, 1, 2]) + numbers("q", [0, 3 * width, 4 * width]) + numbers("q", [0, 2, 3])
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "a.bin").write_bytes(numbers(code[0], [*itertools.chain(*texts)]))
    file = TokenFile(tmp_path / "a.bin", ByteTokenizer())
    assert (file.tokens.tolist(), file.document_starts.tolist()) == ([1, 2, 3, 4, 5, 6], [0, 4])
    if code[0] != "B":
        (tmp_path / "a.bin").write_bytes(numbers(code[0], [1, 2, 3, -4, 5, 6]))
        with pytest.raises(UserError, match="token id -4 is not among the 257 of tokenizer bytes"):
            TokenFile(tmp_path / "a.bin", ByteTokenizer())


@pytest.mark.parametrize("part", [0.05, 0.3, 0.9])
def test_validation_text_is_cut_off_where_a_document_starts(kind: str, part: float, tmp_path: Path) -> None:
    directory = made(kind, tmp_path / "in")
    for path in directory.glob("*val*"):
        path.unlink()
    with pytest.raises(UserError, match=r"has no validation text: add val=0\.01, the fraction to hold out"):
        open_files(directory, "val", ByteTokenizer(), None)
    train, val = (open_files(directory, split, ByteTokenizer(), str(part)) for split in ("train", "val"))
    assert ids(train) + ids(val) == row("train")
    assert ids(train)[-1] == EOS
    assert [*train.document_offsets.tolist(), *(val.document_offsets + len(train)).tolist()] == [
        0, *itertools.accumulate(map(len, documents("train")))][:-1]  # fmt: skip
    longest = max(map(len, documents("train")))
    assert 0 <= part * len(row("train")) - len(val) < longest
    assert (
        len({train.fingerprint, val.fingerprint, open_files(directory, "val", ByteTokenizer(), "0.5").fingerprint}) == 3
    )
    other = made(kind, tmp_path / "other")
    assert ids(open_files(directory, "val", ByteTokenizer(), str(other))) == row("train") + row("val")


def test_what_names_files(tmp_path: Path) -> None:
    directory = made("megatron", tmp_path / "in")
    for name in ("train", "train.bin", "train.idx"):
        assert find_files(directory / name) == {"train": [directory / "train.bin"], "val": []}
    assert find_files(tmp_path / "none") == find_files(tmp_path) == {}
    for name in ("a_validation.bin", "interval.bin", "tiny_shakespeare_val.bin", "valid-1.bin", "b.bin", "test.bin"):
        (tmp_path / name).write_bytes(b"ab")
    found = {split: [path.name for path in paths] for split, paths in find_files(tmp_path).items()}
    held_out = ["a_validation.bin", "tiny_shakespeare_val.bin", "valid-1.bin"]
    assert found == {"train": ["b.bin", "interval.bin"], "val": held_out}
    assert find_files(tmp_path / "test") == {"train": [tmp_path / "test.bin"], "val": []}
    (directory / "train.bin").unlink()
    with pytest.raises(UserError, match="has no text for train: name files of training text"):
        open_files(directory, "train", ByteTokenizer(), None)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    """nanoGPT's character-level directories have their alphabet in one."""
    directory = made("nanogpt", tmp_path / "in")
    (directory / "meta.pkl").write_bytes(b"cposix\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(UserError, match=r"does not say which tokenizer .*: add one, such as --data .*,tokenizer=gpt2"):
        parse_data(str(directory)).vocab_size  # noqa: B018
    assert parse_data(f"{directory},tokenizer=bytes").vocab_size == 257
    assert not Path("pwned").exists()


def damaged(directory: Path, name: str, change: Callable[[bytes], bytes]) -> Path:
    (directory / name).write_bytes(change((directory / name).read_bytes()))
    return directory / name


@pytest.mark.parametrize(
    ("kind", "name", "change", "message"),
    [
        ("nanogpt", "train.bin", lambda data: data[:-1], "do not fill rows of uint16"),
        ("nanogpt", "train.bin", lambda data: b"", "0 bytes do not fill rows of"),
        ("nanogpt", "train.bin", lambda data: data + b"\xff\xff", "token id 65535 is not among the 257 of tokenizer bytes"),
        ("nanogpt", "train.bin", lambda data: b"\x93SPHERE\n" + data, "is a shard of a data directory; name the directory"),
        ("llmc", "fineweb_train_000000.bin", lambda data: data[:-2], "does not hold the .* tokens of its header"),
        ("llmc", "fineweb_train_000000.bin", lambda data: data[:4] + b"\2" + data[5:], "version 2 of llm.c's format is not"),
        ("megatron", "train.bin", lambda data: data[:-2], r"not as long as train\.idx says"),
        ("megatron", "train.idx", lambda data: data[:-1], "is not a Megatron index, is cut off"),
        ("megatron", "train.idx", lambda data: data[:20], "is not a Megatron index, is cut off"),
        ("megatron", "train.idx", lambda data: data[:17] + b"\6" + data[18:], "numbers of kind 6 are not token ids"),
        ("megatron", "train.idx", lambda data: data[:282] + b"\7" + data[283:], "are not stored one after another"),
        ("megatron", "train.idx", lambda data: data[:754] + b"\1" + data[755:], "borders of documents that are not"),
        ("megatron", "train.idx", lambda data: data[:-1] + b"\x80", "borders of documents that are not"),
        ("megatron", "train.idx", lambda data: data[:-8] + b"\x3d" + data[-7:], "borders of documents that are not"),
        ("megatron", "train.idx", lambda data: data[:26] + bytes(8) + data[34:-488], "borders of documents that are not"),
    ],
)  # fmt: skip
def test_damage_is_named(kind: str, name: str, change: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    directory = made(kind, tmp_path / "in")
    damaged(directory, name, change)
    with pytest.raises(UserError, match=message) as caught:
        open_files(directory, "train", ByteTokenizer(), None)
    assert "\n" not in str(caught.value)


def test_an_id_that_no_sample_met_is_found_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_files, "_SAMPLE", 2)
    directory = made("nanogpt", tmp_path / "in")
    content = bytearray((directory / "train.bin").read_bytes())
    content[14:16] = b"\xff\xff"
    (directory / "train.bin").write_bytes(content)
    tokens = open_files(directory, "train", ByteTokenizer(), None)
    for read in (tokens.verify, lambda: tokens.read(0, 20)):
        with pytest.raises(UserError, match="token id 65535"):
            read()


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ("{own},tokenizer=bytes", "are for token files of other programs"),
        ("{files},tokenizer=bytes,val=2", "val=2 is neither a file nor a fraction"),
        ("{files},tokenizer=bytes,val=none", "val=none is neither a file nor a fraction"),
        ("{files}/none,tokenizer=bytes", "no data directory"),
        ("{files},tokenizer=no such", "unknown tokenizer 'no such'"),
        ("{own}=1,{files}=2,tokenizer=bytes", "are for token files of other programs"),
    ],
)
def test_what_data_cannot_say(said: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(tiny.text(0, 400))
    prepare([tmp_path / "a.txt"], tmp_path / "own", "bytes", val_fraction=0.3)
    data = said.format(own=tmp_path / "own", files=made("nanogpt", tmp_path / "in"))
    with pytest.raises(UserError, match=message):
        open_data(config(data))


def test_files_in_a_mixture(tmp_path: Path) -> None:
    one, other = made("nanogpt", tmp_path / "a"), made("megatron", tmp_path / "b")
    data = open_data(config(f"{one}=0.7,{other}=0.3,tokenizer=bytes"))
    assert [part.weight for part in data.held_out] == [0.7, 0.3]
    text = row("train")
    for window in data.loader.batch(3)[0].tolist():
        assert any(text[at : at + len(window)] == window for at in range(len(text)))


def test_the_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    command = commands.make_command(monkeypatch, capsys)
    directory = made("nanogpt", tmp_path / "in")
    words = ("data", "convert", "--data", f"{directory},tokenizer=bytes", "--format", "megatron")
    counts = ", ".join(f"{split} {len(row(split)):,} tokens" for split in TEXTS)
    answer = command(*words, "--out", tmp_path / "m")
    assert (answer.code, answer.out) == (0, f"{tmp_path / 'm'}: {counts}\n")
    answer = command("data", "convert", "--data", "stream:x", "--format", "llmc", "--out", tmp_path / "n")
    assert (answer.code, "is not one data directory" in answer.err) == (2, True)
    assert not (tmp_path / "n").exists()

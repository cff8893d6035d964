"""`prepare`: right tokens from every format, the same bytes for any workers
and after any interruption, clear refusals.
"""

from __future__ import annotations

import fcntl
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import commands
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from prepared_texts import Interrupted, contents, in_small_blocks, interrupt_after, texts_of

from spherelm.data import encoding
from spherelm.data import prepare as prepare_module
from spherelm.data.documents import Block, DocumentError
from spherelm.data.prepare import prepare
from spherelm.data.shards import ShardError, open_tokens
from spherelm.data.tokenizer import load_tokenizer
from spherelm.errors import OutputExistsError

BOOKS = [f"Book {i}, " + "some words and more " * (3 + 7 * i % 11) for i in range(60)]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    """One file of each kind; together they hold BOOKS in order."""
    folder = tmp_path / "in"
    folder.mkdir()
    files = {
        "a.txt": BOOKS[0].encode(),
        "b.txt.gz": gzip.compress(BOOKS[1].encode()),
        "c.jsonl": lines(BOOKS[2:20]),
        "d.jsonl.gz": gzip.compress(lines(BOOKS[20:30])),
        "e.jsonl.xz": lzma.compress(lines(BOOKS[30:40])),
        "f.jsonl.zst": zstandard.compress(lines(BOOKS[40:50])),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    pyarrow.parquet.write_table(pyarrow.table({"text": BOOKS[50:]}), folder / "g.parquet")
    return sorted(folder.iterdir())


@pytest.fixture(autouse=True)
def _no_saved_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is."""
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 1e9)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    in_small_blocks(monkeypatch, 100)


def test_every_format_in_order(inputs: list[Path], tmp_path: Path) -> None:
    manifest = prepare(inputs, tmp_path / "out", "bytes")
    assert texts_of(tmp_path / "out") == BOOKS
    assert [entry["documents"] for entry in manifest["inputs"]] == [1, 1, 18, 10, 10, 10, 10]
    assert sorted(contents(tmp_path / "out")) == ["manifest.json", "tokenizer.meta.json", "train-00000.bin"]
    train = manifest["splits"]["train"]
    text_bytes = sum(len(text.encode()) for text in BOOKS)
    assert (train["documents"], train["bytes"], train["tokens"]) == (60, text_bytes, text_bytes + 60)
    tokens = open_tokens(tmp_path / "out", "train")
    assert (len(tokens), tokens.bytes_total) == (text_bytes + 60, text_bytes)
    assert tokens.document_offsets.tolist() == np.cumsum([0, *(len(t.encode()) + 1 for t in BOOKS[:-1])]).tolist()
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest


def test_with_the_shipped_tokenizer(inputs: list[Path], tmp_path: Path) -> None:
    prepare(inputs, tmp_path / "out")
    tokenizer, tokens = load_tokenizer(tmp_path / "out"), open_tokens(tmp_path / "out", "train")
    expected = [i for text in BOOKS for i in [*tokenizer.encode(text), tokenizer.eos_id]]
    assert tokens.read(0, len(tokens)).tolist() == expected
    assert tokens.tokenizer_fingerprint == tokenizer.fingerprint == load_tokenizer("default").fingerprint


def test_workers_do_not_change_a_byte(inputs: list[Path], tmp_path: Path, small: None) -> None:
    for workers in (1, 2):
        prepare(inputs, tmp_path / f"out{workers}", "bytes", None, 0.3, workers, shard_tokens=500)
    assert contents(tmp_path / "out1") == contents(tmp_path / "out2")
    assert len(list((tmp_path / "out1").glob("train-*.bin"))) > 5
    assert sorted(texts_of(tmp_path / "out1") + texts_of(tmp_path / "out1", "val")) == sorted(BOOKS)


def test_a_failing_worker_ends_the_run_with_the_first_fault(inputs: list[Path], tmp_path: Path) -> None:
    inputs[2].write_bytes(lines(BOOKS[2:20]) + b"{\n")
    inputs[4].write_bytes(lzma.compress(b"[\n"))
    with pytest.raises(DocumentError, match=r"c\.jsonl, line 19: not JSON"):
        prepare(inputs, tmp_path / "out", "bytes", workers=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tokenizer", ["bytes", "default"])
def test_resumed_equals_uninterrupted(
    inputs: list[Path], tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    """Interrupted again and again, with rubbish written after the last saved state: the same bytes as in one go."""
    inputs[0].write_text("a long text of many words " * 40)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = prepare(inputs, whole, tokenizer, None, 0.2, shard_tokens=400)
    taken = []
    for results in (0, 1, 3, 5, 2, 9, 4):
        interrupt_after(monkeypatch, results)
        with pytest.raises(Interrupted):
            prepare(inputs, parts, tokenizer, None, 0.2, shard_tokens=400)
        if not results:
            assert not parts.exists(), "nothing was saved yet, nothing is left"
            continue
        position = json.loads((parts / ".partial" / "state.json").read_text())["position"]
        taken.append((position["source"], position["blocks"]))
        with pytest.raises(ShardError, match="unfinished"):
            open_tokens(parts, "train")
        for path in (parts / ".partial").glob("*.bin"):
            if is_open(path):
                path.write_bytes(path.read_bytes() + b"rubbish")
    assert taken == sorted(set(taken)), "each attempt goes on where the one before stopped"
    monkeypatch.setattr(prepare_module, "encode_all", encoding.encode_all)
    assert prepare(inputs, parts, tokenizer, None, 0.2, shard_tokens=400) == expected
    assert contents(parts) == contents(whole)


def is_open(path: Path) -> bool:
    return path.read_bytes()[:8] == bytes(8)


def interrupted(monkeypatch: pytest.MonkeyPatch, inputs: list[Path], out: Path, **settings: Any) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(patch, 13)
        with pytest.raises(Interrupted):
            prepare(inputs, out, "bytes", shard_tokens=400, **settings)


def test_resuming_with_other_arguments_is_refused(
    inputs: list[Path], tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    interrupted(monkeypatch, inputs, out)
    before = contents(out)
    for arguments in [(inputs[1:], out, "bytes"), (inputs, out, "default"), (inputs, out, "bytes", None, 0.5)]:
        with pytest.raises(OutputExistsError, match=r"unfinished work with other inputs or options: .*delete"):
            prepare(*arguments, shard_tokens=400)
    assert contents(out) == before


@pytest.mark.parametrize("begun", [False, True])
def test_a_fault_may_be_mended_and_the_work_goes_on(
    inputs: list[Path], tmp_path: Path, small: None, begun: bool
) -> None:
    """Unless a part of the faulty file is in the shards already."""
    out, good = tmp_path / "out", inputs[4].read_bytes()
    inputs[4].write_bytes(lzma.compress(lines(BOOKS[30:31] * begun) + b"nonsense\n"))
    with pytest.raises(DocumentError, match=rf"e\.jsonl\.xz, line {1 + begun}: not JSON"):
        prepare(inputs, out, "bytes", shard_tokens=400)
    position = json.loads((out / ".partial" / "state.json").read_text())["position"]
    assert position["documents"] == [1, 1, 18, 10, int(begun), 0, 0]
    inputs[4].write_bytes(good)
    if begun:
        with pytest.raises(OutputExistsError, match="other inputs"):
            prepare(inputs, out, "bytes", shard_tokens=400)
    else:
        prepare(inputs, out, "bytes", shard_tokens=400)
        assert texts_of(out) == BOOKS


def test_damage_during_an_interruption_is_found(
    inputs: list[Path], tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for open_one, problem in [(False, "do not match the sha256"), (True, "changed since the interruption")]:
        out = tmp_path / f"out-{open_one}"
        interrupted(monkeypatch, inputs, out)
        shard = next(path for path in (out / ".partial").glob("train-*.bin") if is_open(path) == open_one)
        shard.write_bytes(shard.read_bytes()[:4096] + b"?" + shard.read_bytes()[4097:])
        with pytest.raises(ShardError, match=problem) as error:
            prepare(inputs, out, "bytes", shard_tokens=400)
        assert "delete" in str(error.value)


def test_an_interruption_while_the_files_move(
    inputs: list[Path], tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(inputs, tmp_path / "whole", "bytes", shard_tokens=400)
    replace, moved = os.replace, []

    def dying(source: Path, target: Path) -> None:
        if Path(source).suffix == ".bin":
            if len(moved) == 2:
                raise Interrupted
            moved.append(target)
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr("spherelm.data.output.os.replace", dying)
        with pytest.raises(Interrupted):
            prepare(inputs, tmp_path / "out", "bytes", shard_tokens=400)
    assert len(moved) == 2
    with pytest.raises(ShardError, match="unfinished"):
        open_tokens(tmp_path / "out", "train")
    prepare(inputs, tmp_path / "out", "bytes", shard_tokens=400)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_prepared_already(inputs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    manifest = prepare(inputs, out, "bytes")
    stamps = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (out / ".partial").mkdir()
    assert prepare(inputs, out, "bytes", progress=True, workers=2) == manifest
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == stamps
    assert "already prepared" in capsys.readouterr().err


def test_other_parameters_do_not_overwrite(inputs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(inputs, out, "bytes")
    before = contents(out)
    for arguments, name in [
        ((inputs, out, "default"), "tokenizer"),
        ((inputs, out, "bytes", None, 0.5), "inputs, val_fraction"),
        ((inputs[1:], out, "bytes"), "inputs"),
        ((inputs[1:], out, "bytes", inputs[:1]), "inputs"),
    ]:
        with pytest.raises(OutputExistsError, match=f"another {name}: choose another --out"):
            prepare(*arguments)
    assert contents(out) == before


def test_a_damaged_finished_directory_is_not_taken_for_good(inputs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare(inputs, out, "bytes")
    shard = out / "train-00000.bin"
    shard.write_bytes(shard.read_bytes()[:5000] + b"?" + shard.read_bytes()[5001:])
    with pytest.raises(ShardError, match="do not match the sha256"):
        prepare(inputs, out, "bytes")


def test_a_directory_of_something_else(inputs: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "out" / "thesis.tex").touch()
    for out, message in (("out", "holds something other than prepared data"), ("file", "file is a file")):
        with pytest.raises(OutputExistsError, match=message):
            prepare(inputs, tmp_path / out, "bytes")
    (tmp_path / "out" / "thesis.tex").unlink()
    prepare(inputs, tmp_path / "out", "bytes")


def test_two_at_once(inputs: list[Path], tmp_path: Path) -> None:
    partial = tmp_path / "out" / ".partial"
    partial.mkdir(parents=True)
    with open(partial / "lock", "a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(OutputExistsError, match="another process is preparing"):
            prepare(inputs, tmp_path / "out", "bytes")
        assert partial.is_dir(), "what the other process does is left alone"
    prepare(inputs, tmp_path / "out", "bytes")


def test_val_files(inputs: list[Path], tmp_path: Path) -> None:
    prepare(inputs[2:], tmp_path / "out", "bytes", val=inputs[:2])
    assert texts_of(tmp_path / "out", "val") == BOOKS[:2]
    assert texts_of(tmp_path / "out", "train") == BOOKS[2:]


def test_val_fraction_goes_by_document(inputs: list[Path], tmp_path: Path) -> None:
    """Whatever file, format or order a document comes in, it stays in its split."""
    prepare(inputs, tmp_path / "a", "bytes", val_fraction=0.3)
    other = tmp_path / "in" / "all.jsonl"
    other.write_bytes(lines(BOOKS[::-1]))
    prepare([other], tmp_path / "b", "bytes", val_fraction=0.3)
    for split in ("train", "val"):
        documents_of_split = texts_of(tmp_path / "a", split)
        assert 8 < len(documents_of_split) < 52
        assert texts_of(tmp_path / "b", split) == documents_of_split[::-1]


@pytest.mark.parametrize(("fraction", "split"), [(1e-9, "val"), (1 - 1e-9, "train")])
def test_a_split_without_documents(
    inputs: list[Path], tmp_path: Path, fraction: float, split: str, small: None
) -> None:
    with pytest.raises(ValueError, match=f"of 60 documents leaves none for {split}: choose another --val-fraction"):
        prepare(inputs, tmp_path / "out", "bytes", val_fraction=fraction)
    assert not (tmp_path / "out").exists()


ONE = "".join(f"Line {i} of the only document there is.\n" for i in range(300))


@pytest.mark.parametrize("deduplicate", [False, True])
def test_one_document_is_split(tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, deduplicate: bool) -> None:
    """At the end of a line near the fraction, also after an interruption; two documents are not."""
    path = tmp_path / "one.txt.gz"
    path.write_bytes(gzip.compress(ONE.encode()))
    settings: dict[str, Any] = {"val_fraction": 0.1, "deduplicate": deduplicate}
    manifest = prepare([path], tmp_path / "out", "bytes", **settings)
    (train,), (val,) = texts_of(tmp_path / "out"), texts_of(tmp_path / "out", "val")
    assert train + val == ONE
    assert train.endswith("\n")
    assert abs(len(val) / len(ONE) - 0.1) < 0.01
    assert [entry["characters"] for entry in manifest["inputs"]] == [[0, len(train)], [len(train), None]]
    for results in (3, 90):
        with monkeypatch.context() as patch:
            interrupt_after(patch, results)
            with pytest.raises(Interrupted):
                prepare([path], tmp_path / "parts", "bytes", **settings)
    prepare([path], tmp_path / "parts", "bytes", **settings)
    assert contents(tmp_path / "parts") == contents(tmp_path / "out")
    (tmp_path / "two.txt").write_text("Another document.")
    two = prepare([path, tmp_path / "two.txt"], tmp_path / "two", "bytes", val_fraction=0.5)
    assert sorted(texts_of(tmp_path / "two") + texts_of(tmp_path / "two", "val")) == ["Another document.", ONE]
    assert all("characters" not in entry for entry in two["inputs"])


def test_the_command_says_what_it_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    command = commands.make_command(monkeypatch, capsys)
    rows = [{"body": {"text": text}} for text in ("good", " \n", None, "", "better")]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "cut off")
    words = (
        "data",
        "prepare",
        "--input",
        tmp_path / "in",
        "--tokenizer",
        "bytes",
        "--workers",
        1,
        "--out",
        tmp_path / "o",
    )
    refused = command(*words)
    assert (refused.code, "line 1: no string" in refused.err, "it has body.text" in refused.err) == (2, True, True)
    refused = command(*words, "--field", "body.text")
    assert (refused.code, "line 3: no string" in refused.err, "--skip-bad" in refused.err) == (2, True, True)
    assert not (tmp_path / "o").exists()
    answer = command(*words, "--field", "body.text", "--skip-bad")
    assert answer.code == 0
    assert answer.out.splitlines()[1:] == ['left out: 2 empty, 1 no string under "body.text", 1 not JSON']
    assert texts_of(tmp_path / "o") == ["good", "better"]
    other = command(*words, "--field", "body.text")
    assert (other.code, "another skip_bad_rows" in other.err) == (2, True)
    (tmp_path / "one.txt").write_text(ONE)
    words = ("data", "prepare", "--input", tmp_path / "one.txt", "--val-fraction", 0.2, "--out", tmp_path / "1")
    answer = command(*words, "--tokenizer", "bytes", "--workers", 1)
    assert answer.code == 0
    place = len(texts_of(tmp_path / "1")[0])
    assert answer.out.startswith(f"one.txt is one document: from character {place:,} on it is the validation text\n")


def test_what_a_directory_holds_besides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Nothing in it stops the command or is left out unsaid; a file's own name has to be one of a text."""
    command = commands.make_command(monkeypatch, capsys)
    directory = tmp_path / "in"
    directory.mkdir()
    files = {"a.txt": b"good", "blank.txt": b" \n", "b.jsonl.gz": gzip.compress(b""), "c.txt.gz": gzip.compress(b""),
             "none.csv": b"", "page.html": b"x", "b.HTML": b"x", "README": b"x", ".z.pdf": b"x"}  # fmt: skip
    for name, content in files.items():
        (directory / name).write_bytes(content)
    words = ("--tokenizer", "bytes", "--workers", 1)
    for number, given in enumerate((directory, directory / "*")):
        out = tmp_path / f"{number}"
        answer = command("data", "prepare", "--input", given, "--out", out, *words)
        assert answer.code == 0, answer.err
        kinds = "2 of an unknown kind (.html), 1 of an unknown kind (a name without an end)"
        said = answer.out.splitlines()[1].removeprefix("left out: ")
        assert set(said.split(", ")) == {"3 empty", *kinds.split(", ")}
        assert texts_of(out) == ["good"]
    (directory / "a.txt").unlink()
    refused = command("data", "prepare", "--input", directory, "--out", tmp_path / "none", *words)
    assert (refused.code, "the inputs hold no documents with text" in refused.err) == (2, True)
    assert not (tmp_path / "none").exists()


def test_cuts_that_are_not_safe_are_said(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("spherelm.data.cutting._PIECE", 60)
    monkeypatch.setattr("spherelm.data.cutting.LONGEST", 500)
    (tmp_path / "a.txt").write_text("x" * 3000)
    command = commands.make_command(monkeypatch, capsys)
    words = ("--tokenizer", "bytes", "--workers", 1, "--out", tmp_path / "out")
    answer = command("data", "prepare", "--input", tmp_path / "a.txt", *words)
    count = json.loads((tmp_path / "out" / "manifest.json").read_text())["unsafe_cuts"]
    assert 4 <= count <= 3000 / 500
    assert answer.out.splitlines()[1].startswith(f"{count} cuts within long stretches of text that have no safe place")
    assert texts_of(tmp_path / "out") == ["x" * 3000]


def test_a_long_text_over_blocks_and_shards(tmp_path: Path, small: None) -> None:
    text = "a long text of many words " * 100
    for i, content in enumerate([text, "short"]):
        (tmp_path / f"{i}.txt").write_text(content)
    files = [tmp_path / "0.txt", tmp_path / "1.txt"]
    for fraction, name in [(0.0, "plain"), (0.5, "split")]:
        if fraction:
            files.append(tmp_path / "2.jsonl")
            files[2].write_bytes(lines(BOOKS))
        manifest = prepare(files, tmp_path / name, "bytes", val_fraction=fraction, shard_tokens=300)
        documents_found = [t for split in manifest["splits"] for t in texts_of(tmp_path / name, split)]
        assert sorted(documents_found) == sorted([text, "short", *(BOOKS if fraction else [])])
    tokens = open_tokens(tmp_path / "plain", "train")
    assert len(tokens.shards) > 5
    assert tokens.document_offsets.tolist() == [0, len(text) + 1]


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"inputs": []}, "no input files"),
        ({"val_fraction": 1.0}, "val fraction 1.0"),
        ({"val_fraction": -0.1}, "val fraction -0.1"),
        ({"val_fraction": 0.1, "val": ["a.txt"]}, "both --val and --val-fraction"),
        ({"val": ["a.txt"]}, r"a\.txt is also a training input"),
        ({"workers": 0}, "0 workers"),
        ({"tokenizer": "no such"}, "unknown tokenizer 'no such'"),
        ({"inputs": ["none.txt"]}, "no input file"),
        ({"inputs": ["a.txt", "empty.txt"]}, r"empty\.txt is empty"),
        ({"inputs": ["a.txt", "x.docx"]}, r"x\.docx: cannot tell"),
        ({"inputs": ["a.txt", "latin.txt"]}, r"latin\.txt is not UTF-8 \(byte 3\)"),
        ({"inputs": ["a.txt", "blank.jsonl"]}, r"blank\.jsonl holds no documents with text"),
        ({"inputs": ["blank.jsonl", "a.txt"]}, r"blank\.jsonl holds no documents with text"),
        ({"inputs": ["blank.jsonl.gz", "a.txt"]}, r"blank\.jsonl\.gz holds no documents with text"),
    ],
)
def test_bad_input(tmp_path: Path, settings: dict[str, Any], problem: str) -> None:
    files = {
        "a.txt": b"text",
        "empty.txt": b"",
        "x.docx": b"a,b",
        "latin.txt": b"caf\xe9",
        "blank.jsonl": b'\n{"text":""}\n',
    }
    files["blank.jsonl.gz"] = gzip.compress(b"")
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    arguments: dict[str, Any] = {"inputs": ["a.txt"], "tokenizer": "bytes", **settings}
    for key in ("inputs", "val"):
        arguments[key] = [tmp_path / name for name in arguments.get(key, [])]
    with pytest.raises((ValueError, FileNotFoundError), match=problem) as error:
        prepare(out=tmp_path / "out", **arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists(), "a failure leaves nothing behind"


def test_progress_is_on_stderr(inputs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(inputs, tmp_path / "out", "bytes", progress=True)
    out, err = capsys.readouterr()
    assert (out, "tokenizing" in err) == ("", True)
    prepare(inputs, tmp_path / "silent", "bytes")
    assert capsys.readouterr() == ("", "")


def test_a_worker_that_dies_is_an_error_of_one_line(inputs: list[Path], tmp_path: Path) -> None:
    prepare(inputs, tmp_path / "out", "bytes")
    (tmp_path / "out" / "tokenizer.meta.json").unlink()  # so that the workers cannot start
    with pytest.raises(OSError, match="a worker process died"):
        list(
            encoding.encode_all(
                [encoding.EncodingJob(0, Block(inputs[0], ["x"], 1), "train")], tmp_path / "out", 0.0, 2
            )
        )

"""Streaming by `datasets`: any position can be taken up again,
and what `prepare` makes of it does not depend on how.
"""

from __future__ import annotations

import bz2
import gzip
import itertools
import json
import lzma
from pathlib import Path
from typing import Any

import commands
import pyarrow
import pyarrow.parquet
import pytest
import tiny
import zstandard
from prepared_texts import Interrupted, contents, interrupt_after

from spherelm.data import prepare as prepare_module
from spherelm.data.documents import DocumentError
from spherelm.data.hub import HubRequest, HubText
from spherelm.data.prepare import prepare
from spherelm.data.rows import RowSettings
from spherelm.data.shards import Shard, open_tokens
from spherelm.errors import OutputExistsError
from spherelm.train.batches import open_data

datasets = pytest.importorskip(
    "datasets", reason="streaming needs datasets: pip install '.[data]' in a clone of spherelm"
)

TEXTS = [f"Document {i}: " + "and so on " * (1 + 7 * i % 13) + "é" for i in range(70)]
EOS = 256


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    """A folder of three Parquet files, several row groups each, that together hold TEXTS in order."""
    folder = tmp_path / "parquet"
    folder.mkdir()
    for i, (begin, end) in enumerate([(0, 30), (30, 35), (35, 70)]):
        table = pyarrow.table({"text": TEXTS[begin:end], "n": list(range(begin, end))})
        pyarrow.parquet.write_table(table, folder / f"part-{i}.parquet", row_group_size=8)
    return folder


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    folder = tmp_path / "jsonl"
    folder.mkdir()
    for i, part in enumerate((TEXTS[:40], TEXTS[40:])):
        lines = "".join(json.dumps({"n": 0, "text": text}) + "\n" for text in part)
        (folder / f"part-{i}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few documents, and a saved state after each."""
    blocks = HubText.blocks
    monkeypatch.setattr(HubText, "blocks", lambda self, after: blocks(self, after, 300))
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0.0)


def shards(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(directory.glob("*.bin"))]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_every_position_can_be_taken_up_again(kind: str, request: pytest.FixtureRequest) -> None:
    folder = str(request.getfixturevalue(kind))
    text = HubText(HubRequest(folder))
    positions, seen = list[Any](), list[str]()
    for document in text.documents():
        seen.append(document)
        positions.append(json.loads(json.dumps(text.position())))
    assert seen == TEXTS
    other = HubText(HubRequest(folder))
    assert other.identity == text.identity
    for at in (0, 6, 7, 8, 29, 33, 34, 39, 40, 68, 69):
        assert list(other.documents(positions[at])) == TEXTS[at + 1 :]
    assert list(other.documents()) == TEXTS, "and again from the start"


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_taken_up_again_and_again(kind: str, request: pytest.FixtureRequest) -> None:
    position, seen = None, list[str]()
    for count in (5, 1, 2, 9, 30, 3, 1, 99):
        text = HubText(HubRequest(str(request.getfixturevalue(kind))))
        seen += itertools.islice(text.documents(position), count)
        position = json.loads(json.dumps(text.position()))
    assert seen == TEXTS


def test_blocks_go_on_behind_any_of_them(parquet: Path) -> None:
    text = HubText(HubRequest(str(parquet)))
    blocks = list(text.blocks(None, 300))
    assert [text for block in blocks for text in block.texts] == TEXTS
    assert blocks[-1].read_bytes == sum(map(len, TEXTS))
    for i, block in enumerate(blocks):
        again = [(b.texts, b.read_bytes) for b in text.blocks(block.after, 300)]
        assert again == [(b.texts, b.read_bytes) for b in blocks[i + 1 :]]


def test_the_same_shards_as_from_the_files_themselves(parquet: Path, tmp_path: Path) -> None:
    prepare(sorted(parquet.iterdir()), tmp_path / "files", "bytes", val_fraction=0.2)
    manifest = prepare([], tmp_path / "stream", "bytes", val_fraction=0.2, hub=HubRequest(str(parquet)))
    assert shards(tmp_path / "stream") == shards(tmp_path / "files")
    (entry,) = manifest["inputs"]
    assert (entry["name"], entry["documents"], entry["dataset"]["files"]) == (str(parquet), 70, 3)
    assert prepare([], tmp_path / "stream", "bytes", val_fraction=0.2, hub=HubRequest(str(parquet))) == manifest


@pytest.mark.row("Data at scale")
def test_workers_do_not_change_a_byte(parquet: Path, tmp_path: Path, small: None) -> None:
    for workers in (1, 2):
        prepare(
            [], tmp_path / str(workers), "bytes", None, 0.2, workers, hub=HubRequest(str(parquet)), shard_tokens=999
        )
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(shards(tmp_path / "1")) > 4


def test_resumed_equals_uninterrupted(
    parquet: Path, jsonl: Path, tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file input first, then the stream; each attempt goes on behind the rows that are on the disk."""
    arguments = [sorted(jsonl.iterdir())[:1]]
    settings: dict[str, Any] = {"val_fraction": 0.2, "hub": HubRequest(str(parquet)), "shard_tokens": 999}
    prepare(*arguments, tmp_path / "whole", "bytes", **settings)
    rows = list[int]()
    for results in (2, 3, 5, 4):
        with monkeypatch.context() as patch:
            interrupt_after(patch, results)
            with pytest.raises(Interrupted):
                prepare(*arguments, tmp_path / "parts", "bytes", **settings)
        position = json.loads((tmp_path / "parts" / ".partial" / "state.json").read_text())["position"]
        rows.append(position["after"]["rows"] if position["after"] else 0)
    assert rows == sorted(set(rows))
    prepare(*arguments, tmp_path / "parts", "bytes", **settings)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_work_on_another_stream_is_refused(parquet: Path, tmp_path: Path) -> None:
    prepare([], tmp_path / "out", "bytes", hub=HubRequest(str(parquet)))
    before = contents(tmp_path / "out")
    (parquet / "part-3.parquet").write_bytes((parquet / "part-0.parquet").read_bytes())
    for hub in (HubRequest(str(parquet)), HubRequest(str(parquet), limit=70)):
        with pytest.raises(OutputExistsError, match="prepared with another inputs"):
            prepare([], tmp_path / "out", "bytes", hub=hub)
    assert contents(tmp_path / "out") == before


def test_limit_config_column_and_single_files(parquet: Path, jsonl: Path) -> None:
    assert list(HubText(HubRequest(str(parquet), limit=33)).documents()) == TEXTS[:33]
    assert list(HubText(HubRequest(str(jsonl / "part-1.jsonl"))).documents()) == TEXTS[40:]
    renamed = parquet.parent / "renamed.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": TEXTS[:3]}), renamed)
    assert list(HubText(HubRequest(str(renamed), column="content")).documents()) == TEXTS[:3]
    with pytest.raises(ValueError, match=r'has no column "text" \(it has content\): name another with --field'):
        HubText(HubRequest(str(renamed)), skip_bad=False)


def test_fields_within_fields_and_bad_rows(tmp_path: Path) -> None:
    rows = [{"body": {"text": text, "n": 1}} for text in TEXTS[:9]] + [{"body": {"text": None, "n": 1}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in ("a.parquet", "a.jsonl"):
        request = HubRequest(str(tmp_path / name), column="body.text")
        assert list(HubText(request, skip_bad=True).documents()) == [*TEXTS[:9], 'no string under "body.text"']
        refused(request, r'row 10: no string under "body.text" \(it is null\); fix that row, or .*--skip-bad')
    manifest = prepare([], tmp_path / "out", "bytes", hub=request, rows=RowSettings("body.text", skip_bad=True))
    assert manifest["left_out"] == {'no string under "body.text"': 1}
    assert manifest["splits"]["train"]["documents"] == 9


def refused(request: HubRequest, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        list(HubText(request, skip_bad=False).documents())
    assert "\n" not in str(caught.value)


def test_a_file_of_the_dataset_is_no_validation_text(jsonl: Path, tmp_path: Path) -> None:
    """Whatever it is called; prepared, or streamed into training."""
    (tmp_path / "val.jsonl").write_bytes(next(jsonl.glob("*.jsonl")).read_bytes())
    val = tmp_path / "val.jsonl"
    with pytest.raises(ValueError, match=r"val\.jsonl is also a training input \(.*: remove one"):
        prepare([], tmp_path / "out", "bytes", val=[val], hub=HubRequest(str(jsonl)))
    assert not (tmp_path / "out").exists()
    config = tiny.run_config("gpt", Path(f"stream:{jsonl},tokenizer=bytes,val={val}"))
    with pytest.raises(ValueError, match=r"val\.jsonl is also a training input \("):
        open_data(config)


def test_what_cannot_be_read(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(HubRequest(str(parquet), split="test"), "cannot read dataset .*test.*Available splits")
    refused(HubRequest(str(parquet), column="n"), r'row 1: no string under "n" \(it is a number\)')
    refused(HubRequest(str(parquet), limit=0), "limit of rows must be at least 1, got 0")
    refused(HubRequest(str(parquet / "part-0.parquet"), config="en"), "is one file, .*leave its name out")
    refused(HubRequest("./no/such"), "no dataset './no/such'")
    (tmp_path / "a.txt").write_text("text")
    refused(HubRequest(str(tmp_path / "a.txt")), r"a\.txt: only \.parquet, \.jsonl and \.json files are streamed")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing of the kind")
    refused(HubRequest(str(tmp_path / "a.parquet")), "cannot read dataset")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    refused(HubRequest("Skylion007/openwebtext"), "cannot reach the Hugging Face hub for 'Skylion007/openwebtext'")


PACKED = {".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("suffix", PACKED)
def test_damaged_compression_is_refused(jsonl: Path, tmp_path: Path, suffix: str) -> None:
    """Also in a second stream, which the libraries below take for the end of some formats."""
    parts = [PACKED[suffix](path.read_bytes()) for path in sorted(jsonl.iterdir())]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(b"".join(parts))
    assert list(HubText(HubRequest(str(path))).documents()) == TEXTS
    for content in (parts[0] + parts[1][:-9], parts[0] + b"?" + parts[1], parts[0] + b"?", parts[0][:-9]):
        path.write_bytes(content)
        refused(HubRequest(str(path)), "damaged or cut off|[Nn]ot a gzipped file|file ended before")


def test_the_command(parquet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    command = commands.make_command(monkeypatch, capsys)
    words = ("data", "prepare", "--hf", parquet, "--tokenizer", "bytes", "--workers", 1, "--limit", 20)
    answer = command(*words, "--out", tmp_path / "out", "--deduplicate")
    assert answer.code == 0
    assert answer.out.splitlines()[0].startswith("train: 20 documents")
    assert answer.out.splitlines()[1] == "left out: 0 duplicate"
    expected = "".join(TEXTS[:20]).encode()
    tokens = open_tokens(tmp_path / "out", "train")
    assert [i for i in tokens.read(0, len(tokens)).tolist() if i != EOS] == list(expected)
    assert Shard(tmp_path / "out" / "train-00000.bin").header.documents == 20
    assert command("data", "prepare", "--out", tmp_path / "none").code == 2


def test_without_the_library(parquet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DocumentError, match=r"needs datasets: pip install '\.\[data\]' in a clone of spherelm"):
        HubText(HubRequest(str(parquet)))

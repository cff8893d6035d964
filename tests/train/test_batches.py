"""The text of a run: mixtures, streams, documents kept apart;
each trained on, validated on and resumed through the trainer.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from spherelm.data import stream
from spherelm.data.hub import HubRequest
from spherelm.data.prepare import prepare
from spherelm.data.shards import open_tokens
from spherelm.data.sources import Hub, Mixture, Shards, Shipped, parse_data, tokens_per_byte
from spherelm.layers.attention import separate_documents
from spherelm.runs.config import RunConfig
from spherelm.runs.loading import load_model
from spherelm.runs.metrics import read_metrics
from spherelm.train.batches import open_data
from spherelm.train.trainer import Trainer, train


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two data directories of many small documents, and as "text" the file of the first."""
    root = tmp_path_factory.mktemp("text")
    for i, name in enumerate("ab"):
        lines = [json.dumps({"text": tiny.text(100 * i + j, 5 + j % 7)}) + "\n" for j in range(80)]
        (root / f"{name}.jsonl").write_text("".join(lines))
        prepare([root / f"{name}.jsonl"], root / name, "bytes", val_fraction=0.3)
    return [root / "a", root / "b"]


def run_config(data: str, **overrides: Any) -> RunConfig:
    config = tiny.run_config("ngpt", Path("unused"), **{"eval_windows": 20, **overrides})
    return dataclasses.replace(config, data=data)


def mixture(directories: list[Path]) -> str:
    return ",".join(f"{path}={weight}" for path, weight in zip(directories, ("0.7", "0.3"), strict=True))


def test_what_data_names(directories: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = directories
    assert parse_data(None) == Shipped()
    assert parse_data(str(one)) == parse_data(f"{one}=3") == Shards(one)
    assert parse_data(mixture(directories)) == Mixture({one: Fraction(7, 10), other: Fraction(3, 10)})
    assert parse_data(f"{one}=2,{other}=.5") == Mixture({one: Fraction(4, 5), other: Fraction(1, 5)})
    monkeypatch.chdir(tmp_path)
    assert parse_data("x=1,y") == Shards(Path("x=1,y"))
    Path("x=1,y=2").mkdir()
    assert parse_data("x=1,y=2") == Shards(Path("x=1,y=2"))
    request = HubRequest("org/name@v1", config="en", split="all", column="content", limit=9)
    stream = "stream:org/name@v1,tokenizer=bytes,val=0.2,config=en,split=all,column=content,limit=9"
    assert parse_data(stream) == Hub(request, "bytes", "0.2")
    assert parse_data(mixture(directories)).vocab_size == parse_data("stream:x,tokenizer=bytes").vocab_size == 257


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("{a}=1,{a}=2", "names a directory twice"),
        ("{a}=1,{b}=0", "a weight of 0: weights must be positive"),
        ("{a}=1,none=1", "no data directory none"),
        ("{a}=1,{c}=1", "different tokenizers: prepare them with one"),
        ("stream:", "is not a stream: write stream:NAME,KEY=VALUE"),
        ("stream:{a}.jsonl,size=3", "is not a stream: .* keys column, config, limit, split, tokenizer, val"),
        ("stream:{a}.jsonl,limit=x", "limit=x is not a number"),
        ("stream:{a}.jsonl,tokenizer=bytes,val=2", "val=2 is neither a file nor a fraction"),
        ("stream:{a}.jsonl,tokenizer=bytes,val=none.txt", "val=none.txt is neither a file nor a fraction"),
        ("stream:{a}.jsonl,val=0.3", "has 4096 token ids, the model only 257"),
    ],
)
def test_what_cannot_be_opened(data: str, message: str, directories: list[Path], tmp_path: Path) -> None:
    prepare([directories[0].parent / "a.jsonl"], tmp_path / "c", "default", val_fraction=0.3)
    named = data.format(a=directories[0], b=directories[1], c=tmp_path / "c")
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        open_data(run_config(named))
    assert "\n" not in str(caught.value)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_model(run).state_dict()


def test_a_mixture_is_validated_by_source(directories: list[Path], tmp_path: Path) -> None:
    config = run_config(mixture(directories))
    loss = train(config, tmp_path / "run", show_progress=False)
    last = [record for record in read_metrics(tmp_path / "run" / "metrics.jsonl") if record["kind"] == "val"][-1]
    one, other = (last["loss_by_source"][str(path)] for path in directories)
    assert last["loss"] == loss == pytest.approx(0.7 * one + 0.3 * other, rel=1e-12)
    data = open_data(config)
    bytes_per_token = [1 / tokens_per_byte(open_tokens(path, "val")) for path in directories]
    assert data.tokens_per_byte == pytest.approx(1 / (0.7 * bytes_per_token[0] + 0.3 * bytes_per_token[1]))
    for path, expected in zip(directories, (one, other), strict=True):
        alone = Trainer(run_config(str(path)), tmp_path / path.name)
        alone.metrics.close()
        alone.model.load_state_dict(weights(tmp_path / "run"))
        assert alone._validation_losses() == {str(path): pytest.approx(expected, rel=1e-6)}
    parts = [open_data(config, rank, 2).loader.batch(3)[0] for rank in range(2)]
    assert torch.equal(torch.cat(parts), data.loader.batch(3)[0])


@pytest.mark.row("Data at scale")
@pytest.mark.parametrize("kind", ["mixture", "stream"])
def test_resumed_equals_uninterrupted(
    kind: str, directories: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stream, "SHUFFLE_TOKENS", 160)
    monkeypatch.setattr(stream, "_PIECE_CHARACTERS", 100)
    streamed = f"stream:{directories[0]}.jsonl,tokenizer=bytes,val=0.3"
    data = mixture(directories) if kind == "mixture" else streamed
    config = run_config(data, steps=8, save_every=3, keep=9, mask_documents=True)
    train(config, tmp_path / "whole", show_progress=False)
    for step in (3, 6):
        shutil.copytree(tmp_path / "whole", tmp_path / str(step))
        for later in range(step + 1, 9):
            shutil.rmtree(tmp_path / str(step) / "checkpoints" / f"step-{later:08d}", ignore_errors=True)
        trainer = Trainer(config, tmp_path / str(step), resume=True)
        if kind == "stream":
            assert trainer.progress.data["position"]["after"]["rows"] > 1
            assert trainer.data.loader.state(step) == trainer.progress.data, "it goes on there, not from the start"
        trainer.run(show_progress=False)
        assert tiny.metrics(tmp_path / str(step)) == tiny.metrics(tmp_path / "whole")
        pairs = zip(weights(tmp_path / str(step)).values(), weights(tmp_path / "whole").values(), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_stream_validates_on_what_it_does_not_train_on(directories: list[Path], tmp_path: Path) -> None:
    """The same held-out documents as `prepare` chooses; or a file of one's own."""
    held_out = open_data(run_config(f"stream:{directories[0]}.jsonl,tokenizer=bytes,val=0.3")).held_out[0]
    prepared = open_data(run_config(str(directories[0]))).held_out[0]
    count = len(held_out.batch[0])
    assert count == 20
    row = open_tokens(directories[0], "val").read(0, 16 * 20 + 1)
    assert held_out.batch[0].flatten().tolist() == row[:-1].tolist()
    assert prepared.batch[0].shape == held_out.batch[0].shape
    file = f"stream:{directories[0]}.jsonl,tokenizer=bytes,val={directories[1]}.jsonl"
    windows = open_data(run_config(file)).held_out[0].batch[0]
    text = "".join(json.loads(line)["text"] + "\0" for line in Path(f"{directories[1]}.jsonl").read_text().splitlines())
    expected = [256 if letter == "\0" else ord(letter) for letter in text][: 16 * 20]
    assert windows.flatten().tolist() == expected


@pytest.mark.row("Data at scale")
def test_documents_are_kept_apart(directories: list[Path], tmp_path: Path) -> None:
    """In training, whatever the micro-batches, and in validation."""
    for data in (mixture(directories), f"stream:{directories[0]}.jsonl,tokenizer=bytes,val=0.3"):
        assert open_data(run_config(data, mask_documents=True)).end_token == 256
        assert open_data(run_config(data)).end_token is None
    runs = {
        (mask, size): Trainer(
            run_config(str(directories[0]), mask_documents=mask, micro_batch_size=size, seq_len=64, max_seq_len=64),
            tmp_path / f"{mask}-{size}",
        )
        for mask in (False, True)
        for size in (None, 1)
    }
    losses = {}
    for key, run in runs.items():
        run.metrics.close()
        losses[key] = run._gradients(0).sum().item(), *run._validation_losses().values()
    assert losses[True, None] == pytest.approx(losses[True, 1], rel=1e-5)
    run = runs[True, None]
    tokens, targets = run.data.loader.batch(0)
    assert (tokens == 256).any()
    expected = run.model.loss(tokens, targets, *separate_documents(tokens, 256)).item()
    assert losses[True, None][0] == pytest.approx(expected, rel=1e-6)
    assert all(abs(a - b) > 1e-6 for a, b in zip(losses[True, None], losses[False, None], strict=True))


@pytest.mark.parametrize("kind", ["directory", "mixture", "stream"])
def test_text_that_lies_elsewhere_is_the_same_text(
    kind: str, directories: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By another path, and after it was moved; in other proportions it is other text."""
    place = directories[0].parent
    data = {
        "directory": "{}/a",
        "mixture": "{}/a=0.7,{}/b=0.3",
        "stream": "stream:{}/a.jsonl,tokenizer=bytes,val=0.3",
    }[kind]
    loss = train(run_config(data.replace("{}", str(place)), steps=2), tmp_path / "run", show_progress=False)
    shutil.copytree(place, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    for where in ("moved", str(tmp_path / "moved")):
        config = run_config(data.replace("{}", where), steps=2)
        assert train(config, tmp_path / "run", resume=True, show_progress=False) == loss
    if kind != "directory":
        other = data.replace("{}", "moved").replace("0.3", "0.31")
        with pytest.raises(ValueError, match=r"made with another config: data(_identity\.val)? is"):
            train(run_config(other, steps=2), tmp_path / "run", resume=True, show_progress=False)


def test_the_part_that_a_stream_holds_out_is_part_of_what_it_is() -> None:
    """Its first held-out documents may be the same, and then its identity is."""

    def held_out(val: str) -> tuple[object, ...]:
        return parse_data(f"stream:x,tokenizer=bytes,val={val}").proportions

    assert held_out("0.30") == held_out(".3") != held_out("0.31")
    assert held_out("a/val.txt") == held_out("b/val.txt") != held_out("0.3")

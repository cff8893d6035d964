"""Text, runs and models small enough to train in a fraction of a second."""

from __future__ import annotations

import errno
import io
import json
import random
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from spherelm.data.prepare import prepare
from spherelm.data.shards import Ids, ShardHeader, ShardWriter
from spherelm.data.tokenizer import Tokenizer
from spherelm.recipes import Preset, make_run
from spherelm.runs.checkpoint import MOMENTS, WEIGHTS
from spherelm.runs.config import RunConfig
from spherelm.runs.loading import checkpoint_of
from spherelm.runs.metrics import read_metrics
from spherelm.train.trainer import train

COMPILES = (
    pytest.mark.slow,
    # Of the compiler itself, which looks at the hidden state between two compiled blocks.
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    # Of the compiler, at any autograd function that it meets.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.*should not be instantiated:DeprecationWarning"),
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler here"),
)


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that compiles: slow, left out where there is no C++ compiler,
    the compiler's own warnings let pass.
    """
    for mark in COMPILES:
        test = mark(test)
    return test


ARMS = ("gpt", "ngpt")
VOCAB = 257
MEASURED = ("seconds", "tokens_per_second", "mfu", "memory_mb", "threads")
"""The fields of a record of `metrics.jsonl` in which two runs that are otherwise equal differ."""

"""Ids of the bytes tokenizer."""

PRESET = Preset(
    n_layers=2,
    d_model=16,
    n_heads=2,
    seq_len=16,
    batch_size=4,
    steps=6,
    eval_every=2,
    eval_windows=6,
    compile=False,
)


def text(seed: int, words: int = 400) -> str:
    """Pseudo-words, so that there is something to learn."""
    draw = random.Random(seed)
    syllables = [a + b for a in "bdklmnst" for b in "aeiou"]
    vocabulary = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(40)]
    return " ".join(draw.choices(vocabulary, k=words))


def make_data(directory: Path) -> Path:
    """A data directory of about 2000 training and 1000 validation bytes, made below `directory`."""
    train, val, out = directory / "train.txt", directory / "val.txt", directory / "data"
    train.write_text(text(1), encoding="utf-8")
    val.write_text(text(2, 200), encoding="utf-8")
    prepare([train], out, "bytes", val=[val])
    return out


def run_config(arm: str, data: Path, **overrides: Any) -> RunConfig:
    """A run of six steps, in float32 unless told otherwise."""
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 24, "seq_len": 16, "batch_size": 4, "steps": 6}
    rest = {"eval_every": 2, "eval_windows": 6, "compile": False, "dtype": "float32", "lr": 1e-2}
    return make_run(arm, vocab_size=VOCAB, data=str(data), **{**sizes, **rest, **overrides})


def metrics(run: Path) -> list[dict[str, Any]]:
    """The records of a run without what differs between equal runs: times and speeds."""
    records = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in r.items() if k not in MEASURED} for r in records]


def full_disk(after: int) -> Callable[..., AbstractContextManager[Any]]:
    """In place of `FileSystem.create_stream`: from file number `after` on,
    half a file is written and the disk is full.
    """
    files = iter(range(1000))

    @contextmanager
    def create_stream(self: Any, path: Path, mode: str) -> Iterator[Any]:
        is_full = next(files) >= after

        class Stream(io.FileIO):
            def write(self, content: Any) -> int:
                if not is_full:
                    return super().write(content)
                super().write(content[: len(content) // 2])
                raise OSError(errno.ENOSPC, "No space left on device")

        with Stream(path, "wb") as stream:
            yield stream

    return create_stream


def tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Everything in a checkpoint that one process wrote.
    (The bytes differ: safetensors orders its metadata at random.)
    """
    return {**load_file(checkpoint / WEIGHTS), **load_file(checkpoint / MOMENTS)}


def assert_bitwise(one: Path, other: Path) -> None:
    """Two checkpoints hold the same bits."""
    ours, theirs = tensors(one), tensors(other)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def assert_resumes(config: RunConfig, directory: Path) -> tuple[Path, Path]:
    """A run that goes on from its first checkpoint ends where one does that was not interrupted;
    the last checkpoints.
    """
    for name in ("whole", "broken"):
        train(config, directory / name, show_progress=False)
    for late in sorted((directory / "broken" / "checkpoints").iterdir())[1:]:
        shutil.rmtree(late)
    train(config, directory / "broken", resume=True, show_progress=False)
    ends = [checkpoint_of(directory / name) for name in ("whole", "broken")]
    assert_bitwise(*ends)
    assert metrics(directory / "whole") == metrics(directory / "broken")
    return ends[0], ends[1]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write_shard(
    path: Path, documents: Iterable[Sequence[int] | Ids], tokenizer: Tokenizer, text_bytes: int
) -> ShardHeader:
    """Write `documents` (ids without end tokens) as one shard, the end token after each."""
    writer = ShardWriter(path, tokenizer)
    try:
        for ids in documents:
            writer.append([*ids, tokenizer.eos_id], 0)
        writer.text_bytes = text_bytes
        return writer.finish()
    finally:
        writer.close()

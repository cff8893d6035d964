"""Parallel text small enough to train on in a fraction of a second:
the target spells the source backwards, word by word.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from spherelm.data.pairs import PairFiles, PairSettings, prepare_pairs
from spherelm.data.tokenizer import load_tokenizer
from spherelm.recipes import make_run
from spherelm.runs.config import RunConfig

SYLLABLES = [a + b for a in "bdklm" for b in "aiu"]


def sentence(draw: random.Random) -> str:
    return " ".join("".join(draw.choices(SYLLABLES, k=2)) for _ in range(draw.randint(1, 3)))


def translate(text: str) -> str:
    return " ".join(word[::-1] for word in text.split())


def write_files(directory: Path, name: str, sentences: list[str]) -> PairFiles:
    """NAME.src and NAME.tgt in `directory`."""
    files = PairFiles(directory / f"{name}.src", directory / f"{name}.tgt")
    files.source.write_text("".join(f"{s}\n" for s in sentences), encoding="utf-8")
    files.target.write_text("".join(f"{translate(s)}\n" for s in sentences), encoding="utf-8")
    return files


def make_pairs(directory: Path, count: int = 60, **options: Any) -> Path:
    """A data directory below `directory`, in bytes unless `options` say otherwise, with 20 validation pairs."""
    draw = random.Random(0)
    train = write_files(directory, "train", [sentence(draw) for _ in range(count)])
    val = write_files(directory, "val", [sentence(draw) for _ in range(20)])
    prepare_pairs(train, directory / "pairs", val, PairSettings(**{"tokenizer": "bytes", **options}))
    return directory / "pairs"


def run_config(arm: str, data: Path, **overrides: Any) -> RunConfig:
    """A run of six steps in float32."""
    sizes = {"n_layers": 2, "d_model": 16, "n_heads": 2, "d_ff": 24, "seq_len": 16, "batch_size": 4, "steps": 6}
    rest = {"eval_every": 2, "eval_windows": 8, "compile": False, "dtype": "float32", "lr": 1e-2}
    vocab_size = load_tokenizer(data).vocab_size
    return make_run(arm, "pairs", vocab_size=vocab_size, data=str(data), **{**sizes, **rest, **overrides})

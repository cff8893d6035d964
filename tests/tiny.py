"""Text, runs and models small enough to train in a fraction of a second."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from spherelm.data.prepare import prepare
from spherelm.recipes import WAYS, Preset, make_run
from spherelm.train.config import RunConfig
from spherelm.train.metrics import MEASURED, read_metrics

ARMS = ("gpt", "ngpt")
VOCAB = 257
"""Ids of the bytes tokenizer."""

PRESET = Preset(
    n_layers=2,
    d_model=16,
    n_heads=2,
    seq_len=16,
    batch_size=4,
    steps=6,
    rates={(recipe, arm): 1e-2 for recipe in WAYS for arm in ARMS},
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


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))

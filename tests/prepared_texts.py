"""Texts that are prepared in small steps, and prepared directories read without our code."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spherelm.data import documents, encoding
from spherelm.data import prepare as prepare_module
from spherelm.data.documents import Block
from spherelm.data.shards import Shard

EOS = 256


def in_small_blocks(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Blocks of a few documents, so that small inputs have many, and a saved state after each."""
    read_blocks = documents.read_blocks

    def small(path: Path, **settings: Any) -> Iterator[Block]:
        return read_blocks(path, **settings, block_size=size)

    monkeypatch.setattr(prepare_module, "read_blocks", small)
    monkeypatch.setattr(prepare_module, "CHECKPOINT_SECONDS", 0.0)


class Interrupted(BaseException):
    """Stands for Ctrl-C or a kill."""


def interrupt_after(monkeypatch: pytest.MonkeyPatch, results: int) -> None:
    """Let the next `prepare` die when it has taken this many results."""

    def dying(*arguments: Any) -> Iterator[encoding.Encoded]:
        for count, result in enumerate(encoding.encode_all(*arguments)):
            if count == results:
                raise Interrupted
            yield result

    monkeypatch.setattr(prepare_module, "encode_all", dying)


def contents(directory: Path) -> dict[str, bytes]:
    """Every file, by its path within the directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def texts_of(directory: Path, split: str = "train") -> list[str]:
    """The documents of a prepared directory of bytes, decoded without our code."""
    ids = np.concatenate([np.asarray(Shard(path).tokens) for path in sorted(directory.glob(f"{split}-*.bin"))])
    return [bytes(document.tolist()[:-1]).decode() for document in np.split(ids, np.flatnonzero(ids == EOS) + 1)[:-1]]

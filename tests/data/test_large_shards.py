"""A shard of more than 2^31 tokens and 4 GB: the arithmetic holds, and reading takes no memory.
The file is a sparse one.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from spherelm.data.loader import Loader, validation_windows
from spherelm.data.shards import BODY_START, MAGIC, VERSION, Shard, ShardHeader, Tokens
from spherelm.data.tokenizer import ByteTokenizer

TOKENS = 2**31 + 12_345
MARKS = {5: 7, 2**30: 8, 2**31 - 1: 9, 2**31: 10, 2**31 + 1: 11, TOKENS - 2: 12, TOKENS - 1: 13}


def sparse_shard(path: Path) -> Shard:
    """Zeros, but for MARKS and two documents, the second beyond 2^31; written without our writer."""
    tokenizer, table = ByteTokenizer(), np.array([0, 2**31 + 7], "<i8")
    header = ShardHeader(
        dtype="uint16",
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        tokenizer_fingerprint=tokenizer.fingerprint,
        tokens=TOKENS,
        documents=2,
        text_bytes=TOKENS - 2,
        body_sha256="0" * 64,
        table_sha256=hashlib.sha256(table.tobytes()).hexdigest(),
    )
    text = json.dumps(asdict(header)).encode()
    with open(path, "wb") as file:
        file.write(struct.pack("<8sII32s", MAGIC, VERSION, len(text), hashlib.sha256(text).digest()) + text)
        for place, token in MARKS.items():
            file.seek(BODY_START + 2 * place)
            file.write(struct.pack("<H", token))
        file.seek(BODY_START + (2 * TOKENS + 7) // 8 * 8)
        file.write(table.tobytes())
    return Shard(path)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Tokens:
    directory = tmp_path_factory.mktemp("large")
    shards = [sparse_shard(directory / f"{i}.bin") for i in range(2)]
    assert (directory / "0.bin").stat().st_size > 2**32
    assert (directory / "0.bin").stat().st_blocks < 1000, "sparse"
    return Tokens(shards, directory, "train")


def test_every_place_is_read(text: Tokens) -> None:
    assert len(text) == 2 * TOKENS > 2**32
    for begin in (0, TOKENS):
        for place, token in MARKS.items():
            assert text.read(begin + place, 1).tolist() == [token]
    assert text.read(2**31 - 2, 5).tolist() == [0, 9, 10, 11, 0]
    assert text.read(TOKENS - 3, 10).tolist() == [0, 12, 13, 0, 0, 0, 0, 0, 7, 0]
    assert text.document_offsets.tolist() == [0, 2**31 + 7, TOKENS, TOKENS + 2**31 + 7]


def test_windows_reach_to_the_end(text: Tokens) -> None:
    """Of one window in four thousand, some lie beyond 2^32 tokens, none outside;
    short ones stand for as many as 4 billion.
    """
    loader = Loader(text, 1024, 8, seed=0)
    starts = np.array(loader.window_starts(3 * loader.windows - 500, 1000))
    assert starts.min() >= 0
    assert starts.max() + 1025 <= len(text)
    assert (starts > 2**31).mean() == pytest.approx(0.5, abs=0.1)
    assert len(set(starts[:500].tolist())) == 500
    single = Loader(text, 1, 8, seed=0)
    assert single.windows > 2**32 - 2
    assert max(single.window_starts(2**40, 200)) > 2**32 * 0.9
    tokens, _ = validation_windows(text, 1024, 7)
    assert tokens.shape == (7, 1024)


def anonymous() -> int:
    """Private memory of this process, in bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) << 10


@pytest.mark.row("Data at scale")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_reading_takes_no_memory(text: Tokens) -> None:
    """64 MB of windows at random places of 8.6 GB."""
    loader = Loader(text, 4096, 8, seed=0)
    loader.batch(0)
    before = anonymous()
    for step in range(1, 1000):
        loader.batch(step)
    assert anonymous() - before < 16 << 20

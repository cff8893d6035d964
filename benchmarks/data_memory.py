"""Memory of `spherelm data prepare`, of the loaders and of direct streaming while they go through more
than 1 GB of tokens.

python benchmarks/data_memory.py --json docs/results/data.json

The shipped text is cut into documents and repeated, each time with a number in front, and one document in ten once more
without, for --deduplicate to find. Memory is what a process holds for itself (Anonymous in /proc/PID/smaps_rollup);
pages of files that the system keeps because nobody else needs the room (the shards, read by memory map) are not in it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from spherelm.data.corpus import shipped_documents
from spherelm.data.hub import HubRequest, HubText
from spherelm.data.loader import Batches, Loader
from spherelm.data.mixture import MixtureLoader
from spherelm.data.shards import Tokens, open_tokens
from spherelm.data.stream import StreamLoader
from spherelm.data.tokenizer import ByteTokenizer

DOCUMENT = 8000  # characters
MIB = 1 << 20


def write_text(folder: Path, target: int, file_bytes: int = 64 * MIB) -> int:
    """Parquet files with about `target` bytes of text; how many documents there are."""
    books = "\n".join(document["text"] for document in shipped_documents("train"))
    pieces = [books[i : i + DOCUMENT] for i in range(0, len(books), DOCUMENT)]
    written, copy, documents = 0, 0, 0
    while written < target:
        rows: list[str] = []
        held = 0
        while held < file_bytes:
            for i, piece in enumerate(pieces):
                rows += [f"{copy} {piece}"] + ([piece] if i % 10 == 0 else [])
            held = sum(map(len, rows))
            copy += 1
        table = pyarrow.table({"text": rows})
        pyarrow.parquet.write_table(table, folder / f"part-{written // file_bytes:05d}.parquet", row_group_size=1000)
        written, documents = written + held, documents + len(rows)
    return documents


def anonymous(process: int | str = "self") -> float:
    """Memory that a process holds for itself, in MiB; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) / 1024


def children(process: int) -> list[int]:
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        found += [int(child) for child in task.read_text().split()]
    return found


def summary(samples: list[float], parts: int = 5) -> dict[str, Any]:
    """The largest value in each of `parts` equal parts of the time, in MiB."""
    edges = [round(i * len(samples) / parts) for i in range(parts + 1)]
    peaks = [max(samples[a:b]) for a, b in itertools.pairwise(edges) if b > a]
    return {"peak_mib_by_fifth": [round(peak) for peak in peaks], "samples": len(samples)}


def watch_prepare(folder: Path, out: Path, workers: int) -> dict[str, Any]:
    """Run `spherelm data prepare` over the folder and watch it."""
    words = ["--hf", str(folder), "--tokenizer", "bytes", "--val-fraction", "0.01", "--deduplicate"]
    command = [
        sys.executable,
        "-m",
        "spherelm",
        "data",
        "prepare",
        *words,
        "--out",
        str(out),
        "--workers",
        str(workers),
    ]
    start = time.perf_counter()
    parent, others = list[float](), list[float]()
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            parent.append(anonymous(process.pid))
            others.append(max([anonymous(child) for child in children(process.pid)], default=0.0))
            time.sleep(0.5)
    if process.returncode:
        raise SystemExit(f"prepare ended with {process.returncode}")
    seconds = time.perf_counter() - start
    manifest = json.loads((out / "manifest.json").read_text())
    left_out = sum(entry["duplicates_left_out"] for entry in manifest["inputs"])
    counts = {
        split: {key: entry[key] for key in ("tokens", "documents", "bytes")}
        for split, entry in manifest["splits"].items()
    }
    size = sum(path.stat().st_size for path in out.glob("*.bin"))
    told = {"splits": counts, "shard_bytes": size, "duplicates_left_out": left_out, "workers": workers}
    return {**told, "seconds": round(seconds, 1), "parent": summary(parent[3:]), "largest_worker": summary(others[3:])}


def watch_batches(loader: Batches, steps: int) -> dict[str, Any]:
    """Read `steps` batches and watch this process."""
    start, samples = time.perf_counter(), [anonymous()]
    for step in range(steps):
        tokens, _ = loader.batch(step)
        if step % max(1, steps // 200) == 0:
            samples.append(anonymous())
    seconds = time.perf_counter() - start
    read = steps * tokens.numel()
    return {"tokens_read": read, "tokens_per_second": round(read / seconds), **summary(samples)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=0.65, help="of text; two bytes a token are written")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=2000, help="batches of 32 windows of 1024 tokens")
    parser.add_argument("--folder", type=Path, help="where to work; a temporary one if left out")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        text, out = work / "text", work / "data"
        text.mkdir()
        documents = write_text(text, round(arguments.gigabytes * 1e9))
        result: dict[str, Any] = {"documents_given": documents, "prepare": watch_prepare(text, out, arguments.workers)}
        train, val = open_tokens(out, "train"), open_tokens(out, "val")
        loaders = batches(train, val, text)
        for name, make in loaders.items():
            result[name] = watch_batches(make(), arguments.steps // (8 if name == "stream" else 1))
            print(name, result[name], flush=True)
    finally:
        shutil.rmtree(work)
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


def batches(train: Tokens, val: Tokens, text: Path) -> dict[str, Callable[[], Batches]]:
    """Each way to read the text, 32 windows of 1024 tokens at a time."""
    weights = [Fraction("0.7"), Fraction("0.3")]
    return {
        "loader": lambda: Loader(train, 1024, 32, seed=0),
        "mixture": lambda: MixtureLoader([train, val], weights, 1024, 32, seed=0),
        "stream": lambda: StreamLoader(HubText(HubRequest(str(text))), ByteTokenizer(), 1024, 32, seed=0),
    }


if __name__ == "__main__":
    main()

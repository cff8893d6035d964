"""`metrics.jsonl`: one JSON object a line, the record from which every report is computed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spherelm.errors import UserError


def in_words(record: Mapping[str, Any]) -> str:
    """A record of `metrics.jsonl` as a person reads it while the run works;
    where in the run it was made is left out.
    """
    if record["kind"] == "val":
        bits = f" ({record['bits_per_byte']:.3f} bits per byte)" if record.get("bits_per_byte") else ""
        return f"validation loss {record['loss']:.4f}{bits}"
    if record["kind"] == "eval":
        return ", ".join(f"{task} acc {found['acc']:.3f}" for task, found in record["tasks"].items() if "acc" in found)
    if record["kind"] in ("skip", "stop"):
        return f"{'update left out' if record['kind'] == 'skip' else 'stopped'}: {record['reason']}"
    share = f", MFU {record['mfu']:.2f}" if "mfu" in record else ""
    return f"loss {record['loss']:.3f}, {record['tokens_per_second']:,.0f} tokens/s{share}"


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every record of a `metrics.jsonl`; a last line that was cut off is left out,
    any other damage raises `ValueError`.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is not JSON: {error}") from error
    return records

"""`metrics.jsonl`: one JSON object a line, the record from which every report is computed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from spherelm.errors import UserError


class DamagedMetrics(UserError):
    """A `metrics.jsonl` is not as a run wrote it."""


REMEDY = "take the line out, or leave the run out"


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


def is_record(value: Any) -> bool:
    """Whether a line of a `metrics.jsonl` holds what every record has."""
    return isinstance(value, dict) and "kind" in value and isinstance(value.get("step"), int)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every record of a `metrics.jsonl`; a last line that was cut off is left out,
    any other damage raises `ValueError`.
    """
    lines = path.read_bytes().splitlines()
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:  # what is no JSON, or no text
            if number == len(lines):
                break
            raise DamagedMetrics(f"{path}, line {number} is not JSON ({error}): {REMEDY}") from error
        if not is_record(record):
            raise DamagedMetrics(f"{path}, line {number} is no record with a kind and a step: {REMEDY}")
        if record["kind"] == "val" and not isinstance(record.get("loss", ""), int | float | None):
            raise DamagedMetrics(f"{path}, line {number} is a validation without a loss: {REMEDY}")
        records.append(record)
    return records


def read_evaluations(run: Path) -> Iterator[dict[str, Any]]:
    """The results of `spherelm eval --json` in a run directory, file by file; other files are passed over."""
    for path in sorted(run.glob("*.json")):
        try:
            record = json.loads(path.read_bytes())
        except ValueError:
            continue
        if isinstance(record, dict) and _is_evaluation(record):
            yield record


def _is_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether tasks have metrics and perplexities their lengths, and there is one of both."""
    tasks, lengths = record.get("tasks"), record.get("perplexity")
    if tasks is not None and not (isinstance(tasks, dict) and all(_has_metrics(task) for task in tasks.values())):
        return False
    if lengths is not None and not (isinstance(lengths, dict) and {"stride", "files", "lengths"} <= lengths.keys()):
        return False
    return tasks is not None or lengths is not None


def _has_metrics(task: Any) -> bool:
    metrics = task.get("metrics") if isinstance(task, dict) else None
    return isinstance(metrics, dict) and all(isinstance(one, dict) and "value" in one for one in metrics.values())

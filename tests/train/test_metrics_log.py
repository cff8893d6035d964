"""`metrics.jsonl`: whole lines, a torn end tolerated, nothing twice after a resume."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from spherelm.runs.metrics import read_metrics
from spherelm.train.metrics_log import MetricsLog


def written(path: Path, steps: int) -> list[dict[str, object]]:
    log = MetricsLog(path, 0)
    for step in range(steps + 1):
        if step:
            log.write("train", step=step, loss=1 / step)
        if step % 2 == 0:
            log.write("val", step=step, loss=0.5)
    log.close()
    return read_metrics(path)


def test_records_come_back_in_order_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = written(path, 3)
    assert [(r["kind"], r["step"]) for r in records] == [
        ("val", 0),
        ("train", 1),
        ("train", 2),
        ("val", 2),
        ("train", 3),
    ]
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    assert sorted(records[1]) == ["kind", "loss", "step"]


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write("val", step=0, loss=2.0)
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"kind": "val", "step": 0, "loss": 2.0}]
    log.close()


def test_numbers_survive_exactly(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write("train", step=1, loss=0.1 + 0.2, lr=5e-324, grad_norm=1.7976931348623157e308)
    log.close()
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (record["loss"], record["lr"], record["grad_norm"]) == (0.1 + 0.2, 5e-324, 1.7976931348623157e308)


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_torn_last_line_is_left_out(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = written(path, 3)
    path.write_bytes(path.read_bytes()[: -1 - cut])
    assert read_metrics(path) == records[:-1]


def test_zeros_that_a_power_cut_left_are_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = written(path, 2)
    path.write_bytes(path.read_bytes() + bytes(100))
    assert read_metrics(path) == records


def test_damage_in_the_middle_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, 3)
    lines = path.read_text().splitlines()
    lines[1] = lines[1][:9]
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is not JSON"):
        read_metrics(path)


@pytest.mark.parametrize("torn", ["", '{"kind": "train", "st', "\0\0\0"])
def test_resuming_drops_what_will_be_done_again(torn: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = written(path, 6)
    with path.open("a") as file:
        file.write(torn)
    log = MetricsLog(path, 4)
    assert [r["step"] for r in read_metrics(path)] == [0, 1, 2, 2, 3, 4, 4]
    for record in whole[7:]:
        log.write(**record)  # type: ignore[arg-type]
    log.close()
    assert read_metrics(path) == whole


def test_starting_over_drops_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    written(path, 3)
    MetricsLog(path, 0).close()
    assert read_metrics(path) == []


def test_a_run_whose_log_is_gone_can_go_on(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 4)
    log.write("train", step=5, loss=1.0)
    log.close()
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [5]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full, a disk that is always full")
def test_a_full_disk_is_named_with_what_to_do(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.write("val", step=0, loss=2.0)
    log.close()
    message = r"could not write .*metrics\.jsonl .*No space left.*free some space and --resume"
    with open("/dev/full", "ab", buffering=0) as log._file, pytest.raises(OSError, match=message):
        log.write("train", step=1, loss=1.0)


def test_a_line_that_only_half_fits_is_a_full_disk_too(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)

    class AlmostFull:
        def write(self, data: bytes) -> int:
            file.write(data[:7])
            return 7

    with log._file as file:
        log._file = AlmostFull()  # type: ignore[assignment]
        with pytest.raises(OSError, match="No space left") as error:
            log.write("train", step=1, loss=1.0)
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.ENOSPC
    assert read_metrics(tmp_path / "metrics.jsonl") == []

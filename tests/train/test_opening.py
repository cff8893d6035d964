"""Output of a run on screen: how it begins, then its losses as they come, on a terminal and in a log file."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from spherelm.data.shards import open_tokens
from spherelm.models import build
from spherelm.runs.group import Group
from spherelm.runs.metrics import read_metrics
from spherelm.train import opening as module
from spherelm.train.batches import repetition
from spherelm.train.opening import opening, warnings
from spherelm.train.trainer import Trainer, train

MakeTrainer = Callable[..., Trainer]


def validations(run: Path) -> list[tuple[int, str]]:
    """Step and loss of each, as a line has it."""
    return [(r["step"], f"{r['loss']:.4f}") for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "val"]


def shown_validations(lines: list[str]) -> list[tuple[int, str]]:
    found = [re.fullmatch(r"run: step (\d+)/6, validation loss (\S+) \(\S+ bits per byte\)", line) for line in lines]
    return [(int(match[1]), match[2]) for match in found if match]


@pytest.mark.row("Screen")
def test_a_log_file_gets_plain_lines(
    trainer: MakeTrainer, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer("ngpt", log_every=4)
    run.run()
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert (shown.out, "\r" in shown.err, "\x1b" in shown.err) == ("", False, False)
    assert all(re.match(r"spherelm: |run: step \d/6, ", line) for line in lines), "each is ours"
    assert shown_validations(lines) == validations(tmp_path / "run")
    assert [line.split(",")[0] for line in lines if " tokens/s, MFU " in line] == ["run: step 4/6"]
    told = "\n".join(line for line in lines if line.startswith("spherelm: "))
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    for fact in (
        f"{parameters:,} parameters",
        "cpu, float32 (as asked for) on 1 thread; memory: about ",
        f"6 updates of 64 tokens, {6 * 64 / len(open_tokens(data, 'train')):.3g} epochs of {data}",
        f"logged to {tmp_path / 'run' / 'metrics.jsonl'}; saved every 30 minutes and at the end",
        run.speed.peak(),
    ):
        assert fact in told
    assert "warning" not in told


@pytest.mark.row("Screen")
@pytest.mark.parametrize("bars", [True, False])
def test_a_terminal_gets_a_bar_and_the_same_validations(
    bars: bool, trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    monkeypatch.setenv("TQDM_DISABLE", "" if bars else "1")
    with os.fdopen(ours, "rb", buffering=0) as screen:
        with os.fdopen(theirs, "w", encoding="utf-8") as terminal, monkeypatch.context() as patch:
            patch.setattr(sys, "stderr", terminal)
            trainer("gpt").run()
        shown = screen.read(2**16).replace(b"\r\n", b"\n").decode()
    assert ("\r" in shown) == bars
    lines = [line.rpartition("\r")[2] for line in shown.splitlines()]
    assert shown_validations(lines) == validations(tmp_path / "run")


def test_a_quiet_run_is_the_same_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny.run_config("ngpt", data)
    random = []
    for name, shows in (("quiet", False), ("shown", True)):
        train(config, tmp_path / name, show_progress=shows)
        random.append(torch.get_rng_state())
        assert (capsys.readouterr().err != "") == shows
    assert tiny.metrics(tmp_path / "quiet") == tiny.metrics(tmp_path / "shown")
    assert torch.equal(*random), "counting memory draws nothing"


def test_a_run_that_goes_on_says_from_where(trainer: MakeTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer("gpt").run(show_progress=False)
    trainer("gpt", resume=True).run()
    assert ", resuming from step 6" in capsys.readouterr().err


def test_an_update_that_is_left_out_is_said(
    trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trainer("gpt", on_bad_step="skip")
    monkeypatch.setattr(run, "_gradients", lambda step: torch.tensor([float("nan") if step == 2 else 1.0]))
    monkeypatch.setattr(run.optimizer, "step", lambda: None)
    monkeypatch.setattr("spherelm.train.trainer.clip_gradients", lambda *_: torch.tensor(1.0))
    run.run()
    assert "update left out: the loss is nan at step 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("times", "said"), [(0.9, ""), (1.5, "1.5 times; up to 4 times"), (7.0, "7 times; more than 4")]
)
def test_text_that_repeats_is_warned_of(times: float, said: str) -> None:
    found = repetition({"some": 0.5, "most": times})
    assert (len(found) == 1) == bool(said)
    assert said in "".join(found)
    assert all(line.startswith("warning: most is read") for line in found)


@pytest.mark.row("Screen")
def test_a_run_warns_of_text_that_repeats_and_of_memory_that_does_not_fit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = len(open_tokens(data, "train"))
    config = tiny.run_config("gpt", data, steps=5 * size // 64)

    def lines(config: Any) -> list[str]:
        found = opening(config, tmp_path, Group(), "float32", 64, 0, "a peak")
        return [line for line in found if line.startswith("warning")]

    (repeats,) = lines(config)
    assert str(data) in repeats
    monkeypatch.setattr(module, "memory_of", lambda device: 1000)
    _, memory = lines(config)
    assert "does not fit" in memory
    assert "of 0 MiB" in memory
    monkeypatch.setattr(module, "memory_of", lambda device: None)
    assert lines(config) == [repeats], "nobody knows how much there is"


def test_runs_beside_each_other_share_the_memory(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two fit, three do not; what is wrong with many of them is said once."""
    config, cpu = tiny.run_config("gpt", data), torch.device("cpu")
    needed = module.memory_per_device(config)["total"]
    monkeypatch.setattr(module, "memory_of", lambda device: 2 * needed)
    runs = [replace(config, train=replace(config.train, seed=seed)) for seed in range(3)]
    assert warnings(runs, cpu, 2) == []
    (said,) = warnings(runs, cpu, 3)
    assert "use fewer --workers" in said


def test_memory_is_that_of_this_machine() -> None:
    """As the system says it, or less in a container."""
    there = module.memory_of(torch.device("cpu"))
    held = int(Path("/proc/meminfo").read_text().split()[1]) * 2**10
    assert there is not None
    assert 2**28 < there <= 1.1 * held
    assert module.memory_of(torch.device("meta")) is None


def test_what_a_token_meets_is_told_of_experts(tmp_path: Path) -> None:
    from spherelm.recipes import make_run

    config = make_run("ngpt", "moe", vocab_size=61, compile=False)
    (first, *_) = opening(config, tmp_path, Group(), "float32", 64, 0, "a peak")
    whole, met = (int(number.replace(",", "")) for number in re.findall(r"[\d,]{5,}", first))
    with torch.device("meta"):
        assert whole == sum(parameter.numel() for parameter in build(config.model).parameters())
    assert met < whole

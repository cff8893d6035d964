"""`spherelm bench`: what it reports is computed from what it timed, and both arms do the same amount of work."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
import torch

from spherelm.experiments import bench as module
from spherelm.experiments.bench import Shape, bench, bench_table, configs, parse_shape, peak_memory
from spherelm.experiments.cost import StepCost
from spherelm.train import diagnostics
from spherelm.train.counting import training_flops

SHAPE = Shape(n_layers=2, d_model=16, n_heads=2, seq_len=16, batch_size=4, vocab_size=61)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a step of GPT takes 2 s, one of nGPT 3, a retraction 0.03, and the peak is 10 GFLOP/s."""
    monkeypatch.setattr(module, "measure_cost", lambda gpt, ngpt, steps: StepCost(2.0, 3.0, 1.5))
    monkeypatch.setattr(module, "matmul_rate", lambda dtype: 1e10)
    monkeypatch.setattr(module, "peak_memory", lambda config: 100.0 if config.arm == "gpt" else 103.0)
    monkeypatch.setattr(module, "retraction_seconds", lambda config: 0.03)


def test_a_shape_is_six_numbers() -> None:
    assert parse_shape("2,16,2,16,4,61") == SHAPE
    assert parse_shape("6, 384, 6, 512, 8, 8192").vocab_size == 8192


@pytest.mark.parametrize("text", ["", "1,2,3", "2,16,2,16,4,61,7", "2,16,2,16,4,x", "2,16,2,0,4,61", "2,16,2,-1,4,61"])
def test_another_shape_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"--shape takes six whole numbers L,D,H,T,B,V such as .*; got "):
        parse_shape(text)


def test_both_arms_have_the_shape() -> None:
    for arm, config in configs(SHAPE, "float32", compiled=False).items():
        model, train = config.model, config.train
        assert (config.arm, model.n_layers, model.d_model, model.n_heads, model.vocab_size) == (arm, 2, 16, 2, 61)
        assert (train.seq_len, train.batch_size, train.dtype, train.compile) == (16, 4, "float32", False)


@pytest.mark.usefixtures("timed")
def test_a_step_that_is_faster_than_the_product_is_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "matmul_rate", lambda *_: 1.0)
    mfu = bench(SHAPE, "float32", compiled=False, steps=5)["mfu"]
    assert mfu["gpt"] == 1.0
    assert mfu["ngpt"] == pytest.approx(1 / 1.5, rel=0.01), "of three seconds instead of two, for as many operations"


@pytest.mark.usefixtures("timed")
def test_the_figures_follow_from_the_times() -> None:
    result = bench(SHAPE, "float32", compiled=False, steps=5)
    assert result["step_time_ratio"] == 1.5
    assert result["tokens_per_second"] == {"gpt": 32.0, "ngpt": 64 / 3}
    assert result["matmul_gflops"] == 10.0
    assert result["peak_memory_mb"] == {"gpt": 100.0, "ngpt": 103.0}
    assert result["retraction_share"] == pytest.approx(0.01)
    assert set(result["mfu"]) == set(tiny.ARMS)
    for arm, config in configs(SHAPE, "float32", compiled=False).items():
        flops = training_flops(config.model, 4, 16)
        assert result["mfu"][arm] == pytest.approx(flops / result["step_seconds"][arm] / 1e10)
    lines = bench_table(result).splitlines()
    assert lines[0].startswith("2 layers, d 16, 2 heads, sequence 16, batch 4, vocabulary 61; float32, not compiled, ")
    assert "A step of nGPT takes 1.500 times as long as one of GPT." in lines
    assert "Retraction: 1.00 % of a step of nGPT." in lines
    assert ["step", "2.000", "3.000", "s"] in [line.split() for line in lines]


@pytest.mark.usefixtures("timed")
def test_hybrids_are_timed_by_their_pattern() -> None:
    shape = Shape(n_layers=9, d_model=32, n_heads=2, seq_len=16, batch_size=4, vocab_size=61)
    result = bench(shape, "float32", compiled=False, steps=5, pattern="MA-")
    assert result["step_seconds"] == {"gpt": 2.0, "ngpt": 3.0}
    assert (result["pattern"], result["shape"]["n_layers"]) == ("MA-", 3)
    lines = bench_table(result).splitlines()
    assert lines[0].startswith("3 layers MA-, d 32, ")
    assert lines[1].split() == ["GPT", "nGPT"]
    assert "A step of nGPT takes 1.500 times as long as one of GPT." in lines


def test_the_rate_is_of_a_real_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that ticks a second a reading."""
    ticks = iter(range(100))
    monkeypatch.setattr(diagnostics.time, "perf_counter", lambda: float(next(ticks)))
    assert module.matmul_rate(torch.float32, size=10) == 2000.0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of multiprocessing, where pytest runs threads
def test_memory_is_of_a_process_of_its_own() -> None:
    """At a shape whose tensors are larger than what starting up takes:
    more than its states, less than twenty times these.
    """
    config = configs(Shape(2, 256, 4, 64, 4, 4096), "float32", compiled=False)["ngpt"]
    states = 4 * 4 * (2 * 16 * 256**2 + 2 * 4096 * 256) / 2**20  # weight, gradient and two moments of each matrix
    assert states < peak_memory(config) < 20 * states


def test_a_machine_is_timed(command: commands.Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole command, without the processes that memory is measured in, and a smaller product."""
    monkeypatch.setattr(module, "peak_memory", lambda config: 1.0)
    monkeypatch.setattr(module, "matmul_rate", partial(module.matmul_rate, size=64))
    words = ["--shape", "2,16,2,16,4,61", "--steps", 2, "--no-compile", "--dtype", "float32"]
    answer = command("bench", *words, "--json", tmp_path / "bench.json", "--profile")
    assert answer.code == 0, answer.err
    result: dict[str, Any] = json.loads((tmp_path / "bench.json").read_text())
    pinned = {"step_time_ratio", "tokens_per_second", "matmul_gflops", "mfu", "peak_memory_mb"}
    assert pinned <= set(result)
    for name in ("tokens_per_second", "mfu", "peak_memory_mb"):
        assert all(result[name][arm] > 0 for arm in tiny.ARMS)
    shown, *profiles = answer.out.split("\nWhere three steps of ")
    assert shown == bench_table(result) + "\n"
    assert [text.split()[0] for text in profiles] == list(tiny.ARMS)
    assert all("aten::mm" in text for text in profiles)
    again = command("bench", *words, "--json", tmp_path / "bench.json")
    assert (again.code, again.out) == (2, "")
    assert "already exists: choose another --json" in again.err


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--shape", "6,384"], "--shape takes six whole numbers"),
        (["--steps", 0], "steps must be at least 1, got 0"),
        (["--shape", "2,15,2,16,4,61"], "n_heads=2 does not divide d_model=15"),
    ],
)
def test_requests_that_make_no_sense(words: list[object], line: str, command: commands.Command) -> None:
    answer = command("bench", *words)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"spherelm: {line}")

"""`spherelm doctor`: what is right passes, and what is made wrong here is found, named, and told what to do about."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
import torch

from spherelm.experiments import doctor
from spherelm.models.decoder import Decoder


def run_that_ends_at(loss: float) -> Callable[[int, str], list[dict[str, Any]]]:
    """In place of a run; of two processes it ends a hundredth lower."""

    def trained(processes: int, place: str) -> list[dict[str, Any]]:
        ends = [{"kind": "val", "loss": value} for value in (8.0, loss - 0.01 * (processes - 1))]
        return [ends[0], {"kind": "train", "tokens_per_second": 1000.0}, ends[1]]

    trained.cache_clear = lambda: None  # type: ignore[attr-defined]
    return trained


def double(model: Decoder) -> None:
    with torch.no_grad():
        for weight in model.blocks[0].parameters():
            weight.mul_(2)


def fail(*_: object) -> None:
    raise RuntimeError("no kernel image\nis available")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No compiler, no large products, no processes, and a cache of its own: a second."""
    monkeypatch.setattr(doctor, "compile_parts", lambda model: None)
    monkeypatch.setattr(doctor, "SIZE_ON_CPU", 64)
    monkeypatch.setattr(doctor, "processes", lambda: "two")
    monkeypatch.setattr(doctor, "CHECKS", {**doctor.CHECKS, "processes": (lambda: "two", "")})
    monkeypatch.setattr(doctor, "trained", run_that_ends_at(7.0))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("small")
@pytest.mark.row("Check of a machine")
def test_a_machine_that_works(command: commands.Command, tmp_path: Path) -> None:
    answer = command("doctor", "--json", tmp_path / "doctor.json")
    assert answer.code == 0, answer.out
    first, *block, last, verdict = answer.out.splitlines()
    assert (first, last) == ("```", "```")
    assert verdict.startswith("ready: GPT and nGPT train on ")
    written = json.loads((tmp_path / "doctor.json").read_text())
    assert written["verdict"] == verdict
    assert written["versions"]["torch"] == torch.__version__
    assert [one["name"] for one in written["checks"]] == list(doctor.CHECKS)
    assert block == [doctor.CheckResult(**one).lines() for one in written["checks"]]
    assert "scipy" not in answer.out, "a library that is always there"
    assert "matplotlib" in answer.out
    assert "ruff" not in answer.out


@pytest.mark.parametrize(
    ("name", "part", "wrong", "told"),
    [
        ("torch.compile", "compile_parts", double, "'s logits is off by "),
        ("torch.compile", "compile_parts", fail, "RuntimeError: no kernel image"),
        ("number formats", "matmul_rate", fail, "RuntimeError: no kernel image"),
        ("training", "trained", run_that_ends_at(8.5), "20 updates took the validation loss from 8.000 to 8.500"),
        ("disk", "FREE", 1e30, " free in "),
        ("processes", "CHECKS", doctor.CHECKS, "one process ends at a loss of 7.0000, two at 6.9900"),
    ],
)
@pytest.mark.usefixtures("small")
def test_what_is_wrong_is_found_and_the_rest_is_checked_all_the_same(
    name: str, part: str, wrong: object, told: str, command: commands.Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, part, wrong)
    answer = command("doctor")
    assert answer.code == 1
    lines = [line for line in answer.out.splitlines() if not line.startswith("    ")]
    found = {line[:20].strip(): line[20:].partition(" ") for line in lines[1:-2]}
    assert list(found) == list(doctor.CHECKS)
    assert found[name][0] == "failed"
    assert told in found[name][2]
    assert f"{name} failed: {doctor.CHECKS[name][1]}" in lines[-1]
    assert lines[-1].startswith("not ready: ")
    assert ("Traceback" in answer.out) == ("Error: " in told)
    assert [check for check, (state, *_) in found.items() if state == "failed"] == [name]


def test_a_device_is_compared_with_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU under another name, first as it is and then with wrong numbers."""
    with pytest.raises(doctor.NotThere):
        doctor.against_the_cpu()
    other, right = torch.device("cpu:0"), doctor.results
    monkeypatch.setattr(doctor, "best_device", lambda: other)
    assert "logits off by up to 0e+00, gradients by 0e+00" in doctor.against_the_cpu()
    wrong = {"logits": torch.ones(1), "gradient of head.linear.weight": torch.tensor(float("nan"))}
    monkeypatch.setattr(doctor, "results", lambda arm, place: right(arm, place) | (wrong if place == other else {}))
    with pytest.raises(ValueError, match=r"GPT's logits is off by .* of its length, more than 0.001"):
        doctor.against_the_cpu()
    del wrong["logits"]
    with pytest.raises(ValueError, match=r"GPT's gradient of head.linear.weight is off by nan"):
        doctor.against_the_cpu()


@pytest.mark.slow
def test_two_processes_train_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    doctor.trained.cache_clear()
    first, last = doctor.losses(doctor.trained(2, "cpu"))
    assert last < first - 1
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    doctor.trained.cache_clear()
    with pytest.raises(ValueError, match=r"spherelm: unknown device 'cuda:77': choose one of "):
        doctor.trained(1, "cuda:77")

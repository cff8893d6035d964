"""Runs with products in few bits (docs/precision.md): they learn, resume to the bit, and refuse what cannot be."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest
import tiny
from train.test_resume import assert_same_run, crash_at

from spherelm import load_model
from spherelm.errors import UserError
from spherelm.layers.low_precision import Precision
from spherelm.recipes import make_run
from spherelm.runs.config import from_dict, read_config, to_dict
from spherelm.train.trainer import Trainer, train

MakeTrainer = Callable[..., Trainer]
SIZES: dict[str, Any] = {"d_ff": 32, "precision": "nvfp4", "dtype": "float32"}
both_arms = pytest.mark.parametrize("arm", tiny.ARMS)


@pytest.mark.row("Products in few bits")
@both_arms
def test_resuming_changes_nothing(arm: str, trainer: MakeTrainer, data: Path, tmp_path: Path) -> None:
    fields = {**SIZES, "save_every": 2, "precision.hadamard": True, "dtype": "bfloat16"}
    loss = train(tiny.run_config(arm, data, **fields), tmp_path / "whole", show_progress=False)
    first = trainer(arm, **fields)
    crash_at(first, 6)
    with pytest.raises(SystemExit):
        first.run(show_progress=False)
    assert trainer(arm, resume=True, **fields).run(show_progress=False) == loss
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@both_arms
def test_it_learns_nearly_as_well_and_leaves_a_plain_model(arm: str, data: Path, tmp_path: Path) -> None:
    """Its own validation is in that format; what `load_model` gives is not. Muon, FNGPT and QK norm are part of it."""
    own = {"variant.inner_norm": True} if arm == "ngpt" else {"qk_norm": True}
    fields = {**SIZES, **own, "optimizer": "muon", "steps": 40, "eval_every": 40}
    plain = train(
        tiny.run_config(arm, data, **{**fields, "precision": "float32"}), tmp_path / "plain", show_progress=False
    )
    loss = train(tiny.run_config(arm, data, **fields), tmp_path / "run", show_progress=False)
    start = tiny.metrics(tmp_path / "run")[0]["loss"]
    assert loss < start - 0.5 * (start - plain)
    assert loss != plain
    modules = load_model(tmp_path / "run").modules()
    assert not any("product" in vars(module) for module in modules)


@both_arms
def test_precision_of_plain_formats_is_that_of_everything(arm: str, data: Path, tmp_path: Path) -> None:
    """The same run to the bit, and the same record of it; in a changed run it switches the format off."""
    for name, fields in (("dtype", {"dtype": "bfloat16"}), ("precision", {"precision": "bfloat16", "dtype": "auto"})):
        train(tiny.run_config(arm, data, **{"steps": 2, **fields}), tmp_path / name, show_progress=False)
    assert_same_run(tmp_path / "precision", tmp_path / "dtype")
    assert read_config(tmp_path / "precision" / "config.json") == read_config(tmp_path / "dtype" / "config.json")


def test_the_switches_are_part_of_the_record() -> None:
    run = make_run(
        "gpt", "demo", vocab_size=64, precision="nvfp4", **{"precision.amax": "one", "precision.weights": False}
    )
    assert run.train.precision == Precision("nvfp4", weights=False, amax="one")
    assert from_dict(to_dict(run)) == run
    before = to_dict(make_run("gpt", "demo", vocab_size=64))
    del before["train"]["precision"]
    assert from_dict(before).train.precision == Precision()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"precision": "nvfp5"}, r"unknown precision 'nvfp5' \(did you mean 'nvfp4'\?\)"),
        ({"precision": "bfloat16", "dtype": "float32"}, "precision=bfloat16 computes in bfloat16, and dtype=float32"),
        ({"precision": "nvfp4", "precision.amax": "two"}, r"precision\.amax must be .*, got 'two'"),
        ({"precision": "fp8", "precision.hadamard": True}, r"precision\.hadamard has no effect .*precision=nvfp4"),
        ({"precision.inputs": True}, r"precision\.inputs has no effect"),
        ({"precision.kind": "nvfp4"}, r"no field is called precision\.kind"),
    ],
    ids=str,
)
def test_mistakes_in_fields(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        make_run("ngpt", "demo", vocab_size=64, **fields)


def test_mistakes_that_show_when_a_run_begins(
    data: Path, tmp_path: Path, command: commands.Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    words = ["train", "--arm", "gpt", "--data", data, "--out", tmp_path / "run", "--d-model", 48, "--n-heads", 2]
    for more, said in (
        (["--precision", "fp8"], "precision=fp8 needs torchao: pip install '.[quantize]'"),
        (
            ["--precision", "nvfp4", "--d-ff", 24],
            "blocks.0.mlp.part.u is 24 x 48: choose sizes that are multiples of 16",
        ),
        (["--precision", "int4"], "--precision"),
    ):
        answer = command(*words, *more)
        assert (answer.code, len(answer.shown)) == (2, 1)
        assert said in answer.shown[0]
    assert not (tmp_path / "run").exists()


def test_the_run_says_that_the_format_is_emulated(data: Path, tmp_path: Path, command: commands.Command) -> None:
    words = ["--arm", "ngpt", "--data", data, "--out", tmp_path / "run", "--set", "n_layers=1", "eval_windows=1"]
    answer = command("train", *words, "--steps", 1, "--precision", "nvfp4", "--dtype", "float32")
    assert answer.code == 0
    (line,) = [line for line in answer.shown if "emulated" in line]
    assert line.endswith(
        "nvfp4 of inputs, weights, gradients; amax unit, stochastic rounding: emulated, rounded and multiplied in float32, "
        "which is slower than without; no torch.compile"
    )

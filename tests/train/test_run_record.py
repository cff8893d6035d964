"""The run directory: who may have it, what it says of itself, and the configuration that it stores."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from spherelm.data.output import write_json
from spherelm.models import GPTConfig, NGPTConfig
from spherelm.optim import OptimConfig, ScheduleConfig
from spherelm.recipes import PRESETS, RECIPES, make_run
from spherelm.runs.config import RunConfig, TrainConfig, from_dict, read_config, to_dict
from spherelm.runs.record import FREE_TO_CHANGE, claim_directory, command_line, flat, git_commit, versions

WANTED: dict[str, Any] = {"arm": "gpt", "train": {"steps": 3, "keep": 2}, "betas": (0.9, 0.95)}


@pytest.mark.parametrize("exists", [False, True])
def test_a_new_or_empty_directory_is_claimed(exists: bool, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "run"
    if exists:
        out.mkdir(parents=True)
    assert claim_directory(out, WANTED, resume=False) is False
    record = tiny.read_json(out / "config.json")
    assert record["train"] == {"steps": 3, "keep": 2}
    assert set(record) == {*WANTED, "versions", "git_commit", "command"}
    assert [path.name for path in out.iterdir()] == ["config.json"]


def test_resuming_into_nothing_starts(tmp_path: Path) -> None:
    assert claim_directory(tmp_path / "run", WANTED, resume=True) is False
    assert claim_directory(tmp_path / "run", WANTED, resume=True) is True


def test_an_occupied_directory_is_refused_and_left_alone(tmp_path: Path) -> None:
    claim_directory(tmp_path, WANTED, resume=False)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(FileExistsError, match="already holds something: choose another --out, or --resume"):
        claim_directory(tmp_path, WANTED, resume=False)
    assert (tmp_path / "config.json").read_bytes() == before


def test_a_directory_of_something_else_cannot_be_resumed(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds nothing to resume \(no config\.json\)"):
        claim_directory(tmp_path, WANTED, resume=True)
    with pytest.raises(FileExistsError, match=r"is a file: choose another --out"):
        claim_directory(tmp_path / "thesis.tex", WANTED, resume=False)


@pytest.mark.parametrize("content", ["{", "[1]", "3", "\0"])
def test_a_damaged_config_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json is damaged .*choose another --out"):
        claim_directory(tmp_path, WANTED, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arm": "ngpt"}, "arm is 'gpt' there and 'ngpt' now"),
        ({"train": {"steps": 4, "keep": 2}}, r"train\.steps is 3 there and 4 now"),
        ({"betas": (0.9, 0.99)}, r"betas is \[0\.9, 0\.95\] there and \[0\.9, 0\.99\] now"),
        ({"new": 1}, "new is None there and 1 now"),
    ],
)
def test_a_field_that_differs_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    claim_directory(tmp_path, WANTED, resume=False)
    with pytest.raises(ValueError, match=message):
        claim_directory(tmp_path, {**WANTED, **change}, resume=True)


def test_what_may_change_on_resuming_is_called_as_in_the_config() -> None:
    runs = make_run("ngpt", recipe="nugpt", vocab_size=9), make_run("ngpt", "hybrid", vocab_size=9)
    configs = [to_dict(run) for run in runs]
    assert set(FREE_TO_CHANGE) <= {field for config in configs for field in ("base", *flat(config))}


def test_how_often_to_save_may_change(tmp_path: Path) -> None:
    claim_directory(tmp_path, WANTED, resume=False)
    assert claim_directory(tmp_path, {**WANTED, "train": {"steps": 3, "keep": 9}}, resume=True)


def test_json_is_written_whole_and_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": [math.nan, 1.5, {"b": math.inf}], "c": (-math.inf, None)})
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": [None, 1.5, {"b": None}],
        "c": [None, None],
    }
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert tiny.read_json(path)["a"][1] == 1.5, "the old file stays until the new one is whole"
    assert not list(tmp_path.glob("*.part"))


def test_provenance(monkeypatch: pytest.MonkeyPatch) -> None:
    assert versions()["python"] == sys.version.split()[0]
    assert versions()["torch"] == sys.modules["torch"].__version__
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("+changes")) == 40
    for program in ("/x/spherelm/__main__.py", "/usr/bin/spherelm"):
        monkeypatch.setattr(sys, "argv", [program, "train", "--out", "my run"])
        assert command_line() == "spherelm train --out 'my run'"
    monkeypatch.setattr(sys, "argv", ["study.py", "3"])
    assert command_line() == "study.py 3"


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (FileNotFoundError("git"), subprocess.CalledProcessError(128, "git")):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(subprocess, "run", fail)
        assert git_commit() is None


NAMED_RUNS = [*((preset, "law") for preset in PRESETS), *(("demo", recipe) for recipe in RECIPES if recipe != "law")]


@pytest.mark.parametrize("arm", tiny.ARMS)
def test_every_configuration_survives_json(arm: str) -> None:
    """Of every preset, and of every recipe."""
    for preset, recipe in NAMED_RUNS:
        config = make_run(arm, preset, recipe, vocab_size=4096, data="some/where", lr=1e-3)
        plain = json.loads(json.dumps(to_dict(config)))
        assert from_dict(plain) == config
        assert from_dict({**plain, "versions": {}, "command": "of no concern"}) == config


@pytest.mark.parametrize(
    "change",
    [{"arm": "bert"}, {"train": {"steps": 3}}, {"model": {"colour": "red"}}, {"schedule": None}, {"optim": {}}],
    ids=str,
)
def test_a_record_of_something_else_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    plain = {**to_dict(make_run("gpt", vocab_size=257)), **change}
    with pytest.raises(ValueError, match="not a run configuration of this version of spherelm"):
        from_dict(plain)
    (tmp_path / "config.json").write_text(json.dumps(plain))
    with pytest.raises(ValueError, match=r"config\.json cannot be used: "):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps must be more than 0, got 0"),
        ({"seq_len": 0}, "seq_len must be more than 0"),
        ({"batch_size": -1}, "batch_size must be more than 0, got -1"),
        ({"eval_windows": 0}, "eval_windows must be more than 0"),
        ({"keep": 0}, "keep must be more than 0, got 0"),
        ({"eval_every": -1}, "eval_every must be at least 0, got -1"),
        ({"save_every": -1}, "save_every must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"dtype": "float16"}, "dtype must be 'auto', 'float32' or 'bfloat16', got 'float16'"),
        ({"micro_batch_size": 3}, "micro_batch_size=3 does not divide batch_size=4"),
        ({"micro_batch_size": 0}, "micro_batch_size must be more than 0, got 0"),
        ({"strategy": "tensor"}, "strategy must be 'replicate', 'shard' or 'hybrid', got 'tensor'"),
        ({"on_bad_step": "ignore"}, "on_bad_step must be 'stop' or 'skip', got 'ignore'"),
        ({"spike_factor": 0.5}, "spike_factor must be 0 or more than 1, got 0.5"),
        ({"timeout": 0.0}, "timeout must be more than 0, got 0.0"),
        ({"keep_every": -1}, "keep_every must be at least 0, got -1"),
        ({"label_smoothing": 1.0}, "label_smoothing must be less than 1, got 1.0"),
        ({"label_smoothing": -0.1}, "label_smoothing must be at least 0, got -0.1"),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**{"steps": 3, "seq_len": 8, "batch_size": 4, **fields})


def test_a_sequence_longer_than_the_model_reads_is_refused() -> None:
    model = GPTConfig(vocab_size=9, n_layers=1, d_model=8, n_heads=1, max_seq_len=8)
    with pytest.raises(ValueError, match="seq_len=9 is longer than the model's max_seq_len=8"):
        RunConfig("r", "p", model, OptimConfig(1e-3), ScheduleConfig(), TrainConfig(1, 9, 1))


def test_configs_cannot_be_changed_by_accident() -> None:
    for config in (make_run("gpt", vocab_size=9), TrainConfig(1, 1, 1), NGPTConfig(9, 1, 8, 1)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.seed = 1  # type: ignore


@pytest.mark.parametrize(("rate", "multiplier"), [(None, 3.0), (0.05, 5.0)])
def test_an_older_rate_of_the_matrices_is_their_multiplier(rate: float | None, multiplier: float) -> None:
    """What was `lr` times the multiplier, or `matrix_lr` where that was given."""
    run = make_run("ngpt", "demo", vocab_size=50, lr=0.01, matrix_rate=3.0)
    plain = to_dict(run)
    plain["optim"]["matrix_lr"] = rate
    assert from_dict(plain).optim.multipliers == dataclasses.replace(run.optim.multipliers, matrix=multiplier)


@pytest.mark.parametrize("rate", ["x", [1], True])
def test_an_older_rate_that_is_no_number_is_refused(rate: Any) -> None:
    plain = to_dict(make_run("ngpt", "demo", vocab_size=50))
    plain["optim"] |= {"matrix_lr": rate, "lr": 0.01 if rate is not True else 0}
    with pytest.raises(ValueError, match=r"matrix_lr|lr must be more than 0"):
        from_dict(plain)

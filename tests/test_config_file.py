"""`spherelm train --config`, and the lists of what there is to choose from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import commands
import pytest
from ruamel.yaml import YAML

from spherelm.data.sources import parse_data
from spherelm.errors import UserError
from spherelm.models import ARMS
from spherelm.recipes import PRESETS, RECIPES, changed, make_run
from spherelm.runs.config import RunConfig, from_dict, read_config, to_dict
from spherelm.train import trainer

SMALL = [
    "--steps",
    3,
    "--seq-len",
    16,
    "--batch-size",
    2,
    "--dtype",
    "float32",
    "--no-compile",
    "--keep",
    5,
    "--seed",
    4,
]
SMALL += ["--set", "n_layers=1", "d_model=32"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The runs that the command line asked for, none of which is trained."""
    seen: list[RunConfig] = []

    def note(config: RunConfig, *_: Any) -> float:
        seen.append(config)
        return 0.0

    monkeypatch.setattr(trainer, "train", note)
    return seen


def test_a_runs_config_trains_it_again(data: Path, tmp_path: Path, command: commands.Command) -> None:
    first, again = tmp_path / "first", tmp_path / "again"
    assert command("train", "--arm", "ngpt", "--out", first, "--data", data, *SMALL).code in (0, 1)
    assert command("train", "--config", first / "config.json", "--out", again).code in (0, 1)
    assert read_config(again / "config.json") == read_config(first / "config.json")
    assert (again / "checkpoints").is_dir()
    logs = [(run / "metrics.jsonl").read_text().splitlines() for run in (first, again)]
    losses = [[json.loads(line).get("loss") for line in log] for log in logs]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_flags_override_the_file_and_nothing_else_changes(
    arm: str, preset: str, tmp_path: Path, command: commands.Command, asked: list[RunConfig]
) -> None:
    config = make_run(arm, preset, "paper", vocab_size=64, lr=0.01, seed=7, keep=5)
    file = tmp_path / "run.json"
    file.write_text(json.dumps(to_dict(config)))
    flags = ["--lr", 0.02, "--keep", 2, "--dtype", "float32", "--set", "grad_clip=0.5", "rope_base=500"]
    assert command("train", "--config", file, "--out", tmp_path / "out", *flags).code == 0
    wanted = dataclasses.replace(
        config,
        optim=dataclasses.replace(config.optim, lr=0.02, grad_clip=0.5),
        model=dataclasses.replace(config.model, rope_base=500),
        train=dataclasses.replace(config.train, keep=2, dtype="float32"),
    )
    assert asked == [wanted]


def test_another_optimizer_or_scale_by_name(asked: list[RunConfig]) -> None:
    config = make_run("ngpt", "demo", "paper", vocab_size=64)
    run = changed(config, {"optimizer": "muon", "momentum": 0.7, "alpha.init": 0.3, "schedule": "constant"})
    assert (run.optim.optimizer.kind, run.model.alpha.init, run.schedule.kind) == ("muon", 0.3, "constant")  # type: ignore[union-attr]
    assert run.optim.optimizer.momentum == 0.7  # type: ignore[union-attr]
    assert run.optim.multipliers == config.optim.multipliers


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--arm", "gpt"], "--arm has no effect with --config"),
        (["--preset", "1m"], "--preset has no effect with --config"),
        (["--recipe", "nugpt"], "--recipe has no effect with --config"),
        (["--set", "recipe=paper"], "recipe is chosen by --recipe"),
        (["--set", "alpha.init=0.1"], "alpha.init is no field of gpt, only of ngpt"),
        (["--set", "momentum=0.5"], "momentum is a field of the optimizer muon"),
        (["--set", "grad_clop=1"], "did you mean 'grad_clip'?"),
    ],
)
def test_what_does_not_fit_the_file_is_refused(
    flags: list[str], said: str, tmp_path: Path, command: commands.Command, asked: list[RunConfig]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(json.dumps(to_dict(make_run("gpt", "demo", "paper", vocab_size=64))))
    answer = command("train", "--config", file, "--out", tmp_path / "out", *flags)
    assert (answer.code, len(answer.err.splitlines()), asked) == (2, 1, [])
    assert said in answer.err


@pytest.mark.parametrize(
    "text",
    [
        "arm: ngpt\nsteps: 50\nlr: 1e-3\nalpha.init: 0.1\nmatrix_rate: 2\noptimizer: muon\nmomentum: .9\nschedule: wsd\n",
        """
        arm: ngpt
        train: {steps: 50}
        optim: {lr: 1e-3, multipliers: {matrix: 2}, optimizer: {kind: muon, momentum: 0.9}}
        model: {alpha: {init: 0.1}}
        schedule: {kind: wsd}
        """,
        """{"arm": "ngpt", "train": {"steps": 50}, "lr": 1e-3, "model": {"alpha.init": 0.1}, "matrix_rate": 2,
        "optim": {"optimizer": {"kind": "muon"}, "momentum": 0.9}, "schedule": {"kind": "wsd"}}""",
    ],
    ids=["flat", "nested", "both, in JSON"],
)
def test_some_fields_are_filled_up_from_flags_preset_and_recipe(
    text: str, data: Path, tmp_path: Path, command: commands.Command, asked: list[RunConfig]
) -> None:
    file = tmp_path / ("run.json" if text.startswith("{") else "run.yaml")
    file.write_text(text)
    flags = ["--steps", 60, "--recipe", "paper", "--data", data]
    assert command("train", "--config", file, "--out", tmp_path / "out", *flags).code == 0
    fields = {"alpha.init": 0.1, "matrix_rate": 2.0, "optimizer": "muon", "momentum": 0.9, "schedule": "wsd"}
    size = parse_data(str(data)).vocab_size
    assert asked == [make_run("ngpt", "demo", "paper", vocab_size=size, data=str(data), lr=1e-3, steps=60, **fields)]


def test_a_whole_config_may_be_yaml(tmp_path: Path, command: commands.Command, asked: list[RunConfig]) -> None:
    config = make_run("ngpt", "hybrid", vocab_size=64, eps=1e-12)
    file = tmp_path / "run.yaml"
    YAML().dump(to_dict(config), file)
    assert command("train", "--config", file, "--out", tmp_path / "out").code == 0
    assert asked == [config]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("run.yaml", "arm: gpt\narm: ngpt", "duplicate key"),
        ("run.json", '{"arm": "gpt", "arm": "ngpt"}', "'arm' occurs twice"),
        ("run.yaml", "arm: gpt\nsteps: 3\ntrain: {steps: 4}", "steps is set twice"),
        ("run.yaml", "arm: gpt\nstepz: 3", "did you mean 'steps'?"),
        ("run.yaml", "arm: gpt\ntrain: {keep: 0}", "keep must be more than 0, got 0"),
        ("run.yml", "arm: [gpt", "(line 2)"),
        ("run.yml", "- arm", "it holds no fields"),
        ("run.yaml", "arm: 7", "arm must be text, got 7"),
        ("run.yaml", 'arm: gpt\n"": 3', "run.yaml cannot be used: '' stands where the name of a field should"),
        ("run.yaml", "arm: gpt\n3: 4\nsteps: 5", "run.yaml cannot be used: 3 stands where the name of a field should"),
        ("run.yaml", "arm: gpt\ntrain: {true: 4}", "run.yaml cannot be used: True stands where the name"),
        ("run.yaml", "arm: gpt\ntrain: &x {train: *x}", "run.yaml cannot be used: it is nested too deeply"),
        ("run.yaml", "arm: gpt\nsteps: {}", "steps must be a valid integer, got {}"),
        ("run.yaml", "arm: ngpt\ngpt: {lr: 0.1}", "'gpt' is no part of a run's settings"),
        ("run.yaml", "arm: gpt\ntrian: {steps: 3}", "(did you mean 'train'?)"),
        ("run.yaml", "arm: gpt\nprecision: [3]", "unknown precision [3]: choose one of "),
        ("run.yaml", "arm: gpt\noptimizer: [muon]", "unknown optimizer ['muon']: choose one of "),
        ("run.json", '{"arm": "gpt", "": 3}', "run.json cannot be used: '' stands where the name of a field should"),
    ],
)
def test_a_mistake_in_a_file_is_told_in_one_line(
    name: str, text: str, said: str, tmp_path: Path, command: commands.Command, asked: list[RunConfig]
) -> None:
    (tmp_path / name).write_text(text + "\n")
    answer = command("train", "--config", tmp_path / name, "--out", tmp_path / "out")
    assert (answer.code, len(answer.err.splitlines()), asked) == (2, 1, [])
    assert said in answer.err


@pytest.mark.parametrize("text", ["", "{", "[]", '{"recipe": "paper"}', "null"])
def test_a_file_that_is_no_config_is_refused(
    text: str, tmp_path: Path, command: commands.Command, asked: list[RunConfig]
) -> None:
    file = tmp_path / "run.json"
    file.write_text(text)
    answer = command("train", "--config", file, "--out", tmp_path / "out")
    assert (answer.code, len(answer.err.splitlines()), asked) == (2, 1, [])
    assert str(file) in answer.err


def test_without_arm_and_file_both_are_named(tmp_path: Path, command: commands.Command) -> None:
    answer = command("train", "--out", tmp_path / "out")
    assert (answer.code, answer.err.count("\n")) == (2, 1)
    assert "--arm gpt or --arm ngpt" in answer.err
    assert "--config" in answer.err


@pytest.mark.parametrize(("name", "table"), [("presets", PRESETS), ("recipes", RECIPES)])
def test_what_there_is_to_choose_from_has_a_line_each(name: str, table: Any, command: commands.Command) -> None:
    answer = command(name)
    lines = [line.split(maxsplit=1) for line in answer.out.splitlines()]
    assert {line[0] for line in lines} - {"preset"} == set(table)
    assert all(len(line) == 2 for line in lines)
    assert (answer.code, answer.err) == (0, "")


def test_every_preset_says_what_it_is() -> None:
    assert all(preset.about for preset in PRESETS.values())


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("train.steps", 3.5),
        ("train.compile", "false"),
        ("train.log_to", None),
        ("train.mask_documents", "no"),
        ("model.variant", None),
        ("model.n_layers", None),
        ("model.vocab_size", None),
        ("model.tie_embeddings", "no"),
        ("model.common_start", True),
        ("model.alpha.init", "large"),
        ("model.architecture", "decoder"),
        ("model.architecture.kind", "bogus"),
        ("optim.lr", "fast"),
        ("optim.optimizer.kind", "sgd"),
        ("schedule.rho", []),
        ("data", 7),
        ("recipe", None),
    ],
)
def test_a_value_of_another_type_is_refused(path: str, value: Any) -> None:
    record = json.loads(json.dumps(to_dict(make_run("ngpt", vocab_size=64))))
    *outer, last = path.split(".")
    place = record
    for name in outer:
        place = place[name]
    assert last in place
    place[last] = value
    with pytest.raises(UserError):
        from_dict(record)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_what_was_written_is_read_as_it_was(arm: str, preset: str) -> None:
    config = make_run(arm, preset, vocab_size=64, lr=0.01)
    assert from_dict(json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("preset", "fields", "needs"),
    [
        ("demo", {"d_expert": 8}, "a pattern with O"),
        ("demo", {"s_moe.init": 2.0}, "a pattern with O"),
        ("hybrid", {"n_experts": 4}, "a pattern with O"),
        ("demo", {"mamba_groups": 2}, "a pattern with M"),
        ("moe", {"s_mamba.scale": 2.0}, "a pattern with M"),
    ],
)
def test_a_field_of_a_part_that_is_not_there_is_refused(preset: str, fields: dict[str, Any], needs: str) -> None:
    with pytest.raises(UserError, match=f"{next(iter(fields))} has no effect .*{needs}"):
        make_run("ngpt", preset, vocab_size=64, **fields)
    with pytest.raises(UserError, match=f"{next(iter(fields))} has no effect .*{needs}"):
        changed(make_run("ngpt", preset, vocab_size=64), fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"eval_every": "x"},
        {"eval_every": 2.5},
        {"eval_windows": None},
        {"max_seq_len": None},
        {"optimizer": {}},
        {"optimizer": [1]},
        {"architecture": [1, 2]},
        {"step": "riemannian"},
        {"pattern": "AO", "n_experts": None},
        {"pattern": "AO", "n_shared_experts": None},
        {"pattern": "M-", "mamba_conv": None},
    ],
    ids=str,
)
def test_a_field_of_another_type_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        make_run("ngpt", vocab_size=64, **fields)

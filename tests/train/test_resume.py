"""A run that was interrupted, however it was, ends bit for bit like one that was not."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny

from spherelm.data.prepare import prepare
from spherelm.runs.checkpoint import latest_checkpoint
from spherelm.train.signals import Interrupted
from spherelm.train.trainer import Trainer, train

MakeTrainer = Callable[..., Trainer]
both_arms = pytest.mark.parametrize("arm", tiny.ARMS)


def assert_same_run(run: Path, reference: Path) -> None:
    """Weights, moments, random state and metrics (but for times) are equal, bit for bit."""
    ours, theirs = latest_checkpoint(run), latest_checkpoint(reference)
    assert ours is not None
    assert theirs is not None
    assert ours.name == theirs.name
    tiny.assert_bitwise(ours, theirs)
    assert tiny.metrics(run) == tiny.metrics(reference)


def crash_at(trainer: Trainer, step: int) -> None:
    """Have the update number `step` fail as a power cut would: nothing is saved, the last line is torn."""
    update = trainer._update

    def failing(current: int, lr: float) -> tuple[float, float]:
        if current + 1 == step:
            with (trainer.out / "metrics.jsonl").open("a") as file:
                file.write('{"kind": "train", "ste')
            raise SystemExit("power cut")
        return update(current, lr)

    trainer._update = failing  # type: ignore


@both_arms
@pytest.mark.parametrize("fields", [{}, {"dtype": "bfloat16", "batch_size": 2}, {"micro_batch_size": 2}], ids=str)
def test_resuming_after_a_crash_changes_nothing(
    arm: str, fields: dict[str, Any], trainer: MakeTrainer, data: Path, tmp_path: Path
) -> None:
    settings = {"save_every": 2, **fields}
    loss = train(tiny.run_config(arm, data, **settings), tmp_path / "whole", show_progress=False)
    first = trainer(arm, **settings)
    crash_at(first, 6)
    with pytest.raises(SystemExit):
        first.run(show_progress=False)
    assert [record["step"] for record in tiny.metrics(tmp_path / "run")][-1] == 5, "beyond the checkpoint at 4"
    assert trainer(arm, resume=True, **settings).run(show_progress=False) == loss
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_crash_before_the_first_checkpoint_starts_over(trainer: MakeTrainer, tmp_path: Path) -> None:
    first = trainer()
    crash_at(first, 4)
    with pytest.raises(SystemExit):
        first.run(show_progress=False)
    assert latest_checkpoint(tmp_path / "run") is None
    trainer(resume=True).run(show_progress=False)
    steps = [record["step"] for record in tiny.metrics(tmp_path / "run") if record["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5, 6]


SCORED: dict[str, Any] = {"eval_tasks": "some", "eval_tasks_every": 4}
MEASURING = {
    "the first validation": ("validation", 2, 0),
    "a later validation": ("validation", 5, 2),
    "the last validation": ("validation", 11, 6),
    "an evaluation": ("score", 1, 4),
    "the last evaluation": ("score", 2, 6),
    "an update between two validations": ("update", 3, 3),
    "an update after which a validation is due": ("update", 4, 4),
    "the last update": ("update", 6, 6),
}
"""The activity during which the signal comes, its number among all of its kind,
and the update that the run has come to.
"""


@pytest.mark.row("Interruption")
@pytest.mark.parametrize("moment", MEASURING)
def test_a_signal_saves_before_anything_else_is_measured(
    moment: str, trainer: MakeTrainer, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing goes on after it, and what was not measured is measured when the run goes on."""
    kind, last, step = MEASURING[moment]
    calls: list[str] = []
    wanted: list[tuple[str, int]] = []

    def note(called: str) -> None:
        calls.append(called)
        if (called, calls.count(called)) in wanted:
            signal.raise_signal(signal.SIGHUP)

    def score(model: Any) -> dict[str, Any]:
        note("score")
        note("scored")
        return {"tasks": {"some": {"acc": sum(p.sum().item() for p in model.parameters())}}}

    monkeypatch.setattr("spherelm.train.checks.task_scorer", lambda *_: score)
    settings = {**SCORED, "batch_size": 2}  # three batches of validation windows
    loss = train(tiny.run_config("ngpt", data, **settings), tmp_path / "whole", show_progress=False)
    calls.clear()
    wanted.append((kind, last))
    first = trainer("ngpt", **settings)
    update, forward = first._update, first.model.loss

    def noted_update(current: int, lr: float) -> tuple[float, float | None]:
        note("update")
        return update(current, lr)

    def noted_loss(*batch: Any) -> Any:
        note("training" if first.model.training else "validation")
        return forward(*batch)

    with monkeypatch.context() as patch:
        patch.setattr(first, "_update", noted_update)
        patch.setattr(first.model, "loss", noted_loss)
        with pytest.raises(
            Interrupted, match=f"SIGHUP: saved .*run at step {step}; resume with: spherelm train --resume .*run$"
        ):
            first.run(show_progress=False)
    assert [call for call in calls if call != "training"][-1] == kind
    assert calls.count(kind) == last, "nothing comes after it"
    saved = latest_checkpoint(tmp_path / "run")
    assert saved is not None
    assert saved.name == f"step-{step:08d}"
    wanted.clear()
    assert trainer("ngpt", resume=True, **settings).run(show_progress=False) == loss
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_is_left_as_it_is(trainer: MakeTrainer, tmp_path: Path) -> None:
    loss = trainer().run(show_progress=False)
    files = {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()}
    assert trainer(resume=True).run(show_progress=False) == loss
    assert {path: path.read_bytes() for path in sorted((tmp_path / "run").rglob("*")) if path.is_file()} == files


def test_what_changes_nothing_may_change_on_resuming(trainer: MakeTrainer, data: Path, tmp_path: Path) -> None:
    train(tiny.run_config("ngpt", data), tmp_path / "whole", show_progress=False)
    first = trainer(save_every=2)
    crash_at(first, 4)
    with pytest.raises(SystemExit):
        first.run(show_progress=False)
    trainer(resume=True, save_every=0, keep=1).run(show_progress=False)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(("arm", "before", "after"), [("ngpt", None, 1), ("gpt", 1, None), ("ngpt", 4, 2)])
def test_smaller_micro_batches_may_be_taken_on_resuming(
    arm: str, before: int | None, after: int | None, trainer: MakeTrainer, data: Path, tmp_path: Path
) -> None:
    """As one does where memory ran out: the run ends where it would have ended, but for the rounding of sums."""
    loss = train(tiny.run_config(arm, data), tmp_path / "whole", show_progress=False)
    first = trainer(arm, save_every=2, micro_batch_size=before)
    crash_at(first, 6)
    with pytest.raises(SystemExit):
        first.run(show_progress=False)
    resumed = trainer(arm, resume=True, save_every=2, micro_batch_size=after, eval_every=4, stop_above=20.0)
    assert resumed.micro_batch_size == (after or 4)
    assert resumed.run(show_progress=False) == pytest.approx(loss, rel=1e-5)
    curves = ([r for r in tiny.metrics(tmp_path / name) if r["kind"] == "train"] for name in ("run", "whole"))
    for ours, theirs in zip(*curves, strict=True):
        assert ours["step"] == theirs["step"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lr": 2e-2}, r"optim\.lr is 0\.01 there and 0\.02 now"),
        ({"seq_len": 8}, r"train\.seq_len is 16 there and 8 now"),
        ({"seed": 1}, r"train\.seed is 0 there and 1 now"),
        ({"steps": 8}, r"--steps 8 is more than the 6 of .*run, and with schedule=linear"),
        ({"d_ff": 32}, r"model\.d_ff is 24 there and 32 now"),
        ({"recipe": "paper"}, r"recipe is 'law' there and 'paper' now"),
        ({"dtype": "bfloat16"}, r"train\.dtype is 'float32' there and 'bfloat16' now"),
    ],
)
def test_another_config_is_refused_by_the_field(
    fields: dict[str, Any], message: str, trainer: MakeTrainer, tmp_path: Path
) -> None:
    trainer(steps=6).run(show_progress=False)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(ValueError, match=message):
        trainer(resume=True, **fields)
    assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_the_other_arm_is_refused(trainer: MakeTrainer) -> None:
    trainer("gpt", steps=1).run(show_progress=False)
    with pytest.raises(ValueError, match="arm is 'gpt' there and 'ngpt' now"):
        trainer("ngpt", resume=True, steps=1)


def test_other_text_under_the_same_path_is_refused(tmp_path: Path) -> None:
    data = tiny.make_data(tmp_path)
    train(tiny.run_config("gpt", data, steps=1), tmp_path / "run", show_progress=False)
    (tmp_path / "data").rename(tmp_path / "old")
    (tmp_path / "train.txt").write_text(tiny.text(5))
    prepare([tmp_path / "train.txt"], data, "bytes", val=[tmp_path / "val.txt"])
    with pytest.raises(ValueError, match=r"made with another config: data_identity\.train is"):
        train(tiny.run_config("gpt", data, steps=1), tmp_path / "run", resume=True, show_progress=False)

"""Sweeps: which runs there are, how they are named, and the table that they end in."""

from __future__ import annotations

import json
import math
import shutil
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
from commands import make_command

from spherelm.experiments import sweep as module
from spherelm.experiments.jobs import Job
from spherelm.experiments.record import Run
from spherelm.experiments.sweep import UNTRAINED, against_base, grid, name_of, sweep, sweep_table
from spherelm.recipes.written import parse_axis, parse_fields
from spherelm.report.sweep_page import Row, label, limits, varying, write_page
from spherelm.runs.config import to_dict
from spherelm.runs.metrics import read_metrics


def test_a_grid_has_every_combination_once() -> None:
    choices = grid({"arm": ("gpt", "ngpt"), "lr": (0.1, 0.2), "steps": (3,)})
    assert choices == [
        {"arm": arm, "lr": lr, "steps": 3} for arm in ("gpt", "ngpt") for lr in (0.1, 0.2)
    ]  # fmt: skip
    assert grid({}) == [{}]


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("alpha.init=0.05,0.25", ("alpha.init", [0.05, 0.25])),
        ("batch_size=4", ("batch_size", [4])),
        ("dtype=float32,bfloat16", ("dtype", ["float32", "bfloat16"])),
        ("tie_embeddings=true,false", ("tie_embeddings", [True, False])),
        ("n_kv_heads=null", ("n_kv_heads", [None])),
        ("lr=1e-3", ("lr", [0.001])),
        ("betas=[0.9,0.95],[0.9,0.99]", ("betas", [[0.9, 0.95], [0.9, 0.99]])),
        ("schedule=log,cosine", ("schedule", ["log", "cosine"])),
        ("n_kv_heads=1,auto", ("n_kv_heads", [1, "auto"])),
    ],
)
def test_an_axis_is_read_from_a_word(text: str, axis: tuple[str, list[Any]]) -> None:
    assert parse_axis(text) == axis


@pytest.mark.parametrize("text", ["alpha.init", "alpha.init=", "=1,2", ""])
def test_a_word_that_is_no_axis_is_refused(text: str) -> None:
    with pytest.raises(
        ValueError, match=r"cannot read '.*': write a field and its values, such as alpha.init=0\.05,0\.25"
    ):
        parse_axis(text)


def test_names_tell_runs_apart_and_are_one_directory() -> None:
    choices = grid({"arm": ("gpt", "ngpt"), "lr": (0.001, 0.0015), "preset": ("a/b",)})
    names = [name_of(choice, seed) for choice in choices for seed in (0, 1)]
    assert len(set(names)) == 8
    assert names[0] == "gpt-lr=0.001-preset=a_b-seed=0"
    assert not any("/" in name for name in names)


def test_a_row_knows_its_mean_and_error() -> None:
    row = Row({}, [3.0, 3.2, 3.4])
    assert row.mean == pytest.approx(3.2)
    assert row.standard_error == pytest.approx(0.2 / math.sqrt(3))
    assert Row({}, [3.0]).standard_error is None
    assert math.isnan(Row({}, [3.0, math.nan]).mean)


def test_a_row_is_compared_with_the_first_of_its_arm_seed_by_seed() -> None:
    choices = [("gpt", [3.0, 3.4]), ("ngpt", [2.0, 2.2]), ("ngpt", [2.1, 2.4]), ("gpt", [math.nan, 3.0])]
    rows = against_base([Row({"arm": arm}, losses) for arm, losses in choices])
    assert [row.base for row in rows] == [None, None, [2.0, 2.2], [3.0, 3.4]]
    assert (rows[0].difference, rows[0].difference_error) == (None, None)
    assert rows[2].difference == pytest.approx(0.15)
    # Differences of 0.1 and 0.2: their mean's error is half of what is between them.
    assert rows[2].difference_error == pytest.approx(0.05)
    assert rows[3].difference is not None
    assert math.isnan(rows[3].difference)


def test_a_row_is_compared_over_the_seeds_that_it_shares_with_its_base() -> None:
    rows = against_base([Row({"arm": "gpt"}, [3.0, 3.4, 9.0]), Row({"arm": "gpt"}, [3.1, 3.6])])
    assert rows[1].difference == pytest.approx(0.15)
    assert rows[1].difference_error == pytest.approx(0.05)


def test_a_label_says_what_differs_and_no_more() -> None:
    choices = [
        {"arm": "ngpt", "recipe": "paper", "lr": 0.02, "steps": 5},
        {"arm": "ngpt", "recipe": "riemannian", "lr": 0.02},
    ]
    rows = [Row(choice, [1.0]) for choice in choices]
    assert varying(rows) == ["recipe", "steps"]
    assert [label(row, varying(rows)) for row in rows] == ["paper, steps 5", "riemannian"]
    assert label(rows[0], ["lr"]) == "lr 0.02"
    assert label(rows[0], []) == "the only choice"


@pytest.mark.parametrize(
    ("words", "fields"),
    [(["schedule=log", "rho=0.05"], {"schedule": "log", "rho": 0.05}), ([], {}), (["d_ff=null"], {"d_ff": None})],
)
def test_fields_are_read_from_words(words: list[str], fields: dict[str, Any]) -> None:
    assert parse_fields(words) == fields


def test_the_table_is_markdown() -> None:
    rows = [Row({"arm": "gpt", "lr": 0.1}, [3.0, 3.2]), Row({"arm": "ngpt", "lr": 0.2}, [math.nan])]
    assert sweep_table(rows).splitlines() == [
        "| arm | lr | validation loss | s.e. | against base | seeds |",
        "|---|---|---|---|---|---|",
        "| gpt | 0.1 | 3.1000 | 0.1000 |  | 2 |",
        "| ngpt | 0.2 | diverged |  |  | 1 |",
    ]


def test_a_sweep_on_real_runs(data: Path, tmp_path: Path, jobs_done: list[str]) -> None:
    choices = grid({"arm": ("gpt", "ngpt"), "preset": ("tiny",), "lr": (1e-2, 1e30)})[:3]
    rows = sweep(choices, 2, tmp_path, vocab_size=tiny.VOCAB, data=str(data))
    assert jobs_done == [name_of(choice, seed) for choice in choices for seed in (0, 1)]
    assert [math.isnan(row.mean) for row in rows] == [False, False, True], "what diverged comes last"
    assert rows[0].mean <= rows[1].mean
    record = tiny.read_json(tmp_path / "sweep.json")
    assert set(record) == {"rows", "commands", "git_commit", "versions"}
    for row, stored in zip(rows, record["rows"], strict=True):
        assert set(stored) == {
            "choice", "losses", "runs", "is_base", "mean", "standard_error", "difference", "difference_error"
        }  # fmt: skip
        assert stored["choice"] == row.choice
        assert stored["runs"] == [name_of(row.choice, seed) for seed in (0, 1)]
        for seed, loss in enumerate(stored["losses"]):
            run = tmp_path / name_of(row.choice, seed)
            assert tiny.read_json(run / "config.json")["optim"]["lr"] == row.choice["lr"]
            assert loss == (None if row.choice["lr"] == 1e30 else read_metrics(run / "metrics.jsonl")[-1]["loss"])
    write_page(rows, tmp_path)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 2, "one figure an arm"
    assert "2 of 2 diverged" in page
    assert f"{rows[0].mean:.4f} ± {rows[0].standard_error:.4f}" in page
    assert "base" in page
    logs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")}
    again = sweep(choices, 2, tmp_path, vocab_size=tiny.VOCAB, data=str(data))
    assert [row.choice for row in again] == [row.choice for row in rows]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/metrics.jsonl")} == logs, "nothing ran again"


def test_the_command_ends_in_a_page(
    data: Path,
    tmp_path: Path,
    jobs_done: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--preset", "tiny", "--data", data, "--arms", "gpt", "--out", tmp_path / "out"]
    answer = make_command(monkeypatch, capsys)("sweep", *words)
    assert answer.code == 0, answer.err
    assert jobs_done == ["gpt-preset=tiny-recipe=law-seed=0"]
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert f"1 choice, 1 run · 2 layers of 16 · 6 steps of 4 × 16 tokens · data {data}" in page
    assert '<button class="copy"' in page


def test_the_axes_of_a_sweeps_page_show_every_run_to_its_end() -> None:
    """Also where a choice ends far above the others, which a cut at the first validations would leave out."""
    tokens = np.array([0.0, 64.0, 128.0])
    curves = ([8.0, 5.0, 4.0], [8.0, 7.6, 7.5], [8.0, np.nan, np.nan])
    runs = [Run("r", tokens, tokens, tokens, np.array(loss), tokens, False) for loss in curves]
    low, high = limits(runs)
    assert low < 4.0 < 7.5 < high < 8.0
    assert limits(runs[2:]) == (0.0, 1.0)


def fake_runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs that end at their learning rate plus a tenth of their seed,
    on text that its name identifies; which, in order.
    """
    done: list[str] = []

    def run(jobs: list[Job], *_: Any) -> list[float]:
        losses = [job.config.optim.lr + job.config.train.seed / 10 for job in jobs]
        for job, loss in zip(jobs, losses, strict=True):
            job.out.mkdir(exist_ok=True, parents=True)
            record = to_dict(job.config) | {"data_identity": {"train": job.config.data}}
            (job.out / "config.json").write_text(json.dumps(record))
            position = {"step": 1, "tokens": 10, "seconds": 1.0}
            (job.out / "metrics.jsonl").write_text(json.dumps({"kind": "val", **position, "loss": loss}) + "\n")
            done.append(job.out.name)
        return losses

    monkeypatch.setattr(module, "say_before", lambda *_: None)
    monkeypatch.setattr(module, "run_jobs", run)
    monkeypatch.setattr(module, "open_data", lambda config: SimpleNamespace(identity={"train": config.data}))
    return done


def test_a_second_sweep_in_a_directory_adds_to_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs(monkeypatch)
    first, second, third = ({"arm": "gpt", "lr": lr} for lr in (3.0, 1.0, 2.0))
    sweep([first, second], 2, tmp_path, vocab_size=9)
    monkeypatch.setattr(module, "command_line", lambda: "spherelm sweep more")
    rows = sweep([third, second], 1, tmp_path, vocab_size=9)
    assert [(row.choice, list(row.losses)) for row in rows] == [
        (second, [1.0, 1.1]), (third, [2.0]), (first, [3.0, 3.1])
    ], "best first, and a choice keeps its seeds"  # fmt: skip
    assert [row.base for row in rows] == [[3.0, 3.1], [3.0, 3.1], None], "the base is the first sweep's"
    record = tiny.read_json(tmp_path / "sweep.json")
    assert [row["choice"] for row in record["rows"]] == [second, third, first]
    assert record["commands"][1:] == ["spherelm sweep more"]
    write_page(rows, tmp_path)
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert all(escape(command) in page for command in record["commands"])
    assert "3 choices, 5 runs" in page


def test_a_sweep_beside_another_keeps_what_that_one_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs(monkeypatch)
    run, beside = module.run_jobs, {"arm": "gpt", "lr": 1.0}

    def slow(jobs: list[Job], *rest: Any) -> list[float]:
        monkeypatch.setattr(module, "run_jobs", run)
        sweep([beside], 1, tmp_path, vocab_size=9)
        return run(jobs, *rest)

    monkeypatch.setattr(module, "run_jobs", slow)
    rows = sweep([{"arm": "gpt", "lr": 2.0}], 1, tmp_path, vocab_size=9)
    assert [row.choice["lr"] for row in rows] == [1.0, 2.0]


def test_what_an_older_version_left_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs(monkeypatch)
    sweep([{"arm": "gpt", "lr": lr} for lr in (2.0, 1.0)], 1, tmp_path, vocab_size=9)
    record = tiny.read_json(tmp_path / "sweep.json")
    record["command"] = record.pop("commands")[0]
    for row in record["rows"]:
        del row["is_base"]
    (tmp_path / "sweep.json").write_text(json.dumps(record))
    rows = sweep([{"arm": "gpt", "lr": 3.0}], 1, tmp_path, vocab_size=9)
    assert [(row.choice["lr"], row.base) for row in rows] == [(1.0, [2.0]), (2.0, None), (3.0, [2.0])]


def test_the_same_choice_in_other_words_is_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs(monkeypatch)
    sweep([{"arm": "gpt", "lr": 1, "momentum": 0.9}], 1, tmp_path, vocab_size=9)
    assert len(sweep([{"arm": "gpt", "momentum": 0.9, "lr": 1.0}], 1, tmp_path, vocab_size=9)) == 1


def test_a_field_that_only_one_choice_has_tells_them_apart() -> None:
    rows = [Row({"arm": "ngpt"}, [1.0]), Row({"arm": "ngpt", "max_angle": None}, [1.0])]
    assert varying(rows) == ["max_angle"]
    assert [label(row, ["max_angle"]) for row in rows] == ["nothing changed", "max_angle None"]


def test_a_choice_whose_runs_are_gone_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_runs(monkeypatch)
    first, second = ({"arm": "gpt", "lr": lr} for lr in (3.0, 1.0))
    sweep([first], 1, tmp_path, vocab_size=9)
    shutil.rmtree(tmp_path / name_of(first, 0))
    (row,) = sweep([second], 1, tmp_path, vocab_size=9)
    assert (row.choice, row.base) == (second, None)


def test_sweeps_on_different_text_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = fake_runs(monkeypatch)
    sweep([{"arm": "gpt", "lr": 1.0}], 1, tmp_path, vocab_size=9, data="books")
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(ValueError, match="holds a sweep on other text: its train data differ"):
        sweep([{"arm": "gpt", "lr": 2.0}], 1, tmp_path, vocab_size=9, data="wiki")
    assert len(done) == 1
    assert (tmp_path / "sweep.json").read_bytes() == before


def test_the_varied_fields_reach_their_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Job] = []

    def record(jobs: list[Job], *_: Any) -> list[float]:
        seen.extend(jobs)
        return [1.0] * len(jobs)

    monkeypatch.setattr(module, "say_before", lambda *_: None)
    monkeypatch.setattr(module, "run_jobs", record)
    choice = {"arm": "ngpt", "alpha.init": 0.3, "batch_size": 8, "grad_clip": 0.5, "d_model": 64, "lr": 0.02}
    sweep([choice], 2, tmp_path, vocab_size=99, data="d", workers=3)
    for seed, job in enumerate(seen):
        config = job.config
        assert (config.model.alpha.init, config.model.d_model, config.model.vocab_size) == (0.3, 64, 99)  # type: ignore[union-attr]
        assert (config.train.batch_size, config.train.seed, config.data) == (8, seed, "d")
        assert (config.optim.grad_clip, config.optim.lr) == (0.5, 0.02)
        assert config.train.stop_above == pytest.approx(math.log(99) + UNTRAINED)


def test_a_run_that_rises_far_above_the_untrained_loss_is_stopped(
    data: Path, tmp_path: Path, jobs_done: list[str]
) -> None:
    """Not only one whose numbers overflow: this one would have gone on for 400 updates."""
    choice = {"arm": "gpt", "preset": "tiny", "lr": 30.0, "steps": 400, "eval_every": 5, "grad_clip": None}
    (row,) = sweep([choice], 1, tmp_path, vocab_size=tiny.VOCAB, data=str(data))
    assert math.isnan(row.mean)
    run = tmp_path / name_of(choice, 0)
    assert "is above 6.549" in (run / "diverged.txt").read_text(encoding="utf-8")
    assert max(r["step"] for r in read_metrics(run / "metrics.jsonl")) < 400


def test_no_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds must be at least 1, got 0"):
        sweep([{"arm": "gpt"}], 0, tmp_path, vocab_size=9)
    assert not list(tmp_path.iterdir())

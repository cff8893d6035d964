"""The main job, end to end at a tiny size: what it runs, what it writes, how it goes on and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import make_command

from spherelm.data.shards import open_tokens
from spherelm.data.sources import tokens_per_byte
from spherelm.experiments import comparison as module
from spherelm.experiments.comparison import CompareConfig, compare, samples
from spherelm.experiments.record import read_comparison
from spherelm.models import DecoderArch
from spherelm.recipes.presets import PRESETS
from spherelm.report.comparison_page import write_report
from spherelm.runs.config import read_config
from spherelm.runs.metrics import read_metrics
from spherelm.runs.record import alone_in
from spherelm.train.guard import Diverged
from spherelm.train.trainer import train

FULL_TOKENS = 6 * 4 * 16


def config(data: Path, **fields: Any) -> CompareConfig:
    return CompareConfig(**{"preset": "tiny", "data": str(data), "dtype": "float32", "seeds": 2, **fields})


def final(run: Path) -> float:
    loss: float = read_metrics(run / "metrics.jsonl")[-1]["loss"]
    return loss


def test_hybrids_are_compared_where_the_preset_has_a_pattern(
    data: Path, tmp_path: Path, jobs_done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page and the summary speak of them, and of the baseline as the baseline, whoever is ahead."""
    pytest.importorskip(
        "matplotlib", reason="the page needs matplotlib: pip install '.[report]' in a clone of spherelm"
    )
    architecture = DecoderArch(pattern="M-A")
    pattern = dataclasses.replace(tiny.PRESET, n_layers=3, d_model=32, architecture=architecture)
    monkeypatch.setitem(PRESETS, "tiny", pattern)
    out = tmp_path / "out"
    summary = compare(config(data, seeds=1, quick=True), out)
    assert jobs_done == ["gpt-0", "ngpt-0"]
    patterns = [tiny.read_json(out / run / "config.json")["model"]["architecture"]["pattern"] for run in jobs_done]
    assert patterns == ["M-A", "M-A"]
    rates = [read_config(out / run / "config.json").optim.lr for run in jobs_done]
    assert [summary["arms"][arm]["lr"] for arm in tiny.ARMS] == rates
    losses = {arm: summary["arms"][arm]["final_loss"] for arm in tiny.ARMS}
    assert summary["speedup"]["winner"] == min(losses, key=lambda arm: losses[arm])
    read = read_comparison(out)
    assert (read.baseline, read.normalized) == tiny.ARMS
    assert {read.winner, read.loser} == set(losses)
    page = write_report(out).read_text()
    assert "<title>GPT and nGPT side by side" in page
    assert "final loss, nGPT less GPT" in page


@pytest.mark.row("Report")
def test_a_whole_comparison(data: Path, tmp_path: Path, jobs_done: list[str]) -> None:
    pytest.importorskip(
        "matplotlib", reason="the page needs matplotlib: pip install '.[report]' in a clone of spherelm"
    )
    out = tmp_path / "out"
    returned = compare(config(data), out)
    summary = json.loads((out / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary == json.loads(json.dumps(returned))
    assert {"arms", "speedup", "step_time_ratio", "config", "short_runs", "versions", "command"} <= set(summary)
    for arm in tiny.ARMS:
        losses = [final(out / f"{arm}-{seed}") for seed in (0, 1)]
        of_arm = summary["arms"][arm]
        assert of_arm["final_loss_by_seed"] == losses
        assert of_arm["final_loss"] == pytest.approx(sum(losses) / 2)
        assert of_arm["final_loss_se"] == pytest.approx(abs(losses[0] - losses[1]) / 2)
        per_byte = tokens_per_byte(open_tokens(data, "val"))
        assert of_arm["bits_per_byte"] == pytest.approx(of_arm["final_loss"] / math.log(2) * per_byte)
        assert of_arm["tokens_per_second"] > 0
        assert of_arm["lr"] == read_config(out / f"{arm}-0" / "config.json").optim.lr
        assert of_arm["runs"] == [f"{arm}-0", f"{arm}-1"]
    best = summary["speedup"]["winner"]
    assert jobs_done[:4] == ["gpt-0", "ngpt-0", "gpt-1", "ngpt-1"], "both arms of a seed side by side"
    targets = summary["arms"]["gpt" if best == "ngpt" else "ngpt"]["final_loss_by_seed"]
    expected = [f"{best}-{seed}-steps4" for seed in (0, 1)]
    if any(final(out / run) <= target for run, target in zip(expected, targets, strict=True)):
        expected += [f"{best}-{seed}-steps2" for seed in (0, 1)]
    assert jobs_done[4:] == expected
    assert [run["run"] for run in summary["short_runs"]] == jobs_done[4:]
    for run in summary["short_runs"]:
        assert run["final_loss"] == final(out / run["run"])
        assert run["tokens"] == run["steps"] * 4 * 16
    assert {"tokens", "tokens_interval", "seconds", "bound", "by_seed", "steps"} <= set(summary["speedup"])
    assert summary["speedup"]["method"] == "schedule-ends"
    assert summary["step_time_ratio"] > 0
    assert summary["config"] | {"preset": "tiny", "seeds": 2, "steps": 6, "seq_len": 16} == summary["config"]
    assert summary["config"]["tokens"] == FULL_TOKENS
    page = write_report(out).read_text()
    assert page.lower().startswith("<!doctype html>")
    assert len(page) > 10_000
    written = tiny.read_json(out / "samples.json")
    assert written["prompt"] == module.PROMPT[:8], "the models read 16 bytes: half of them are the prompt"
    assert all(len(written[arm]) == 2 for arm in tiny.ARMS)


def test_shorter_budgets_have_whole_schedules_of_their_own(data: Path, tmp_path: Path, jobs_done: list[str]) -> None:
    summary = compare(config(data, seeds=1), tmp_path / "out")
    best = summary["speedup"]["winner"]
    assert summary["short_runs"][0]["steps"] == 4
    for steps in (short["steps"] for short in summary["short_runs"]):
        run = tmp_path / "out" / f"{best}-0-steps{steps}"
        assert tiny.read_json(run / "config.json")["train"]["steps"] == steps
        rates = [record["lr"] for record in read_metrics(run / "metrics.jsonl") if record["kind"] == "train"]
        assert len(rates) == steps
        assert rates[-1] <= 0.5 * rates[0], "decayed to its end"
    assert summary["speedup"]["tokens_interval"] is None
    assert summary["arms"]["gpt"]["final_loss_se"] is None


def test_quick_reads_the_curve_of_the_full_runs(data: Path, tmp_path: Path, jobs_done: list[str]) -> None:
    summary = compare(config(data, quick=True), tmp_path / "out")
    assert jobs_done == ["gpt-0", "ngpt-0", "gpt-1", "ngpt-1"]
    assert summary["speedup"]["method"] == "in-run"
    assert summary["short_runs"] == []
    curve = module.in_run_curve(tmp_path / "out" / "ngpt-0")
    assert [tokens for tokens, _ in curve] == [128, 256, 384], "the untrained start is no point"
    gpt, ngpt = (tiny.read_json(tmp_path / "out" / f"{arm}-0" / "config.json") for arm in tiny.ARMS)
    assert gpt["train"] == ngpt["train"]
    assert gpt["data_identity"] == ngpt["data_identity"], "both arms read the same text in the same order"
    shared = set(gpt["model"]) & set(ngpt["model"])
    assert {name: gpt["model"][name] for name in shared} == {name: ngpt["model"][name] for name in shared}


def test_an_arm_that_diverges_loses_and_the_rest_is_written(data: Path, tmp_path: Path, jobs_done: list[str]) -> None:
    summary = compare(config(data, lr_gpt=1e30), tmp_path / "out")
    assert summary["speedup"]["winner"] == "ngpt"
    assert summary["speedup"]["tokens"] is None
    stored = json.loads((tmp_path / "out" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert stored["arms"]["gpt"]["final_loss"] is None
    assert stored["arms"]["gpt"]["final_loss_by_seed"] == [None, None]
    assert stored["arms"]["ngpt"]["final_loss"] > 0
    written = tiny.read_json(tmp_path / "out" / "samples.json")
    assert written["gpt"] == []
    assert len(written["ngpt"]) == 2
    pytest.importorskip(
        "matplotlib", reason="the page needs matplotlib: pip install '.[report]' in a clone of spherelm"
    )
    assert "diverged" in write_report(tmp_path / "out").read_text()


def test_where_every_run_diverged_there_is_nothing_to_compare(data: Path, tmp_path: Path, jobs_done: list[str]) -> None:
    """GPT by a loss that is no number, nGPT by ending worse than an untrained model; no shorter run is tried."""
    with pytest.raises(Diverged, match=r"out: every run of both arms diverged, .*: lower --lr-gpt and --lr-ngpt"):
        compare(config(data, seeds=1, lr_gpt=1e30, lr_ngpt=1e6), tmp_path / "out")
    assert [path.name for path in sorted((tmp_path / "out").glob("*/diverged.txt"))] == ["diverged.txt"] * 2
    assert not list((tmp_path / "out").glob("*steps*"))


def test_what_each_arm_learns_with_can_be_chosen(data: Path, tmp_path: Path, jobs_done: list[str]) -> None:
    chosen = config(
        data, seeds=1, quick=True, steps=2, batch_size=2, seq_len=8, lr_gpt=0.02, lr_ngpt=0.03, recipe="paper"
    )
    summary = compare(chosen, tmp_path / "out")
    assert (summary["arms"]["gpt"]["lr"], summary["arms"]["ngpt"]["lr"]) == (0.02, 0.03)
    assert summary["config"]["tokens"] == 2 * 2 * 8
    record = tiny.read_json(tmp_path / "out" / "ngpt-0" / "config.json")
    assert record["model"]["s_z"]["init"] == 1.0
    assert (record["train"]["steps"], record["train"]["seq_len"], record["train"]["batch_size"]) == (2, 8, 2)


@pytest.mark.parametrize(
    ("steps", "shorter"), [(1, []), (2, [1]), (3, [2, 1]), (6, [4, 2]), (100, [65, 40, 25]), (240, [156, 96, 60])]
)
def test_shorter_budgets_are_whole_and_fall(steps: int, shorter: list[int]) -> None:
    assert module.shorter_budgets(steps) == shorter


@pytest.mark.parametrize(
    ("losses", "steps"),
    [
        ({65: [3.1, 3.1], 40: [3.5, 3.5]}, [65]),
        ({65: [2.9, 3.1], 40: [3.5, 3.5]}, [65, 40]),
        ({65: [2.9, 2.9], 40: [2.9, 2.9], 25: [2.9, 3.5]}, [65, 40, 25]),
        ({65: [math.nan, math.nan]}, [65]),
    ],
)
def test_budgets_get_shorter_until_no_seed_reaches_its_target(
    losses: dict[int, list[float]],
    steps: list[int],
    data: Path,
    tmp_path: Path,
    jobs_done: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "run_jobs", lambda jobs, *rest: losses[jobs[0].config.train.steps])
    wanted = config(data, steps=100)
    done = module.shorter_runs(wanted, "ngpt", wanted.run("ngpt", tiny.VOCAB, 0), [3.0, 3.0], tmp_path, None)
    assert [(job.config.train.steps, loss) for job, loss in done[::2]] == [
        (n, pytest.approx(losses[n][0], nan_ok=True)) for n in steps
    ]
    assert [job.config.train.seed for job, _ in done] == [0, 1] * len(steps)


def test_an_occupied_directory_is_refused(data: Path, tmp_path: Path, jobs_done: list[str]) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match="already holds something"):
        compare(config(data), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    assert jobs_done == []


def test_two_comparisons_never_share_a_directory(data: Path, tmp_path: Path, jobs_done: list[str]) -> None:
    tmp_path.joinpath("out").mkdir()
    with alone_in(tmp_path / "out"), pytest.raises(FileExistsError, match="out is in use by another process"):
        compare(config(data), tmp_path / "out")
    assert jobs_done == []


def test_a_comparison_goes_on_where_it_stopped(
    data: Path, tmp_path: Path, jobs_done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, wanted = tmp_path / "out", config(data, seeds=1)
    with monkeypatch.context() as patch:
        patch.setattr(module, "summarize", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compare(wanted, out)
    assert not (out / "summary.json").exists()
    logs = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    assert len(logs) >= 3, "both arms, and the better one for shorter runs"
    with pytest.raises(FileExistsError, match="--resume to continue"):
        compare(wanted, out)
    with pytest.raises(ValueError, match="fields is None there"):
        compare(config(data, seeds=1, fields=("d_model=16",)), out, resume=True)
    summary = compare(wanted, out, resume=True)
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")} == logs, "no run was done again"
    assert summary["arms"]["gpt"]["final_loss"] == final(out / "gpt-0")
    assert compare(wanted, out, resume=True)["speedup"]["by_seed"] == summary["speedup"]["by_seed"]
    more = compare(config(data, seeds=2), out, resume=True)
    assert all(path.stat().st_mtime_ns == time for path, time in logs.items()), (
        "seeds are added to those that are there"
    )
    assert more["arms"]["gpt"]["final_loss_by_seed"] == [final(out / "gpt-0"), final(out / "gpt-1")]
    with pytest.raises(ValueError, match="seeds is 2 there and 1 now"):
        compare(wanted, out, resume=True)


def test_fields_are_for_the_arms_that_have_them(data: Path) -> None:
    runs = [
        config(data, preset="demo", fields=("d_ff=24", "alpha.init=0.3")).run(arm, 300, seed=1) for arm in tiny.ARMS
    ]
    assert [run.model.d_ff for run in runs] == [24, 24]
    assert runs[1].model.alpha.init == 0.3  # type: ignore[union-attr]
    for wrong, said in (
        ("no_field=1", "no field is called no_field"),
        ("lr=1", "lr is chosen by --lr-gpt"),
        ("seed=1", "--seeds"),
    ):
        with pytest.raises(ValueError, match=said):
            config(data, preset="demo", fields=(wrong,)).run("gpt", 300, seed=0)


def interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_without_matplotlib_nothing_is_trained_in_vain(
    data: Path,
    tmp_path: Path,
    jobs_done: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command = make_command(monkeypatch, capsys)
    answer = command("compare", "--preset", "tiny", "--data", data, "--out", tmp_path / "out")
    assert (answer.code, answer.out) == (2, "")
    assert re.search(r"matplotlib.*pip install '\.\[report\]' in a clone of spherelm", answer.err)
    assert jobs_done == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("limit", "prompt", "length"), [(1, 1, 0), (2, 1, 1), (64, 32, 32), (200, 40, 90)])
def test_samples_fit_the_models(limit: int, prompt: int, length: int, data: Path, tmp_path: Path) -> None:
    runs = {arm: tmp_path / arm for arm in tiny.ARMS}
    for arm, run in runs.items():
        train(tiny.run_config(arm, data, steps=1, seq_len=min(limit, 16), max_seq_len=limit), run, show_progress=False)
    written = samples(runs)
    assert written["prompt"] == module.PROMPT[:prompt]
    texts = [text for arm in tiny.ARMS for text in written[arm]]
    assert len(texts) == 4
    assert max(len(text.encode("utf-8", "ignore")) for text in texts) <= 3 * length, "a stray byte shows as three"
    assert (max(map(len, texts)) > 0) == (length > 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seeds": 0}, "seeds must be more than 0, got 0"),
        ({"preset": "huge"}, "unknown preset 'huge': choose one of demo"),
        ({"preset": "pairs"}, "preset 'pairs' has the architecture encdec: use spherelm sweep to train both arms"),
        ({"preset": "encoder"}, "preset 'encoder' has the architecture encoder: use spherelm sweep"),
        ({"recipe": "secret"}, "unknown recipe 'secret': choose one of law, paper"),
        ({"steps": 0}, "steps must be more than 0, got 0"),
        ({"seq_len": 10**6}, "sequence length 1000000 needs 1000001 tokens"),
        ({"lr_ngpt": 0.0}, "lr must be more than 0, got 0.0"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    fields: dict[str, Any], message: str, data: Path, tmp_path: Path, jobs_done: list[str]
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(config(data, **fields), tmp_path / "out")
    assert not (tmp_path / "out").exists(), "the same --out can be given again"

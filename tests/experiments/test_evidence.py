"""The ladder of evidence: what it runs, that it finds a rate, resumes, judges on test text,
and how it fits what it found.
"""

from __future__ import annotations

import dataclasses
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from commands import make_command

from spherelm.data.output import write_json
from spherelm.data.prepare import prepare
from spherelm.evaluate.perplexity import mean_loss
from spherelm.experiments import evidence, evidence_plan
from spherelm.experiments.evidence import (
    Grid,
    GridPoint,
    Ladder,
    beyond,
    climb,
    time_limit,
)
from spherelm.experiments.evidence_record import evidence_table, on_record
from spherelm.recipes import make_run
from spherelm.recipes.presets import PRESETS
from spherelm.runs.loading import load_model
from spherelm.runs.record import alone_in


def test_the_sizes_are_what_they_are_called() -> None:
    for name, low, high in (
        ("0.3m", 0.25e6, 0.35e6),
        ("1m", 0.9e6, 1.1e6),
        ("4m", 3.3e6, 4.2e6),
        ("12m", 11e6, 12.5e6),
    ):
        point = GridPoint(name, 256, 5)
        assert low < point.block_parameters < high
        assert point.tokens == pytest.approx(PRESETS[name].steps * 1024), "five tokens for each block parameter"
        assert point.tokens == pytest.approx(5 * point.block_parameters, rel=1e-3)
        model = make_run("ngpt", name, "nugpt", vocab_size=9).model
        assert model.d_model // model.n_heads == 64, "nuGPT wants heads of one width"


def test_points_come_cheapest_first() -> None:
    grid = Grid("d", "t", sizes=("1m", "0.3m"), contexts=(256, 1024), budgets=(10, 5))
    costs = [point.cost for point in grid.points()]
    assert len(costs) == 8
    assert costs == sorted(costs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizes": ("huge",)}, "unknown size 'huge': choose one of demo"),
        ({"sizes": ("0.3m", "pairs")}, "'pairs' has another architecture than the contenders, .*: take another"),
        ({"sizes": ("hybrid",)}, "'hybrid' has another architecture than the contenders"),
        ({"contenders": ("bert",)}, "unknown contender 'bert': choose one of gpt-law"),
        ({"contexts": (300,)}, "context 300 is no power of two, as the tokens of an update are"),
        ({"budgets": (0.0,)}, "budgets.0 must be more than 0"),
        ({"budgets": (math.inf,)}, "budgets.0 must be a finite number"),
        ({"budgets": (5.0, 5.0)}, "budgets has a value twice"),
        ({"contenders": ("gpt-law", "gpt-law")}, "contenders has a value twice"),
        ({"budgets": (0.0078, 0.0079)}, "budgets 0.0078 and 0.0079 are both 2 updates of 0.3m: leave one out"),
        ({"seeds": 0}, "seeds must be more than 0, got 0"),
    ],
)
def test_what_cannot_be_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid("d", "t", **fields)


def test_updates_grow_with_the_root_of_the_tokens() -> None:
    points = [GridPoint("0.3m", 256, budget) for budget in (0.3, 5, 20, 80, 320)]
    assert [point.tokens_an_update for point in points] == [1024, 1024, 2048, 4096, 8192]
    assert [point.steps for point in points[1:]] == [1280, 2560, 5120, 10240]
    assert GridPoint("0.3m", 8192, 20).tokens_an_update == 8192, "one sequence"
    for point in points:
        assert point.tokens == pytest.approx(point.budget * point.block_parameters, rel=0.01)


def search(loss: Any, start: float = 1.0) -> dict[float, float]:
    """`Ladder.tune` on a known curve."""
    found: dict[float, float] = {}
    pending = [start, start / 2, start * 2]
    while pending:
        found |= {rate: loss(rate) for rate in pending}
        pending = beyond(found)
    return found


@pytest.mark.parametrize("best", [2.0**k for k in range(-6, 7)])
def test_a_search_ends_between_two_worse_rates(best: float) -> None:
    found = search(lambda rate: abs(math.log2(rate / best)))
    assert min(found, key=lambda rate: found[rate]) == best
    assert {best / 2, best * 2} <= set(found)


def test_a_search_goes_away_from_what_diverges_and_ends_where_everything_does() -> None:
    found = search(lambda rate: math.nan if rate > 0.1 else 1 / rate)
    assert min((r for r in found if found[r] == found[r]), key=lambda r: found[r]) == 2.0**-4
    assert len(search(lambda rate: math.nan)) == evidence.PATIENCE


IDENTITY = {"data": "1,2", "test": "3"}


def test_what_is_no_record_of_evidence_is_refused(tmp_path: Path) -> None:
    grid = Grid("d", "t")
    assert on_record(tmp_path / "evidence.json", grid, IDENTITY) == ([], [])
    told = '{"grid": {"data": "d", "test": "t", "test_windows": 256}, "measured": [%s], "costs": [%s]}'
    for text in ("{", "[1]", '{"mine": 1}', told % ('{"a": 1}', ""), told % ("", "1")):
        (tmp_path / "evidence.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"is not what spherelm evidence wrote .*: move it away"):
            on_record(tmp_path / "evidence.json", grid, IDENTITY)
    (tmp_path / "evidence.json").write_text(told % ("", ""), encoding="utf-8")
    with pytest.raises(ValueError, match="was measured with test 't', now it is 'u': choose another --out"):
        on_record(tmp_path / "evidence.json", Grid("d", "u"), IDENTITY)


def test_text_that_was_moved_is_the_same_and_other_text_in_its_place_is_not(tmp_path: Path) -> None:
    path, grid = tmp_path / "evidence.json", Grid("d", "t")
    write_json(path, evidence.summary(grid, IDENTITY, []))
    assert on_record(path, Grid("./d", "/elsewhere/t"), IDENTITY) == ([], [])
    for name in IDENTITY:
        with pytest.raises(ValueError, match=f"was measured with {name} "):
            on_record(path, grid, {**IDENTITY, name: "4"})


@pytest.fixture
def test_data(data: Path, tmp_path: Path) -> Path:
    """Another directory with the same tokenizer."""
    train, val = tmp_path / "a.txt", tmp_path / "b.txt"
    train.write_text(tiny.text(5, 50), encoding="utf-8")
    val.write_text(tiny.text(6, 100), encoding="utf-8")
    prepare([train], tmp_path / "test", "bytes", val=[val])
    return tmp_path / "test"


def test_a_small_ladder(
    data: Path,
    test_data: Path,
    tmp_path: Path,
    jobs_done: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evidence_plan, "SMALLEST_UPDATE", 64)
    grid = Grid(str(data), str(test_data), ("tiny",), (16,), (0.02, 0.04), ("gpt-law", "ngpt-law"), 2, test_windows=5)
    out = tmp_path / "ladder"
    record = climb(grid, out)
    stored = tiny.read_json(out / "evidence.json")
    write_json(tmp_path / "returned.json", record)  # a loss that is not a number, of a run that diverged, becomes null
    returned = tiny.read_json(tmp_path / "returned.json")
    assert {k: v for k, v in stored.items() if k != "grid"} == {k: v for k, v in returned.items() if k != "grid"}
    assert [(m["contender"], m["budget"]) for m in record["measured"]] == [
        (contender, budget) for budget in grid.budgets for contender in grid.contenders
    ]
    for m in record["measured"]:
        losses = {float(rate): math.inf if math.isnan(loss) else loss for rate, loss in m["rates"].items()}
        assert losses[m["lr"]] == min(losses.values()) == m["validation"][0]
        assert min(losses) < m["lr"] < max(losses), "the best rate has a worse one on each side"
        assert len(m["test"]) == 2
        windows = evidence.validation_windows(evidence.open_tokens(test_data, "val"), 16, 5)
        assert m["test"][1] == pytest.approx(
            mean_loss(load_model(out / m["runs"][1]), *windows, batch_size=5), rel=1e-5
        )
        assert tiny.read_json(out / m["runs"][1] / "config.json")["optim"]["lr"] == m["lr"]
    assert len(record["speedups"]) == 2
    assert {row["tokens"] for row in record["speedups"]} == {64 * m["steps"] for m in record["measured"]}
    assert evidence_table(record).count("\n| tiny | 16 |") == 4 + 2
    (cost,) = record["costs"]
    assert (cost["size"], cost["context"], cost["batch"], cost["compiled"]) == ("tiny", 16, 4, False)
    assert list(cost["seconds"]) == list(grid.contenders)
    assert all(seconds > 0 for seconds in cost["seconds"].values())
    assert cost["ratios"]["gpt-law"]["gpt-law"] == 1.0
    for row in record["speedups"]:
        if row["speedup"] is not None:
            assert row["seconds"] == row["speedup"] / cost["ratios"]["gpt-law"]["ngpt-law"]
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    again = climb(grid, out)
    kept = ("measured", "costs", "speedups")
    assert {k: again[k] for k in kept} == {k: record[k] for k in kept}, "steps are not timed again either"
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")} == stamps, "nothing ran again"
    assert capsys.readouterr().err.count("measurement") == 1, "what is left takes about so long; nothing is left then"
    part = climb(dataclasses.replace(grid, budgets=(0.04,), contenders=("gpt-law",), seeds=1), out)
    assert {k: part[k] for k in kept} == {k: record[k] for k in kept}, "what is known already stays"


def test_beyond_what_is_confirmed_a_run_takes_the_recipes_rate(
    data: Path, test_data: Path, tmp_path: Path, jobs_done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence_plan, "SMALLEST_UPDATE", 64)
    contenders = ("gpt-no-qk-norm",)
    grid = Grid(str(data), str(test_data), ("tiny",), (16,), (0.02,), contenders, 1, confirm=0, test_windows=5)
    (row,) = climb(grid, tmp_path / "ladder")["measured"]
    config = tiny.read_json(tmp_path / "ladder" / row["runs"][0] / "config.json")
    (point,) = grid.points()
    lawful = make_run("gpt", "tiny", "law", vocab_size=config["model"]["vocab_size"], qk_norm=False,
                      steps=point.steps, seq_len=16, batch_size=4)  # fmt: skip
    assert len(row["rates"]) == 1
    assert row["lr"] == pytest.approx(lawful.optim.lr, rel=0.005)
    assert config["model"]["qk_norm"] is False


def test_long_runs_are_compiled(data: Path, test_data: Path, tmp_path: Path) -> None:
    grid = Grid(str(data), str(test_data), budgets=(1.25, 2.5))
    ladder = Ladder(grid, tmp_path)
    compiled = {p.steps: ladder.job("ngpt-law", p, 1e-2, 0).config.train.compile for p in grid.points()}
    assert compiled == {320: False, 640: True}


def test_text_of_another_tokenizer_cannot_judge(data: Path, tmp_path: Path) -> None:
    train, val = tmp_path / "a.txt", tmp_path / "b.txt"
    train.write_text(tiny.text(5, 500), encoding="utf-8")
    val.write_text(tiny.text(6, 500), encoding="utf-8")
    prepare([train], tmp_path / "test", "default", val=[val])
    with pytest.raises(ValueError, match="was made with another tokenizer than"):
        climb(Grid(str(data), str(tmp_path / "test")), tmp_path / "out")


def test_what_chose_the_rates_cannot_judge(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="which chooses the learning rates: give --test held-out text"):
        climb(Grid(str(data), str(data)), tmp_path / "out")


def test_two_never_work_through_one_directory(
    data: Path, test_data: Path, tmp_path: Path, jobs_done: list[str]
) -> None:
    (tmp_path / "out").mkdir()
    with alone_in(tmp_path / "out"), pytest.raises(FileExistsError, match="out is in use by another process"):
        climb(Grid(str(data), str(test_data)), tmp_path / "out")
    assert jobs_done == []


def test_what_could_not_be_done_to_the_end_is_not_begun(
    data: Path, test_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = Grid(str(data), str(test_data))
    for minutes in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="minutes must be a positive number, got"):
            climb(grid, tmp_path / "out", minutes=minutes)
    with pytest.raises(FileExistsError, match="is a file: choose another --out"):
        climb(grid, test_data / "manifest.json")
    assert not (tmp_path / "out").exists()


def test_after_its_minutes_the_block_is_left_and_the_signal_is_as_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with time_limit(0.0005):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            time.sleep(0.01)
        pytest.fail("it did not end")
    with time_limit(None), time_limit(10.0):
        pass
    assert signal.getsignal(signal.SIGTERM) == before


class Watch:
    """In place of `threading.Timer`: its time comes when a test says so."""

    def __init__(self, interval: float, function: Callable[[], None]) -> None:
        Watch.ring = staticmethod(function)

    ring: Callable[[], None]
    start = cancel = join = lambda self: None


@pytest.mark.parametrize(
    ("stop", "code", "said"),
    [
        ("its minutes", 0, "spherelm: time is up (--minutes 7); run the same command again to continue"),
        ("a scheduler", 143, "spherelm: stopped; run the same command again to continue"),
    ],
)
def test_when_its_minutes_are_over_it_prints_what_it_has(
    stop: str,
    code: int,
    said: str,
    data: Path,
    test_data: Path,
    tmp_path: Path,
    jobs_done: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(evidence_plan, "SMALLEST_UPDATE", 64)
    monkeypatch.setattr(evidence.threading, "Timer", Watch)
    real = Ladder.measure

    def measure(self: Ladder, contender: str, point: GridPoint) -> dict[str, Any]:
        if contender == "ngpt-law":
            Watch.ring() if stop == "its minutes" else os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)  # a signal ends it
        return real(self, contender, point)

    monkeypatch.setattr(Ladder, "measure", measure)
    flags = ["--data", data, "--test", test_data, "--sizes", "tiny", "--contexts", "16", "--budgets", "0.02"]
    flags += ["--contenders", "gpt-law", "ngpt-law", "--seeds", "1", "--minutes", "7", "--out", tmp_path / "out"]
    answer = make_command(monkeypatch, capsys)("evidence", *flags)
    assert (answer.code, answer.shown[-1]) == (code, said)
    record = tiny.read_json(tmp_path / "out" / "evidence.json")
    (row,) = record["measured"]
    assert row["contender"] == "gpt-law"
    assert answer.out == ("" if code else evidence_table(record) + "\n")

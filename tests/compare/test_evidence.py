"""The ladder of evidence: what it runs, that it finds a rate, resumes, judges on test text, and how it fits what it found."""

from __future__ import annotations

import itertools
import math
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from spherelm.compare import evidence
from spherelm.compare.evidence import (
    Grid,
    Ladder,
    Point,
    all_speedups,
    beyond,
    climb,
    costs_on_record,
    growth,
    one_speedup,
    table,
    time_limit,
)
from spherelm.data.prepare import prepare
from spherelm.evaluate.perplexity import mean_loss
from spherelm.presets import PRESETS, RATES_OF_SMALLEST, SMALLEST
from spherelm.recipes import make_run
from spherelm.train.checkpoint import load_model
from spherelm.train.record import write_json


def test_the_sizes_are_what_they_are_called() -> None:
    for name, low, high in (
        ("0.3m", 0.25e6, 0.35e6),
        ("1m", 0.9e6, 1.1e6),
        ("4m", 3.3e6, 4.2e6),
        ("12m", 11e6, 12.5e6),
    ):
        point = Point(name, 256, 5)
        assert low < point.block_parameters < high
        assert point.steps == PRESETS[name].steps, "five tokens for each block parameter"
        assert point.tokens == pytest.approx(5 * point.block_parameters, rel=1e-3)
        model = make_run("ngpt", name, "nugpt", vocab_size=9).model
        assert model.d_model // model.n_heads == 64, "nuGPT wants heads of one width"


def test_rates_of_sizes_are_carried_over_from_the_smallest() -> None:
    """At 128 channels and 5120 updates: 2^(-3/4) 16^(-1/3) of the rate at 64 channels and 320 updates."""
    ratio = 2**-0.75 * 16 ** (-1 / 3)
    for arm in tiny.ARMS:
        base = evidence.PRESETS["1m"].rates["adam", arm]
        assert base == pytest.approx(ratio * recipes_rate(arm), rel=0.05)
    assert PRESETS["1m"].base == SMALLEST


def recipes_rate(arm: str) -> float:
    return RATES_OF_SMALLEST["adam", arm]


def test_points_come_cheapest_first() -> None:
    grid = Grid("d", "t", sizes=("1m", "0.3m"), contexts=(256, 1024), budgets=(10, 5))
    costs = [point.cost for point in grid.points()]
    assert len(costs) == 8
    assert costs == sorted(costs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sizes": ("huge",)}, "unknown size 'huge': choose among demo"),
        ({"contenders": ("bert",)}, "unknown contender 'bert': choose among gpt-paper"),
        ({"contexts": (300,)}, "context 300 does not divide the 1024 tokens of an update"),
        ({"budgets": (0.0,)}, "budgets must be positive"),
        ({"seeds": 0}, "seeds must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid("d", "t", **fields)


def search(loss: Any, start: float = 1.0) -> dict[float, float]:
    """What `Ladder.tune` does, on a known curve."""
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


def rung(tokens: int, *test: float) -> dict[str, Any]:
    return {"tokens": tokens, "test": list(test)}


def test_the_speedup_is_the_ratio_of_tokens_to_the_same_loss() -> None:
    """Losses that fall by 1 for each doubling: two seeds, the contender one doubling ahead, then one and a half."""
    own = [rung(1000, 5.0, 5.5), rung(2000, 4.0, 4.5), rung(4000, 3.0, 3.5)]
    found = one_speedup(rung(4000, 4.0, 4.0), own)
    assert found["speedup"] == pytest.approx(4000 / (2000 * 2**0.25))
    assert found["bound"] is None
    low, high = found["interval"]
    assert low < math.sqrt(2 * 2**0.5) < high
    ahead = one_speedup(rung(1000, 6.0, 6.0), own)
    assert (ahead["speedup"], ahead["bound"], ahead["interval"]) == (1.0, "at least", None)
    behind = one_speedup(rung(1000, 1.0, 1.0), own)
    assert (behind["speedup"], behind["bound"]) == (0.25, "at most")
    assert one_speedup(rung(1000, 1.0, 1.0), [rung(1000, 2.0, math.nan)])["speedup"] is None


def measurement(arm: str, contender: str, steps: int, *test: float) -> dict[str, Any]:
    place = {"size": "1m", "context": 256, "budget": steps / 1024, "block_parameters": 2**20}
    return {**place, "arm": arm, "contender": contender, "steps": steps, "tokens": 1024 * steps, "test": list(test)}


def test_the_speedup_in_seconds_is_that_in_tokens_over_the_ratio_of_the_steps() -> None:
    """Of the steps timed together at the same size and context, compiled where the baseline's run was."""
    measured = [
        measurement("gpt", "gpt-adamw", 320, 5.0, 5.1),
        measurement("gpt", "gpt-adamw", 1280, 3.0, 3.1),
        *(measurement("ngpt", "ngpt-adam", 160 * 2**k, 5.0 - k, 5.15 - k) for k in range(4)),
    ]

    def cost(compiled: bool, ratio: float, size: str = "1m", base: str = "gpt-adamw") -> dict[str, Any]:
        return {"size": size, "context": 256, "compiled": compiled, "ratios": {base: {"ngpt-adam": ratio}}}

    wrong = [cost(False, 9.0, size="4m"), cost(True, 9.0, base="gpt-muon"), {**cost(False, 9.0), "context": 1024}]
    short, long = all_speedups(measured, [*wrong, cost(False, 1.25), cost(True, 0.8)])
    assert long["seconds"] == pytest.approx(long["speedup"] / 0.8)
    assert long["seconds_interval"] == pytest.approx([edge / 0.8 for edge in long["interval"]])
    assert short["seconds"] == pytest.approx(short["speedup"] / 1.25)
    unknown = list(all_speedups(measured, wrong))
    assert [(row["seconds"], row["seconds_interval"]) for row in unknown] == [(None, None)] * 2
    assert [row["speedup"] for row in unknown] == [short["speedup"], long["speedup"]]


def test_what_is_no_record_of_evidence_is_refused(tmp_path: Path) -> None:
    assert costs_on_record(tmp_path / "evidence.json") == []
    for text in ("{", "[1]"):
        (tmp_path / "evidence.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"is not what spherelm evidence wrote .*: move it away"):
            costs_on_record(tmp_path / "evidence.json")


def rows(speedup: Any, budgets: tuple[float, ...], contexts: tuple[int, ...] = (256,)) -> list[dict[str, Any]]:
    return [
        {"baseline": "g", "contender": "n", "budget": b, "context": c, "block_parameters": n,
         "speedup": speedup(b, c, n), "bound": None}
        for b, c, n in itertools.product(budgets, contexts, (3e5, 1e6))
    ]  # fmt: skip


def test_growth_finds_the_powers_that_made_the_points() -> None:
    fit = growth(rows(lambda b, c, n: 1.5 * b**0.2 * c**0.3 * n**-0.1, (5, 10, 20), (256, 1024)))["g -> n"]
    assert fit["points"] == 12
    assert fit["power"] == pytest.approx({"budget": 0.2, "context": 0.3, "block_parameters": -0.1})
    assert all(error < 1e-6 for error in fit["error"].values())


def test_growth_says_what_it_cannot_know() -> None:
    found = rows(lambda b, c, n: b**0.5, (5, 10))
    found[0]["bound"] = "at least"
    fit = growth(found)["g -> n"]
    assert (fit["points"], fit["left_out"]) == (3, 1)
    assert fit["power"] == {
        "budget": pytest.approx(0.5),
        "block_parameters": pytest.approx(0, abs=1e-9),
        "context": None,
    }
    assert fit["error"] == {"budget": None, "block_parameters": None, "context": None}, "no points to spare"
    assert growth(found[:1])["g -> n"]["power"] == {"budget": None, "block_parameters": None, "context": None}


@pytest.fixture
def test_data(data: Path, tmp_path: Path) -> Path:
    """Another directory with the same tokenizer."""
    train, val = tmp_path / "a.txt", tmp_path / "b.txt"
    train.write_text(tiny.text(5, 50), encoding="utf-8")
    val.write_text(tiny.text(6, 100), encoding="utf-8")
    prepare([train], tmp_path / "test", "bytes", val=[val])
    return tmp_path / "test"


def test_a_small_ladder(
    data: Path, test_data: Path, tmp_path: Path, jobs_done: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "TOKENS_AN_UPDATE", 64)
    grid = Grid(
        str(data), str(test_data), ("tiny",), (16,), (0.02, 0.04), ("gpt-adamw", "ngpt-adam"), 2, test_windows=5
    )
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
    assert table(record).count("\n| tiny | 16 |") == 4 + 2
    (cost,) = record["costs"]
    assert (cost["size"], cost["context"], cost["compiled"]) == ("tiny", 16, False)
    assert list(cost["seconds"]) == list(grid.contenders)
    assert all(seconds > 0 for seconds in cost["seconds"].values())
    assert cost["ratios"]["gpt-adamw"]["gpt-adamw"] == 1.0
    for row in record["speedups"]:
        if row["speedup"] is not None:
            assert row["seconds"] == row["speedup"] / cost["ratios"]["gpt-adamw"]["ngpt-adam"]
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")}
    again = climb(grid, out)
    kept = ("measured", "costs", "speedups")
    assert {k: again[k] for k in kept} == {k: record[k] for k in kept}, "steps are not timed again either"
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/metrics.jsonl")} == stamps, "nothing ran again"


def test_long_runs_are_compiled(data: Path, test_data: Path, tmp_path: Path) -> None:
    grid = Grid(str(data), str(test_data), budgets=(1.25, 2.5))
    ladder = Ladder(grid, tmp_path)
    compiled = {p.steps: ladder.job("ngpt-muon", p, 1e-2, 0).config.train.compile for p in grid.points()}
    assert compiled == {320: False, 640: True}


def test_text_of_another_tokenizer_cannot_judge(data: Path, tmp_path: Path) -> None:
    train, val = tmp_path / "a.txt", tmp_path / "b.txt"
    train.write_text(tiny.text(5, 500), encoding="utf-8")
    val.write_text(tiny.text(6, 500), encoding="utf-8")
    prepare([train], tmp_path / "test", "default", val=[val])
    with pytest.raises(ValueError, match="was made with another tokenizer than"):
        climb(Grid(str(data), str(tmp_path / "test")), tmp_path / "out")


def test_after_its_minutes_it_is_told_to_stop() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: received.append(number))
    try:
        with time_limit(0.0005):
            deadline = time.monotonic() + 20
            while not received and time.monotonic() < deadline:
                time.sleep(0.01)
        with time_limit(None), time_limit(10.0):
            pass
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]

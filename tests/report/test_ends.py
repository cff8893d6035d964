"""`spherelm report`: which runs become which points, and what it says of the others."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import commands
import pytest

from spherelm.data.output import write_json
from spherelm.recipes import make_run
from spherelm.report import ends_page
from spherelm.report.charts import Line
from spherelm.report.ends_page import write_ends
from spherelm.runs.config import to_dict

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install '.[report]' in a clone of spherelm")

pytestmark = pytest.mark.usefixtures("unseen")

SHAPE: dict[str, Any] = {"vocab_size": 96, "n_layers": 3, "d_model": 32, "n_heads": 2, "batch_size": 4, "seq_len": 16}
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(name, arm, loss, **fields)`: a run that ended at that loss, NaN for a diverged one."""

    def make(name: str, arm: str, loss: float, ended: bool = True, text: str = "a", **fields: Any) -> Path:
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        config = make_run(arm, **{**SHAPE, "steps": 10, "lr": 1e-2, **fields})
        write_json(directory / "config.json", {**to_dict(config), "data_identity": {"val": text, "tokenizer": "t"}})
        step = config.train.steps if ended else config.train.steps // 2
        line = {"kind": "val", "step": step, "tokens": step * 64, "seconds": 1.0, "loss": loss}
        (directory / "metrics.jsonl").write_text("" if math.isnan(loss) else json.dumps(line) + "\n")
        if math.isnan(loss):
            (directory / "diverged.txt").write_text("diverged")
        return directory

    return make


def report(tmp_path: Path, overwrite: bool = False) -> tuple[list[Any], dict[str, Any], str]:
    """The figures, ends.json and the page."""
    out = tmp_path / "out"
    figures = write_ends([tmp_path / "runs"], out, overwrite)
    return figures, json.loads((out / "ends.json").read_text()), (out / "index.html").read_text("utf-8")


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Line]]:
    """The lines of each figure that is made, by its key."""
    found: dict[str, list[Line]] = {}
    real = ends_page._figure

    def watch(key: str, title: str, caption: str, lines: list[Line], *rest: Any) -> Any:
        found[key] = lines
        return real(key, title, caption, lines, *rest)

    monkeypatch.setattr(ends_page, "_figure", watch)
    return found


def seeds(line: Line) -> list[list[float]]:
    """The losses at each x, seed by seed; checks the mean that is drawn."""
    dots = list(zip(*map(list, line.dots), strict=True)) if line.dots is not None else []
    found = [[y for at, y in dots if at == x] or [mean] for x, mean in zip(line.x, line.seeds[0], strict=True)]
    assert [sum(values) / len(values) for values in found] == pytest.approx(line.seeds[0])
    return found


def test_each_budget_shows_its_best_choice_over_seeds(
    write: Write, tmp_path: Path, seen: dict[str, list[Line]]
) -> None:
    for arm, shift in (("gpt", 0.0), ("ngpt", -0.1)):
        for seed in (0, 1):
            write(f"{arm}-long-{seed}", arm, 3.0 + shift + seed / 10, steps=20, seed=seed)
            write(f"{arm}-short-{seed}", arm, 4.0 + shift + seed / 10, steps=10, seed=seed)
            write(f"{arm}-worse-{seed}", arm, 4.5 + shift, steps=10, lr=2e-2, seed=seed)
    write("gpt-lucky", "gpt", float("nan"), steps=20, lr=3e-2)
    report(tmp_path)
    gpt, ngpt = seen["budget"]
    assert (gpt.label, ngpt.label) == ("GPT", "nGPT")
    assert gpt.x == [640, 1280]
    assert seeds(gpt) == [[4.0, 4.1], [3.0, 3.1]]
    assert seeds(ngpt)[1] == [2.9, 3.0]


def test_learning_rates_are_told_apart_by_budget_and_the_edge_is_said(
    write: Write, tmp_path: Path, seen: dict[str, list[Line]]
) -> None:
    for lr, loss in ((1e-3, 4.2), (2e-3, 4.0), (4e-3, 4.1), (8e-3, float("nan"))):
        write(f"gpt-{lr}", "gpt", loss, lr=lr)
        write(f"ngpt-{lr}", "ngpt", 4.0 - lr if math.isfinite(loss) else loss, lr=lr)
    figures, _, page = report(tmp_path)
    assert [figure.key for figure in figures] == ["rate"]
    assert seen["rate"][0].x == [1e-3, 2e-3, 4e-3], "what diverged is no point"
    assert "The lowest: GPT 0.002 (by a parabola 0.0022) and nGPT 0.004 (beside a rate that diverged)." in page
    assert "nGPT at least 4x (0.001 to 0.004, beside a rate that diverged)" in page
    assert page.count(">diverged<") == 2


def test_rates_are_compared_on_the_seeds_that_all_of_them_have(
    write: Write, tmp_path: Path, seen: dict[str, list[Line]]
) -> None:
    """As `spherelm evidence` leaves them: the best rate of seed 0 has three seeds, whose mean is another."""
    for lr, losses in ((1e-3, [4.0]), (2e-3, [3.9, 4.3, 4.3]), (4e-3, [4.05]), (8e-3, [float("nan")])):
        for seed, loss in enumerate(losses):
            write(f"gpt-{lr}-{seed}", "gpt", loss, lr=lr, seed=seed)
    write("gpt-longer", "gpt", 3.5, lr=1e-3, steps=20)
    _, _, page = report(tmp_path)
    assert seeds(seen["rate"][0]) == [[4.0], [3.9], [4.05]]
    assert "The lowest: GPT 0.002 (by a parabola 0.0019)" in page
    assert seeds(seen["budget"][0]) == [[3.9, 4.3, 4.3], [3.5]], "all seeds of the best"


def test_rates_of_different_recipes_are_lines_of_their_own(
    write: Write, tmp_path: Path, seen: dict[str, list[Line]]
) -> None:
    for recipe, rates in (("paper", (1e-3, 2e-3)), ("law", (1e-2, 2e-2))):
        for lr in rates:
            write(f"gpt-{lr}", "gpt", 4.0 + lr, recipe=recipe, lr=lr)
    _, _, page = report(tmp_path)
    assert [(line.label, line.x) for line in seen["rate"]] == [
        ("GPT, law, muon", [1e-2, 2e-2]),
        ("GPT, paper, adamw", [1e-3, 2e-3]),
    ]
    assert "GPT (law, muon) 0.01 (at the edge of what was tried)" in page


def test_the_same_run_twice_is_no_second_seed_and_an_unfinished_one_is_none(write: Write, tmp_path: Path) -> None:
    write("a", "gpt", 4.0)
    write("again", "gpt", 4.0)
    write("seed", "gpt", 4.2, seed=1)
    write("longer", "gpt", 3.5, steps=20)
    write("stopped", "gpt", 3.0, ended=False, steps=30)
    _, record, page = report(tmp_path)
    assert [end["loss"] for end in record["ends"]] == [4.0, 3.5, 4.2]
    assert "Left out: 1 that did not come to their end" in page
    assert "1 that repeat another run, seed included, count once" in page
    assert "4.100\u00a0±\u00a00.100" in page


def test_tasks_are_read_from_what_eval_wrote(write: Write, tmp_path: Path, seen: dict[str, list[Line]]) -> None:
    for arm, value in (("gpt", 0.3), ("ngpt", 0.4)):
        for steps in (10, 20):
            run = write(f"{arm}-{steps}", arm, 4 - steps / 100, steps=steps)
            metrics = {
                "acc": {"value": value + steps / 1000, "stderr": 0.01},
                "acc_norm": {"value": 0.9, "stderr": None},
            }
            record = {"tasks": {"arc_easy": {"metrics": metrics, "chance": 0.25}}, "average": {"acc": {"value": value}}}
            (run / "eval.json").write_text(json.dumps(record))
            (run / "broken.json").write_text("{")
    figures, record, _ = report(tmp_path)
    assert [figure.title for figure in figures] == ["Final loss over token budget", "arc_easy", "average of the five"]
    assert seen["task-arc-easy"][1].seeds == [[pytest.approx(0.41), pytest.approx(0.42)]]
    assert record["ends"][0]["scores"] == pytest.approx({"arc_easy": 0.31, "average of the five": 0.3})


def test_perplexities_over_length_are_read_too(write: Write, tmp_path: Path, seen: dict[str, list[Line]]) -> None:
    """Of one text one figure, whose lines are arms and ways to place positions, with a dot a seed."""

    def record(shift: float, positions: str = "as trained", file: str = "books.txt") -> dict[str, Any]:
        rows = [{"length": length, "perplexity": length / 16 + shift} for length in (16, 32)]
        part = {"stride": None, "files": [f"some/{file}"], "tokens": 64, "documents": 2, "positions": positions}
        return {"perplexity": {**part, "trained_length": 16, "lengths": rows}}

    for arm in ("gpt", "ngpt"):
        for seed in (0, 1):
            run = write(f"{arm}-{seed}", arm, 4.0, seed=seed)
            write_json(run / "lengths.json", record(10.0 * seed))
            write_json(run / "other-text.json", record(0.0, file="wiki.txt"))
    write_json(run / "yarn.json", record(5.0, "yarn:2"))
    figures, _, page = report(tmp_path)
    assert [figure.key for figure in figures] == ["length-0", "length-1"]
    assert [(line.label, line.x, seeds(line)) for line in seen["length-0"]] == [
        ("GPT, as trained", [16, 32], [[1.0, 11.0], [2.0, 12.0]]),
        ("nGPT, as trained", [16, 32], [[1.0, 11.0], [2.0, 12.0]]),
        ("nGPT, yarn:2", [16, 32], [[6.0], [7.0]]),
    ]
    assert "On 64 tokens of 2 documents of books.txt, disjoint windows: at each length the same tokens" in page


def test_sizes_are_lines_of_their_own(write: Write, tmp_path: Path, seen: dict[str, list[Line]]) -> None:
    for layers in (2, 3):
        for steps in (10, 20):
            write(f"ngpt-{layers}-{steps}", "ngpt", 4 - layers / 10 - steps / 100, n_layers=layers, steps=steps)
    _, _, page = report(tmp_path)
    assert [line.label for line in seen["budget"]] == ["nGPT, 2 x 32, context 16", "nGPT, 3 x 32, context 16"]
    assert not re.search(r"https?://", page.replace('xmlns="http://www.w3.org/2000/svg"', ""))


def test_losses_on_different_text_are_not_put_together(write: Write, tmp_path: Path) -> None:
    write("a", "gpt", 4.0)
    write("b", "ngpt", 4.0, text="b")
    with pytest.raises(ValueError, match="were validated on different text or tokens"):
        report(tmp_path)
    assert not (tmp_path / "out").exists()


def test_what_failed_while_writing_works_the_next_time(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("gpt-0", "gpt", 3.0)

    def fail(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("spherelm.report.ends_page.write_json", fail)
        with pytest.raises(OSError, match="no space left"):
            report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    report(tmp_path)


def test_what_holds_no_run_or_is_taken_is_refused(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="no run is named: give directories of spherelm train or compare"):
        write_ends([], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="holds no run: pass directories of spherelm compare, sweep or train"):
        write_ends([tmp_path], tmp_path / "out")
    run = write("a", "gpt", 4.0, ended=False)
    with pytest.raises(FileNotFoundError, match="no finished run in"):
        write_ends([run], tmp_path / "out")
    with pytest.raises(FileExistsError, match="already holds something: choose another --out"):
        write_ends([run], run)
    write("b", "gpt", 4.0)
    answer = commands.make_command(monkeypatch, capsys)("report", tmp_path / "runs", "--out", tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text("utf-8")
    assert "no two runs of one arm and size differ in budget or learning rate" in page
    assert re.match("no figure, since no two runs of one arm and size differ in budget or learning rate: ", answer.out)
    again = commands.make_command(monkeypatch, capsys)("report", tmp_path / "runs", "--out", tmp_path / "out")
    assert again.code == 2
    assert again.shown == [
        f"spherelm: {tmp_path / 'out'} already holds something: choose another --out, or give --overwrite"
    ]
    (tmp_path / "out" / "notes.txt").write_text("mine")
    write("c", "gpt", 3.0, steps=20)
    report(tmp_path, overwrite=True)
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["ends.json", "figures", "index.html", "notes.txt"]
    assert (tmp_path / "out" / "figures" / "budget.svg").is_file()

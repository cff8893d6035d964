"""The report page: it stands alone, says what its runs say, and has words for what is missing."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_runs import SHAPE, write_comparison

from spherelm.experiments.record import Arm, Comparison, read_comparison
from spherelm.report.comparison_page import write_report
from spherelm.report.wording import caveats, si, verdict

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install '.[report]' in a clone of spherelm")

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page; fails on tags that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.styles = ""
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" in self.open:
            self.styles += data
        elif "script" not in self.open:
            self.text += data

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


Build = Callable[..., tuple[Path, Page]]
Read = Callable[..., Comparison]


def unchanged(directory: Path) -> None:
    """No edit."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete comparison over three seeds with its page, not to be changed."""
    path = tmp_path_factory.mktemp("compare")
    write_comparison(path)
    write_report(path)
    return path


@pytest.fixture(scope="module")
def page(directory: Path) -> Page:
    """The page of `directory`."""
    return Page((directory / "report.html").read_text("utf-8"))


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """`build(edit, **options)`: a synthetic comparison without weights, edited, and its page."""

    def make(edit: Callable[[Path], None] = unchanged, **options: Any) -> tuple[Path, Page]:
        write_comparison(tmp_path, **{"checkpoint": False, **options})
        edit(tmp_path)
        return tmp_path, Page(write_report(tmp_path).read_text("utf-8"))

    return make


@pytest.fixture
def read(tmp_path: Path) -> Read:
    """`read(edit, **options)`: a synthetic comparison, edited and read back."""

    def make(edit: Callable[[Path], None] = unchanged, **options: Any) -> Comparison:
        write_comparison(tmp_path, checkpoint=False, **options)
        edit(tmp_path)
        return read_comparison(tmp_path)

    return make


def edit_summary(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "summary.json"
        summary = json.loads(path.read_text())
        change(summary)
        path.write_text(json.dumps(summary))

    return edit


@pytest.mark.row("Report")
def test_the_page_stands_alone(directory: Path, page: Page) -> None:
    for _, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "action", "poster", "srcset", "data"):
            assert re.match(r"#|data:", attributes.get(name) or "#"), attributes
        assert "url(" not in (attributes.get("style") or "").replace("url(#", "")
    assert "@import" not in page.styles
    assert "url(" not in page.styles
    html = (directory / "report.html").read_text("utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.search(r"https?://", html)
    assert len(html.encode()) < 400_000


def test_no_id_occurs_twice_and_every_reference_has_its_target(directory: Path, page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    html = (directory / "report.html").read_text("utf-8")
    references = re.findall(r'href="#([^"]+)"|url\(#([^)"]+)\)', html)
    assert references
    assert {name for pair in references for name in pair if name} <= set(ids)


def test_figures_are_numbered_named_and_follow_the_theme(page: Page) -> None:
    assert page.count("svg") == page.count("figure") == page.count("figcaption") == 8
    for i in range(1, 9):
        assert f"Figure {i}." in page.text
    drawings = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert all(attributes["role"] == "img" and attributes["aria-labelledby"] for attributes in drawings)
    styles = " ".join(attributes.get("style") or "" for _, attributes in page.tags)
    assert not re.search(r"#[0-9a-f]{6}\b", styles), "a colour that the theme cannot change"
    for variable in set(re.findall(r"var\((--[a-z-]+)\)", styles)):
        assert page.styles.count(f"{variable}:") >= 3, f"{variable} is not set for light, dark and by choice"


def test_numbers_are_those_of_the_runs(directory: Path, page: Page) -> None:
    for arm in ("gpt", "ngpt"):
        finals, bits = [], []
        for seed in range(3):
            lines = [
                json.loads(line) for line in (directory / f"{arm}-{seed}" / "metrics.jsonl").read_text().splitlines()
            ]
            last = [line for line in lines if line["kind"] == "val"][-1]
            finals.append(last["loss"])
            bits.append(last["bits_per_byte"])
        assert f"{np.mean(finals):.3f}\u00a0±\u00a0{np.std(finals, ddof=1) / np.sqrt(3):.3f}" in page.text
        assert ", ".join(f"{loss:.3f}" for loss in finals) in page.text
        assert f"{np.mean(bits):.3f}" in page.text


def test_the_speedup_is_said_in_one_sentence_with_its_interval(directory: Path, page: Page) -> None:
    speedup = json.loads((directory / "summary.json").read_text())["speedup"]
    low, high = speedup["tokens_interval"]
    assert (
        f"with {speedup['tokens']:.2f}× fewer tokens (95% interval over 3 seeds: {low:.2f} to {high:.2f})" in page.text
    )
    assert "not as a forecast" in page.text


def test_one_seed_has_no_interval(build: Build) -> None:
    _, page = build(seeds=1)
    assert "one seed, so no interval" in page.text
    assert "±" not in page.text


@pytest.mark.parametrize(("apart", "tie"), [(0.004, True), (0.2, False)])
def test_no_arm_is_ahead_where_seeds_differ_by_more_than_the_arms(
    build: Build, apart: float, tie: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = read_comparison(build(seeds=3)[0])
    losses = {"gpt": [5.27, 5.25, 5.29], "ngpt": [loss - apart for loss in (5.26, 5.27, 5.28)]}
    monkeypatch.setattr(Arm, "final_losses", property(lambda arm: losses[arm.name]))
    assert ("No arm is ahead here" in verdict(comparison)) == tie


def test_no_arm_is_ahead_where_the_factor_rounds_to_one(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = read_comparison(build(seeds=1)[0])
    for tokens, tie in ((1.004, True), (1.006, False), (1 / 1.004, True)):
        monkeypatch.setitem(comparison.summary["speedup"], "tokens", tokens)
        assert ("No arm is ahead here" in verdict(comparison)) == tie


def test_gpt_winning_is_said(build: Build) -> None:
    directory, page = build(swap=True, seeds=2)
    speedup = json.loads((directory / "summary.json").read_text())["speedup"]
    assert speedup["tokens"] < 1
    assert "GPT wins here. GPT reaches nGPT’s final validation loss" in page.text
    assert f"{1 / speedup['tokens']:.2f}× fewer tokens" in page.text
    html = (directory / "report.html").read_text("utf-8")
    assert ">GPT, ends of full schedules</text>" in html
    assert ">nGPT, final loss</text>" in html


def test_an_arm_that_diverged_is_said(build: Build) -> None:
    def diverge(directory: Path) -> None:
        for run in ("gpt-0", "gpt-1"):
            (directory / run / "diverged.txt").write_text("gpt: the loss is nan at step 7\n")
            (directory / run / "metrics.jsonl").write_text("")

        def change(summary: dict[str, Any]) -> None:
            summary["arms"]["gpt"].update(final_loss=float("nan"), final_loss_by_seed=[float("nan")] * 2)
            nothing = dict.fromkeys(("tokens", "tokens_interval", "seconds", "seconds_interval", "tokens_to_reach"))
            summary["speedup"].update(nothing, winner="ngpt", by_seed=[])

        edit_summary(change)(directory)

    _, page = build(diverge, seeds=2)
    assert "There is no speedup to report, since gpt-0 and gpt-1 diverged" in page.text
    assert "nan" not in page.text
    assert "None" not in page.text


@pytest.mark.parametrize(("swap", "bound", "factor"), [(False, "at least", 2.0), (True, "at most", 0.5)])
def test_a_bound_is_called_one(read: Read, swap: bool, bound: str, factor: float) -> None:
    known = {"bound": bound, "tokens": factor, "tokens_interval": None, "tokens_to_reach": 819_200}
    comparison = read(edit_summary(lambda summary: summary["speedup"].update(known)), swap=swap, seeds=2)
    assert "with at least 2.00× fewer tokens (no interval, since not every seed crosses" in verdict(comparison)
    assert "at most 819k instead of 1.64M" in verdict(comparison)


def test_time_is_told_for_the_faster_arm(read: Read) -> None:
    slower = {"tokens": 1.1, "seconds": 0.8, "seconds_interval": [0.75, 0.85]}
    comparison = read(edit_summary(lambda summary: summary["speedup"].update(slower)), seeds=2)
    said = "GPT gets there 1.25× faster (95% interval over 2 seeds: 1.18 to 1.33)"
    assert said in caveats(comparison)[0]


def test_an_interval_around_one_is_doubted(read: Read) -> None:
    comparison = read(edit_summary(lambda summary: summary["speedup"].update(tokens_interval=[0.9, 1.9])))
    assert any("do not tell the arms apart" in text for text in caveats(comparison))


def test_quick_mode_is_said(build: Build) -> None:
    _, page = build(quick=True, seeds=1)
    assert "Quick mode" in page.text
    assert "ends of full schedules" not in page.text
    assert "Table 2" not in page.text


def test_a_summary_that_disagrees_with_its_runs_is_reported(read: Read) -> None:
    comparison = read(edit_summary(lambda summary: summary["arms"]["gpt"].update(final_loss=1.5)))
    assert "summary.json gives 1.5 as the final loss of gpt" in comparison.disagreements[0]
    assert comparison.arms["gpt"].final_loss > 2


def test_missing_pieces_are_said_in_words(build: Build) -> None:
    def strip(directory: Path) -> None:
        (directory / "samples.json").unlink()

    _, page = build(strip, seeds=1)
    assert "No text samples" in page.text
    assert "The weights cannot be shown" in page.text
    assert page.count("figure") == 2


HOSTILE = '<script>alert(1)</script> & "quotes" <img src="http://x.example/y.png" onerror=alert(2)> $title'


def test_hostile_text_stays_text(build: Build) -> None:
    def poison(directory: Path) -> None:
        (directory / "samples.json").write_text(
            json.dumps({"prompt": HOSTILE, "gpt": [HOSTILE], "ngpt": [HOSTILE * 2]})
        )

        def change(summary: dict[str, Any]) -> None:
            summary.update(command=HOSTILE, git_commit=HOSTILE, versions={HOSTILE: HOSTILE})
            summary["config"].update(preset=HOSTILE, data={HOSTILE: HOSTILE})
            summary["arms"]["gpt"].update(recipe=HOSTILE, optimizer=HOSTILE)

        edit_summary(change)(directory)

    _, page = build(poison, seeds=1)
    assert page.count("script") == 1
    assert page.count("img") == 0
    assert page.text.count(HOSTILE) >= 6


def test_each_arms_optimizer_is_named(build: Build) -> None:
    def forget(summary: dict[str, Any]) -> None:
        del summary["arms"]["gpt"]["optimizer"]

    _, page = build(edit_summary(forget), seeds=1)
    row = page.text.partition("Optimizer")[2].partition("Parameters")[0]
    assert row.strip() == "unknownMuon for block matrices, AdamW for the rest"


def test_the_same_runs_give_the_same_bytes(directory: Path, page: Page) -> None:
    first = (directory / "report.html").read_bytes()
    assert write_report(directory).read_bytes() == first


def test_reproducing_is_one_copy_away(directory: Path, page: Page) -> None:
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["command"] in page.text
    assert json.dumps(summary["config"], indent=2) in page.text
    assert "torch 2.13.0" in page.text
    assert f'"d_model": {SHAPE["d_model"]}' in page.text


def test_means_are_taken_where_every_seed_validated(read: Read) -> None:
    def thin_out(directory: Path) -> None:
        path = directory / "gpt-1" / "metrics.jsonl"
        lines = path.read_text().splitlines()
        path.write_text("\n".join(lines[:6] + lines[10:]) + "\n")

    arm = read(thin_out, seeds=2).arms["gpt"]
    curve = arm.mean_curve()
    assert curve is not None
    tokens, _, loss = curve
    assert [len(run.steps) for run in arm.runs] == [20, 18]
    assert len(tokens) == 18
    for at, mean in zip(tokens, loss, strict=True):
        seeds = [run.loss[np.flatnonzero(run.tokens == at)[0]] for run in arm.runs]
        assert mean == pytest.approx(np.mean(seeds), rel=1e-12)


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lambda d: (d / "summary.json").unlink(), FileNotFoundError, "not the output of a finished"),
        (lambda d: (d / "summary.json").write_text("{"), ValueError, "is not JSON"),
        (lambda d: (d / "summary.json").write_text("[]"), ValueError, "an object was expected"),
        (edit_summary(lambda s: s.pop("speedup")), ValueError, "no `speedup`"),
        (edit_summary(lambda s: s["arms"].pop("ngpt")), ValueError, "arms.ngpt.runs"),
        (lambda d: (d / "gpt-0/metrics.jsonl").unlink(), FileNotFoundError, "metrics.jsonl is missing"),
        (lambda d: (d / "gpt-0/metrics.jsonl").write_text(""), ValueError, "holds no validation"),
        (lambda d: (d / "gpt-0/metrics.jsonl").write_text("nonsense\n{}\n"), ValueError, "line 1 is not JSON"),
        (
            lambda d: (d / "gpt-0/metrics.jsonl").write_text('{"kind": "val", "step": 1, "loss": 1}\n'),
            ValueError,
            "`tokens`",
        ),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: Callable[[Path], Any], error: type[Exception], words: str) -> None:
    write_comparison(tmp_path, seeds=1, quick=True, checkpoint=False)
    damage(tmp_path)
    with pytest.raises(error, match=re.escape(words)):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_page_says_what_was_measured_and_nothing_that_the_evidence_denies(tmp_path: Path) -> None:
    write_comparison(tmp_path, checkpoint=False)
    comparison = read_comparison(tmp_path)
    text = " ".join(caveats(comparison))
    config = comparison.summary["config"]
    assert f"a context of {config['seq_len']:,} tokens" in text
    budget = comparison.arms["gpt"].runs[0].tokens[-1]
    assert f"a budget of {si(budget)} tokens" in text
    assert "grows with the length of the context and of the run" in text
    assert "gain less" not in text
    bare = replace(comparison, summary={"speedup": {}})
    assert "this context length and a budget of" in " ".join(caveats(bare))

"""`spherelm inspect`: a directory of figures, tables and pages from real runs,
and one line for what cannot be inspected.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import tiny_pairs
import torch
from commands import make_command
from safetensors.torch import load_file, save_file
from synthetic_runs import write_comparison

from spherelm import sphere
from spherelm.analysis import weights
from spherelm.analysis.recording import record
from spherelm.data.output import write_json
from spherelm.data.tokenizer import load_tokenizer
from spherelm.report import inspection, sphere_map
from spherelm.report.comparison_page import write_report
from spherelm.report.drawing import Figure
from spherelm.report.inspection import Request, expand, inspect
from spherelm.report.walk import MAX_TOKENS, SENTENCE, fitting_sentence, trace_walks
from spherelm.runs.checkpoint import WEIGHTS
from spherelm.runs.config import to_dict
from spherelm.runs.loading import load_model
from spherelm.train.evaluation import load_decoder
from spherelm.train.trainer import Trainer

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install '.[report]' in a clone of spherelm")

SMALL = Request(sentence="The sea.", tokens=64, images=False)
OF_WEIGHTS = [
    "alpha",
    "scales",
    "sz",
    "norms",
    "cond-attention",
    "cond-mlp",
    "eigen",
    "products",
    "cosines",
    "query-key",
    "ranks",
]
FIGURES = [
    *OF_WEIGHTS,
    "angles",
    "paths",
    "to-prediction",
    "to-state",
    "state-length",
    "state-rank",
    "anisotropy",
    "entropy",
    "four-bits",
    "sharpness",
    "lens-loss",
    "lens-agreement",
    "lens-divergence",
    "off-sphere",
]


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each arm with three checkpoints, read only, and an nGPT of another size."""
    place = tmp_path_factory.mktemp("runs")
    sizes: dict[str, dict[str, Any]] = {"gpt-0": {}, "ngpt-0": {}, "ngpt-wide": {"d_model": 32}}
    for name, fields in sizes.items():
        config = tiny.run_config(name.split("-")[0], data, save_every=2, keep=3, **fields)
        Trainer(config, place / name, False).run()
    return {name: place / name for name in sizes}


@dataclass(frozen=True)
class Inspected:
    """The result of inspecting both arms: the directory, its figures, and which of them were asked for as images."""

    out: Path
    figures: list[Figure]
    images: list[str]


@pytest.fixture(scope="module")
def inspected(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Inspected:
    """Both arms, of nGPT two seeds (two checkpoints of one run): drawn once, for all tests.
    Of the images the first is real.
    """
    out = tmp_path_factory.mktemp("inspected") / "out"
    images: list[str] = []
    real = Figure.png

    def loose(figure: Figure) -> Any:
        """Without the search for a layout, which takes half of the time."""
        from matplotlib.figure import Figure as Canvas

        canvas = Canvas(figsize=figure.size)
        figure.draw(canvas)
        return canvas

    def png(figure: Figure) -> bytes:
        images.append(figure.key)
        return real(figure) if len(images) == 1 else b"not drawn"

    checkpoint = out.parent / "best"  # one of its names
    checkpoint.symlink_to(runs["ngpt-0"] / "checkpoints" / "step-00000004")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "png", png)
        patch.setattr(Figure, "drawn", loose)
        patch.setattr(sphere_map, "ITERATIONS", 20)
        request = Request(sentence="The sea.", tokens=64)
        figures = inspect([runs["gpt-0"], runs["ngpt-0"], checkpoint], out, request)
    return Inspected(out, figures, images)


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are drawn, but not made into files."""

    def svg(figure: Figure) -> str:
        figure.drawn()
        return "<svg></svg>"

    monkeypatch.setattr(Figure, "svg", property(svg))
    monkeypatch.setattr(sphere_map, "ITERATIONS", 20)


@pytest.mark.row("Inside the models")
def test_every_figure_is_there_as_svg_and_as_png(inspected: Inspected) -> None:
    figures = inspected.out / "figures"
    assert (
        {path.stem for path in figures.glob("*.svg")} == {path.stem for path in figures.glob("*.png")} == set(FIGURES)
    )
    for name in FIGURES:
        ET.parse(figures / f"{name}.svg")
    assert inspected.images == FIGURES
    assert (figures / f"{FIGURES[0]}.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_shows_all_figures_and_links_what_is_there(inspected: Inspected) -> None:
    page = (inspected.out / "index.html").read_text("utf-8")
    assert page.count("<figure>") == len(FIGURES)
    assert all(f"Figure {i}." in page for i in range(1, len(FIGURES) + 1))
    links = re.findall(r'href="([^"#]+)"', page)
    assert "walk.html" in links
    assert all((inspected.out / link).is_file() for link in links if not link.startswith("data:"))
    assert not re.search(r"https?://", page.replace('xmlns="http://www.w3.org/2000/svg"', ""))
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_tables_hold_what_was_measured(inspected: Inspected, runs: dict[str, Path]) -> None:
    def table(name: str) -> list[dict[str, str]]:
        with (inspected.out / "tables" / f"{name}.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    angles = table("angles")
    assert {row["run"] for row in angles} == {"gpt-0", "ngpt-0", "ngpt-0 step-00000004"}
    assert len(angles) == 3 * 4 * 64
    lengths = [row for row in table("stops") if (row["name"], row["arm"]) == ("length", "ngpt")]
    assert [float(row["value"]) for row in lengths] == pytest.approx([1] * 10, abs=1e-5)
    off = table("off_sphere")
    assert {row["update"] for row in off} == {"2", "4", "6"}, "every checkpoint that was kept"
    departures = [(float(row["largest_departure"]), row["arm"]) for row in off if row["name"] == "input"]
    assert all((departure < 1e-5) == (arm == "ngpt") for departure, arm in departures)
    found = {(row["layer"], row["head"]): [] for row in table("singular_values")}  # type: dict[Any, list[float]]
    for row in table("singular_values"):
        if (row["run"], row["name"]) == ("ngpt-0", "K"):
            found[row["layer"], row["head"]].append(float(row["value"]))
    assert found.keys() == {(layer, head) for layer in "12" for head in "01"}, "layers as the page numbers them"
    key = load_model(runs["ngpt-0"]).blocks[1].attention.part.k.weight[8:]
    assert found["2", "1"] == pytest.approx(torch.linalg.svdvals(key).tolist(), rel=1e-4)


def test_the_record_says_what_was_looked_at(inspected: Inspected) -> None:
    record = json.loads((inspected.out / "inspect.json").read_text())
    runs = [(run["name"], run["update"]) for run in record["runs"]]
    assert runs == [("gpt-0", 6), ("ngpt-0", 6), ("ngpt-0 step-00000004", 4)]
    assert (record["tokens"], record["pair_rows"], record["sentence"]) == (64, tiny.VOCAB, "The sea.")
    assert record["text"] == "shipped validation text"


@pytest.mark.usefixtures("unseen")
def test_one_arm_alone_names_no_other(runs: dict[str, Path], tmp_path: Path) -> None:
    figures = inspect([runs["ngpt-0"]], tmp_path / "out", SMALL)
    assert [figure.key for figure in figures] == FIGURES
    assert not re.search(r"\bGPT", " ".join(figure.caption for figure in figures))
    with pytest.raises(FileExistsError, match="already holds something: choose another --out, or give --overwrite"):
        inspect([runs["ngpt-0"]], tmp_path / "out", SMALL)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = (tmp_path / "out" / "index.html").read_text("utf-8")
    inspect([runs["ngpt-0"]], tmp_path / "out", replace(SMALL, tokens=32), overwrite=True)
    assert "32 tokens of text" in (tmp_path / "out" / "index.html").read_text("utf-8") != before
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("unseen")
def test_a_gpt_alone_has_no_scales_to_show(runs: dict[str, Path], tmp_path: Path) -> None:
    figures = inspect([runs["gpt-0"]], tmp_path / "out", SMALL)
    assert {figure.key for figure in figures} == set(FIGURES) - {"alpha", "scales", "sz"}
    assert not list((tmp_path / "out").glob("figures/*.png")), "no images were asked for"


def test_text_of_ones_own_is_read_in_whole_sequences(runs: dict[str, Path], tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("abcd" * 9, encoding="utf-8")
    model, tokenizer = load_model(runs["ngpt-0"]), load_tokenizer("bytes")
    found = inspection.windows(tokenizer, inspection._text(Request(text=text)), model, 2048)
    assert tokenizer.decode(found.flatten().tolist()) == "abcd" * 8
    assert found.shape == (2, 16)
    assert inspection.windows(tokenizer, "abcdef", model, 5).tolist() == [list(b"abcde")], (
        "fewer than a sequence are one"
    )
    with pytest.raises(ValueError, match="the text has 1 token: give at least two"):
        inspection.windows(tokenizer, "a", model, 2048)
    text.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"mine\.txt is not UTF-8 text"):
        inspection._text(Request(text=text))


def test_a_comparison_stands_for_its_runs(tmp_path: Path) -> None:
    write_comparison(tmp_path, checkpoint=False)
    names = [path.name for path in expand(tmp_path)]
    assert names == ["gpt-0", "gpt-1", "gpt-2", "ngpt-0", "ngpt-1", "ngpt-2"]
    (tmp_path / "summary.json").write_text("{}")
    with pytest.raises(ValueError, match=r"summary\.json is damaged .*: pass the run directories"):
        expand(tmp_path)


@pytest.mark.usefixtures("unseen")
def test_a_comparisons_page_links_the_walk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_comparison(tmp_path)
    for run in ("gpt-0", "ngpt-0"):
        load_tokenizer("bytes").save(tmp_path / run)
    monkeypatch.setattr("spherelm.report.comparison_page.trace_walks", partial(trace_walks, sentence="x" * 41))
    page = write_report(tmp_path).read_text("utf-8")
    assert "walk.html" not in page
    assert "spherelm inspect . --out inside" in page
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("spherelm: The walk on the sphere cannot be shown: the sentence has 41 tokens")
    assert said.removeprefix("spherelm: ") in page
    monkeypatch.setattr("spherelm.report.comparison_page.trace_walks", partial(trace_walks, sentence="A B C"))
    page = write_report(tmp_path).read_text("utf-8")
    assert '<a href="walk.html">' in page
    assert "cannot be shown" not in page
    walk = (tmp_path / "walk.html").read_text("utf-8")
    assert '"tokens": ["A", "' in walk
    assert 'href="report.html"' in walk
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: RUN"),
        (["nowhere"], "there is no directory nowhere: give the path of a run"),
        (["."], "holds no run: give a directory that spherelm train wrote"),
        (["RUN", "--tokens", "1"], "tokens must be at least 2, got 1"),
        (["RUN", "--layer", "3"], "layer must be 1 to 2 for .*, got 3"),
        (["RUN", "--sentence", "x" * 41], "the sentence has 41 tokens: give one of 1 to 16"),
        (["RUN", "--text", "missing.txt"], r"no file missing\.txt: give a text file"),
        (["RUN", "WIDE"], "are runs of ngpt of different sizes, not seeds of one model"),
    ],
)
def test_what_cannot_be_inspected_is_one_line(
    words: list[str],
    said: str,
    runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    named = {"RUN": str(runs["ngpt-0"]), "WIDE": str(runs["ngpt-wide"])}
    command = make_command(monkeypatch, capsys)
    answer = command("inspect", *(named.get(word, word) for word in words), "--out", "out")
    assert answer.code == 2
    assert len(answer.shown) == 1
    assert re.search(said, answer.shown[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("unseen")
def test_encoder_decoders_are_looked_into_as_they_read_their_own_source(tmp_path: Path) -> None:
    data = tiny_pairs.make_pairs(tmp_path)
    runs = [tmp_path / arm for arm in tiny.ARMS]
    for run in runs:
        Trainer(tiny_pairs.run_config(run.name, data, steps=1), run, False).run(show_progress=False)
    figures = inspect(runs, tmp_path / "out", Request(sentence="bada ki", tokens=32, images=False))
    assert len(figures) > 10
    assert (tmp_path / "out" / "walk.html").is_file()
    model, tokens = load_model(runs[1]), torch.randint(256, (2, 9))
    seen = record(model, tokens)
    h = model.trunk(model.embedded(tokens), memory=model.encoded(tokens))
    torch.testing.assert_close(seen.stops[-1], h.detach().flatten(0, 1))
    kinds = {"attention": "attention", "cross-attention": "cross_attention", "MLP": "mlp"}
    assert seen.steps == [(layer, kind) for layer in range(1, len(model.blocks) + 1) for kind in kinds]
    for (layer, kind), before, proposal, after in zip(
        seen.steps, seen.stops, seen.proposals, seen.stops[1:], strict=False
    ):
        alpha = getattr(model.blocks[layer - 1], kinds[kind]).alpha().abs().detach()
        torch.testing.assert_close(after, sphere.step(before, sphere.norm(proposal), alpha), msg=kind)
    encoders, cross = model.encoder.blocks, [block.cross_attention.part for block in model.blocks]
    measured = weights.condition_numbers(model)
    for name, owners in (("W_u of the encoder", [b.mlp.part.u for b in encoders]), ("C_o", [c.o for c in cross])):
        heads = 1 if name.startswith("W_u") else model.config.n_heads
        for layer, owner in enumerate(owners):
            parts = np.split(owner.weight.detach().double().numpy(), heads, axis=1)
            wanted = np.median([np.linalg.cond(part) for part in parts])
            assert measured[name][layer] == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match="ngpt is an encoder-decoder"):
        load_decoder(runs[1])


def test_nothing_is_drawn_of_a_model_with_nan(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["ngpt-0"], run)
    checkpoint = run / "checkpoints" / "step-00000006"
    stored = load_file(checkpoint / WEIGHTS)
    stored["blocks.1.mlp.part.o.weight"][0, 0] = torch.nan
    save_file(stored, checkpoint / WEIGHTS)
    state = json.loads((checkpoint / "state.json").read_text())
    state["sha256"].pop(WEIGHTS)
    (checkpoint / "state.json").write_text(json.dumps(state))
    assert load_model(run) is not None
    with pytest.raises(ValueError, match=r"run cannot be inspected: blocks\.1\.mlp\.part\.o\.weight holds NaN or Inf"):
        inspect([run], tmp_path / "out", SMALL)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("max_seq_len", [1, 2, 3, 16, 39, 40, 64])
def test_the_default_sentence_is_cut_to_the_most_words_that_every_run_holds(max_seq_len: int, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("short", "long")]
    for run, length in zip(runs, (max_seq_len, 64), strict=True):
        run.mkdir()
        write_json(run / "config.json", to_dict(tiny.run_config("ngpt", tmp_path, seq_len=length)))
        load_tokenizer("bytes").save(run)
    found = fitting_sentence(runs)
    limit = min(max_seq_len, MAX_TOKENS)  # a byte is a token here
    assert SENTENCE.startswith(found)
    assert 1 <= len(found) <= limit
    words = [match.end() for match in re.finditer(r"\S+", SENTENCE) if match.end() <= limit]
    assert len(found) == (words[-1] if words else limit)


def test_a_sentence_that_fits_is_left_alone(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", to_dict(tiny.run_config("gpt", tmp_path, seq_len=64)))
    load_tokenizer("default").save(tmp_path)
    assert fitting_sentence([tmp_path]) == SENTENCE


@pytest.mark.usefixtures("unseen")
def test_a_run_on_bytes_with_a_short_context_is_inspected_with_no_more_than_its_name(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = make_command(monkeypatch, capsys)
    answer = command("inspect", str(runs["ngpt-0"]), "--out", str(tmp_path / "out"), "--no-images", "--tokens", "64")
    assert answer.code == 0
    assert answer.shown == [
        "spherelm: the walk shows 'The old man' only: the whole default sentence has too many tokens; "
        "choose another with inspect --sentence"
    ]
    assert json.loads((tmp_path / "out" / "inspect.json").read_text())["sentence"] == "The old man"
    assert "“The old man”" in (tmp_path / "out" / "index.html").read_text("utf-8")


@pytest.mark.usefixtures("unseen")
@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_what_failed_while_writing_leaves_nothing(
    error: BaseException, runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(inspection, "_sections", lambda inspected: [])
    monkeypatch.setattr(inspection, "walk_page", fail)
    with pytest.raises(type(error)):
        inspect([runs["ngpt-0"]], tmp_path / "out", SMALL)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_next_token_is_refused(runs: dict[str, Path]) -> None:
    model = load_model(runs["ngpt-0"])
    object.__setattr__(model.config, "max_seq_len", 1)
    with pytest.raises(ValueError, match="reads one token at a time: there is no next token to show"):
        inspection.windows(load_tokenizer("bytes"), "abc", model, 2048)


def test_what_lies_in_the_directory_stays(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="already holds something: choose another --out"):
        inspect([runs["ngpt-0"]], tmp_path, SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_tokenizer_of_another_model_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(runs["ngpt-0"], run)
    for path in run.glob("tokenizer*"):
        path.unlink()
    load_tokenizer("default").save(run)
    with pytest.raises(ValueError, match="its model knows 0 to 256: they do not belong together"):
        inspect([run], tmp_path / "out", SMALL)


def test_without_matplotlib_one_line_says_what_to_install(
    runs: dict[str, Path], tmp_path: Path, without: Callable[[str], None]
) -> None:
    without("matplotlib")
    with pytest.raises(ValueError, match=r"pip install '\.\[report\]' in a clone of spherelm"):
        inspect([runs["ngpt-0"]], tmp_path / "out", SMALL)

"""Figures: small, deterministic SVG that one page can hold many of."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from spherelm.report import plots
from spherelm.report.svg import VARIABLES, standalone

pytest.importorskip("matplotlib", reason="figures need matplotlib: pip install '.[report]' in a clone of spherelm")

SVG = "{http://www.w3.org/2000/svg}"
LAYERS = [np.linspace(0.1, 0.4, 6), np.linspace(0.2, 0.3, 6)]


def losses(**fields: Any) -> plots.LossPlot:
    x = np.linspace(0, 2e6, 500)
    curves = {arm: [plots.Curve(x, 3 + i * 0.01 + np.exp(-x / 4e5)) for i in range(3)] for arm in ("gpt", "ngpt")}
    return plots.LossPlot(curves, {arm: seeds[1] for arm, seeds in curves.items()}, **fields)


def everything(key: str = "k") -> dict[str, str]:
    text = (key, "A <title>", "What & how")
    numbers = {arm: dict.fromkeys(("Q", "K", "V", "W_o"), LAYERS) for arm in ("gpt", "ngpt")}
    norms = {arm: dict.fromkeys(("input", "output"), LAYERS) for arm in ("gpt", "ngpt")}
    full = losses(level=3.1, ends=[(5e5, 3.2), (1e6, 3.0)], crossing=(7e5, 3.1), crossing_label="700k")
    return {
        "losses": plots.loss_curves(full, *text).svg,
        "alpha": plots.eigen_learning_rates({"alpha_A": LAYERS, "alpha_M": LAYERS}, *text).svg,
        "scales": plots.layer_scales({"s_qk": LAYERS, "s_u": LAYERS, "s_v": LAYERS}, *text).svg,
        "s_z": plots.logit_scales([np.random.default_rng(0).normal(10, 1, 4096)], *text).svg,
        "norms": plots.embedding_norms(norms, *text).svg,
        "conditions": plots.condition_numbers(numbers, ["Q", "K", "V", "W_o"], *text).svg,
    }


@pytest.fixture(scope="module")
def figures() -> dict[str, str]:
    return everything()


def test_each_is_small_well_formed_and_named(figures: dict[str, str]) -> None:
    for name, svg in figures.items():
        root = ET.fromstring(svg)
        assert len(svg) < 32_000, name
        assert root.find(f"{SVG}title").text == "A <title>"
        assert root.find(f"{SVG}desc").text == "What & how"
        assert root.get("aria-labelledby") == "k-title k-desc"
        assert all(element.get("id", "k-").startswith("k-") for element in root.iter())


def test_text_is_text_and_nothing_is_fetched(figures: dict[str, str]) -> None:
    assert "validation loss (nats per token)" in figures["losses"]
    assert ">700k<" in figures["losses"]
    for svg in figures.values():
        assert svg.count("http") == 1
        assert "<style" not in svg
        assert "font-family" not in svg


def test_every_colour_is_a_variable(figures: dict[str, str]) -> None:
    known = {name for name, _, _ in VARIABLES.values()}
    for svg in figures.values():
        assert not re.search(r"(fill|stroke): (#|black|white|rgb)", svg)
        assert set(re.findall(r"var\((--[a-z-]+)\)", svg)) <= known


def test_same_numbers_give_the_same_bytes_and_other_keys_other_ids(figures: dict[str, str]) -> None:
    def draw(key: str) -> str:
        return plots.eigen_learning_rates({"alpha_A": LAYERS, "alpha_M": LAYERS}, key, "A <title>", "What & how").svg

    assert draw("k") == figures["alpha"]
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (figures["alpha"], draw("other"))]
    assert len(ids[0]) == len(ids[1]) > 0
    assert not ids[0] & ids[1]


def test_standalone_brings_its_colours(figures: dict[str, str]) -> None:
    svg = standalone(figures["losses"])
    ET.fromstring(svg)
    assert all(f"{name}:{light};" in svg and f"{name}:{dark};" in svg for name, light, dark in VARIABLES.values())


def test_an_infinite_condition_number_leaves_a_gap() -> None:
    numbers = {"gpt": {"Q": [np.array([5.0, np.inf, 7.0])]}, "ngpt": {"Q": [np.array([2.0, 3.0, 4.0])]}}
    svg = plots.condition_numbers(numbers, ["Q"], "k", "t", "d").svg
    assert "inf" not in svg.lower()
    assert "nan" not in svg.lower()


def test_a_diverged_curve_is_drawn_as_far_as_it_goes() -> None:
    curve = plots.Curve([0, 1, 2, 3], [4.0, 3.0, float("nan"), float("nan")])
    good = plots.Curve([0, 1, 2, 3], [4.0, 3.0, 2.5, 2.4])
    svg = plots.loss_curves(
        plots.LossPlot({"gpt": [curve], "ngpt": [good]}, {"gpt": curve, "ngpt": good}), "k", "t", "d"
    ).svg
    assert "nan" not in svg.lower()


def test_without_matplotlib_one_line_says_what_to_install(without: Callable[[str], None]) -> None:
    without("matplotlib")
    with pytest.raises(ValueError, match=r"pip install '\.\[report\]' in a clone of spherelm"):
        _ = plots.eigen_learning_rates({"alpha_A": LAYERS}, "k", "t", "d").svg


def test_an_image_is_the_drawing_in_the_light_colours_and_leaves_matplotlib_as_it_was() -> None:
    from matplotlib.colors import get_named_colors_mapping
    from matplotlib.image import imread

    before = dict(get_named_colors_mapping())
    drawing = plots.eigen_learning_rates({"alpha_A": LAYERS, "alpha_M": LAYERS}, "k", "t", "d")
    pixels = (255 * imread(io.BytesIO(drawing.png()))[..., :3]).round().astype(int).reshape(-1, 3)
    seen = {"#" + bytes(pixel.tolist()).hex() for pixel in pixels}
    light = {name: value for name, value, _ in VARIABLES.values()}
    assert {light["--c-ngpt"], light["--c-second"], light["--bg"], light["--fg"]} <= seen
    assert not seen & set(VARIABLES), "stand-ins that were not replaced"
    assert dict(get_named_colors_mapping()) == before
    assert drawing.svg == plots.eigen_learning_rates({"alpha_A": LAYERS, "alpha_M": LAYERS}, "k", "t", "d").svg


def test_dotted_lines_are_drawn_beside_the_others() -> None:
    numbers = {arm: {"Q": LAYERS} for arm in ("gpt", "ngpt")}
    plain, both = (plots.condition_numbers(numbers, ["Q"], "k", "t", "d", dotted).svg for dotted in (None, numbers))
    dashes = [len(re.findall("stroke-dasharray", svg)) for svg in (plain, both)]
    assert dashes[1] == dashes[0] + 2

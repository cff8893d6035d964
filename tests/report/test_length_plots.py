"""The figure of loss over length: every line and the trained length are in it, and the same numbers give the same bytes."""

from __future__ import annotations

import numpy as np

from spherelm.report.length_plots import LengthLine, change_over_length

LENGTHS = np.array([256.0, 512.0, 1024.0])


def lines() -> list[LengthLine]:
    seeds = [np.array([0.0, 0.01 * i, 0.03 * i]) for i in (1, 2, 3)]
    labels = ("as trained", "yarn:4")
    return [LengthLine(arm, LENGTHS, seeds, label, i) for arm in ("gpt", "ngpt") for i, label in enumerate(labels)]


def test_the_figure_names_every_line_and_length() -> None:
    drawing = change_over_length(lines(), 256, "length", "Loss over length", "What it shows")
    svg = drawing.svg
    for text in ("GPT, as trained", "nGPT, as trained", "nGPT, yarn:4", "256", "512", "1,024", "tokens of a window"):
        assert f">{text}<" in svg
    assert svg == change_over_length(lines(), 256, "length", "Loss over length", "What it shows").svg
    other = change_over_length(lines()[:3], 512, "length", "Loss over length", "What it shows").svg
    assert other != svg

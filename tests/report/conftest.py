"""Figures that are drawn without being laid out and made into files, which takes most of the time of a page."""

from __future__ import annotations

import pytest

from spherelm.report.drawing import Figure


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure of a page is drawn, but its files are empty."""

    def svg(figure: Figure) -> str:
        from matplotlib.figure import Figure as Canvas

        figure.draw(Canvas(figsize=figure.size))
        return "<svg></svg>"

    monkeypatch.setattr(Figure, "svg", property(svg))
    monkeypatch.setattr(Figure, "png", lambda figure: b"")

"""The HTML around figures that are not a comparison's: what `spherelm inspect` and `spherelm report` write."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

from spherelm.report import svg
from spherelm.report.figures import Figure
from spherelm.report.page import figure_list


def plain_page(kicker: str, title: str, subtitle: str, body: str) -> str:
    """A self-contained page in the look of a comparison's report; title and subtitle are plain text, the body is HTML."""
    resources = files("spherelm.report")
    return Template(resources.joinpath("inspect.html").read_text("utf-8")).substitute(
        kicker=escape(kicker),
        title=escape(title),
        subtitle=escape(subtitle),
        palette=svg.palette(":root", ':root[data-theme="dark"]', ':root:not([data-theme="light"])'),
        css=resources.joinpath("report.css").read_text("utf-8").strip(),
        body=body,
    )


def figure_sections(sections: Sequence[tuple[str, str, Sequence[Figure]]]) -> str:
    """Sections of (heading, introduction, figures), the figures numbered through; sections without figures are left out."""
    parts, first = [], 1
    for heading, introduction, figures in sections:
        if figures:
            intro = f"<p>{escape(introduction)}</p>" if introduction else ""
            parts.append(
                f'<section class="wide"><h2>{escape(heading)}</h2>{intro}{figure_list(figures, first)}</section>'
            )
        first += len(figures)
    return "\n".join(parts)


def write_figures(figures: Sequence[Figure], out: Path, images: bool = True) -> list[Figure]:
    """Write each figure to the new directory `out/figures` as SVG, and as PNG if `images`; returns them."""
    (out / "figures").mkdir()
    for figure in figures:
        target = out / "figures" / f"{figure.drawing.key}.svg"
        target.write_text(svg.standalone(figure.svg), encoding="utf-8")
        if images:
            target.with_suffix(".png").write_bytes(figure.drawing.png())
    return list(figures)


def plain_table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of plain text."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in header)
    body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"

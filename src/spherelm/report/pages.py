"""The HTML of every page: templates, filled by jinja2, which escapes all that is not marked as HTML.

A page is one file: no network, no library, and nothing on it needs a script but the walk.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from spherelm.data.output import check_free, whole_directory
from spherelm.report import svg
from spherelm.report.drawing import Figure

Sections = Sequence[tuple[str, Sequence[Figure]]]
"""Headings and the figures below them."""


@cache
def _templates() -> Environment:
    loader = PackageLoader("spherelm.report", "templates")
    found = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    found.globals["source"] = lambda name: Markup(loader.get_source(found, name)[0].strip())
    found.globals["palette"] = Markup(
        svg.palette(":root", ':root[data-theme="dark"]', ':root:not([data-theme="light"])')
    )
    return found


def render(template: str, **values: Any) -> str:
    """A whole page: a file of `templates/` with what stands in its braces. Text is escaped, `Markup` is not."""
    return _templates().get_template(template).render(**values)


def write_figures(sections: Sections, out: Path, images: bool = True) -> list[Figure]:
    """Write each figure to the new directory `out/figures` as SVG, and as PNG if `images`; returns them."""
    (out / "figures").mkdir()
    figures = [figure for _, group in sections for figure in group]
    for figure in figures:
        target = out / "figures" / f"{figure.key}.svg"
        target.write_text(svg.standalone(figure.svg), encoding="utf-8")
        if images:
            target.with_suffix(".png").write_bytes(figure.png())
    return figures


@contextmanager
def new_directory(out: Path, record: str, overwrite: bool) -> Iterator[Path]:
    """A directory to fill, which becomes `out` whole at the end of the block, or not at all.

    overwrite: write over an earlier one, which is known by its file `record`; what else lies there stays. Raises
    `OutputExistsError` where `out` holds something else, or anything without `overwrite`.
    """
    out = out.resolve()
    earlier = (out / record).is_file()
    if not (earlier and overwrite):
        check_free(out, "--out, or give --overwrite" if earlier else "--out")
        with whole_directory(out) as part:
            yield part
        return
    beside = out.with_name(f".{out.name}.new")
    shutil.rmtree(beside, ignore_errors=True)
    with whole_directory(beside) as part:
        yield part
    for path in beside.iterdir():
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(path, target)
    beside.rmdir()

"""The pages that state results: what they say is made from docs/results, and what other places say agrees with it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from test_docs import ROOT, name_of

from spherelm.report.wording import REACH


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    """research/pages.py, whose neighbours are imported by their names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "research"))
        before = set(sys.modules)
        import pages

        yield pages
        for name in set(sys.modules) - before:
            if (
                getattr(sys.modules[name], "__file__", None)
                and "research" in Path(sys.modules[name].__file__ or "").parts
            ):
                del sys.modules[name]


def test_no_page_is_stale(pages: ModuleType) -> None:
    """Otherwise: python research/pages.py."""
    stale = [
        page
        for page in pages.pages()
        if pages.renewed(page.read_text(encoding="utf-8")) != page.read_text(encoding="utf-8")
    ]
    assert [name_of(page) for page in stale] == []


def test_every_part_stands_in_a_page_and_every_mark_has_a_part(pages: ModuleType) -> None:
    texts = [page.read_text(encoding="utf-8") for page in pages.pages()]
    marks = [name for text in texts for name in re.findall(r"<!-- results:([\w-]+) -->", text)]
    assert set(marks) == set(pages.PARTS)
    assert sum(len(pages.PART.findall(text)) for text in texts) == len(marks)


def test_a_stale_number_is_found(pages: ModuleType) -> None:
    text = "before\n<!-- results:saving -->\n\n12 ms\n\n<!-- end:saving -->\nafter\n"
    renewed = pages.renewed(text)
    assert "12 ms" not in renewed
    assert renewed.startswith("before\n<!-- results:saving -->")
    assert renewed.endswith("<!-- end:saving -->\nafter\n")
    assert pages.renewed(renewed) == renewed


def test_reports_and_results_say_the_same_of_longer_runs(pages: ModuleType) -> None:
    """Every report says that small runs gain more the longer they are: the ladder must say so too."""
    assert pages.tables.lead_grows() == ("runs of small models show the same" in REACH)

"""The scripts that made what docs/results holds: their commands in the documents can still be given."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from spherelm.recipes import make_run

ROOT = Path(__file__).resolve().parents[1]
SEARCHES = [
    line.strip()
    for page in sorted((ROOT / "docs").glob("*.md"))
    for line in page.read_text(encoding="utf-8").splitlines()
    if line.strip().startswith("python scripts/search_rates.py ") and "..." not in line
]


def script(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_searches_in_the_documents() -> None:
    assert len(SEARCHES) >= 4


@pytest.mark.parametrize("command", SEARCHES)
def test_a_search_of_the_documents_is_one_that_can_be_run(command: str) -> None:
    search_rates = script("search_rates")
    asked = search_rates.parser().parse_args(shlex.split(command)[2:])
    starts = {name: start for name, start, _ in search_rates.fields_of(asked.start)}
    run = make_run(asked.arm, asked.preset, vocab_size=9, **search_rates.fixed_fields(asked.fixed), **starts)
    assert run.arm == asked.arm


@pytest.mark.parametrize(
    ("fixed", "message"),
    [
        ("arm=gpt", "'arm=gpt': arm is chosen by --arm"),
        ("steps=1,2", "steps has 2 values, [1, 2]: a run has one"),
    ],
)
def test_what_cannot_be_searched_is_refused_in_one_line(
    fixed: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--arm", "gpt", "--data", "none", "--out", str(tmp_path), "--start", "lr=1e-3", "--fixed", fixed]
    monkeypatch.setattr("sys.argv", ["search_rates.py", *words])
    with pytest.raises(SystemExit) as end:
        script("search_rates").main()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"search_rates: {message}\n"


def test_what_the_page_says_of_the_inside_is_what_was_measured() -> None:
    """And a reversal of the numbers would reverse what it says."""
    inside = script("inside_summary")
    found = json.loads((ROOT / "docs" / "results" / "inside.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "inside.md").read_text(encoding="utf-8")
    assert inside.renewed(page, found) == page, "give the command at the head of scripts/inside_summary.py"
    found["arms"] = dict(zip(found["arms"], reversed(found["arms"].values()), strict=True))
    (row,) = [line for line in inside.text(found).splitlines() if line.startswith("| 5: condition numbers")]
    verdicts = {"agrees": "**differs**", "**differs**": "agrees", "in part": "in part"}
    before = next(line for line in page.splitlines() if line.startswith("| 5: condition numbers"))
    assert row.split(" | ")[-1].strip(" |") == verdicts[before.split(" | ")[-1].strip(" |")]

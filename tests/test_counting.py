"""Numbers with their things."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import commands
import pytest

from spherelm.counting import counted


def test_one_thing_is_singular() -> None:
    for number in (0, 1, 2, 11, 1001, 10**7):
        count, thing = counted(number, "process", "processes").split(" ")
        assert int(count.replace(",", "")) == number
        assert thing == ("process" if number == 1 else "processes")
    assert counted(2, "document") == "2 documents"


def test_nothing_is_counted_as_1_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The output of `data prepare` for one of each kind."""
    (tmp_path / "a.jsonl").write_text('{"text": "b"}\n{"text": "b"}\n{"text": ""}\nnull\n')
    words = ("--tokenizer", "bytes", "--workers", 1, "--deduplicate", "--skip-bad", "--out", tmp_path / "out")
    answer = commands.make_command(monkeypatch, capsys)("data", "prepare", "--input", tmp_path / "a.jsonl", *words)
    assert answer.code == 0
    assert len(re.findall(r"\b1 [a-z]+", answer.out)) == 4
    assert not re.search(r"\b1 ([a-z]+ )?[a-z]+s\b", answer.out)

"""The example from letters to phonemes, on a made-up dictionary."""

from __future__ import annotations

import gzip
import json
import runpy
import sys
from itertools import product
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "grapheme_to_phoneme.py"


def test_it_runs_from_the_dictionary_to_error_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["".join(letters) for letters in product("bdk", "aiu", "lmn", "aiu", "st")]
    lines = [f"{word} {' '.join(word.upper())}1" for word in words]
    lines += [f"{words[0]}(2) B AA0  # of old", "3d TH R IY1", ";;; a note"]
    dictionary = tmp_path / "cmudict.dict.gz"
    dictionary.write_bytes(gzip.compress("\n".join(lines).encode()))
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["g2p", str(dictionary), str(out), "--steps", "2", "--test-words", "3"])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    scores = json.loads((out / "ngpt-0" / "scores.json").read_text())
    assert scores["words"] == 3
    assert 0 <= scores["word_error_rate"] <= 1
    trained = (out / "train.letters").read_text().splitlines()
    held_out = (out / "val.letters").read_text().splitlines()
    assert not set(trained) & set(held_out)
    assert "3 d" not in trained


def test_it_reads_the_dictionary(tmp_path: Path) -> None:
    path = tmp_path / "dict"
    path.write_text("read R EH1 D\nread(2) R IY1 D\nread(3) R EH2 D\na.m. EY1 EH1 M\no'er AO1 R # short\n")
    words = runpy.run_path(str(EXAMPLE))["read_dictionary"](path)
    assert words == {"read": ["R EH D", "R IY D"], "o'er": ["AO R"]}
